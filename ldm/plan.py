"""What of a generator is trained, stage by stage, as shapes: for the cost of a run before anything is compiled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from launch import loop
from ldm import autoencoder, diffusion
from ldm.generator import Generator, Weights


class Stage(NamedTuple):
    """A task as `loop.fit` gets it; `item` is the shape of what a batch has of each image, `prepare` as there."""

    task: loop.Task
    tx: optax.GradientTransformation
    item: Any
    prepare: Callable[[Any, jax.Array], Any] | None


def stage(generator: Generator, name: str, *, steps: int, optimiser: dict, augment: Callable | None) -> Stage:
    """The stage called `name`: 'autoencoder' or 'diffusion'."""
    model, tx = generator.autoencoder, loop.optimiser(steps=steps, **optimiser)
    image = jax.ShapeDtypeStruct(model.image_shape, jnp.float32)
    moved = augment and (lambda x, key: augment(key, x))
    if name == "autoencoder":
        return Stage(autoencoder.task(model, kl_weight=generator.kl_weight), tx, image, moved)
    latent = jax.ShapeDtypeStruct(model.latent_shape, jnp.float32)
    draw = lambda q, key: autoencoder.draw(autoencoder.Posterior(*q), key)
    task = diffusion.task(generator.denoiser, generator.init_unet, draw, min_snr=generator.min_snr)
    if not augment:
        return Stage(task, tx, (latent, latent), None)
    coder = lambda: autoencoder.task(model, kl_weight=0.0).init(jax.random.key(0))
    known = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(coder))
    return Stage(task, tx, image, lambda x, key: tuple(model.encode(known, augment(key, x))))


def weights(generator: Generator) -> Weights:
    """The shapes of what is sampled with."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    moment = jax.ShapeDtypeStruct(generator.autoencoder.latent_shape[-1:], jnp.float32)
    coder = jax.eval_shape(autoencoder.task(generator.autoencoder, kl_weight=0.0).init, key)
    return Weights(coder, jax.eval_shape(generator.init_unet, key), moment, moment)
