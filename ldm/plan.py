"""What of a generator is trained, stage by stage: for its training, and for what a run costs before anything is compiled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from launch import loop
from ldm import autoencoder, diffusion, gan, reconstruction
from ldm.generator import Generator, Weights


class Stage(NamedTuple):
    """A task as `loop.fit` gets it; `item` is the shape of what a batch has of each image, `prepare` as there."""

    task: loop.Task
    tx: optax.GradientTransformation
    item: Any
    prepare: Callable[[Any, jax.Array], Any] | None


def stage(generator: Generator, name: str, *, steps: int, optimiser: dict, augment: Callable | None) -> Stage:
    """The stage called `name`, one of `generator.stages`; an autoencoder with its adversary, where it has one."""
    moved = augment and (lambda x, key: augment(key, x))
    if name == "gan":
        image = jax.ShapeDtypeStruct(generator.gan.image_shape, jnp.float32)
        return Stage(gan.task(generator.gan), gan.optimiser(steps=steps, **optimiser), image, moved)
    model, aims = generator.autoencoder, generator.aims
    image = jax.ShapeDtypeStruct(model.image_shape, jnp.float32)
    if name != "diffusion":
        task = reconstruction.task(model, aims, adversarial=bool(aims.adversarial))
        return Stage(task, reconstruction.optimiser(model, aims, steps=steps, **optimiser), image, moved)
    latent = jax.ShapeDtypeStruct(model.latent_shape, jnp.float32)
    draw = lambda q, key: autoencoder.draw(autoencoder.Posterior(*q), key)
    task = diffusion.task(generator.denoiser, generator.init_unet, draw, min_snr=generator.min_snr)
    tx = loop.optimiser(steps=steps, **optimiser)
    if not augment:
        return Stage(task, tx, (latent, latent), None)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    known = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return Stage(task, tx, image, lambda x, key: tuple(model.encode(known, augment(key, x))))


def weights(generator: Generator) -> Any:
    """The shapes of what is sampled with; see `generator.load`."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    if generator.gan is not None:
        return jax.eval_shape(generator.gan.init, key)["generator"]
    moment = jax.ShapeDtypeStruct(generator.autoencoder.latent_shape[-1:], jnp.float32)
    unet = generator.init_unet and jax.eval_shape(generator.init_unet, key)
    return Weights(jax.eval_shape(generator.autoencoder.init, key), unet, moment, moment)
