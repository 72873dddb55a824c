"""A stage is a folder of a workdir with the settings it was made with; other settings are refused, not mixed in.

Runs may share stages: then the folder is a link to one named after a hash of those settings.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from launch import checkpoint, log


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
    before = made_with(folder)
    check(folder, dict.fromkeys(before or {}) | settings, grow)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    barrier(f"claim {folder.name}")
    if settings != before:  # many runs of a study claim its one folder
        checkpoint.write_json(folder / "settings.json", settings)


def made_with(folder: Path) -> dict[str, Any] | None:
    """The (flat) settings that `folder` was made with; None where it is not made yet."""
    return checkpoint.read_json(folder / "settings.json")


CONTENT = "data.content"  # of the settings: a hash of the images and patients that a stage learned from


def check(folder: Path, settings: dict[str, Any], grow: tuple[str, ...] = ()) -> None:
    """Raises ValueError as `claim` does where `folder` is made, with others than these settings."""
    before = made_with(folder)
    for key in settings if before is not None else ():
        was, now = before.get(key), settings[key]
        grown = key in grow and was is not None and now is not None and was < now
        if was != now and (not grown or folder.is_symlink()):  # a shared folder is named after its settings
            how = f"config.{key}={was!r}, not {now!r}"
            if key == CONTENT:
                how = "other images or patients than data.path holds now (files, patients or splits changed since)"
            raise ValueError(f"{folder} was made with {how}: use another --workdir, or delete that folder")


def key_of(settings: dict[str, Any]) -> str:
    """A name for these (flat) settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def shared(folder: Path, settings: dict[str, Any], store: Path | None) -> Iterator[None]:
    """`with shared(...)`: claim `folder` and do the stage, while no other process does the same one.

    Args:
      store: where runs with the same settings find the stage: `folder` becomes a link to one named after a hash of its
        settings in there, unless it is there already. A run that comes second finds it done, or waits, or goes on from
        the last checkpoint where the first was killed: the lock goes with the process that holds it. None: not shared.
    """
    if store is None:
        yield
        return
    name = f"{folder.name}-{key_of(settings)}"
    lead = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        if lead:
            store.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((store / f"{name}.lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.say(f"{folder.name}: another run is at the same one; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            (store / name).mkdir(exist_ok=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            if not (folder.exists() or folder.is_symlink()):
                folder.symlink_to(os.path.relpath((store / name).resolve(), folder.parent.resolve()))
        barrier(f"share {folder.name}")
        yield


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def replace_folder(aside: Path, folder: Path) -> None:
    """Moves a finished folder into place."""
    if jax.process_index() == 0:
        os.replace(aside, folder)
    barrier(f"replace {folder.name}")
