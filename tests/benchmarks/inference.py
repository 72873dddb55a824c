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
    return of_cases(CASES)


def of_cases(cases: dict) -> dict:
    """Images a second of ours, and the times of all sides, for each case and the peers at hand."""
    have = _sides.have_peers(*{peer for _, peers in cases.values() for peer in peers})
    found = {}
    for name, (case, peers) in cases.items():
        sides = {"ours": _sides.Side("_ours", case)}
        with _sides.together(sides):
            for peer in (p for p in peers if p in have):
                sides[peer] = _sides.Side("_peers", {**case, "peer": peer}, _sides.PEERS)
            rounds, seconds = (5, 5.0) if case["task"] == "sample" else (9, 0.5)  # a round of samples takes minutes
            times = _sides.in_turns(sides, rounds, seconds)
        rate = case["batch"] / float(np.median(times["ours"]))
        found[name] = {"images_per_s": round(rate, 1), **_sides.compared(times)}
    return found
