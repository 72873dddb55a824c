"""The layers all models share, rank-generic (2D and 3D alike), and how they are lowered on this machine.

What a layer computes is a function under `jax.jit`: a network that calls it 40 times on a few shapes traces, differentiates
and lowers it once for each shape, and the compiler gets to see the same network.

Parameters only, no mutable state. Parameter names carry their initial distribution, so that `init` can draw a whole
model in one kernel: `kernel` ~ N(0, 1 / fan_in), `zero` = 0, `bias` = 0, `scale` = 1.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from launch import early, mesh

_INITIALISERS = {
    "kernel": nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
    "zero": nn.initializers.zeros,
    "bias": nn.initializers.zeros,
    "scale": nn.initializers.ones,
}

# Channels in times channels out, for each axis that may be taken by fours, from which this is measured to be faster.
BY_FOURS_FROM = 4608 if early.old_kernels() else 1024

_PLATFORM = jax.make_user_context(None)  # a traced function is found again only under the same one


def lowered_for(platform: str) -> contextlib.AbstractContextManager[None]:
    """`with lowered_for(...)`: programs are written for another platform than this machine's, to be looked at, not run."""
    return _PLATFORM(platform)


def init(init_fn: Callable, key: jax.Array) -> Any:
    """Draws the parameters of `init_fn(key) -> params` from their names and shapes, with one random kernel.

    `jit(module.init)` compiles a random kernel per leaf (10 to 20 s for a UNet); this compiles one. Raises KeyError for
    a parameter whose name is not one of this module's four.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(jax.eval_shape(init_fn, key))
    names = [path[-1].key for path, _ in leaves]
    sizes = [int(np.prod(leaf.shape)) if name == "kernel" else 0 for name, (_, leaf) in zip(names, leaves, strict=True)]
    draws = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    values = [
        draw.reshape(leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5
        if name == "kernel"
        else _INITIALISERS[name](key, leaf.shape, leaf.dtype)
        for name, draw, (_, leaf) in zip(names, draws, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, values)


def on_cpu() -> bool:
    """Whether the program that is being traced is for a CPU."""
    return (_PLATFORM.value or jax.default_backend()) == "cpu"


def once(values: Any) -> Any:
    """`values`; on a CPU they, and in the backward pass their gradients, are computed once and kept.

    XLA computes what is cheap for one element again for every use of it: a norm and its activation in each transposition
    that the gradient of a kernel asks for, and the gradients of norms and residual sums in a chain through the network.
    """
    return jax.lax.optimization_barrier(values) if on_cpu() else values


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x` (.., C) times `kernel` (C, F)."""
    return _matmul(x, kernel) if on_cpu() else x @ kernel


@jax.custom_vjp
def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    return x @ kernel, (x, kernel)


def _matmul_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of JAX's own gradient of a kernel XLA makes a product of two transposes, at a third of the rate; where rows are more
    than one axis, it copies them transposed."""
    x, kernel = saved
    rows = once((x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])))
    return dy @ kernel.T, jax.lax.dot_general(*rows, (((0,), (0,)), ((), ())))


_matmul.defvjp(_matmul_forward, _matmul_backward)


def conv(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[int, ...] | None = None
) -> jax.Array:
    """Convolution of `x` (B, *S, C) with `kernel` (*K, C, F), zero `padding` on both sides (None: K // 2).

    On a CPU a 3D convolution is made of 2D ones, depth folded into the batch, since XLA's native one is about five times
    slower there, and one of many channels takes four rows at a time. Images that a mesh splits over devices stay split.
    """
    size = kernel.shape[:-2]
    padding = tuple(k // 2 for k in size) if padding is None else padding
    return once(_conv_of_parts(once(x), kernel, strides, padding))


def _conv_of_parts(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[int, ...]) -> jax.Array:
    size = kernel.shape[:-2]
    if all(k == 1 for k in size):
        steps = (slice(None), *(slice(None, None, s) for s in strides))
        return matmul(x[steps], kernel.reshape(kernel.shape[-2:]))
    reach, step = size[0] // 2, strides[0]
    inner = lambda slab, kernel: _conv(slab, kernel, strides, (0, *padding[1:]))
    y = None
    if size[0] % 2 and padding[0] == reach:
        y = mesh.over_slabs(inner, x, kernel, before=reach, after=max(reach - step + 1, 0), multiple=step)
    outer = lambda x, kernel: _conv(x, kernel, strides, padding)
    return mesh.over_rows(outer, x, kernel) if y is None else y


def _conv(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[int, ...], axes: int = 2
) -> jax.Array:
    """`axes`: how many of them may still be taken by fours, a last one only with positions enough for matrix products."""
    rank = kernel.ndim - 2
    if on_cpu():
        fours = kernel.shape[0] == 3 and strides[0] == 1 and x.shape[1] + 2 * padding[0] > 4 and x.dtype == jnp.float32
        many = np.prod(kernel.shape[-2:]) >= BY_FOURS_FROM * axes and (rank > 1 or x.shape[0] * x.shape[1] >= 1024)
        if fours and (rank == 3 or (axes and many)):
            return _conv_by_fours(x, kernel, strides, padding, axes - 1)
        if rank == 3:
            return _conv_by_taps(x, kernel, strides, padding)
    convolve = _conv_on_cpu if on_cpu() else _convolve
    return convolve(x, kernel, strides, tuple((p, p) for p in padding))


def _convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple, **dilations) -> jax.Array:
    spatial = "DHW"[2 - kernel.ndim :]
    order = f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=order, **dilations)


_conv_on_cpu = jax.custom_vjp(_convolve, nondiff_argnums=(2, 3))


def _conv_forward(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple) -> tuple[jax.Array, tuple]:
    return _convolve(x, kernel, strides, padding), (x, kernel)


def _conv_backward(
    strides: tuple[int, ...], padding: tuple, saved: tuple, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """JAX's own gradients, with their axes in the order that XLA's fast convolution takes. XLA brings others into that order
    itself, but not within a loop (jaxlib 0.12): the UNet's step in two parts took 33 times as long."""
    x, kernel = saved
    ones, reach, over = (1,) * len(strides), [], []
    for size, k, out, step, (low, _) in zip(
        x.shape[1:-1], kernel.shape, dy.shape[1:-1], strides, padding, strict=False
    ):
        spread = step * (out - 1) + 1  # of dy with its places `step` apart
        reach.append((k - 1 - low, size + low - spread))
        over.append((low, spread + k - 1 - size - low))
    turned = jnp.flip(kernel, range(len(strides))).swapaxes(-1, -2)
    dx = _convolve(dy, turned, ones, reach, lhs_dilation=strides)
    dkernel = _convolve(x.swapaxes(0, -1), jnp.moveaxis(dy, 0, -2), ones, over, rhs_dilation=strides)
    return dx, jnp.moveaxis(dkernel, 0, -2)


_conv_on_cpu.defvjp(_conv_forward, _conv_backward)


def _conv_by_taps(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[int, ...]) -> jax.Array:
    """A sum of convolutions of one axis less, over the taps of the first axis, which is folded into the batch."""
    taps, step = kernel.shape[0], strides[0]
    padded = _padded(x, padding[0], padding[0])
    depth = (padded.shape[1] - taps) // step + 1
    total = 0.0
    for tap in range(taps):
        planes = padded[:, tap : tap + step * (depth - 1) + 1 : step]
        total += _conv(planes.reshape(-1, *planes.shape[2:]), kernel[tap], strides[1:], padding[1:])
    return total.reshape(x.shape[0], depth, *total.shape[1:])


def _conv_by_fours(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[int, ...], axes: int
) -> jax.Array:
    """As `_conv_by_taps`, for three taps in steps of one: six products for four planes, where the taps take twelve.

    Winograd's F(4, 3) along the first axis (Lavin and Gray 2016, 'Fast algorithms for convolutional neural networks',
    section 4.3), with the points 0, 1 / sqrt(2), sqrt(2), their negatives and infinity in place of 0, 1, 2 and so on: in
    fp32 the result is then off by 1.0e-6 of its largest value in place of 2.6e-6, over two axes by 2e-6, where XLA's own
    is by 0.5e-6 to 1e-6. A last axis makes matrix products.
    """
    rows, root = x.shape[1] + 2 * padding[0] - 2, 2**0.5
    d = _six_rows(x, padding[0], -(-rows // 4))
    a, b, e, f = d[4] - 2 * d[2], (d[3] - 2 * d[1]) / root, d[4] - d[2] / 2, (d[3] - d[1] / 2) * root
    planes = d[0] - 2.5 * d[2] + d[4], a + b, a - b, e + f, e - f, d[1] - 2.5 * d[3] + d[5]
    a, b = (kernel[0] + kernel[2] / 2) / -1.5, kernel[1] / (-1.5 * root)
    e, f = (kernel[0] + kernel[2] * 2) / 6, kernel[1] / (6 / root)
    kernels = kernel[0], a + b, a - b, e + f, e - f, kernel[2]
    if kernel.ndim == 3:
        m = _parts(once(jax.vmap(matmul)(*once((jnp.stack(planes), jnp.stack(kernels))))), 0)
    else:
        pairs = once([*zip(planes, kernels, strict=True)])
        m = once([_conv(*pair, strides[1:], padding[1:], axes) for pair in pairs])
    a, b, e, f = m[1] + m[2], (m[1] - m[2]) / root, m[3] + m[4], (m[3] - m[4]) * root
    y = jnp.stack([m[0] + a + e, b + f, a / 2 + 2 * e, b / 2 + 2 * f + m[5]], axis=1)
    return y.reshape(x.shape[0], -1, *y.shape[2:])[:, :rows]


def _six_rows(x: jax.Array, padding: int, count: int) -> list[jax.Array]:
    """Of `x` (B, R, *S, C) between `padding` rows of zeros on either side, the first six rows, the six that start four
    rows later, and so on: for each of the six `count` rows, (B * count, *S, C)."""
    quarters = _parts(_padded(x, 0, -x.shape[1] % 4).reshape(x.shape[0], -1, 4, *x.shape[2:]), 2)

    def every_fourth(first: int) -> jax.Array:
        rows, at = quarters[first % 4], first // 4
        found = rows[:, max(at, 0) : at + count]  # rows of zeros come only where they are needed
        return _padded(found, max(-at, 0), max(at + count - rows.shape[1], 0)).reshape(-1, *x.shape[2:])

    return [every_fourth(row - padding) for row in range(6)]


def _parts(x: jax.Array, axis: int) -> list[jax.Array]:
    """The arrays along an axis. The gradient is one concatenation; that of indices would be a sum of padded arrays."""
    return [part.squeeze(axis) for part in jnp.split(x, x.shape[axis], axis)]


def _padded(x: jax.Array, before: int, after: int) -> jax.Array:
    """(B, *S, C) with so many zeros at either end of the first spatial axis."""
    return jnp.pad(x, ((0, 0), (before, after), *((0, 0),) * (x.ndim - 2)))


def upsample(x: jax.Array, factors: tuple[int, ...]) -> jax.Array:
    """Nearest-neighbour up-sampling of (B, *S, C) by an integer factor per spatial axis."""
    for axis, factor in enumerate(factors, start=1):
        if factor > 1:
            x = jnp.repeat(x, factor, axis=axis)
    return x


# Of a kernel of three taps over an axis where each position stands twice: the two taps, over the positions themselves,
# that make the even and the odd outputs. [phase, tap, tap of the kernel]
_PHASES = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)


def conv_upsampled(x: jax.Array, kernel: jax.Array, factors: tuple[int, ...]) -> jax.Array:
    """`conv(upsample(x, factors), kernel)` with strides of 1.

    On a CPU, where factors are 1 and 2 and the kernel has three taps an axis, it takes about (2 / 3)^axes of the
    multiplications: taps that meet the same position are summed beforehand (Shi et al. 2016, 'Is the deconvolution
    layer the same as a convolutional layer?').
    """
    doubled = [axis for axis, factor in enumerate(factors) if factor == 2]
    if not on_cpu() or set(factors) - {1, 2} or set(kernel.shape[:-2]) != {3}:
        return conv(upsample(x, factors), kernel.astype(x.dtype), (1,) * len(factors))
    for axis in reversed(doubled):  # (*K, C, F) -> (*K, C, phases F), the phase of the first axis slowest
        kernel = jnp.moveaxis(jnp.tensordot(_PHASES, kernel, (2, axis)), (1, 0), (axis, -2))
        kernel = kernel.reshape(*kernel.shape[:-2], -1)
    edges = [(int(axis in doubled),) * 2 for axis in range(len(factors))]  # padded here: XLA is slow at it for two taps
    wide = jnp.pad(x, ((0, 0), *edges, (0, 0)))
    y = conv(wide, kernel.astype(x.dtype), (1,) * len(factors), tuple(1 - e for e, _ in edges))
    y = y.reshape(*y.shape[:-1], *(2,) * len(doubled), -1)
    for axis in doubled:  # the first phase axis is this one's
        n, at = x.shape[1 + axis], 1 + axis
        y = jnp.moveaxis(y, len(factors) + 1, 0)
        pair = [jax.lax.slice_in_dim(y[phase], phase, phase + n, axis=at) for phase in (0, 1)]
        y = jnp.stack(pair, at + 1).reshape(*pair[0].shape[:at], 2 * n, *pair[0].shape[at + 1 :])
    return y


def parameter(module: nn.Module, name: str, shape: tuple[int, ...]) -> jax.Array:
    """The module's parameter of this name, which says how it is initialised.

    Flax's own `param` traces the initialiser at every use, only to compare shapes; here they are compared.
    """
    if not module.has_variable("params", name):
        return module.param(name, _INITIALISERS[name], shape)
    value = module.get_variable("params", name)
    if value.shape != shape:
        raise flax.errors.ScopeParamShapeError(name, "/".join(module.path), value.shape, shape)
    return value


class Conv(nn.Module):
    """Convolution over all spatial axes of a (B, *S, C) array, which is up-sampled by `up` first.

    `zero=True` starts the output at zero.
    """

    features: int
    kernel: int | tuple[int, ...] = 3
    strides: int | tuple[int, ...] = 1
    up: tuple[int, ...] = ()
    zero: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rank = x.ndim - 2
        size = (self.kernel,) * rank if isinstance(self.kernel, int) else self.kernel
        strides = (self.strides,) * rank if isinstance(self.strides, int) else self.strides
        name = "zero" if self.zero else "kernel"
        kernel = parameter(self, name, (*size, x.shape[-1], self.features))
        bias = parameter(self, "bias", (self.features,))
        return _biased_conv(x.astype(self.dtype), kernel, bias, strides, self.up)


@jax.jit(static_argnums=(3, 4))
def _biased_conv(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, strides: tuple[int, ...], up: tuple[int, ...]
) -> jax.Array:
    y = conv_upsampled(x, kernel, up) if up else conv(x, kernel.astype(x.dtype), strides)
    return y + bias.astype(x.dtype)


class Dense(nn.Module):
    """Linear map of the last axis."""

    features: int
    zero: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        name = "zero" if self.zero else "kernel"
        kernel = parameter(self, name, (x.shape[-1], self.features))
        bias = parameter(self, "bias", (self.features,))
        return matmul(x.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)


class GroupNorm(nn.Module):
    """Group normalisation (Wu and He 2018) of a (B, *S, C) array, in fp32 whatever the compute type.

    Moments are taken per channel first and then per group, which reads the large axes once.
    """

    groups: int = 32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        groups = next(g for g in range(min(self.groups, channels), 0, -1) if channels % g == 0)
        scale = parameter(self, "scale", (channels,))
        bias = parameter(self, "bias", (channels,))
        return _group_norm(x, scale, bias, groups, self.epsilon)


@jax.jit(static_argnums=(3, 4))
def _group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, groups: int, epsilon: float) -> jax.Array:
    channels, spatial = x.shape[-1], tuple(range(1, x.ndim - 1))
    wide = x.astype(jnp.float32)
    moments = once((wide.mean(spatial), (wide**2).mean(spatial)))
    first, second = (m.reshape(-1, groups, channels // groups) for m in moments)
    mean = first.mean(-1, keepdims=True)
    variance = jnp.maximum(second.mean(-1, keepdims=True) - mean**2, 0.0)
    gain = (jax.lax.rsqrt(variance + epsilon) * jnp.ones_like(first)).reshape(-1, channels) * scale
    shift = bias - (mean * jnp.ones_like(first)).reshape(-1, channels) * gain
    gain, shift = once((gain, shift))
    rows = (slice(None), *(None,) * len(spatial))
    return (wide * gain[rows] + shift[rows]).astype(x.dtype)
