"""Stands in for main.py in tests of studies: fast, with known copy rates, and it minds being run twice at once."""

import json
import os
import pathlib
import signal
import sys
import time

import numpy as np


def alive(pid):
    try:
        os.kill(pid, 0)
        return True
    except ProcessLookupError:
        return False


def main(argv):
    flags = dict(arg.removeprefix("--").split("=", 1) for arg in argv)
    workdir, seed = pathlib.Path(flags["workdir"]), int(flags["config.seed"])
    busy = workdir / "busy"
    if busy.exists() and alive(int(busy.read_text())):
        (workdir / "COLLISION").touch()
    busy.write_text(str(os.getpid()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if flags.get("config.fail") == f"{seed}" and not (workdir / "failed").exists():
        (workdir / "failed").touch()
        sys.exit("error: fail: no room on the disk")
    if flags.get("config.fail") == "always":
        sys.exit("error: fail: always")
    width, steps = float(flags.get("config.unet.width", 32)), int(flags.get("config.train.diffusion.steps", 0))
    diffusion = workdir / "diffusion" / "steps.json"
    done = json.loads(diffusion.read_text()) if diffusion.exists() else []
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0.01")))
    if steps and (not done or done[-1] < steps):
        diffusion.parent.mkdir(exist_ok=True)
        diffusion.write_text(json.dumps([*done, steps]))
    rate = float(np.clip(0.01 * width + 0.02 * seed + 0.0003 * steps - float(flags.get("config.less", 0)), 0, 1))
    both = lambda name, value: {name: value, f"{name}_ci": [value - 0.01, value + 0.01]}
    seen = float(flags.get("config.seen", 0.9))
    audit = {
        "verdict": "FAIL" if rate else "INCONCLUSIVE",
        "policy": {"min_recall": 0.8},
        "power": {**both("recall", seen), "min_detectable_copy_rate": 0.15 if seen else None},
        "rendering": {"differs": False},
        "negative_control": {"excess_p_value": 0.5},
        "n_train": 40,
        "n_train_patients": 40,
        "n_val_patients": 160,
        "n_syn": 128,
        "n_draws": 128,
        "stated": True,
        "calibrated": {**both("copy_rate", rate), **both("n_mem_patients", round(40 * rate))},
        "paper": {**both("copy_rate", rate / 2), **both("null_copy_rate", 0.03), **both("mem_rate", rate / 3)},
    }
    quality = {name: {"value": 0.5 - 0.1 * rate, "ci": [0.3, 0.6]} for name in ("kernel", "recall")}
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0.01")))
    (workdir / "audit").mkdir(exist_ok=True)
    (workdir / "audit" / "audit.json").write_text(json.dumps(audit))
    enabled = flags.get("config.quality.enabled") != "False"
    judged = (
        {"spaces": {"detector": {"synthetic": quality}}} if enabled else {"reason": "config.quality.enabled is False"}
    )
    (workdir / "quality.json").write_text(json.dumps(judged))


if __name__ == "__main__":
    main(sys.argv[1:])
