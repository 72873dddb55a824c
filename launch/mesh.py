"""The one place that knows the mesh: axes, the sharding rule, and how host arrays become global ones.

Two axes, `data` and `fsdp`. A batch is split over both; a parameter is split over `fsdp` by a rule on its shape alone,
so optimiser moments and averages follow their parameters without annotations. The same code runs on 1 device or 512.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from launch import preempt

AXES = ("data", "fsdp")
BATCH = jax.P(AXES)
REPLICATED = jax.P()
SHARD_AT_LEAST = 2**14  # elements; smaller leaves cost more to gather than to hold


def make(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (None: all of all processes), `fsdp` of them along the parameter-sharding axis.

    Raises:
      ValueError: if `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    if fsdp < 1 or n % fsdp:
        raise ValueError(f"config.mesh.fsdp={fsdp} must divide the {n} devices")
    return jax.make_mesh((n // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def size() -> int:
    """Number of devices of the current mesh."""
    return jax.sharding.get_mesh().size


def leaf_spec(shape: tuple[int, ...], fsdp: int) -> jax.P:
    """The rule: split the largest axis that `fsdp` divides; replicate small leaves and those no axis of which fits."""
    if fsdp == 1 or np.prod(shape, dtype=np.int64) < SHARD_AT_LEAST:
        return REPLICATED
    fitting = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if not fitting:
        return REPLICATED
    axis = max(fitting, key=lambda a: shape[a])
    return jax.P(*(["fsdp" if a == axis else None for a in range(axis + 1)]))


def shardings(tree: Any) -> Any:
    """`NamedSharding` for every leaf (anything with a shape) of a tree of parameters or of a whole train state."""
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(lambda leaf: NamedSharding(mesh, leaf_spec(leaf.shape, mesh.shape["fsdp"])), tree)


def replicated() -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(jax.sharding.get_mesh(), REPLICATED)


def put(local: Any) -> Any:
    """This process's rows of a batch (a tree of host arrays) as global arrays split over all devices."""
    sharding = NamedSharding(jax.sharding.get_mesh(), BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), local)


def fetch(tree: Any) -> Any:
    """Global arrays as numpy on every process (a collective where there are several processes)."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))


def rows(batch: int) -> slice:
    """Which rows of a global batch this process feeds.

    Raises:
      ValueError: if the devices do not divide the batch evenly.
    """
    if batch % size():
        raise ValueError(f"batch size {batch} must be a multiple of the {size()} devices")
    local = batch // jax.process_count()
    return slice(jax.process_index() * local, (jax.process_index() + 1) * local)


def stream(fn: Callable, batches: Iterable[tuple[np.ndarray, int]]) -> Iterator[Any]:
    """Runs a jitted `fn` over ordered batches (array, number of valid rows); yields host results without the padding.

    Every process iterates over the same whole batches, computes its own rows, and receives all of them. The next batch
    is started before the last one is fetched. Raises SystemExit with code 0 once one of several processes is told to
    stop.
    """
    waiting = None
    for batch, valid in batches:
        preempt.stop_together()
        result = fn(put(batch[rows(len(batch))])), valid
        if waiting:
            yield _valid(*waiting)
        waiting = result
    if waiting:
        yield _valid(*waiting)


def _valid(result: Any, valid: int) -> Any:
    return jax.tree.map(lambda x: x[:valid], fetch(result))
