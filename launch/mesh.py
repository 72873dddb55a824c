"""The one place that knows the mesh: axes, the sharding rule, and how host arrays become global ones.

Three axes. A batch is split over `data` and `fsdp`; a parameter is split over `fsdp` by a rule on its shape alone, so
optimiser moments and averages follow their parameters without annotations; each image is split over `spatial` along its
first spatial axis, for volumes too large for one device; convolutions exchange their borders. The same code
runs on 1 device or 512.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from launch import preempt

AXES = ("data", "fsdp", "spatial")
BATCH_AXES = AXES[:2]
REPLICATED = jax.P()
SHARD_AT_LEAST = 2**14  # elements; smaller leaves cost more to gather than to hold


def make(fsdp: int = 1, spatial: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (None: all of all processes).

    Args:
      fsdp: devices that share each large parameter.
      spatial: devices that share each image; they are of one process, so that a process feeds whole images.
    Raises:
      ValueError: if the numbers do not divide the devices, or an image would be shared by two processes.
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    if fsdp < 1 or spatial < 1 or n % (fsdp * spatial):
        raise ValueError(f"config.mesh.fsdp={fsdp} times config.mesh.spatial={spatial} must divide the {n} devices")
    shape = (n // (fsdp * spatial), fsdp, spatial)
    auto = (AxisType.Auto,) * 3
    mesh = jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)
    if not in_process_order(np.vectorize(lambda d: d.process_index)(mesh.devices)):
        ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
        mesh = Mesh(np.array(ordered).reshape(shape), AXES, axis_types=auto)
    if not in_process_order(np.vectorize(lambda d: d.process_index)(mesh.devices)):
        raise ValueError(f"config.mesh.spatial={spatial}: must divide the number of devices of each process")
    return mesh


def in_process_order(process: np.ndarray) -> bool:
    """Whether the batch rows of a mesh, given the process of each of its devices, are process 0's, then process 1's, ...

    That is what `rows` and the input pipeline take for granted; a mesh laid out along a pod's wires may differ.
    """
    shares = process.reshape(-1, process.shape[-1])
    one_process_each = (shares == shares[:, :1]).all()
    return bool(one_process_each and (np.diff(shares[:, 0]) >= 0).all())


def size() -> int:
    """Number of devices of the current mesh."""
    return jax.sharding.get_mesh().size


def shares() -> int:
    """Into how many parts the current mesh splits a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size // mesh.shape["spatial"]


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


def placed(tree: Any) -> Any:
    """A tree of shapes with the shardings that such parameters, or such a train state, have."""
    return jax.tree.map(_placed, tree, shardings(tree))


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def replicated() -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(jax.sharding.get_mesh(), REPLICATED)


def batch_spec(shape: tuple[int, ...], spatial: int) -> jax.P:
    """Of an array of whole rows: rows over the batch axes, and images (B, *S, C) over `spatial` where it divides S[0]."""
    return jax.P(BATCH_AXES, "spatial") if len(shape) >= 4 and shape[1] % spatial == 0 else jax.P(BATCH_AXES)


def batch_sharding(x: Any) -> NamedSharding:
    """Of one array, or shape, of a batch."""
    mesh = jax.sharding.get_mesh()
    return NamedSharding(mesh, batch_spec(x.shape, mesh.shape["spatial"]))


def put(local: Any) -> Any:
    """This process's rows of a batch (a tree of host arrays) as global arrays split over all devices."""
    one = lambda x: jax.make_array_from_process_local_data(batch_sharding(x), x)
    return jax.tree.map(lambda x: one(np.asarray(x)), local)


def put_rows(batch: Any) -> Any:
    """A global batch split over all devices as `put` does it, however it was split before."""
    return jax.device_put(batch, jax.tree.map(batch_sharding, batch))


def placed_rows(batch: Any) -> Any:
    """A tree of shapes of a global batch with the shardings that `put_rows` gives."""
    return jax.tree.map(lambda leaf: _placed(leaf, batch_sharding(leaf)), batch)


def put_whole(local: Any) -> Any:
    """Rows (a tree of host arrays, the same on every process) as global arrays, whole on every device: for a number of rows
    that the devices need not divide."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(replicated(), np.asarray(x)), local)


def spread(batch: Any) -> Any:
    """Inside a jitted function: has a batch's rows computed on all devices, also where these do not divide them."""
    spatial = jax.sharding.get_abstract_mesh().shape["spatial"]
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, batch_spec(x.shape, spatial)), batch)


def from_first(values: Any) -> Any:
    """Process 0's numpy arrays on every process: for what each would find out by itself, and not at the same moment."""
    return values if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(values)


def over_slabs(
    fn: Callable, x: jax.Array, weights: jax.Array, *, before: int, after: int, multiple: int = 1
) -> jax.Array | None:
    """`fn(slab, weights)` on each device's slab of (B, *S, C), with planes of its neighbours before and after it.

    Beyond the ends of the image they are zeros. This is the border exchange of a convolution, by hand: XLA's own
    partitioner makes wrong gradients of strided kernels where slabs are thin (jax 0.10; tests/test_mesh.py).

    Returns:
      None where images are not split here into slabs of a `multiple` of planes that reach as far as `before` and `after`.
    """
    split = _spatial(x)
    thick = max(before, after)
    if split == 1 or x.shape[1] % (split * multiple) or x.shape[1] < split * thick:
        return None
    down, up = ([(i, i + 1) for i in range(split - 1)], [(i + 1, i) for i in range(split - 1)])

    def local(x: jax.Array, weights: jax.Array) -> jax.Array:
        parts = [jax.lax.ppermute(x[:, -before:], "spatial", down)] if before else []
        parts += [x]
        parts += [jax.lax.ppermute(x[:, :after], "spatial", up)] if after else []
        return fn(jnp.concatenate(parts, axis=1), jax.lax.pcast(weights, AXES, to="varying"))

    spec = jax.P(BATCH_AXES, "spatial")
    return jax.shard_map(local, in_specs=(spec, jax.P()), out_specs=spec)(x, weights)


def over_rows(fn: Callable, x: jax.Array, weights: jax.Array) -> jax.Array:
    """`fn(x, weights)` on whole images: where a mesh splits them they are gathered first, each group of devices alike."""
    if _spatial(x) == 1:
        return fn(x, weights)
    # weights that vary over the devices have a gradient of each device's own, and the sum of those is made outside
    local = lambda x, weights: fn(x, jax.lax.pcast(weights, BATCH_AXES, to="varying"))
    return jax.shard_map(local, in_specs=(jax.P(BATCH_AXES), jax.P()), out_specs=jax.P(BATCH_AXES))(x, weights)


def _spatial(x: jax.Array) -> int:
    """Devices that share an image of the batch; 1 too for a batch that cannot be split by rows (a model's first look)."""
    mesh = jax.sharding.get_abstract_mesh()
    spatial = mesh.shape.get("spatial", 1)
    return spatial if spatial > 1 and x.shape[0] % (mesh.size // spatial) == 0 else 1


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
    if batch % shares():
        raise ValueError(f"batch size {batch} must be a multiple of the {shares()} devices that split a batch")
    local = batch // jax.process_count()
    return slice(jax.process_index() * local, (jax.process_index() + 1) * local)


def stream(fn: Callable, batches: Iterable[tuple[np.ndarray, int]]) -> Iterator[Any]:
    """Runs a jitted `fn` over ordered batches (array, number of valid rows); yields host results without the padding.

    Every process iterates over the same whole batches, computes its own rows, and receives all of them. A batch that the
    devices do not divide is filled up with its last row. The next batch is started before the last one is fetched. Raises
    SystemExit once one of several processes is told to stop, but not while training: see `preempt.stop_together`.
    """
    waiting = None
    for batch, valid in batches:
        preempt.stop_together()
        if short := -len(batch) % shares():
            batch = np.concatenate([batch, np.repeat(batch[-1:], short, 0)])
        result = fn(put(batch[rows(len(batch))])), valid
        if waiting:
            yield _valid(*waiting)
        waiting = result
    if waiting:
        yield _valid(*waiting)


def _valid(result: Any, valid: int) -> Any:
    return jax.tree.map(lambda x: x[:valid], fetch(result))
