"""Nearest neighbours against FAISS and against a matrix product by the machine's BLAS, and the memory that a search takes.

10,000 x 10,000 x 128, the nearest by dot product. `share of the product's rate`: multiplications a second of the whole
search over those of a square product of 2048, in the same turns. The search of 20,000 in 200,000 runs in a process of its
own whose largest memory is noted; `python -m tests.benchmarks.neighbours 200000` does 200,000 in 200,000, and
`... 1000000 1000000 bf16` a million in a million by products in bfloat16, for an accelerator.
"""

import json
import resource
import subprocess
import sys

if __name__ == "__main__" and "faiss" not in sys.argv[1]:
    from launch import early

    early.settle()

from collections.abc import Callable

import numpy as np

from tests.benchmarks import _sides

N, D = 10_000, 128


def measure() -> dict:
    sides = {"ours": _sides.Side("neighbours", {"side": "ours"}), "product": _sides.Side("_product", {})}
    with _sides.together(sides):
        if _sides.have_peers("faiss"):
            sides["faiss"] = _sides.Side("neighbours", {"side": "faiss"}, _sides.PEERS)
        times = _sides.in_turns(sides, seconds=1.0)
        product = sides["product"].said["GFLOP"] / times.pop("product")
    rate = 2 * N * N * D / 1e9 / times["ours"]
    large = subprocess.run([sys.executable, "-m", __name__, "20000"], capture_output=True, text=True, check=True)
    return {
        "10k x 10k": {**_sides.compared(times), "share of the product's rate": _sides.spread(rate / product)},
        "20k x 200k": json.loads(large.stdout),
    }


def rows(seed: int, n: int = N) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, D), np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def start(case: dict) -> tuple[dict, Callable]:
    query, key = rows(0), rows(1)
    if case["side"] == "faiss":
        import faiss

        index = faiss.IndexFlatIP(D)
        index.add(key)
        return {}, lambda: index.search(query, 1)
    from detection import neighbours

    return {}, lambda: neighbours.nearest(query, key)


def peak(queries: int, keys: int = 200_000, bf16: bool | None = None) -> dict:
    """Time and largest memory of a search among so many keys, and what of the memory was there before it."""
    import time

    from detection import neighbours

    query, key = rows(0, queries), rows(1, keys)
    neighbours.nearest(query[:64], key[:64], bf16=bf16)
    size = lambda: round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    before, begin = size(), time.perf_counter()
    neighbours.nearest(query, key, bf16=bf16)
    return {"seconds": round(time.perf_counter() - begin, 1), "peak_MiB": size(), "before_MiB": before}


if __name__ == "__main__":
    if "faiss" not in sys.argv[1]:
        early.loaded()
    if sys.argv[1].isdigit():
        print(json.dumps(peak(*map(int, filter(str.isdigit, sys.argv[1:])), bf16="bf16" in sys.argv or None)))
    else:
        _sides.serve(start)
