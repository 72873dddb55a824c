"""What of a generator is trained, stage by stage: for its training, and for what a run costs before anything is compiled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from launch import loop
from ldm import autoencoder, diffusion, gan, levels, look, reconstruction, samplers
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


def one_look(generator: Generator) -> Callable[[Weights, jax.Array], Any]:
    """What `look.watch` computes at one look, with as many patients as it may have: `(weights, numbers (B,))`, B images at a
    time. For its cost, as that of sampling; the values mean nothing."""
    denoiser, shape = generator.denoiser, generator.autoencoder.latent_shape

    def compute(weights: Weights, numbers: jax.Array) -> Any:
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(numbers)
        z, few = jnp.zeros((len(numbers), *shape)), keys[: look.SAMPLES]
        measure = lambda _: levels.losses(denoiser, weights.unet, z, keys, look.LEVELS, draws=1)
        sample = lambda _: samplers.sample(denoiser, weights.unet, few, shape, sampler="ddim", steps=look.STEPS)
        draw = lambda turn: generator.autoencoder.decode(weights.autoencoder, sample(turn))
        turns = lambda images, at_once: jnp.arange(-(-images // at_once))
        return jax.lax.map(measure, turns(2 * look.PATIENTS, len(keys))), jax.lax.map(
            draw, turns(look.SAMPLES, len(few))
        )

    return compute


def weights(generator: Generator) -> Any:
    """The shapes of what is sampled with; see `generator.load`."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    if generator.gan is not None:
        return jax.eval_shape(generator.gan.init, key)["generator"]
    moment = jax.ShapeDtypeStruct(generator.autoencoder.latent_shape[-1:], jnp.float32)
    unet = generator.init_unet and jax.eval_shape(generator.init_unet, key)
    return Weights(jax.eval_shape(generator.autoencoder.init, key), unet, moment, moment)
