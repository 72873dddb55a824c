"""Perceptual losses, 2D and 3D: one with nothing to download, derivatives of a Gaussian at several scales, and one by the
features of a network whose weights the user brings.

First and second derivatives are a steerable basis (Freeman and Adelson 1991), what the first layer of a trained network
looks like. Two images differ by their responses (structure) and by the local energy of their responses (texture, as in
Portilla and Simoncelli 2000): a blurred edge is wrong in the first, missing fine grain in the second, which a sum of
pixel errors hardly sees. Each band is measured against what the real images have in it, so fine scales count like coarse ones.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from launch.layers import conv
from ldm.blocks import pool

SCALES = 3  # each half the size of the one before, on axes that keep `SHORTEST` positions
SHORTEST = 4
TAPS = ((0.25, 0.5, 0.25), (-0.5, 0.0, 0.5), (0.5, -1.0, 0.5))  # a Gaussian and its derivatives, binomial
CELL = 4  # positions along each axis over which energy is local
PLANES = 4  # of a volume along each axis, that a network for images sees at a time
FLOOR = 1e-3  # of responses, in units of the image: a constant image has no band to be measured against


def distance(x_hat: jax.Array, x: jax.Array) -> jax.Array:
    """Perceptual distance of a batch `x_hat` from the real `x`, both (B, *S, C) in [-1, 1]: a scalar, 0 where they are
    equal and about 1 where `x_hat` has nothing of `x` in any band.

    Mean over scales and filters of |r_hat - r| / mean |r|, and of the same for the local energy of r, half each.
    """
    terms = []
    for r_hat, r in zip(bank(x_hat), bank(x), strict=True):
        for a, b in ((r_hat, r), (energy(r_hat), energy(r))):
            rest = tuple(range(b.ndim - 1))
            terms.append((jnp.abs(a - b).mean(rest) / (jnp.abs(b).mean(rest) + FLOOR)).mean())
    return jnp.stack(terms).mean()


def filters(rank: int) -> np.ndarray:
    """All products, over the axes, of `TAPS` that have order 1 or 2 in sum: (3, ..., 3, 1, F), F = 5 in 2D and 9 in 3D."""
    orders = [o for o in itertools.product(range(3), repeat=rank) if 1 <= sum(o) <= 2]
    outer = [math.prod(np.ix_(*(np.array(TAPS[o]) for o in order))) for order in orders]
    return np.stack(outer, -1)[..., None, :].astype(np.float32)


def bank(x: jax.Array) -> Iterator[jax.Array]:
    """Responses of `x` (B, *S, C) to every filter at every scale, each (B C, *S / 2^scale, F), finest first."""
    rank = x.ndim - 2
    x = jnp.moveaxis(x, -1, 1).reshape(-1, *x.shape[1:-1], 1)
    inside = (slice(None), *(slice(1, -1),) * rank)
    for scale in range(SCALES):
        if scale:
            x = pool(x, [2 if n >= 2 * SHORTEST else 1 for n in x.shape[1:-1]])
        bordered = jnp.pad(x, [(0, 0), *((1, 1),) * rank, (0, 0)], mode="edge")
        yield conv(bordered, filters(rank), (1,) * rank)[inside]


def energy(r: jax.Array) -> jax.Array:
    """Standard deviation of responses in cells of at most `CELL` positions a side."""
    return jnp.sqrt(pool(r**2, [min(CELL, n) for n in r.shape[1:-1]]) + FLOOR**2)


# ---- by a network


class Network(NamedTuple):
    """Stages of (kernel (3, 3, C, F), bias (F,)); the input less `mean`, over `std`, both (C,) and for images in [-1, 1]."""

    stages: list[list[tuple[np.ndarray, np.ndarray]]]
    mean: np.ndarray
    std: np.ndarray


def read_network(path: Path) -> Network:
    """The weights in an .npz as VGG names them: `convS_L.kernel` (height, width, in, out) and `convS_L.bias` are layer L of
    stage S, each followed by a rectifier; a 2x2 maximum stands between stages. `mean` and `std` are optional.

    Torchvision's VGG16, of PyTorch's state_dict `w` (Zhang et al. 2018 for mean and std):

        numbers = {(1, 1): 0, (1, 2): 2, (2, 1): 5, (2, 2): 7, (3, 1): 10, (3, 2): 12, (3, 3): 14}
        arrays = {f"conv{s}_{l}.kernel": w[f"features.{i}.weight"].permute(2, 3, 1, 0) for (s, l), i in numbers.items()}
        arrays |= {f"conv{s}_{l}.bias": w[f"features.{i}.bias"] for (s, l), i in numbers.items()}
        numpy.savez("vgg.npz", **arrays, mean=[-0.030, -0.088, -0.188], std=[0.458, 0.448, 0.450])

    Raises:
      FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    said = f"perceptual_weights={path}"
    if not path.is_file():
        raise FileNotFoundError(f"{said}: no such file")
    with np.load(path) as file:
        arrays = {name: np.asarray(file[name], np.float32) for name in file.files}
    places = sorted(tuple(map(int, m.groups())) for n in arrays if (m := re.fullmatch(r"conv(\d+)_(\d+)\.kernel", n)))
    if not places:
        raise ValueError(f"{said}: no array named conv1_1.kernel; it holds {', '.join(sorted(arrays)) or 'none'}")
    stages: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    channels = None
    for stage, layer in places:
        name = f"conv{stage}_{layer}"
        kernel, bias = arrays[f"{name}.kernel"], arrays.get(f"{name}.bias")
        wanted = (3, 3, channels or kernel.shape[-2])
        if kernel.ndim != 4 or kernel.shape[:3] != wanted:
            raise ValueError(f"{said}: {name}.kernel has shape {kernel.shape}; wanted {(*wanted, 'any')}")
        channels = kernel.shape[-1]
        if bias is None or bias.shape != (channels,):
            raise ValueError(f"{said}: {name}.bias must be there, of shape {(channels,)}")
        stages.setdefault(stage, []).append((kernel, bias))
    seen = arrays[f"conv{places[0][0]}_{places[0][1]}.kernel"].shape[2]
    mean, std = (arrays.get(name, np.full(seen, value, np.float32)) for name, value in (("mean", 0), ("std", 1)))
    if mean.shape != (seen,) or std.shape != (seen,) or not (std > 0).all():
        raise ValueError(
            f"{said}: mean and std must be {seen} numbers each, as many as channels that go in; std above 0"
        )
    return Network(list(stages.values()), mean, std)


def by_network(network: Network) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """`distance(x_hat, x, key)`, as `distance`: the squared difference of features of unit length, mean over positions and
    stages (Zhang et al. 2018, Eq. 1, all channels weighing the same); 0 where they are equal, 2 at most.

    A channel is an image of its own, repeated over those that go in. Of a volume, `PLANES` random ones along each axis.
    """

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        pairs = zip(_features(network, a), _features(network, b), strict=True)
        return jnp.stack([((f - g) ** 2).sum(-1).mean() for f, g in pairs]).mean()

    def of(x_hat: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
        if x.ndim == 4:
            return one(_grey(x_hat), _grey(x))
        terms = []
        for axis in (1, 2, 3):
            places = jax.random.randint(jax.random.fold_in(key, axis), (PLANES,), 0, x.shape[axis])
            cut = lambda v, places=places, axis=axis: _grey(jnp.moveaxis(v[(slice(None),) * axis + (places,)], axis, 1))
            terms.append(one(cut(x_hat), cut(x)))
        return jnp.stack(terms).mean()

    return of


def _grey(x: jax.Array) -> jax.Array:
    """(..., H, W, C) -> one image of one channel each, (N, H, W, 1)."""
    return jnp.moveaxis(x, -1, -3).reshape(-1, *x.shape[-3:-1], 1)


def _features(network: Network, x: jax.Array) -> Iterator[jax.Array]:
    """Features of (N, H, W, 1) at the end of each stage that the image's size allows, of unit length over channels."""
    h: Any = (x - network.mean) / network.std
    for number, stage in enumerate(network.stages):
        if number:
            if min(h.shape[1:3]) < 2:
                return
            h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for kernel, bias in stage:
            h = jax.nn.relu(conv(h, kernel, (1, 1)) + bias)
        yield h / jnp.sqrt((h**2).sum(-1, keepdims=True) + 1e-10)
