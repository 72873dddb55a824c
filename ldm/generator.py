"""The latent diffusion model as a whole: its two training stages, sampling, and the autoencoder's round trip."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from launch import checkpoint, log, loop, mesh, stage
from ldm import autoencoder, controls, diffusion, look, samplers, unet

ENCODE_BATCH = 64


class Generator(NamedTuple):
    """The models without their parameters, and the folders of the two stages."""

    autoencoder: autoencoder.Autoencoder
    denoiser: diffusion.Denoiser
    init_unet: Callable[[jax.Array], Any]
    kl_weight: float
    min_snr: float
    workdir: Path


class Weights(NamedTuple):
    """What a trained generator samples with; `mean` and `std` (c,) normalise its latents."""

    autoencoder: Any
    unet: Any
    mean: jax.Array
    std: jax.Array


def build(image_shape: tuple[int, ...], workdir: Path, *, coder: dict, net: dict, process: dict) -> Generator:
    """The generator for images of `image_shape` (*S, C); the three dicts are the config's sections of the same order:
    `autoencoder`, `unet`, `diffusion`. Raises ValueError on settings that do not fit together."""
    coder = dict(coder)
    kl_weight = coder.pop("kl_weight")
    autoencoder_ = autoencoder.build(image_shape, **coder)
    unet_ = unet.UNet(**net)

    def apply(params: Any, z_t: jax.Array, t: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return unet_.apply(params, z_t, t, train=key is not None, rngs={} if key is None else {"dropout": key})

    def init(key: jax.Array) -> Any:
        return unet_.init(key, jnp.zeros((1, *autoencoder_.latent_shape)), jnp.zeros(1))

    schedule = diffusion.schedule(process["schedule"], process["steps"], process["beta"])
    denoiser = diffusion.denoiser(apply, schedule, process["predict"])
    return Generator(autoencoder_, denoiser, init, kl_weight, process["min_snr"], workdir)


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
    **fit: Any,
) -> None:
    """First stage: trains and publishes the autoencoder in `workdir/autoencoder`.

    Args:
      images, held_out: random access to float32 (*S, C) in [-1, 1]; `held_out` is only measured on.
      batches, in_order: the input pipeline, as in the `data` package.
      augment: `augment(key, x) -> x` of the training images, on the device.
    """
    folder = generator.workdir / "autoencoder"
    if checkpoint.published(folder) == fit["steps"]:
        return
    moved = augment and jax.jit(augment)
    state = loop.fit(
        "autoencoder",
        autoencoder.task(generator.autoencoder, kl_weight=generator.kl_weight),
        lambda start: batches(images, batch=batch, start=start),
        folder=folder,
        tx=loop.optimiser(steps=fit["steps"], **optimiser),
        key=key,
        prepare=moved and (lambda x, key: moved(key, x)),
        held_out=lambda: loop.whole_batches(in_order, held_out, batch),
        **fit,
    )
    checkpoint.publish(folder, fit["steps"], state.params)


def load_autoencoder(generator: Generator) -> Any:
    """Parameters of the trained autoencoder."""
    init = autoencoder.task(generator.autoencoder, kl_weight=generator.kl_weight).init
    return checkpoint.load(generator.workdir / "autoencoder", jax.eval_shape(init, jax.random.key(0)))


def latents_folder(generator: Generator) -> Path:
    """Inside the autoencoder's folder, so that they go when it goes: another encoder's latents must never be used."""
    return generator.workdir / "autoencoder" / "latents"


def encode_set(generator: Generator, images: Sequence, *, in_order: Callable) -> None:
    """Encodes the training set once, into `autoencoder/latents`: `mu.npy`, `logvar.npy` (n, *s, c), and `moments.json`
    with the mean and standard deviation of z per channel (the posterior's own variance included).

    Both posterior moments are kept, so that training draws a fresh z each time: a stored draw would freeze its noise.
    """
    folder = latents_folder(generator)
    if folder.exists():
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
        for q in mesh.stream(lambda x: encode(params, x), in_order(images, ENCODE_BATCH)):
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


def moments(generator: Generator) -> tuple[jax.Array, jax.Array]:
    """(mean, std) of the training set's latents per channel, as `encode_set` left them."""
    path = latents_folder(generator) / "moments.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there; run --mode=train with this --workdir first")
    both = json.loads(path.read_text())
    return jnp.asarray(both["mean"], jnp.float32), jnp.asarray(both["std"], jnp.float32)


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
    """Second stage: trains the UNet on the latents and publishes its averages in `workdir/diffusion`.

    At every evaluation it is looked at (`look.watch`), and `guard` may end it: then the last averages before the gap
    opened are published.

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
    encode = jax.jit(lambda params, x: tuple(generator.autoencoder.encode(params, x)))

    def draw(q: tuple[jax.Array, jax.Array], key: jax.Array) -> jax.Array:
        return (autoencoder.draw(autoencoder.Posterior(*q), key) - mean) / std

    if augment is None:
        source, prepare = Posteriors(latents_folder(generator)), None
    else:
        moved = jax.jit(augment)
        source, prepare = images, lambda x, key: encode(params, moved(key, x))
    encoded = [encode(params, x) for x in loop.whole_batches(in_order, held_out, batch)]
    state = loop.fit(
        "diffusion",
        diffusion.task(generator.denoiser, generator.init_unet, draw, min_snr=generator.min_snr),
        lambda start: batches(source, batch=batch, start=start),
        folder=folder,
        tx=loop.optimiser(steps=fit["steps"], **optimiser),
        key=key,
        ema=tuple(ema),
        prepare=prepare,
        held_out=lambda: encoded,
        on_eval=watch(generator, images, held_out, patients, params, in_order=in_order, ema=ema, guard=guard, **fit),
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
    batch = -(-min(len(chosen), ENCODE_BATCH) // mesh.size()) * mesh.size()
    mu_held_out = np.concatenate(list(mesh.stream(lambda x: encode(params, x), in_order(chosen, batch))))

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


def averages(generator: Generator, decays: tuple[float, ...], folder: Path) -> dict[str, Any]:
    """The published moving averages in `folder`, by decay."""
    one = jax.eval_shape(generator.init_unet, jax.random.key(0))
    return checkpoint.load(folder, {str(decay): one for decay in decays})


def load(generator: Generator, *, ema: float, decays: tuple[float, ...]) -> Weights:
    """Weights to sample with: the UNet's average of decay `ema`, one of the trained `decays`.

    Raises:
      ValueError: if that average was not kept.
    """
    if ema not in decays:
        raise ValueError(f"config.sample.ema={ema}: training keeps config.train.diffusion.ema={tuple(decays)}")
    unet_ = averages(generator, decays, generator.workdir / "diffusion")[str(ema)]
    return Weights(load_autoencoder(generator), unet_, *moments(generator))


def optimal(generator: Generator) -> tuple[Generator, Weights]:
    """A control: the generator with the optimal denoiser of its training latents (`controls.optimal`) for a UNet. It
    memorizes everything."""
    mean, std = moments(generator)
    mu = np.load(latents_folder(generator) / "mu.npy", mmap_mode="r")
    known = controls.known((mu - np.asarray(mean)) / np.asarray(std))
    denoiser = controls.optimal(generator.denoiser.schedule)
    return generator._replace(denoiser=denoiser), Weights(load_autoencoder(generator), known, mean, std)


def sampler(
    generator: Generator, weights: Weights, *, key: jax.Array, sampler: str, steps: int, eta: float
) -> Callable[[np.ndarray], jax.Array]:
    """A jitted function: sample numbers (B,) -> images (B, *S, C) in [-1, 1]; `sampler` and what follows as in `samplers`.

    Image i depends on (`key`, i) alone: not on its batch, the number of devices, or how many are drawn.
    """

    @jax.jit
    def draw(weights: Weights, numbers: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)
        shape = generator.autoencoder.latent_shape
        z = samplers.sample(generator.denoiser, weights.unet, keys, shape, sampler=sampler, steps=steps, eta=eta)
        x = generator.autoencoder.decode(weights.autoencoder, z * weights.std + weights.mean)
        return jnp.clip(x, -1.0, 1.0)

    return lambda numbers: draw(weights, numbers)


def renoised(
    generator: Generator, weights: Weights, *, level: float, steps: int = 20
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`(key, x) -> x`: images given noise in the latent space up to the time t / T = `level`, and denoised by DDIM, as the
    generator would if it had come so near to them. Row i depends on fold_in(key, i) alone."""

    @jax.jit
    def copy(weights: Weights, key: jax.Array, x: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(x)))
        z = (generator.autoencoder.encode(weights.autoencoder, x).mu - weights.mean) / weights.std
        how = {"sampler": "ddim", "steps": steps, "z": z, "level": level}
        z = samplers.sample(generator.denoiser, weights.unet, keys, z.shape[1:], **how)
        x = generator.autoencoder.decode(weights.autoencoder, z * weights.std + weights.mean)
        return jnp.clip(x, -1.0, 1.0)

    return lambda key, x: copy(weights, key, x)


def latents(generator: Generator) -> Callable[[jax.Array], jax.Array]:
    """A jitted function: images (B, *S, C) -> the means of their latents as vectors (B, D)."""
    params = load_autoencoder(generator)
    encode = jax.jit(lambda params, x: generator.autoencoder.encode(params, x).mu.reshape(len(x), -1))
    return lambda x: encode(params, x)


def round_trip(generator: Generator) -> Callable[[jax.Array], jax.Array]:
    """A jitted function: images -> the autoencoder's rendering of them, clipped to [-1, 1].

    It decodes a draw z ~ q, which is what the UNet learns to sample; so real images passed through it are rendered as
    samples are, and the audit can compare like with like. The draw's noise depends on the row in the batch alone.
    """
    params = load_autoencoder(generator)

    @jax.jit
    def trip(params: Any, x: jax.Array) -> jax.Array:
        z = autoencoder.draw(generator.autoencoder.encode(params, x), jax.random.key(0))
        return jnp.clip(generator.autoencoder.decode(params, z), -1.0, 1.0)

    return lambda x: trip(params, x)
