"""What an autoencoder is trained for (pixels, a perceptual distance, a patch adversary; KL or commitment), and how well it
then does on images it has not seen."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import scipy

from launch import checkpoint, log, loop, mesh
from launch.loop import Task, gradient_only
from ldm import adversary, autoencoder, perceptual, similarity, vq

ERRORS = {"l1": lambda d: jnp.abs(d).mean(), "l2": lambda d: (d**2).mean()}


class Aims(NamedTuple):
    """Weights of the terms of the loss, per pixel and against the pixel error; 0 leaves a term out.

    Attributes:
      error: 'l1' or 'l2', the pixel error.
      kl_weight: of the KL divergence in nats per pixel (KL autoencoders).
      calibrated: multiply `kl_weight` by the error itself. With 'l1' and a weight of 1 the loss then has the gradient of
        the evidence lower bound for Laplace noise of the scale that fits best (Rybkin et al. 2021, there for a normal).
      commitment: of `vq.commitment` (VQ autoencoders).
      perceptual: of `perceptual.distance`, or, with
      perceptual_weights: an .npz of a network's weights, of `perceptual.by_network`.
      adversarial: of the patch adversary, in units of `adversary.balance`.
      adversary_widths: channels of the patch discriminator's levels.
    """

    error: str
    kl_weight: float
    calibrated: bool
    commitment: float
    perceptual: float
    perceptual_weights: str | None
    adversarial: float
    adversary_widths: tuple[int, ...]


def check(aims: Aims, section: str = "autoencoder") -> None:
    """Raises ValueError for an unknown error, or a network that has no weight; `section` is the config's."""
    if aims.error not in ERRORS:
        raise ValueError(f"config.{section}.error={aims.error!r}: use one of {', '.join(ERRORS)}")
    if aims.perceptual_weights and not aims.perceptual:
        raise ValueError(
            f"config.{section}.perceptual_weights is given but config.{section}.perceptual is 0: set it too"
        )


def task(model: autoencoder.Autoencoder, aims: Aims, *, adversarial: bool) -> Task:
    """The loss of `aims`; its adversarial part only where `adversarial` is true, so that it can start late.

    One backward pass serves autoencoder, codebook and discriminator: each has its own terms, through which no gradient
    reaches the others. What is trained against the autoencoder adds gradients but no value, so that the value of the loss
    is the reconstruction's, before and after the adversary starts.
    """
    discriminator = adversary.PatchDiscriminator(tuple(aims.adversary_widths), model.encoder.dtype)
    pixels = math.prod(model.image_shape)
    perceived = lambda x_hat, x, key: perceptual.distance(x_hat, x)
    if aims.perceptual_weights:
        perceived = perceptual.by_network(perceptual.read_network(Path(aims.perceptual_weights).expanduser()))

    def init(key: jax.Array) -> Any:
        params = model.init(key)
        if aims.adversarial:
            params["discriminator"] = discriminator.init(key, jnp.zeros((1, *model.image_shape)))
        return params

    def latents(params: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """(z for the decoder, the loss of the latents, metrics)."""
        q = model.encode(params, x)
        if not model.codes:
            divergence = autoencoder.kl(q).mean()
            moments = {"z_mean": q.mu.mean(), "z_std": q.mu.std(), "z_noise": jnp.exp(q.logvar / 2).mean()}
            return autoencoder.draw(q, key), aims.kl_weight * divergence / pixels, {"kl": divergence, **moments}
        z_q, index = vq.lookup(params["codebook"], q.mu)
        commitment = vq.commitment(q.mu, z_q)
        loss = aims.commitment * commitment + vq.follow(params["codebook"], q.mu, index, key)
        metrics = {"commitment": commitment, "z_mean": q.mu.mean(), "z_std": q.mu.std(), **vq.usage(index, model.codes)}
        return vq.straight_through(q.mu, z_q), loss, metrics

    def compare(x_hat: jax.Array, x: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The reconstruction's loss, without an adversary."""
        error = ERRORS[aims.error](x_hat - x)
        metrics = {aims.error: error, "psnr": 10 * jnp.log10(4.0 / ((x_hat - x) ** 2).mean())}
        if not aims.perceptual:
            return error, metrics
        distance = perceived(x_hat, x, key)
        return error + aims.perceptual * distance, {**metrics, "perceptual": distance}

    def oppose(params: Any, z: jax.Array, x_hat: jax.Array, x: jax.Array, key: jax.Array) -> tuple[jax.Array, dict]:
        """Zero, with the gradients of both sides of the adversarial game."""
        judge = lambda image: discriminator.apply(params["discriminator"], image)
        fixed = jax.lax.stop_gradient
        rest, last = params["decoder"]["params"], model.decoder.last
        _, to_last = jax.vjp(lambda w: model.decoder.apply({"params": {**rest, last: w}}, fixed(z)), rest[last])
        g_rec = jax.grad(lambda image: compare(image, x, key)[0])(x_hat)
        fooled, g_adv = jax.value_and_grad(lambda image: -judge(image).mean())(x_hat)
        weight = aims.adversarial * adversary.balance(lambda g: to_last(g)[0], g_rec, g_adv)
        d_loss = adversary.hinge(judge(x), judge(fixed(x_hat)))
        push = (fixed(weight * g_adv) * x_hat).sum()
        metrics = {"adversarial": fooled, "adversarial_weight": weight, "discriminator": d_loss}
        return gradient_only(push + d_loss), metrics

    def loss(params: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        z, latent_loss, metrics = latents(params, x, key)
        x_hat = model.decoder.apply(params["decoder"], z)
        error, compared = compare(x_hat, x, key)
        if aims.calibrated and not model.codes:
            latent_loss = latent_loss * jax.lax.stop_gradient(compared[aims.error])
        total, metrics = error + latent_loss, {**metrics, **compared}
        if adversarial:
            opposed, told = oppose(params, z, x_hat, x, key)
            total, metrics = total + opposed, {**metrics, **told}
        return total, metrics

    return Task(init, loss)


def optimiser(model: autoencoder.Autoencoder, aims: Aims, **settings: Any) -> optax.GradientTransformation:
    """`loop.optimiser(**settings)` for the autoencoder, another for the discriminator, `vq.optimiser` for the codebook."""
    parts = {"encoder": "ours", "decoder": "ours"}
    rules = {"ours": loop.optimiser(**settings)}
    if model.codes:
        parts["codebook"], rules["codebook"] = "codebook", vq.optimiser()
    if aims.adversarial:
        parts["discriminator"], rules["discriminator"] = "discriminator", loop.optimiser(**settings)
    return optax.partition(rules, parts) if len(rules) > 1 else rules["ours"]


OCTAVES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # edges of the bands of the report, as shares of the Nyquist frequency


def report(
    model: autoencoder.Autoencoder, params: Any, batches: Iterable[tuple[np.ndarray, int]], folder: Path
) -> dict[str, Any]:
    """Writes `reconstruction.json` and `reconstruction.png` (images, reconstructions, differences) of unseen images.

    Args:
      batches: ordered images, as (array, number of valid rows).
    Returns:
      n_images; psnr_db and ssim of a reconstruction, each mean, standard deviation and worst over images; power_db, what a
      reconstruction has of the image's power, by octave of frequency up to Nyquist's (negative: blurred); latent_mean and
      latent_std per channel; codes_used and perplexity of a codebook, over all these images.
    """

    @jax.jit
    def measure(params: Any, x: jax.Array) -> tuple:
        q = model.encode(params, x)
        x_hat = jnp.clip(model.decode(params, autoencoder.draw(q, jax.random.key(0))), -1.0, 1.0)
        index = vq.lookup(params["codebook"], q.mu).index if model.codes else jnp.zeros((len(x), 0), jnp.int32)
        return x, x_hat, similarity.psnr(x_hat, x), similarity.ssim(x_hat, x), q.mu, index

    parts = list(mesh.stream(lambda x: measure(params, x), batches))
    x, x_hat, psnr, ssim, mu, index = (np.concatenate(column) for column in zip(*parts, strict=True))
    spread = lambda v: {"mean": float(v.mean()), "sd": float(v.std()), "worst": float(v.min())}
    channels = tuple(range(mu.ndim - 1))
    result = {
        "n_images": len(x),
        "psnr_db": spread(psnr),
        "ssim": spread(ssim),
        "octaves": [f"{low:g} to {high:g}" for low, high in itertools.pairwise(OCTAVES)],
        "power_db": [10 * math.log10(a / b) for a, b in zip(octave_power(x_hat), octave_power(x), strict=True)],
        "latent_mean": mu.mean(channels).tolist(),
        "latent_std": mu.std(channels).tolist(),
    }
    if model.codes:
        result |= {name: float(value) for name, value in vq.usage(jnp.asarray(index), model.codes).items()}
    if jax.process_index() == 0:
        checkpoint.write_json(folder / "reconstruction.json", result)
        picture(x, x_hat).save(folder / "reconstruction.png")
    log.say(
        f"{folder.name}: {len(x)} unseen images reconstructed at a PSNR of {psnr.mean():.1f} dB and an SSIM of {ssim.mean():.3f}"
    )
    return result


def octave_power(x: np.ndarray) -> list[float]:
    """Mean power of `x` (B, *S, C) in each of `OCTAVES`, from a cosine transform, which sees no edge at the border."""
    size = x.shape[1:-1]
    power = (scipy.fft.dctn(x, axes=range(1, x.ndim - 1), norm="ortho") ** 2).mean((0, -1))
    radius = np.sqrt(sum(np.square(f) for f in np.meshgrid(*(np.arange(n) / n for n in size), indexing="ij")))
    bands = [(radius > low) & (radius <= high) for low, high in itertools.pairwise(OCTAVES)]
    return [float(power[band].sum()) + 1e-12 for band in bands]  # of an empty band, and its ratio is 0 dB


def picture(x: np.ndarray, x_hat: np.ndarray, columns: int = 8) -> PIL.Image.Image:
    """Rows of images, reconstructions and differences (grey: none); volumes by the slice in their middle."""
    middle = lambda v: v[:columns, v.shape[1] // 2, ..., 0] if v.ndim == 5 else v[:columns, ..., 0]
    rows = [np.concatenate(list(middle(v)), axis=1) for v in (x, x_hat, np.clip(x_hat - x, -1, 1))]
    return PIL.Image.fromarray(np.uint8(np.round((np.concatenate(rows) + 1) * 127.5)))
