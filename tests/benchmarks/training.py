"""One training step against the same network in PyTorch, and against MONAI's and diffusers' UNets of its size.

Ours is the training loop's own step: loss, gradient, clipping, Adam. Sides are processes that take turns (`_sides`). The
PyTorch network starts from our weights and must agree with our loss and gradient to 1e-4 before anything is timed.
`utilisation` is what the step's multiplications take of the rate of a matrix product measured in the same turns.
"""

import tempfile
from pathlib import Path

import numpy as np

from tests.benchmarks import _sides

UNET = {"width": 64, "mults": (1, 2, 2), "blocks": 2, "attention": (False, True, False)}
VOLUMES = {"width": 32, "mults": (1, 2, 2), "blocks": 1, "attention": (False, False, True)}
CODER = {"widths": (32, 64, 64), "strides": (2, 2), "patch": 2, "latent": 8, "blocks": 1, "attention": False}
DETECTOR = {"widths": (32, 64), "blocks": (1, 2), "fold": 4, "squeeze": 16, "dim": 64}
STACKS = ("torch", "monai", "diffusers")
CASES = {
    "UNet 2D, batch 16": ({"net": "unet", "size": (16, 16), "channels": 4, "settings": UNET, "batch": 16}, STACKS),
    "UNet 2D, batch 64": ({"net": "unet", "size": (16, 16), "channels": 4, "settings": UNET, "batch": 64}, STACKS),
    "UNet 3D, batch 4": (
        {"net": "unet", "size": (16, 16, 16), "channels": 4, "settings": VOLUMES, "batch": 4},
        ("torch", "monai"),
    ),
    "autoencoder, batch 16": (
        {"net": "autoencoder", "size": (64, 64), "channels": 1, "settings": CODER, "batch": 16},
        ("torch",),
    ),
    "detector, batch 64": (
        {"net": "detector", "size": (64, 64), "channels": 1, "settings": DETECTOR, "batch": 64},
        ("torch",),
    ),
    "UNet 2D, batch 16, bfloat16": (
        {"net": "unet", "size": (16, 16), "channels": 4, "settings": UNET, "batch": 16, "dtype": "bfloat16"},
        ("torch",),
    ),
}
TOLERANCE = 1e-4


def measure() -> dict:
    """Every case of `CASES` that the peers at hand allow."""
    have = _sides.have_peers("torch", "monai", "diffusers")
    return {name: of_case(case, [p for p in peers if p in have]) for name, (case, peers) in CASES.items()}


def of_case(case: dict, peers: list[str], starts: int = 3, rounds: int = 3, seconds: float = 1.5) -> dict:
    """Sides are started anew `starts` times: a process that is slow by where its memory or threads came to lie stays so.

    Raises ValueError where the PyTorch network does not agree with ours.
    """
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        case = {**case, "task": "train", "file": str(Path(folder) / "case.npz")}
        for _ in range(starts):
            sides = {"ours": _sides.Side("_ours", case), "product": _sides.Side("_product", {})}
            with _sides.together(sides):
                for peer in peers:
                    sides[peer] = _sides.Side("_peers", {**case, "peer": peer}, _sides.PEERS)
                said = {name: side.said for name, side in sides.items()}
                for key, value in said.get("torch", {}).items():
                    if "differs" in key and value > TOLERANCE:
                        raise ValueError(f"{case['net']}: PyTorch's {key} {value:.2g}, more than {TOLERANCE:g}")
                parts.append(_sides.in_turns(sides, rounds, seconds))
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    rate = said["product"]["GFLOP"] / found.pop("product")
    result = {**said["ours"], **_sides.compared(found)}
    if "torch" in said:
        result |= {k: float(f"{v:.2g}") for k, v in said["torch"].items() if "differs" in k}
        result["GFLOP"] = said["torch"]["GFLOP"]
        result["product GFLOP/s"] = round(float(np.median(rate)), 1)
        result["utilisation"] = _sides.spread(said["torch"]["GFLOP"] / found["ours"] / rate)
    return result | {f"{name} parameters": said[name]["parameters"] for name in peers}
