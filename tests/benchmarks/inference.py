"""Sampling and embedding against PyTorch: 64 latents at 50 DDIM steps against diffusers' UNet and scheduler, and embeddings
of 64 images against the detector's network in PyTorch. Sides take turns (`_sides`)."""

import numpy as np

from tests.benchmarks import _sides, training

CASES = {
    "64 samples, 50 DDIM steps": (
        {"task": "sample", "net": "unet", "size": (16, 16), "channels": 4, "settings": training.UNET, "batch": 64}
        | {"steps": 50},
        ("diffusers",),
    ),
    "64 embeddings": (
        {
            "task": "embed",
            "net": "detector",
            "size": (64, 64),
            "channels": 1,
            "settings": training.DETECTOR,
            "batch": 64,
        },
        ("torch",),
    ),
}


def measure() -> dict:
    have = _sides.have_peers("torch", "diffusers")
    found = {}
    for name, (case, peers) in CASES.items():
        sides = {"ours": _sides.Side("_ours", case)}
        with _sides.together(sides):
            for peer in (p for p in peers if p in have):
                sides[peer] = _sides.Side("_peers", {**case, "peer": peer}, _sides.PEERS)
            times = _sides.in_turns(sides, seconds=0.5 if case["task"] == "embed" else 5.0)
        rate = case["batch"] / float(np.median(times["ours"]))
        found[name] = {"images_per_s": round(rate, 1), **_sides.compared(times)}
    return found
