"""Orbax behind a few functions, and small files written aside and then renamed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from launch import mesh

# Orbax has each device write a slice of what all of them hold, and compiles that slicing for every shape on every device:
# without a bound, 108 of the 109 seconds of a first save of 150 shapes on eight CPU devices.
SLICE_AT_LEAST = 2**24  # bytes
_ARRAYS = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE_AT_LEAST)),
    (np.ndarray, ocp.type_handlers.NumpyHandler()),
)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all; only the first process writes. Aside it is named after the machine too: in
    containers that share a disk every process may be number 1."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """As `write_text`."""
    if jax.process_index() == 0:
        aside = path.with_name(f".{os.uname().nodename}-{os.getpid()}.{path.name}")
        aside.write_bytes(data)
        os.replace(aside, path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON with sorted layout kept as given and NaN refused (ValueError)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any | None:
    """What process 0 reads, on every process; None where it finds no file. (Where a disk is shared over a network, others
    may not see a file for a minute after it is written.)"""
    text = path.read_bytes() if jax.process_index() == 0 and path.exists() else b""
    size = int(mesh.from_first(np.int32(len(text))))
    if not size:
        return None
    return json.loads(mesh.from_first(np.frombuffer(text.ljust(size), np.uint8)).tobytes())


def exists(path: Path) -> bool:
    """Whether process 0 sees it; told to every process."""
    return bool(mesh.from_first(np.bool_(path.exists())))


def manager(folder: Path, keep: int = 2) -> ocp.CheckpointManager:
    """Asynchronous checkpoints of the last `keep` saved steps under `folder`; each is complete or absent."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=_ARRAYS)
    return ocp.CheckpointManager(folder.absolute(), item_handlers=handler, options=options)


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Starts saving `state` (the device-to-host copy is done on return, so its buffers may be donated).

    Raises:
      OSError: if the disk has no room for it, before anything is written.
    """
    if checkpoints.latest_step() != step:
        needed, free = (
            sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
            shutil.disk_usage(checkpoints.directory).free,
        )
        if free < needed:
            raise OSError(
                f"{checkpoints.directory}: a checkpoint needs {needed / 2**20:.0f} MiB and the disk has {free / 2**20:.0f}; "
                "free some, and the same command goes on from the last checkpoint"
            )
        checkpoints.save(step, args=ocp.args.PyTreeSave(state))


def restore(checkpoints: ocp.CheckpointManager, abstract: Any, step: int | None = None) -> Any:
    """Restores onto the current mesh, whatever mesh it was saved from.

    Args:
      abstract: tree of arrays or ShapeDtypeStructs of the state; shardings follow from the shapes.
      step: the newest if None.
    """
    target = mesh.placed(abstract)
    step = checkpoints.latest_step() if step is None else step
    how = ocp.checkpoint_utils.construct_restore_args(target)
    return checkpoints.restore(step, args=ocp.args.PyTreeRestore(target, restore_args=how))


def publish(folder: Path, step: int, weights: Any) -> None:
    """Saves what a finished stage is used for, without its optimiser, as `folder/weights`: the mark of a stage done."""
    with manager(folder / "weights", keep=1) as weights_manager:
        save(weights_manager, step, weights)


def published(folder: Path) -> int | None:
    """The step of a stage's published weights, as process 0 sees them; None if it has none."""
    if not exists(folder / "weights"):
        return None
    with manager(folder / "weights") as weights_manager:
        step = weights_manager.latest_step()
    step = int(mesh.from_first(np.int32(-1 if step is None else step)))
    return None if step < 0 else step


def load(folder: Path, abstract: Any) -> Any:
    """A finished stage's published weights.

    Raises:
      FileNotFoundError: if there are none; the message names the folder and the mend.
    """
    step = published(folder)
    if step is None:
        raise FileNotFoundError(f"{folder}: no trained weights here; run --mode=train with this --workdir first")
    with manager(folder / "weights") as weights_manager:
        return restore(weights_manager, abstract, step)
