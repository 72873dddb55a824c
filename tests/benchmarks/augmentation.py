"""Distorted views of a batch, as the default detector learns from them, against MONAI's transforms of the same kinds.

Ours distorts whole batches on the device; MONAI's transforms take an image at a time, on the CPU. Sides take turns
(`_sides`). Distributions are alike, not the same: MONAI draws rotation, shift and size together.
"""

from configs.default import get_config
from tests.benchmarks import inference

DISTORTED = {"task": "augment", "channels": 1, "distortions": get_config().detector.augment.to_dict()}
CASES = {
    "2D 64x64": ({**DISTORTED, "size": (64, 64), "batch": 64}, ("monai",)),
    "3D 32x40x32": ({**DISTORTED, "size": (32, 40, 32), "batch": 8}, ("monai",)),
}


def measure() -> dict:
    return inference.of_cases(CASES)
