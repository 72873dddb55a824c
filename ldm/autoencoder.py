"""KL autoencoder (Kingma and Welling 2014; Rombach et al. 2022), 2D and 3D by the same modules."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from launch.layers import Conv, GroupNorm
from launch.loop import Task
from ldm.blocks import Attention, ResBlock, fold, unfold, upsample

LOGVAR_RANGE = (-30.0, 20.0)  # as in Rombach et al.'s code: keeps exp finite early in training


class Posterior(NamedTuple):
    """Diagonal normal over latents, each (B, *s, c)."""

    mu: jax.Array
    logvar: jax.Array


class Encoder(nn.Module):
    """(B, *S, C) in [-1, 1] -> `Posterior`; level i + 1 is `strides[i]` times smaller than level i."""

    widths: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    patch: tuple[int, ...]
    latent: int
    blocks: int
    attention: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> Posterior:
        h = Conv(self.widths[0], dtype=self.dtype)(fold(x, self.patch))
        for level, width in enumerate(self.widths):
            if level:
                h = Conv(width, strides=self.strides[level - 1], dtype=self.dtype)(h)
            for _ in range(self.blocks):
                h = ResBlock(width, dtype=self.dtype)(h)
        h = _middle(h, self.attention, self.dtype)
        h = Conv(2 * self.latent, dtype=self.dtype)(nn.silu(GroupNorm()(h))).astype(jnp.float32)
        mu, logvar = jnp.split(h, 2, axis=-1)
        return Posterior(mu, jnp.clip(logvar, *LOGVAR_RANGE))


class Decoder(nn.Module):
    """(B, *s, c) latents -> (B, *S, C); the encoder mirrored."""

    widths: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    patch: tuple[int, ...]
    channels: int
    blocks: int
    attention: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        h = _middle(Conv(self.widths[-1], dtype=self.dtype)(z), self.attention, self.dtype)
        for level in reversed(range(len(self.widths))):
            for _ in range(self.blocks):
                h = ResBlock(self.widths[level], dtype=self.dtype)(h)
            if level:
                h = Conv(self.widths[level - 1], dtype=self.dtype)(upsample(h, self.strides[level - 1]))
        cells = self.channels
        for factor in self.patch:
            cells *= factor
        return unfold(Conv(cells, dtype=self.dtype)(nn.silu(GroupNorm()(h))), self.patch).astype(jnp.float32)


def _middle(h: jax.Array, attention: bool, dtype: Any) -> jax.Array:
    width = h.shape[-1]
    h = ResBlock(width, dtype=dtype)(h)
    if attention:
        h = ResBlock(width, dtype=dtype)(Attention(dtype=dtype)(h))
    return h


class Autoencoder(NamedTuple):
    """Encoder and decoder that belong together; parameters are {'encoder': ..., 'decoder': ...}."""

    encoder: Encoder
    decoder: Decoder
    image_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]

    def encode(self, params: Any, x: jax.Array) -> Posterior:
        return self.encoder.apply(params["encoder"], x)

    def decode(self, params: Any, z: jax.Array) -> jax.Array:
        return self.decoder.apply(params["decoder"], z)


def build(
    image_shape: tuple[int, ...],
    *,
    widths: tuple[int, ...],
    strides: tuple,
    patch: int | tuple[int, ...] = 1,
    latent: int = 8,
    blocks: int = 1,
    attention: bool = False,
    dtype: Any = jnp.float32,
) -> Autoencoder:
    """Autoencoder for images of `image_shape` (*S, C).

    Args:
      widths: channels of each level, from full size down.
      strides: down-sampling between levels, one int or one int per axis each; one fewer than `widths`.
      patch: positions folded into channels before the first level (a cheap first down-sampling).
    Raises:
      ValueError: where the factors do not divide the image, or the numbers of levels differ.
    """
    *size, channels = image_shape
    each = lambda v: (int(v),) * len(size) if isinstance(v, int) else tuple(int(n) for n in v)
    patch, strides, widths = each(patch), tuple(each(s) for s in strides), tuple(widths)
    if len(strides) != len(widths) - 1:
        raise ValueError(
            f"config.autoencoder.strides has {len(strides)} entries; widths {widths} need {len(widths) - 1}"
        )
    if any(len(s) != len(size) for s in (*strides, patch)):
        raise ValueError(
            f"config.autoencoder: strides {strides} and patch {patch} must fit images of size {tuple(size)}"
        )
    latent_size = []
    for axis, extent in enumerate(size):
        factor = patch[axis]
        for s in strides:
            factor *= s[axis]
        if extent % factor:
            raise ValueError(
                f"config.data.size[{axis}]={extent} must be a multiple of {factor}, the autoencoder's factor"
            )
        latent_size.append(extent // factor)
    shared = {
        "widths": widths,
        "strides": strides,
        "patch": patch,
        "blocks": blocks,
        "attention": attention,
        "dtype": dtype,
    }
    return Autoencoder(
        Encoder(**shared, latent=latent),
        Decoder(**shared, channels=channels),
        tuple(image_shape),
        (*latent_size, latent),
    )


def kl(q: Posterior) -> jax.Array:
    """KL(q || N(0, 1)) in nats per image, summed over latent elements (Kingma and Welling 2014, App. B): (B,)."""
    each = 0.5 * (q.mu**2 + jnp.exp(q.logvar) - 1.0 - q.logvar)
    return each.reshape(each.shape[0], -1).sum(-1)


def draw(q: Posterior, key: jax.Array) -> jax.Array:
    """z ~ q by the reparametrisation z = mu + sigma eps."""
    return q.mu + jnp.exp(0.5 * q.logvar) * jax.random.normal(key, q.mu.shape)


def task(model: Autoencoder, *, kl_weight: float) -> Task:
    """L1 reconstruction, mean over pixels, plus `kl_weight` times the KL divergence per pixel."""
    pixels = 1
    for n in model.image_shape:
        pixels *= n

    def init(key: jax.Array) -> Any:
        encoder_key, decoder_key = jax.random.split(key)
        return {
            "encoder": model.encoder.init(encoder_key, jnp.zeros((1, *model.image_shape))),
            "decoder": model.decoder.init(decoder_key, jnp.zeros((1, *model.latent_shape))),
        }

    def loss(params: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        q = model.encode(params, x)
        x_hat = model.decode(params, draw(q, key))
        l1 = jnp.abs(x_hat - x).mean()
        divergence = kl(q).mean()
        psnr = 10 * jnp.log10(4.0 / ((x_hat - x) ** 2).mean())
        return l1 + kl_weight * divergence / pixels, {"l1": l1, "kl": divergence, "psnr": psnr}

    return Task(init, loss)
