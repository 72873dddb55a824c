"""What a stage costs, before anything is compiled: parameters, FLOPs, bytes a device, communication, time.

Programs are traced with abstract shapes. Their matrix products and convolutions are counted, and arrays are followed from
where they are made to where they are last used; so neither the devices need be there, nor the memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.extend import core

from launch import layers, loop, mesh


class Accelerator(NamedTuple):
    """Of one device, as its maker publishes it.

    Dense FLOP/s of products of float32 arrays at JAX's default precision (`flops`: TF32 on GPUs, one bfloat16 pass on
    TPUs) and of 16-bit arrays (`flops16`); bytes of memory; bytes/s out of it over all its links to the `node` devices
    nearest to it; and bytes/s out of all of such a node to other nodes.
    """

    flops: float
    flops16: float
    memory: float
    links: float
    node: int
    between: float


ACCELERATORS = {
    # GPUs in nodes of eight, each with a network adapter of its own (200 and 400 Gbit/s), as in DGX A100 and H100: what a
    # cloud rents may have a tenth of that. TPUs: a slice is one node; several slices are not told from one
    "A100": Accelerator(156e12, 312e12, 80e9, 300e9, 8, 8 * 25e9),  # SXM, 80 GB; NVLink 3
    "H100": Accelerator(494e12, 989e12, 80e9, 450e9, 8, 8 * 50e9),  # SXM; NVLink 4
    "RTX 4090": Accelerator(82.6e12, 165.2e12, 24e9, 32e9, 8, 12.5e9),  # a 24 GB card; PCIe 4 x16, 100 Gbit/s a machine
    "TPU v4": Accelerator(275e12, 275e12, 32e9, 300e9, 4096, float("inf")),
    "TPU v5e": Accelerator(197e12, 197e12, 16e9, 200e9, 256, float("inf")),
    "TPU v6e": Accelerator(918e12, 918e12, 32e9, 400e9, 256, float("inf")),
}


class Cost(NamedTuple):
    """Of one step. `flops` is of all devices together, as is `flops16`, the share of it that is of 16-bit arrays; what
    follows is in bytes of one device."""

    devices: int
    parameters: int  # a number, not bytes
    flops: float
    flops16: float
    weights: int
    gathered: int  # what other devices hold of the weights, while it is used: at most all of it, as counted here
    gradients: int
    optimiser: int
    averages: int  # moving averages, and the best parameters where some are selected
    activations: int  # most bytes alive at once beside all else: an estimate, mostly from above
    batch: int
    communication: int  # out of a device

    @property
    def memory(self) -> int:
        return sum(getattr(self, name) for name in BYTES)


BYTES = ("weights", "gathered", "gradients", "optimiser", "averages", "activations", "batch")


class Stage(NamedTuple):
    """A cost, how many such steps there are, and a name for the settings it depends on, by which runs share it."""

    cost: Cost
    steps: int
    key: str


def batch(item: Any, size: int) -> Any:
    """`size` items, given the shapes of one (a tree of `jax.ShapeDtypeStruct`)."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), item)


def of(
    task: loop.Task,
    batch: Any,
    *,
    tx: optax.GradientTransformation,
    ema: tuple[float, ...] = (),
    select: bool = False,
    prepare: Callable[[Any, jax.Array], Any] | None = None,
    accumulate: int = 1,
    devices: int = 1,
    fsdp: int = 1,
    spatial: int = 1,
) -> Cost:
    """The cost of a step of `loop.fit`.

    Args:
      batch: tree of `jax.ShapeDtypeStruct`, the global batch, before `prepare`.
      prepare: is done with the whole batch before the first of its parts.
      accumulate: parts that pass through the model one after the other: activations are those of one, gradients are
        there a second time while they are added, and each part's are summed over the devices.
      devices, fsdp, spatial: of the mesh that is planned for, as in `mesh.make`.
    Raises:
      ValueError: where the mesh does not fit the devices, or the batch the mesh.
    """
    rows = _rows(batch, devices, fsdp, spatial)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: loop.create(key, task=task, tx=tx, ema=ema, select=select), key)
    before = jax.make_jaxpr(prepare or (lambda batch, key: batch), return_shape=True)
    with layers.lowered_for("accelerator"):
        step = jax.value_and_grad(task.loss, has_aux=True)
        (preparing_all, all_ready), (preparing, ready) = before(batch, key), before(rows, key)
        part = _rows(all_ready, devices, fsdp, spatial, accumulate)
        everything = preparing_all.jaxpr, jax.make_jaxpr(step)(state.params, all_ready, key).jaxpr
        traced = jax.make_jaxpr(step)(state.params, part, key).jaxpr
        once = jax.make_jaxpr(task.loss)(state.params, ready, key).jaxpr
    held = lambda tree: _held(tree, fsdp)
    grads = len(jax.tree.leaves(state.params))
    busiest = max(
        peak(preparing.jaxpr, _variables(preparing.jaxpr.outvars)), peak(traced, _variables(traced.outvars[-grads:]))
    )
    bytes_of = lambda tree: sum(map(_bytes, jax.tree.leaves(tree)))
    return Cost(
        devices,
        sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params)),
        sum(map(flops, everything)),
        sum(flops(program, sixteen=True) for program in everything),
        held(state.params),
        _held(state.params, 1) - held(state.params),
        held(state.params) * (1 + (accumulate > 1)),
        held(state.opt_state),
        held(state.ema) + held(state.best),
        busiest // spatial,
        # one in use, one ready, one coming; and one as it is prepared
        (3 * bytes_of(rows) + (bytes_of(ready) if prepare else 0)) // spatial,
        accumulate * round(sum(reduction(leaf, devices, fsdp) for leaf in jax.tree.leaves(state.params)))
        + (borders(preparing.jaxpr) + 2 * borders(once) if spatial > 1 else 0),
    )


def drawing(draw: Callable, weights: Any, batch: Any, *, devices: int = 1, fsdp: int = 1, spatial: int = 1) -> Cost:
    """The cost of `draw(weights, batch)` without gradients, as in sampling, the batch filled up to a multiple of the devices
    that split it. Weights are shared as in training, and gathered at every turn of its longest loop (from above: a compiler
    may gather them once)."""
    shares = devices // spatial
    fill = lambda x: jax.ShapeDtypeStruct((-(-x.shape[0] // shares) * shares, *x.shape[1:]), x.dtype)
    batch = jax.tree.map(fill, batch)
    rows = _rows(batch, devices, fsdp, spatial)
    with layers.lowered_for("accelerator"):
        everything, traced = (jax.make_jaxpr(draw)(weights, items).jaxpr for items in (batch, rows))
    held = _held(weights, fsdp)
    gathered = _held(weights, 1) - held
    turns = max((times for _, times in _equations(traced)), default=1)
    return Cost(
        devices,
        sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(weights)),
        flops(everything),
        flops(everything, sixteen=True),
        held,
        gathered,
        0,
        0,
        0,
        peak(traced) // spatial,
        sum(map(_bytes, jax.tree.leaves(rows))) // spatial,
        turns * gathered + (borders(traced) if spatial > 1 else 0),
    )


def _held(tree: Any, fsdp: int) -> int:
    """Bytes of a tree on one device."""
    return sum(_bytes(leaf) // _shards(leaf.shape, fsdp) for leaf in jax.tree.leaves(tree))


def _rows(batch: Any, devices: int, fsdp: int, spatial: int, parts: int = 1) -> Any:
    """What one group of devices sees of a batch, or of one of its `parts`."""
    if devices % (fsdp * spatial):
        raise ValueError(
            f"config.mesh.fsdp={fsdp} times config.mesh.spatial={spatial} must divide config.plan.devices={devices}"
        )
    size, shares = jax.tree.leaves(batch)[0].shape[0], parts * (devices // spatial)
    if size % shares:
        of_it = f" times its {parts} parts" if parts > 1 else ""
        raise ValueError(
            f"a batch of {size} must be a multiple of the {devices // spatial} devices that split a batch{of_it}"
        )
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size // shares, *x.shape[1:]), x.dtype), batch)


def seconds(cost: Cost, accelerator: Accelerator, utilisation: float) -> float:
    """Predicted seconds a step: the arithmetic at that share of the published peak, or the communication, whichever is
    longer (they overlap). The share is an assumption, not a measurement.

    Over several nodes a ring sends what a device sends once out of each node as well, by all its devices' adapters.
    """
    wires = accelerator.links if cost.devices <= accelerator.node else min(accelerator.links, accelerator.between)
    arithmetic = (cost.flops - cost.flops16) / accelerator.flops + cost.flops16 / accelerator.flops16
    return max(arithmetic / cost.devices / utilisation, cost.communication / wires)


def table(stages: Mapping[str, Stage], utilisation: float) -> str:
    """For people: what each stage needs, then the time of all steps on each named accelerator and whether they fit."""
    rows = {"steps": [f"{s.steps:,}" for s in stages.values()]}
    rows["parameters"] = [f"{s.cost.parameters:,}" for s in stages.values()]
    rows["GFLOP a step"] = [f"{s.cost.flops / 1e9:,.3f}" for s in stages.values()]
    for name in (*BYTES, "memory", "communication"):
        label = {"memory": "MiB a device in all", "communication": "MiB sent a step"}.get(name, f"MiB of {name}")
        rows[label] = [f"{getattr(s.cost, name) / 2**20:,.2f}" for s in stages.values()]
    lines = [f"{'':22}" + "".join(f"{name:>14}" for name in stages)]
    lines += [f"{label:22}" + "".join(f"{cell:>14}" for cell in cells) for label, cells in rows.items()]
    worst = max(s.cost.memory for s in stages.values())
    devices = next(iter(stages.values())).cost.devices
    lines.append(f"{devices} device(s), if {100 * utilisation:g} % of the published peak is reached:")
    for name, kind in ACCELERATORS.items():
        hours = sum(s.steps * seconds(s.cost, kind, utilisation) for s in stages.values()) / 3600
        fits = "fits" if worst <= kind.memory else "DOES NOT FIT"
        nodes = -(-devices // kind.node)
        far = (
            f"; {nodes} nodes, {kind.between / 1e9:g} GB/s out of each"
            if nodes > 1 and np.isfinite(kind.between)
            else ""
        )
        lines.append(
            f"  {name:8}{hours:>12.3g} h; {worst / 1e9:.3g} GB of a device's {kind.memory / 1e9:g}: {fits}{far}"
        )
    return "\n".join(lines)


def described(stages: Mapping[str, Stage], utilisation: float) -> dict[str, Any]:
    """For programs: {stage: its key, steps, cost, and seconds of all steps by accelerator}."""
    return {
        name: {
            "key": s.key,
            "steps": s.steps,
            **s.cost._asdict(),
            "memory": s.cost.memory,
            "seconds": {name: s.steps * seconds(s.cost, kind, utilisation) for name, kind in ACCELERATORS.items()},
        }
        for name, s in stages.items()
    }


# ---- what a mesh sends


def reduction(leaf: Any, devices: int, fsdp: int) -> float:
    """Bytes that a device sends for one parameter in a step, by ring algorithms.

    Shared by f devices: gathered before the forward and the backward pass, its gradient scattered, 3 (f - 1) / f of it;
    then the share is summed over the other r = devices / f, 2 (r - 1) / r of a share. Not shared: summed over all.
    """
    whole, f = _bytes(leaf), _shards(leaf.shape, fsdp)
    replicas = devices // f
    return 3 * (f - 1) / f * whole + 2 * (replicas - 1) / replicas * whole / f


def borders(jaxpr: core.Jaxpr) -> int:
    """Bytes that its convolutions exchange where images are split along their first axis: kernel - 1 planes each."""
    total = 0
    for eqn, times in _equations(jaxpr):
        if eqn.primitive.name == "conv_general_dilated":
            image, numbers = eqn.invars[0].aval, eqn.params["dimension_numbers"]
            planes = eqn.invars[1].aval.shape[numbers.rhs_spec[2]] - 1
            total += times * planes * _bytes(image) // image.shape[numbers.lhs_spec[2]]
    return total


# ---- what a traced program says


def flops(jaxpr: core.Jaxpr, sixteen: bool = False) -> float:
    """Multiplications and additions of its matrix products and convolutions, loops counted as often as they run; of
    branches all are counted, and of a `while` one turn. sixteen: only those whose arrays have elements of 16 bits."""
    return sum(times * _own_flops(eqn) for eqn, times in _equations(jaxpr) if not sixteen or _is_sixteen(eqn))


def _is_sixteen(eqn: core.JaxprEqn) -> bool:
    return all(var.aval.dtype.itemsize == 2 for var in eqn.invars[:2] if hasattr(var.aval, "dtype"))


def _own_flops(eqn: core.JaxprEqn) -> float:
    out = float(np.prod(eqn.outvars[0].aval.shape)) if eqn.outvars else 0.0
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * out * float(np.prod([eqn.invars[0].aval.shape[axis] for axis in contracted]))
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        _, inputs, *space = eqn.params["dimension_numbers"].rhs_spec
        taps = float(np.prod([kernel[axis] for axis in (inputs, *space)]))
        return 2 * out * taps / float(np.prod(eqn.params["lhs_dilation"]))  # between the rows there are zeros
    return 0.0


def _equations(jaxpr: core.Jaxpr) -> Iterator[tuple[core.JaxprEqn, int]]:
    """All equations, those of inner programs too, and how often each runs."""
    for eqn in jaxpr.eqns:
        yield eqn, 1
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for inner in _inner(eqn):
            for deep, more in _equations(inner):
                yield deep, times * more


FUSED = ("broadcast_in_dim", "iota")  # made where they are used, never stored
VIEWS = ("reshape", "squeeze", "expand_dims", "copy", "transpose")  # share their operand's memory, or are read so


def peak(jaxpr: core.Jaxpr, free: frozenset[Any] | set[Any] = frozenset()) -> int:
    """Most bytes alive at once among the arrays that a program makes, in the order it is written.

    A compiler fuses and reorders, so it mostly needs less. Inner programs add their own peak while they run.

    Args:
      free: results that are not counted here.
    """
    root: dict[Any, Any] = {}  # of a view: what it is a view of
    last: dict[Any, int] = {}  # where an array is used last
    for i, eqn in enumerate(jaxpr.eqns):
        for var in eqn.invars:
            if not isinstance(var, core.Literal):
                last[root.get(var, var)] = i
        if eqn.primitive.name in VIEWS and not isinstance(eqn.invars[0], core.Literal):
            root[eqn.outvars[0]] = root.get(eqn.invars[0], eqn.invars[0])
    for var in jaxpr.outvars:
        if not isinstance(var, core.Literal):
            last[root.get(var, var)] = len(jaxpr.eqns)
    free = free | {root[var] for var in free if var in root}
    ends: dict[int, list[int]] = {}
    alive = most = 0
    for i, eqn in enumerate(jaxpr.eqns):
        for var in eqn.outvars:
            if var not in root and var not in free and eqn.primitive.name not in FUSED and var in last:
                alive += _bytes(var.aval)
                ends.setdefault(last[var], []).append(_bytes(var.aval))
        most = max(most, alive + max((peak(sub, _variables(sub.outvars)) for sub in _inner(eqn)), default=0))
        alive -= sum(ends.pop(i, []))
    return most


def _variables(found: Sequence[Any]) -> set[Any]:
    """Without the constants that are written out in a program, which take no memory."""
    return {var for var in found if not isinstance(var, core.Literal)}


def _inner(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    """The programs inside an equation: bodies of loops, branches, calls."""
    found = []
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                found.append(one.jaxpr)
            elif isinstance(one, core.Jaxpr):
                found.append(one)
    return found


def _bytes(leaf: Any) -> int:
    size = int(np.prod(leaf.shape))
    return size * (leaf.dtype.itemsize if isinstance(leaf.dtype, np.dtype) else 8)  # a key is two 32-bit words


def _shards(shape: tuple[int, ...], fsdp: int) -> int:
    return 1 if mesh.leaf_spec(shape, fsdp) == mesh.REPLICATED else fsdp
