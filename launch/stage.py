"""A stage is a folder of a workdir with the settings it was made with; other settings are refused, not mixed in."""

import json
import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from launch import checkpoint


def describe(workdir: Path, config: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Writes `config.json`, as resolved, and `environment.json` (commit, versions, devices) into the workdir."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(workdir / "config.json", config)
    checkpoint.write_json(workdir / "environment.json", provenance)
    barrier("describe")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}, values as JSON returns them."""
    flat = {}
    for key, value in tree.items():
        inner = flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        flat.update(inner)
    return json.loads(json.dumps(flat))


def claim(folder: Path, settings: dict[str, Any], grow: tuple[str, ...] = ()) -> None:
    """Makes `folder`, or checks that it was made with the same (flat) settings; those in `grow` may have grown since.

    Raises:
      ValueError: naming the first key that differs, both values, and the mend.
    """
    path = folder / "settings.json"
    before = json.loads(path.read_text()) if path.exists() else settings
    for key in [*before, *settings]:
        was, now = before.get(key), settings.get(key)
        if was != now and not (key in grow and was is not None and was < now):
            raise ValueError(
                f"{folder} was made with config.{key}={was!r}, not {now!r}: use another --workdir, or delete that folder"
            )
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    barrier(f"claim {folder.name}")
    checkpoint.write_json(path, settings)


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def replace_folder(aside: Path, folder: Path) -> None:
    """Moves a finished folder into place."""
    if jax.process_index() == 0:
        os.replace(aside, folder)
    barrier(f"replace {folder.name}")
