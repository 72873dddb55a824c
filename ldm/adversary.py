"""A patch discriminator for autoencoders (Isola et al. 2017) and its hinge losses, weighed as in VQ-GAN (Esser et al. 2021)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from launch.layers import Conv, GroupNorm


class PatchDiscriminator(nn.Module):
    """(B, *S, C) -> (B, *s, 1), one judgement per patch; every level halves each axis. Any rank."""

    widths: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for level, width in enumerate(self.widths):
            x = Conv(width, strides=2, dtype=self.dtype)(x)
            x = nn.leaky_relu(GroupNorm()(x) if level else x, 0.2)
        return Conv(1, dtype=self.dtype)(x).astype(jnp.float32)


def hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
    """The discriminator's loss: judgements of real images above 1 and of reconstructions below -1 cost nothing."""
    return (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()) / 2


def balance(head_back: Callable, g_rec: jax.Array, g_adv: jax.Array) -> jax.Array:
    """Weight at which the adversarial gradient is as long as the reconstruction's at the decoder's last layer (Esser et al.
    2021, Eq. 7): `g_rec` and `g_adv` are gradients with respect to the image, which `head_back` takes to that layer."""
    rec, adv = (optax.tree.norm(head_back(g)) for g in (g_rec, g_adv))
    return jnp.clip(rec / (adv + 1e-4), 0.0, 1e4)
