"""From the command to the first finished training step of the default config: with nothing cached, with the data prepared,
and with the compilations cached as well. Seconds; every start is a new process, stopped once its first step is written."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks import _sides

RUNS = 3


def measure() -> dict:
    found = {"nothing cached s": [], "data prepared s": [], "compilations cached s": []}
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            for number, times in enumerate(found.values()):
                times.append(first_step(Path(folder), number))
    return {name: _sides.spread(times) for name, times in found.items()}


def first_step(folder: Path, number: int) -> float:
    """Start `number` of three in the same cache folders; the compilation cache is emptied before the second."""
    cache, workdir = folder / "cache", folder / f"run{number}"
    if number == 1:
        subprocess.run(["rm", "-rf", str(cache / "xla")], check=True)
    command = [sys.executable, "main.py", "--config=configs/default.py", "--mode=train", f"--workdir={workdir}"]
    stage = workdir / "autoencoder"
    begin = time.perf_counter()
    run = subprocess.Popen(
        [*command, "--config.train.autoencoder.log_every=1"],
        env={**os.environ, "FACSIMILE_CACHE": str(cache), "FACSIMILE_QUIET": "1"},
    )
    while not any(path.stat().st_size for path in stage.glob("metrics.jsonl")):
        if run.poll() is not None:
            raise ValueError(f"{' '.join(command)} ended with exit code {run.returncode} before its first step")
        time.sleep(0.01)
    seconds = time.perf_counter() - begin
    run.terminate()  # it saves and ends; its compilations are in the cache since they were made
    run.wait()
    return seconds
