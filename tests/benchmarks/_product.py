"""The machine's own rate: a product of two square float32 matrices by NumPy's BLAS, served to `_sides`."""

from collections.abc import Callable

import numpy as np

from tests.benchmarks import _sides

SIZE = 2048


def start(case: dict) -> tuple[dict, Callable]:
    a, b = np.random.default_rng(0).standard_normal((2, SIZE, SIZE)).astype(np.float32)
    out = np.empty_like(a)
    return {"GFLOP": 2 * SIZE**3 / 1e9}, lambda: np.matmul(a, b, out=out)


if __name__ == "__main__":
    _sides.serve(start)
