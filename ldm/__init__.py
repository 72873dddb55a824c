"""Generators: autoencoder, latent UNet, diffusion maths and sampling. Sees arrays; knows neither files nor detector."""

from ldm.generator import (
    Generator,
    Weights,
    build,
    encode_set,
    latents,
    load,
    optimal,
    renoised,
    round_trip,
    sampler,
    train_autoencoder,
    train_diffusion,
)
from ldm.levels import loss_levels
from ldm.quality import evaluate, read_features
from ldm.similarity import ssim
