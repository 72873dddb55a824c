"""Autoencoders, 2D and 3D by the same modules: KL (Kingma and Welling 2014; Rombach et al. 2022) and VQ (`vq`)."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from launch.layers import Conv, GroupNorm
from ldm import vq
from ldm.blocks import Attention, ResBlock, fold, levels_of, recomputed, unfold

LOGVAR_RANGE = (-30.0, 20.0)  # as in Rombach et al.'s code: keeps exp finite early in training


class Posterior(NamedTuple):
    """Diagonal normal over latents, each (B, *s, c); a VQ encoder gives a point, log variance minus infinity."""

    mu: jax.Array
    logvar: jax.Array


class Encoder(nn.Module):
    """(B, *S, C) in [-1, 1] -> (B, *s, outputs) in fp32; level i + 1 is `strides[i]` times smaller than level i."""

    widths: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    patch: tuple[int, ...]
    outputs: int
    blocks: int
    attention: bool
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = Conv(self.widths[0], dtype=self.dtype)(fold(x, self.patch))
        for level, width in enumerate(self.widths):
            if level:
                h = Conv(width, strides=self.strides[level - 1], dtype=self.dtype)(h)
            for _ in range(self.blocks):
                h = recomputed(ResBlock, self.remat)(width, dtype=self.dtype)(h)
        h = _middle(h, self.attention, self.remat, self.dtype)
        return Conv(self.outputs, dtype=self.dtype)(nn.silu(GroupNorm()(h))).astype(jnp.float32)


class Decoder(nn.Module):
    """(B, *s, c) latents -> (B, *S, C) in fp32; the encoder mirrored."""

    widths: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    patch: tuple[int, ...]
    channels: int
    blocks: int
    attention: bool
    remat: bool = False
    dtype: Any = jnp.float32

    @property
    def last(self) -> str:
        """What the parameters of the last layer are called."""
        return f"Conv_{len(self.widths)}"

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        h = _middle(Conv(self.widths[-1], dtype=self.dtype)(z), self.attention, self.remat, self.dtype)
        for level in reversed(range(len(self.widths))):
            for _ in range(self.blocks):
                h = recomputed(ResBlock, self.remat)(self.widths[level], dtype=self.dtype)(h)
            if level:
                h = Conv(self.widths[level - 1], up=self.strides[level - 1], dtype=self.dtype)(h)
        cells = self.channels * math.prod(self.patch)
        return unfold(Conv(cells, dtype=self.dtype)(nn.silu(GroupNorm()(h))), self.patch).astype(jnp.float32)


def _middle(h: jax.Array, attention: bool, remat: bool, dtype: Any) -> jax.Array:
    block, attend = (recomputed(kind, remat) for kind in (ResBlock, Attention))
    h = block(h.shape[-1], dtype=dtype)(h)
    return block(h.shape[-1], dtype=dtype)(attend(dtype=dtype)(h)) if attention else h


class Autoencoder(NamedTuple):
    """Modules that belong together; parameters are {'encoder', 'decoder'}, and 'codebook' where there are `codes`."""

    encoder: Encoder
    decoder: Decoder
    image_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    codes: int

    def init(self, key: jax.Array) -> Any:
        encoder_key, decoder_key = jax.random.split(key)
        params = {
            "encoder": self.encoder.init(encoder_key, jnp.zeros((1, *self.image_shape))),
            "decoder": self.decoder.init(decoder_key, jnp.zeros((1, *self.latent_shape))),
        }
        return params | {"codebook": vq.init(self.codes, self.latent_shape[-1])} if self.codes else params

    def encode(self, params: Any, x: jax.Array) -> Posterior:
        h = self.encoder.apply(params["encoder"], x)
        if self.codes:
            return Posterior(h, jnp.full_like(h, -jnp.inf))
        mu, logvar = jnp.split(h, 2, axis=-1)
        return Posterior(mu, jnp.clip(logvar, *LOGVAR_RANGE))

    def decode(self, params: Any, z: jax.Array) -> jax.Array:
        """Images of latents `z`, which a VQ autoencoder first replaces by their nearest codes."""
        if self.codes:
            z = vq.lookup(params["codebook"], z).z_q
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
    codes: int = 0,
    remat: bool = False,
    dtype: Any = jnp.float32,
    section: str = "autoencoder",
) -> Autoencoder:
    """Autoencoder for images of `image_shape` (*S, C).

    Args:
      widths: channels of each level, from full size down.
      strides: down-sampling between levels, one int or one int per axis each; one fewer than `widths`.
      patch: positions folded into channels before the first level (a cheap first down-sampling).
      codes: entries of the codebook of a VQ autoencoder; 0: a KL autoencoder.
      remat: compute activations again for the backward pass (`blocks.recomputed`).
      section: of the config, as errors name it.
    Raises:
      ValueError: where the factors do not divide the image, or the numbers of levels differ.
    """
    *size, channels = image_shape
    strides, patch, latent_size = levels_of(section, tuple(size), widths, strides, patch)
    shared = {"widths": tuple(widths), "strides": strides, "patch": patch}
    shared |= {"blocks": blocks, "attention": attention, "remat": remat, "dtype": dtype}
    encoder = Encoder(**shared, outputs=latent if codes else 2 * latent)
    decoder = Decoder(**shared, channels=channels)
    return Autoencoder(encoder, decoder, tuple(image_shape), (*latent_size, latent), codes)


def kl(q: Posterior) -> jax.Array:
    """KL(q || N(0, 1)) in nats per image, summed over latent elements (Kingma and Welling 2014, App. B): (B,)."""
    each = 0.5 * (q.mu**2 + jnp.exp(q.logvar) - 1.0 - q.logvar)
    return each.reshape(each.shape[0], -1).sum(-1)


def draw(q: Posterior, key: jax.Array) -> jax.Array:
    """z ~ q by the reparametrisation z = mu + sigma eps."""
    return q.mu + jnp.exp(0.5 * q.logvar) * jax.random.normal(key, q.mu.shape)
