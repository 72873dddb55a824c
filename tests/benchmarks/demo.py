"""The README's command, train to audit, in a process of its own with nothing cached: seconds and largest memory."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure() -> dict:
    """Raises ValueError where the command ends otherwise than with a verdict."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "main.py", "--config=configs/brain.py", "--mode=train,sample,audit"]
        begin = time.perf_counter()
        run = subprocess.Popen(
            [*command, f"--workdir={Path(folder) / 'run'}"],
            env={**os.environ, "FACSIMILE_CACHE": str(Path(folder) / "cache"), "FACSIMILE_QUIET": "1"},
        )
        _, status, used = os.wait4(run.pid, 0)  # of this process, where getrusage has the largest of all so far
        seconds = time.perf_counter() - begin
    code = run.returncode = os.waitstatus_to_exitcode(status)
    if code not in (0, 3, 4):
        raise ValueError(f"{' '.join(command)} ended with exit code {code}")
    return {"seconds": round(seconds, 1), "peak_GiB": round(used.ru_maxrss / 2**20, 2)}
