"""The generators as wholes, latent diffusion model, VAE and GAN: what each is made of, its weights, and how it is sampled."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from launch import checkpoint
from ldm import autoencoder, controls, diffusion, gan, levels, look, reconstruction, samplers, unet

# stages of training, in order; each is a folder of the workdir, the last one what is sampled from
STAGES = {"ldm": ("autoencoder", "diffusion"), "vae": ("vae",), "gan": ("gan",)}


class Generator(NamedTuple):
    """The models without their parameters; what a generator of this `kind` does not have is None.

    Attributes:
      adversary_from: step share of the autoencoder's training at which its adversary starts.
      min_snr: as in `diffusion.task`.
      workdir: its stages are folders there.
    """

    kind: str
    autoencoder: autoencoder.Autoencoder | None
    aims: reconstruction.Aims | None
    adversary_from: float
    denoiser: diffusion.Denoiser | None
    init_unet: Callable[[jax.Array], Any] | None
    min_snr: float
    gan: gan.Gan | None
    workdir: Path


class Weights(NamedTuple):
    """What a generator that decodes latents samples with; `mean` and `std` (c,) normalise them. A VAE has no `unet`."""

    autoencoder: Any
    unet: Any
    mean: jax.Array
    std: jax.Array


def stages(kind: str) -> tuple[str, ...]:
    """The stages of training of this kind of generator, in order.

    Raises:
      ValueError: for an unknown kind.
    """
    if kind not in STAGES:
        raise ValueError(f"config.generator={kind!r}: use one of {', '.join(STAGES)}")
    return STAGES[kind]


def build(
    kind: str,
    image_shape: tuple[int, ...],
    workdir: Path,
    *,
    first: dict,
    net: dict,
    process: dict,
    dtype: str = "float32",
    remat: bool = False,
) -> Generator:
    """The generator of this kind for images of `image_shape` (*S, C).

    Args:
      first: the config's section of the first stage.
      net, process: the sections `unet` and `diffusion`, of latent diffusion alone.
      dtype: 'float32' or 'bfloat16', of activations and matrix products; parameters, norms, softmax and losses are fp32.
      remat: compute activations again for the backward pass (`blocks.recomputed`).
    Raises:
      ValueError: on settings that do not fit together.
    """
    stages(kind)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"config.dtype={dtype!r}: use 'float32' or 'bfloat16'")
    compute = jnp.dtype(dtype)
    empty = Generator(kind, None, None, 1.0, None, None, 0.0, None, workdir)
    if kind == "gan":
        return empty._replace(gan=gan.build(image_shape, **first, dtype=compute, remat=remat))
    coder = dict(first)
    aims = reconstruction.Aims(**{name: coder.pop(name) for name in reconstruction.Aims._fields})
    adversary_from = coder.pop("adversary_from")
    model = autoencoder.build(image_shape, **coder, dtype=compute, remat=remat, section=stages(kind)[0])
    reconstruction.check(aims, stages(kind)[0])
    generator = empty._replace(autoencoder=model, aims=aims, adversary_from=adversary_from)
    if kind == "vae":
        if model.codes:
            raise ValueError("config.vae.codes must be 0: a codebook has no prior to sample from")
        return generator
    net_ = unet.UNet(**net, remat=remat, dtype=compute)

    def apply(params: Any, z_t: jax.Array, t: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return net_.apply(params, z_t, t, train=key is not None, rngs={} if key is None else {"dropout": key})

    def init(key: jax.Array) -> Any:
        return net_.init(key, jnp.zeros((1, *model.latent_shape)), jnp.zeros(1))

    schedule = diffusion.schedule(process["schedule"], process["steps"], process["beta"])
    denoiser = diffusion.denoiser(apply, schedule, process["predict"])
    return generator._replace(denoiser=denoiser, init_unet=init, min_snr=process["min_snr"])


def coder_folder(generator: Generator) -> Path:
    """Where the autoencoder is trained and published."""
    return generator.workdir / stages(generator.kind)[0]


def load_autoencoder(generator: Generator) -> Any:
    """Parameters of the trained autoencoder."""
    return checkpoint.load(coder_folder(generator), jax.eval_shape(generator.autoencoder.init, jax.random.key(0)))


def latents_folder(generator: Generator) -> Path:
    """Inside the autoencoder's folder, so that they go when it goes: another encoder's latents must never be used."""
    return coder_folder(generator) / "latents"


def moments(generator: Generator) -> tuple[jax.Array, jax.Array]:
    """(mean, std) of the training set's latents per channel, as `training.encode_set` left them."""
    path = latents_folder(generator) / "moments.json"
    both = checkpoint.read_json(path)
    if both is None:
        raise FileNotFoundError(f"{path}: not there; run --mode=train with this --workdir first")
    return jnp.asarray(both["mean"], jnp.float32), jnp.asarray(both["std"], jnp.float32)


def averages(generator: Generator, decays: tuple[float, ...], folder: Path) -> dict[str, Any]:
    """The moving averages published in `folder`, by decay: of the UNet, or of the GAN's generator."""
    init = generator.init_unet if generator.gan is None else lambda key: generator.gan.init(key)["generator"]
    one = jax.eval_shape(init, jax.random.key(0))
    return checkpoint.load(folder, {str(decay): one for decay in decays})


def load(generator: Generator, *, ema: float, decays: tuple[float, ...], steps: int, guard: str) -> Any:
    """Weights to sample with: the average of decay `ema`, one of `decays`, which the last stage keeps. A VAE keeps none
    and takes no notice of them.

    Args:
      steps: of the last stage, in all; `guard`: as in `look`.
    Raises:
      ValueError: if that average was not kept, or the weights are of another number of steps and no guard stopped there:
        training for more has not come to its end, say.
    """
    final = stages(generator.kind)[-1]
    folder = generator.workdir / final
    made, opened = checkpoint.published(folder), look.opened(folder) if guard == "stop" else None
    if made not in (None, steps, opened and opened["last_safe"]):
        raise ValueError(
            f"{folder} holds weights of step {made}, not of config.train.{final}.steps={steps}: run --mode=train to its "
            "end, or give the steps and config.train.guard of the weights"
        )
    if final == "vae":
        channels = generator.autoencoder.latent_shape[-1]
        return Weights(load_autoencoder(generator), None, jnp.zeros(channels), jnp.ones(channels))
    if ema not in decays:
        raise ValueError(f"config.sample.ema={ema}: training keeps config.train.{final}.ema={tuple(decays)}")
    average = averages(generator, decays, folder)[str(ema)]
    if generator.gan is not None:
        return average
    return Weights(load_autoencoder(generator), average, *moments(generator))


def optimal(generator: Generator) -> tuple[Generator, Weights]:
    """A control: the generator with the optimal denoiser of its training latents (`controls.optimal`) for a UNet. It
    memorizes everything."""
    if generator.denoiser is None:
        raise ValueError(
            f"config.sample.control='optimal' is of latent diffusion; config.generator={generator.kind!r} has none"
        )
    mean, std = moments(generator)
    mu = np.load(latents_folder(generator) / "mu.npy", mmap_mode="r")
    known = controls.known((mu - np.asarray(mean)) / np.asarray(std))
    denoiser = controls.optimal(generator.denoiser.schedule)
    return generator._replace(denoiser=denoiser), Weights(load_autoencoder(generator), known, mean, std)


def sampler(
    generator: Generator, weights: Any, *, key: jax.Array, sampler: str, steps: int, eta: float
) -> Callable[[np.ndarray], jax.Array]:
    """A jitted function: sample numbers (B,) -> images (B, *S, C) in [-1, 1]; `sampler`, `steps` and `eta` as in `samplers`.

    Image i depends on (`key`, i) alone: not on its batch, the number of devices, or how many are drawn.
    """

    def images(weights: Any, keys_B: jax.Array) -> jax.Array:
        if generator.gan is not None:
            return generator.gan.draw(weights, keys_B)
        shape = generator.autoencoder.latent_shape
        if generator.denoiser is None:
            z = jax.vmap(lambda key: jax.random.normal(key, shape))(keys_B)
        else:
            how = {"sampler": sampler, "steps": steps, "eta": eta}
            z = samplers.sample(generator.denoiser, weights.unet, keys_B, shape, **how)
        return generator.autoencoder.decode(weights.autoencoder, z * weights.std + weights.mean)

    @jax.jit
    def draw(weights: Any, numbers: jax.Array, key: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)
        return jnp.clip(images(weights, keys), -1.0, 1.0)

    return lambda numbers: draw(weights, numbers, key)


def renoised(
    generator: Generator, weights: Weights, levels: Sequence[float], *, steps: int = 20
) -> dict[float, Callable[[jax.Array, jax.Array], jax.Array]]:
    """level -> `(key, x) -> x`: images given noise in the latent space up to the time t / T = level, and denoised by DDIM,
    as the generator would if it had come so near to them. Row i depends on fold_in(key, i) alone."""

    @jax.jit  # one program for all levels
    def copy(weights: Weights, key: jax.Array, x: jax.Array, first: int) -> jax.Array:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(x)))
        z = (generator.autoencoder.encode(weights.autoencoder, x).mu - weights.mean) / weights.std
        how = {"sampler": "ddim", "steps": steps, "z": z, "first": first}
        z = samplers.sample(generator.denoiser, weights.unet, keys, z.shape[1:], **how)
        x = generator.autoencoder.decode(weights.autoencoder, z * weights.std + weights.mean)
        return jnp.clip(x, -1.0, 1.0)

    first = {level: steps - max(1, round(level * steps)) for level in levels}
    return {level: lambda key, x, first=at: copy(weights, key, x, first) for level, at in first.items()}


def latents(generator: Generator) -> Callable[[jax.Array], jax.Array]:
    """A jitted function: images (B, *S, C) -> the means of their latents as vectors (B, D)."""
    params = load_autoencoder(generator)
    encode = jax.jit(lambda params, x: generator.autoencoder.encode(params, x).mu.reshape(len(x), -1))
    return lambda x: encode(params, x)


def round_trip(generator: Generator) -> Callable[[jax.Array], jax.Array] | None:
    """A jitted function: images -> the autoencoder's rendering of them, clipped to [-1, 1]. None for a GAN, which has none.

    It decodes a draw z ~ q, which is what the decoder is given when it is sampled from; so real images passed through it
    are rendered as samples are, and the audit can compare like with like. The draw's noise follows from the image's own
    bits: each image has its own, as each sample has, and the same one in whatever batch and place it comes. Noise that two
    images share is a likeness of the two that samples have with neither.
    """
    if generator.autoencoder is None:
        return None
    params = load_autoencoder(generator)

    @jax.jit
    def trip(params: Any, x: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda mark: jax.random.fold_in(jax.random.key(0), mark))(levels.fingerprint(x))
        z = jax.vmap(autoencoder.draw)(generator.autoencoder.encode(params, x), keys)
        return jnp.clip(generator.autoencoder.decode(params, z), -1.0, 1.0)

    return lambda x: trip(params, x)
