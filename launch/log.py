"""What a run tells: metrics as JSON lines, TensorBoard and Weights & Biases, a progress line, and where it came from."""

import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from launch import checkpoint

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy", "scipy")


def provenance() -> dict[str, Any]:
    """Git commit (with `+changes` where the tree differs from it), versions of what computes, and the devices."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD") or "not a git checkout"
    changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "git_commit": commit + changed,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


class Metrics:
    """Metrics of one stage, by step: `metrics.jsonl`, and TensorBoard event files where that extra is installed.

    They go to Weights & Biases as well, and nothing else does, where that is installed and the environment variable
    WANDB_PROJECT names a project: outside a hospital, if its server is there.

    Lines after `start` are dropped on opening: a resumed run writes them again. `window` holds the values since the last
    line, so that the line of a run that stopped between two lines is the same as if it had not.
    """

    def __init__(self, folder: Path, start: int):
        self._windows = folder / "windows.json"
        kept = json.loads(self._windows.read_text()) if self._windows.exists() else {}
        self.window: list[dict[str, float]] = kept.get(str(start), [])
        self._kept = {step: window for step, window in kept.items() if int(step) <= start}
        self._file = self._board = self._wandb = None
        if jax.process_index() != 0:
            return
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= start]
        checkpoint.write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")
        if importlib.util.find_spec("tensorboard"):
            from tensorboard.summary import Writer

            self._board = Writer(str(folder))
        if os.environ.get("WANDB_PROJECT") and importlib.util.find_spec("wandb"):
            import wandb

            place = folder.absolute()
            self._wandb = wandb.init(
                id=hashlib.sha256(str(place).encode()).hexdigest()[:16],  # a run that goes on is the same run
                name="/".join(place.parts[-2:]),
                resume="allow",
                dir=folder,
                settings=wandb.Settings(console="off", disable_git=True, save_code=False, silent=True),
            )

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line `{"step": step, ...}`; non-finite numbers become null."""
        if self._file is None:
            return
        clean = {k: round(v, 8) if v == v and abs(v) != float("inf") else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def keep_window(self, step: int) -> None:
        """To be called with each checkpoint: keeps `window` for a run that goes on from this step."""
        recent = dict(list(self._kept.items())[-2:])  # the checkpoint may fail to be written: earlier ones' too
        self._kept = {**recent, str(step): list(self.window)}
        checkpoint.write_json(self._windows, self._kept)

    def close(self) -> None:
        for writer in (self._file, self._board):
            if writer:
                writer.close()
        if self._wandb:
            self._wandb.finish()


def _step_of(line: str) -> float:
    """Step of a metrics line; a line cut off by a kill counts as the future."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")


def progress(name: str, total: int, start: int = 0, unit: str = "step") -> tqdm:
    """A progress line with rate and time left: live on a terminal, a line every 15 s in a log, none on other hosts.

    What is over within two seconds shows none.
    """
    live = sys.stderr.isatty()
    return tqdm(
        desc=f"{name:<12}",
        total=total,
        initial=start,
        unit=unit,
        disable=jax.process_index() != 0 or bool(os.environ.get("FACSIMILE_QUIET")),
        mininterval=0.2 if live else 15,
        maxinterval=0.5 if live else 30,
        dynamic_ncols=live,
        delay=2,
        leave=True,
        smoothing=0.05,
    )


def say(text: str) -> None:
    """A line for the user, from the first process, that does not tear the progress line."""
    if jax.process_index() == 0 and not os.environ.get("FACSIMILE_QUIET"):
        tqdm.write(text, file=sys.stderr)
