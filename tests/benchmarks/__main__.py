"""Runs benchmarks, prints what they found and adds it to a JSON file.

    python -m tests.benchmarks --what=pipeline,duplicates --out=benchmarks.json

Times of one run are comparable with each other, not with those of another machine or another load: read the ratios.
"""

import argparse
import importlib
import json
import os
from pathlib import Path

from launch import checkpoint, log, machine

# calibration, detectors and statistics take data folders or hours: each is a command of its own, said in its file
NAMES = (
    "demo",
    "augmentation",
    "duplicates",
    "inference",
    "neighbours",
    "pipeline",
    "preparation",
    "startup",
    "training",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="all", help=f"all, or some of {','.join(NAMES)}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks.json"))
    options = parser.parse_args()
    chosen = NAMES if options.what == "all" else options.what.split(",")
    if unknown := sorted({*chosen} - {*NAMES}):
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in chosen:
        before = os.getloadavg()[0]
        found = importlib.import_module(f"tests.benchmarks.{name}").measure()
        results[name] = {**found, "load_before": round(before, 2), "environment": log.provenance()}
        print(name)
        for key, value in leaves(found):
            print(f"  {key:<60} {value}")
        checkpoint.write_json(options.out, results)


def leaves(tree: dict, prefix: str = "") -> list[tuple[str, object]]:
    """The leaves of nested dicts under dotted names."""
    rows = []
    for key, value in tree.items():
        rows += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return rows


if __name__ == "__main__":
    raise SystemExit(machine.one_line_errors(main))
