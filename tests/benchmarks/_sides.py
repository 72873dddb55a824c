"""Two or more sides of a comparison, each in a process of its own, timed in turns.

A side that is not being timed waits on a pipe: PyTorch's OpenMP threads spin while they wait for work, so two frameworks in
one process, or two busy processes, slow each other down several times over. Turns make slow drifts of the machine cancel
in the ratio of a round.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy import stats

ALIKE = 8  # rows of a batch on which two sides must agree: of many, one rectifier's input is within rounding of zero
PEERS = os.environ.get("FACSIMILE_PEERS") or sys.executable  # the Python that has `requirements-bench.txt`


class Side:
    """A child process that answers one JSON line per request; see `serve`."""

    def __init__(self, module: str, case: dict, python: str = sys.executable):
        self._child = subprocess.Popen(
            [python, "-m", f"tests.benchmarks.{module}", json.dumps(case)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")},  # they may slow NumPy down
        )
        self.said = self._answer()

    def _answer(self) -> Any:
        line = self._child.stdout.readline()
        if not line:
            raise ValueError(f"{' '.join(self._child.args[:3])} ended with exit code {self._child.wait()}; see above")
        return json.loads(line)

    def times(self, seconds: float) -> list[float]:
        """Seconds of each repetition; as many as fit into `seconds`, three at least."""
        print(seconds, file=self._child.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self._child.stdin.close()
        self._child.wait()


def serve(start: Callable[[dict], tuple[dict, Callable[[], Any]]]) -> None:
    """The child's half: `start(case)` gives what to say of the case, and the function to time, which must block."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not tear the protocol
    said, once = start(json.loads(sys.argv[1]))
    once()
    once()
    print(json.dumps(said), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(repeat(once, float(line))), file=out, flush=True)


def repeat(once: Callable[[], Any], seconds: float, least: int = 3) -> list[float]:
    begin, times = time.perf_counter(), []
    once()  # wakes threads and fills caches again after the other side's turn
    while len(times) < least or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    return times


@contextlib.contextmanager
def together(sides: dict[str, Side]) -> Iterator[dict[str, Side]]:
    try:
        yield sides
    finally:
        for side in sides.values():
            side.close()


def in_turns(sides: dict[str, Side], rounds: int = 9, seconds: float = 1.5) -> dict[str, np.ndarray]:
    """Median seconds of a repetition, by side and round (rounds,). The order turns round with the rounds."""
    names = list(sides)
    found = {name: np.empty(rounds) for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name][i] = np.median(sides[name].times(seconds))
    return found


def compared(found: dict[str, np.ndarray], ours: str = "ours") -> dict:
    """Milliseconds of each side, and ours over every other: median of the rounds' ratios and its 95 % interval."""
    table = {f"{name} ms": round(1e3 * float(np.median(times)), 2) for name, times in found.items()}
    for name, times in found.items():
        if name != ours:
            table[f"ours / {name}"] = spread(found[ours] / times)
    return table


def spread(values: np.ndarray) -> list[float]:
    """[median, lower, upper]: the order statistics that hold the median with at least 95 %, or else the extremes."""
    ordered, n = np.sort(values), len(values)
    below = max(int(stats.binom.ppf(0.025, n, 0.5)), 1)
    return [round(float(v), 3) for v in (np.median(ordered), ordered[below - 1], ordered[n - below])]


def have_peers(*packages: str) -> set[str]:
    """Which of these packages the peers' Python has."""
    code = f"import importlib.util as u; print(*[p for p in {packages!r} if u.find_spec(p)])"
    return set(subprocess.run([PEERS, "-c", code], capture_output=True, text=True, check=True).stdout.split())
