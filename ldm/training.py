"""Training of the generators, stage by stage, each on the one loop. A stage that is done is skipped."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch import checkpoint, log, loop, mesh, stage
from ldm import autoencoder, look, plan, reconstruction, samplers
from ldm.generator import Generator, averages, coder_folder, latents_folder, load_autoencoder, moments


def on_images(
    images: Sequence,
    held_out: Sequence,
    *,
    batches: Callable,
    in_order: Callable,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None,
    batch: int,
) -> dict[str, Any]:
    """What `loop.fit` is told of a stage that trains on the images themselves."""
    moved = augment and jax.jit(augment)
    return {
        "batches": lambda start: batches(images, batch=batch, start=start),
        "prepare": moved and (lambda x, key: moved(key, x)),
        "held_out": lambda: loop.whole_batches(in_order, held_out, batch),
    }


def train(
    generator: Generator,
    name: str,
    images: Sequence,
    held_out: Sequence,
    *,
    patients: tuple[np.ndarray, np.ndarray],
    guard: str,
    **settings: Any,
) -> None:
    """Trains the stage called `name`, one of `generator.stages`, and publishes it in `workdir/name`.

    Args:
      images, held_out: random access to float32 (*S, C) in [-1, 1]; `held_out` is only measured on.
      patients: of `images` and of `held_out`; `guard`: as in `look`. Both are of the diffusion stage.
      settings: `batches` and `in_order`, the input pipeline, as in the `data` package; `augment(key, x) -> x` of the
        training images, on the device, or None; `key`; and the stage's section of config.train.
    """
    if name == "diffusion":
        return train_diffusion(generator, images, held_out, patients=patients, guard=guard, **settings)
    return (train_gan if name == "gan" else train_autoencoder)(generator, images, held_out, **settings)


def train_autoencoder(
    generator: Generator,
    images: Sequence,
    held_out: Sequence,
    *,
    batches: Callable,
    in_order: Callable,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None,
    key: jax.Array,
    batch: int,
    optimiser: dict,
    steps: int,
    **fit: Any,
) -> None:
    """Trains the autoencoder, reports on its reconstructions of `held_out`, and encodes what the UNet is to learn.

    An adversary that starts late is a second run of the loop, from the step at which the first one ends.

    Raises:
      ValueError: for a codebook whose batches come in parts: a dead code would get the mean of a random vector of each.
    """
    folder, model, aims = coder_folder(generator), generator.autoencoder, generator.aims
    if checkpoint.published(folder) != steps:
        if model.codes and fit.get("accumulate", 1) > 1:
            raise ValueError(
                f"config.train.{folder.name}.accumulate={fit['accumulate']}: with config.{folder.name}.codes it must be 1"
            )
        data = on_images(images, held_out, batches=batches, in_order=in_order, augment=augment, batch=batch)
        tx = plan.stage(generator, folder.name, steps=steps, optimiser=optimiser, augment=None).tx
        alone = int(steps * generator.adversary_from) if aims.adversarial else steps
        for until, adversarial in [(alone, False), (steps, True)] if alone < steps else [(steps, False)]:
            state = loop.fit(
                folder.name,
                reconstruction.task(model, aims, adversarial=adversarial),
                folder=folder,
                steps=until,
                tx=tx,
                key=key,
                **data,
                **fit,
            )
        params = {name: part for name, part in state.params.items() if name != "discriminator"}
        reconstruction.report(model, params, in_order(held_out, min(batch, len(held_out))), folder)
        checkpoint.publish(folder, steps, params)
    if generator.kind == "ldm":
        encode_set(generator, images, in_order=in_order, batch=batch)


def encode_set(generator: Generator, images: Sequence, *, in_order: Callable, batch: int) -> None:
    """Encodes the training set once, `batch` images at a time, into `autoencoder/latents`: `mu.npy`, `logvar.npy` (n, *s,
    c), and `moments.json` with the mean and standard deviation of z per channel (the posterior's own variance included).

    Both posterior moments are kept, so that training draws a fresh z each time: a stored draw would freeze its noise.
    """
    folder = latents_folder(generator)
    if checkpoint.exists(folder):
        return
    params = load_autoencoder(generator)
    aside = folder.with_name(".latents")
    lead = jax.process_index() == 0
    if lead:
        aside.mkdir(parents=True, exist_ok=True)
    stage.barrier("encode")
    shape = (len(images), *generator.autoencoder.latent_shape)
    files = [
        np.lib.format.open_memmap(aside / f"{name}.npy", mode="w+", dtype=np.float32, shape=shape) if lead else None
        for name in autoencoder.Posterior._fields
    ]
    encode = jax.jit(generator.autoencoder.encode)
    axes = tuple(range(len(shape) - 1))
    at, total, squares = 0, 0.0, 0.0
    with log.progress("latents", len(images), unit="image") as bar:
        for q in mesh.stream(lambda x: encode(params, x), in_order(images, min(batch, len(images)))):
            n = len(q.mu)
            for file, values in zip(files, q, strict=True):
                if lead:
                    file[at : at + n] = values
            total = total + q.mu.sum(axes, dtype=np.float64)
            squares = squares + (q.mu.astype(np.float64) ** 2 + np.exp(q.logvar, dtype=np.float64)).sum(axes)
            at += n
            bar.update(n)
    count = np.prod(shape[:-1])
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    for file in files:
        if lead:
            file.flush()
    checkpoint.write_json(aside / "moments.json", {"mean": mean.tolist(), "std": std.tolist()})
    stage.replace_folder(aside, folder)


class Posteriors:
    """Random access to the stored posteriors, (mu, logvar) per image."""

    def __init__(self, folder: Path):
        self._arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in autoencoder.Posterior._fields]

    def __len__(self) -> int:
        return len(self._arrays[0])

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        return tuple(np.array(a[index]) for a in self._arrays)


def train_diffusion(
    generator: Generator,
    images: Sequence,
    held_out: Sequence,
    *,
    batches: Callable,
    in_order: Callable,
    patients: tuple[np.ndarray, np.ndarray],
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None,
    key: jax.Array,
    batch: int,
    optimiser: dict,
    ema: tuple[float, ...],
    guard: str,
    **fit: Any,
) -> None:
    """Trains the UNet on the latents and publishes its averages.

    At every evaluation it is looked at (`look.watch`) unless `guard` is 'off', and 'stop' may end it: then the last averages
    before the gap opened are published.

    Args:
      patients: of `images` and of `held_out`.

    Augmentation (`augment(key, x) -> x`) acts on images and is followed by the encoder in every step: stored latents
    of one view would make it a no-op. Without augmentation the posteriors of `encode_set` say the same, far cheaper.
    """
    folder = generator.workdir / "diffusion"
    look.check(guard)
    if checkpoint.published(folder) == fit["steps"] or publish_safe(generator, guard, ema):
        return
    params = load_autoencoder(generator)
    mean, std = moments(generator)
    encode = jax.jit(lambda params, x: tuple(generator.autoencoder.encode(params, mesh.spread(x))))

    # not in the step: it would be compiled again for other moments
    normalise = jax.jit(lambda q, mean, std: ((q[0] - mean) / std, q[1] - 2 * jnp.log(std)))

    if augment is None:
        source, prepare = Posteriors(latents_folder(generator)), lambda q, key: normalise(q, mean, std)
    else:
        moved = jax.jit(augment)
        source, prepare = images, lambda x, key: normalise(encode(params, moved(key, x)), mean, std)
    encode_whole = lambda: [
        normalise(encode(params, x), mean, std) for x in loop.whole_batches(in_order, held_out, batch)
    ]
    how = {"in_order": in_order, "batch": batch, "ema": ema, "guard": guard}
    planned = plan.stage(generator, "diffusion", steps=fit["steps"], optimiser=optimiser, augment=None)
    state = loop.fit(
        "diffusion",
        planned.task,
        lambda start: batches(source, batch=batch, start=start),
        folder=folder,
        tx=planned.tx,
        key=key,
        ema=tuple(ema),
        prepare=prepare,
        held_out=functools.cache(encode_whole),
        on_eval=None if guard == "off" else watch(generator, images, held_out, patients, params, **how, **fit),
        **fit,
    )
    if not publish_safe(generator, guard, ema):
        checkpoint.publish(folder, fit["steps"], state.ema)


def watch(
    generator: Generator,
    images: Sequence,
    held_out: Sequence,
    patients: tuple[np.ndarray, np.ndarray],
    params: Any,
    *,
    in_order: Callable,
    batch: int,
    ema: tuple[float, ...],
    guard: str,
    eval_every: int,
    **_: Any,
) -> Callable[[int, loop.State], tuple[dict[str, float], bool]]:
    """`look.watch` of this generator; `params` are the autoencoder's."""
    mean, std = moments(generator)
    encode = jax.jit(lambda params, x: generator.autoencoder.encode(params, x).mu)
    normalise = lambda mu: (mu - np.asarray(mean)) / np.asarray(std)
    mu_train = np.load(latents_folder(generator) / "mu.npy", mmap_mode="r")
    of_train, of_held_out = (look.one_per_patient(p) for p in patients)
    chosen = [held_out[i] for i in of_held_out]
    some = in_order(chosen, min(batch, len(chosen)))
    mu_held_out = np.concatenate(list(mesh.stream(lambda x: encode(params, x), some)))

    @jax.jit
    def draw(unet: Any, params: Any, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(numbers)
        shape = generator.autoencoder.latent_shape
        z = samplers.sample(generator.denoiser, unet, keys, shape, sampler="ddim", steps=look.STEPS)
        return jnp.clip(generator.autoencoder.decode(params, z * std + mean), -1.0, 1.0), z

    return look.watch(
        denoiser=generator.denoiser,
        draw=lambda unet, numbers: draw(unet, params, numbers),
        sides=look.Sides(normalise(mu_train[of_train]), normalise(mu_held_out)),
        latents=mu_train,
        normalise=normalise,
        images=images,
        in_order=in_order,
        batch=batch,
        folder=generator.workdir / "diffusion",
        average=str(ema[0]) if ema else None,
        every=eval_every,
        guard=guard,
        key=jax.random.key(1),
    )


def publish_safe(generator: Generator, guard: str, decays: tuple[float, ...]) -> bool:
    """Where training is to stop at the gap and the gap has opened: publishes the last averages before it.

    Raises:
      ValueError: if the gap was open at the first look already.
    """
    folder = generator.workdir / "diffusion"
    opened = look.opened(folder)
    if guard != "stop" or opened is None:
        return False
    if opened["last_safe"] is None:
        raise ValueError(
            f"{folder}: memorization showed at the first look, step {opened['opened_at']}; look earlier with a smaller "
            "config.train.diffusion.eval_every and another --workdir"
        )
    if checkpoint.published(folder) != opened["last_safe"]:
        checkpoint.publish(folder, opened["last_safe"], averages(generator, decays, folder / "last_safe"))
        log.say(f"diffusion: stopped; step {opened['last_safe']} is what will be sampled")
    return True


def train_gan(
    generator: Generator,
    images: Sequence,
    held_out: Sequence,
    *,
    batches: Callable,
    in_order: Callable,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None,
    key: jax.Array,
    batch: int,
    optimiser: dict,
    ema: tuple[float, ...],
    **fit: Any,
) -> None:
    """Trains both players and publishes the averages of the one that generates, in `workdir/gan`.

    The held-out loss is the discriminator's: far above its loss in training, it has learned the training images by heart.
    """
    folder = generator.workdir / "gan"
    if checkpoint.published(folder) == fit["steps"]:
        return
    planned = plan.stage(generator, "gan", steps=fit["steps"], optimiser=optimiser, augment=None)
    state = loop.fit(
        "gan",
        planned.task,
        folder=folder,
        tx=planned.tx,
        key=key,
        ema=tuple(ema),
        **on_images(images, held_out, batches=batches, in_order=in_order, augment=augment, batch=batch),
        **fit,
    )
    checkpoint.publish(folder, fit["steps"], {decay: average["generator"] for decay, average in state.ema.items()})
