"""The copy detector: a contrastive encoder, its training and its embeddings."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from detection import encoder
from launch import checkpoint, layers, log, loop, mesh


class Detector(NamedTuple):
    """Encoder without its parameters, for images of `image_shape`; `folder` holds what is trained."""

    encoder: nn.Module
    image_shape: tuple[int, ...]
    temperature: float
    flips: bool  # the embedding of an image is the sum of its own and its mirror image's: a flipped copy has the same
    folder: Path


def build(image_shape: tuple[int, ...], folder: Path, *, temperature: float, flips: bool, **arch: Any) -> Detector:
    """Detector from the config's section `detector`."""
    return Detector(encoder.build(**arch), image_shape, temperature, flips, folder)


def rescale(x: jax.Array) -> jax.Array:
    """Each image to [-1, 1] by its own minimum and maximum, as the paper feeds its detector; a constant image to -1."""
    axes = tuple(range(1, x.ndim))
    low, high = x.min(axes, keepdims=True), x.max(axes, keepdims=True)
    return 2 * (x - low) / jnp.maximum(high - low, 1e-6) - 1


def nt_xent(a_BxD: jax.Array, b_BxD: jax.Array, temperature: float) -> jax.Array:
    """NT-Xent (Chen et al. 2020, Eq. 1) over the global batch: cosine similarities, all other 2B - 2 views negative."""
    z = jnp.concatenate([a_BxD, b_BxD])
    z = z * jax.lax.rsqrt((z**2).sum(-1, keepdims=True) + 1e-12)
    n = z.shape[0]
    sim = jnp.where(jnp.eye(n, dtype=bool), -jnp.inf, z @ z.T / temperature)
    partner = jnp.take_along_axis(sim, ((jnp.arange(n) + n // 2) % n)[:, None], axis=1)[:, 0]
    return (jax.nn.logsumexp(sim, axis=1) - partner).mean()


def task(detector: Detector, augment: Callable[[jax.Array, jax.Array], jax.Array], both: bool) -> loop.Task:
    """NT-Xent between an image and its augmented view (`both`: two augmented views).

    Args:
      augment: `augment(key, x) -> x`, on the device.
    """

    def init(key: jax.Array) -> Any:
        return detector.encoder.init(key, jnp.zeros((1, *detector.image_shape)))

    def loss(params: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        one_key, other_key, drop_key = jax.random.split(key, 3)
        views = jnp.concatenate([augment(one_key, x) if both else x, augment(other_key, x)])
        z = detector.encoder.apply(params, rescale(views), train=True, rngs={"dropout": drop_key})
        a, b = jnp.split(z, 2)
        return nt_xent(a, b, detector.temperature), {}

    return loop.Task(init, loss)


def train(
    detector: Detector,
    images: Sequence,
    held_out: Sequence,
    *,
    batches: Callable,
    in_order: Callable,
    augment: Callable[[jax.Array, jax.Array], jax.Array],
    both: bool,
    key: jax.Array,
    batch: int,
    optimiser: dict,
    **fit: Any,
) -> None:
    """Trains and publishes the parameters with the lowest loss on `held_out`.

    Raises:
      ValueError: if the devices cannot share the batch.
    """
    if checkpoint.published(detector.folder) == fit["steps"]:
        return
    batch = at_most(batch, len(images))
    state = loop.fit(
        "detector",
        task(detector, augment, both),
        lambda start: batches(images, batch=batch, start=start),
        folder=detector.folder,
        tx=loop.optimiser(steps=fit["steps"], **optimiser),
        key=key,
        held_out=lambda: loop.whole_batches(in_order, held_out, batch),
        select=True,
        **fit,
    )
    checkpoint.publish(detector.folder, fit["steps"], state.best)


def at_most(batch: int, n: int) -> int:
    """The batch for `n` images: an image that is in a batch twice is a negative of itself, and pushed away from itself.

    It may still be, in a batch that runs across the end of an epoch. It depends on the two numbers alone, not on the
    machine: a multiple of eight, or of fewer than eight images a power of two, for as many devices to share.
    """
    if batch <= n:
        return batch
    capped = n // 8 * 8 or 2 ** (n.bit_length() - 1)
    devices = mesh.shares()
    if capped % devices:
        raise ValueError(
            f"the {devices} devices cannot share a batch of {capped}, the most that {n} training images allow: set "
            f"config.train.detector.batch to a multiple of {devices} that is at most {n}, or use fewer devices"
        )
    why = f"with {n} training images, config.train.detector.batch={batch} would make an image a negative of itself"
    log.say(f"detector: {why}; batches of {capped} are used")
    return capped


def embedder(detector: Detector) -> Callable[[jax.Array], jax.Array]:
    """A jitted function: images (B, *S, C) -> embeddings (B, dim) of the trained detector."""
    init = task(detector, lambda key, x: x, both=False).init
    return _with(detector, checkpoint.load(detector.folder, jax.eval_shape(init, jax.random.key(0))))


def untrained(detector: Detector, key: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """As `embedder`, with parameters as they are before the first step: what the architecture sees by itself."""
    return _with(detector, layers.init(task(detector, lambda key, x: x, both=False).init, key))


def _with(detector: Detector, params: Any) -> Callable[[jax.Array], jax.Array]:
    @jax.jit
    def apply(params: Any, x: jax.Array) -> jax.Array:
        one = lambda x: detector.encoder.apply(params, rescale(x))
        return one(x) + one(jnp.flip(x, -2)) if detector.flips else one(x)

    return lambda x: apply(params, x)
