"""The README's command, train to audit, in a process of its own with nothing cached: seconds and largest memory."""

import os
import resource
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
        run = subprocess.run(
            [*command, f"--workdir={Path(folder) / 'run'}"],
            env={**os.environ, "FACSIMILE_CACHE": str(Path(folder) / "cache"), "FACSIMILE_QUIET": "1"},
        )
        seconds = time.perf_counter() - begin
    if run.returncode not in (0, 3, 4):
        raise ValueError(f"{' '.join(command)} ended with exit code {run.returncode}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # KiB, of the largest child so far
    return {"seconds": round(seconds, 1), "peak_GiB": round(peak / 2**20, 2), "exit code": run.returncode}
