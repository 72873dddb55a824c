"""Distorted views of a batch, as the default detector learns from them, against MONAI's transforms of the same kinds.

Ours distorts whole batches on the device; MONAI's transforms take an image at a time, on the CPU. Sides take turns
(`_sides`). Distributions are alike, not the same: MONAI draws rotation, shift and size together.
"""

import numpy as np

from configs.default import get_config
from tests.benchmarks import _sides

CASES = {
    "2D 64x64": {"size": (64, 64), "channels": 1, "batch": 64},
    "3D 32x40x32": {"size": (32, 40, 32), "channels": 1, "batch": 8},
}


def measure() -> dict:
    found, distortions = {}, get_config().detector.augment.to_dict()
    for name, case in CASES.items():
        case = {**case, "task": "augment"}
        sides = {"ours": _sides.Side("_ours", case)}
        with _sides.together(sides):
            if _sides.have_peers("monai"):
                sides["monai"] = _sides.Side(
                    "_peers", {**case, "peer": "monai", "distortions": distortions}, _sides.PEERS
                )
            times = _sides.in_turns(sides, seconds=0.5)
        rate = case["batch"] / float(np.median(times["ours"]))
        found[name] = {"images_per_s": round(rate, 1), **_sides.compared(times)}
    return found
