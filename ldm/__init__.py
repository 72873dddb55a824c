"""Generators: autoencoder, latent UNet, GAN, diffusion maths and sampling. Sees arrays; knows neither files nor detector."""

from ldm.generator import Generator, Weights, build, latents, load, optimal, renoised, round_trip, sampler, stages
from ldm.levels import loss_levels
from ldm.plan import one_look, stage, weights
from ldm.quality import before_and_after, evaluate, not_measured, read_features
from ldm.similarity import ssim
from ldm.training import train
