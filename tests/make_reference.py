"""Writes tests/reference.npz: what diffusers and MONAI compute on fixed inputs, which tests of ours are compared with.

    pip install torch==2.13.0 diffusers==0.42.1 monai==1.6.1
    python tests/make_reference.py

Neither package is needed to run the tests. The file holds
  schedule/KIND: alpha_bar of diffusers' DDPMScheduler, every 37th of 1000 steps and the last;
  start, path/SAMPLER/PREDICT/STEPS: a latent, and where diffusers' sampler takes it with the network `toy`;
  times/SAMPLER/STEPS: the times at which it is asked;
  ddpm: each of 50 ancestral steps from `start`, with noise 0 and with noise 1;
  residual/RANK, attention/RANK: input, output and weights (times 256) of MONAI's AEKLResBlock and SpatialAttentionBlock.
"""

from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import torch
from monai.networks.blocks import SpatialAttentionBlock
from monai.networks.nets.autoencoderkl import AEKLResBlock

FILE = Path(__file__).with_name("reference.npz")
T, BETA = 1000, (0.0015, 0.0195)
START = np.random.default_rng(0).standard_normal((4, 4, 1)).astype(np.float32)
KINDS = {"cosine": "squaredcos_cap_v2", "linear": "linear", "scaled_linear": "scaled_linear"}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
DDPM = {"steps": 50, "beta": (0.001, 0.2)}


def toy(z_t, t):
    """Any smooth function of z_t and t / T will do for a network, as long as both sides are given the same."""
    return np.tanh(np.asarray(z_t) * (0.3 + t)) + 0.1


def schedules():
    picked = [*range(0, T, 37), T - 1]
    for kind, theirs in KINDS.items():
        scheduler = diffusers.DDPMScheduler(T, beta_start=BETA[0], beta_end=BETA[1], beta_schedule=theirs)
        yield f"schedule/{kind}", scheduler.alphas_cumprod.numpy()[picked]


def walk(scheduler, shift=0):
    """Where a scheduler takes `START`; its times count from `shift`."""
    z_t = torch.tensor(START)
    for t in scheduler.timesteps:
        z_t = scheduler.step(torch.tensor(toy(z_t, (t.item() - shift) / T)), t, z_t).prev_sample
    return z_t.numpy()


def deterministic():
    for predict, theirs in PREDICTIONS.items():
        for sampler, steps in (("ddim", 10), ("ddim", 40), ("dpmpp", 10), ("dpmpp", 25)):
            shared = {"num_train_timesteps": T, "beta_start": BETA[0], "beta_end": BETA[1], "prediction_type": theirs}
            shared |= {"beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
            if sampler == "ddim":
                scheduler = diffusers.DDIMScheduler(**shared, clip_sample=False, set_alpha_to_one=True)
            else:
                scheduler = diffusers.DPMSolverMultistepScheduler(**shared, final_sigmas_type="zero")
            scheduler.set_timesteps(steps)
            yield f"times/{sampler}/{steps}", scheduler.timesteps.numpy()
            yield f"path/{sampler}/{predict}/{steps}", walk(scheduler)


def flows(steps=20):
    """Theirs counts times 1 ... T where ours counts 0 ... T - 1."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=T)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    yield f"path/euler/flow/{steps}", walk(scheduler, shift=1)
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(num_train_timesteps=T)
    scheduler.set_timesteps(steps)
    times = torch.arange(steps, 0, -1) * (T / steps)  # its own spacing is not ours
    scheduler.timesteps, sigmas = torch.cat([times[:1], times[1:].repeat_interleave(2)]), times / T
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2), torch.zeros(1)])
    yield f"path/heun/flow/{steps}", walk(scheduler, shift=1)


def ancestral():
    """(step, noise 0 or 1, *latent); step 0 is the first that a sampler takes."""
    T, (low, high) = DDPM["steps"], DDPM["beta"]
    shared = {"beta_start": low, "beta_end": high, "beta_schedule": "linear", "prediction_type": "v_prediction"}
    scheduler, steps = diffusers.DDPMScheduler(T, **shared, clip_sample=False), []
    for t in range(T - 1, -1, -1):
        for noise in (0.0, 1.0):
            drawn = lambda shape, noise=noise, **_: torch.full(shape, noise)
            with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", drawn):
                output = torch.tensor(toy(START, t / T))
                steps.append(scheduler.step(output, t, torch.tensor(START)).prev_sample.numpy())
    yield "ddpm", np.reshape(steps, (T, 2, *START.shape))


def blocks():
    """Channels first; as many groups as ours has. Weights are random, none at its initial value, in steps of 1 / 256."""
    for rank, size, wide in ((2, (6, 5), 64), (3, (3, 4, 5), 32)):
        for name, block, channels in (
            ("residual", AEKLResBlock(rank, wide, norm_num_groups=32, norm_eps=1e-5, out_channels=32), wide),
            ("attention", SpatialAttentionBlock(rank, 32, num_head_channels=8, norm_num_groups=32, norm_eps=1e-5), 32),
        ):
            rng = np.random.default_rng(rank)
            whole = {key: rng.integers(-127, 128, value.shape, np.int8) for key, value in block.state_dict().items()}
            block.load_state_dict({key: torch.tensor(value / 256, dtype=torch.float32) for key, value in whole.items()})
            x = rng.standard_normal((1, channels, *size), dtype=np.float32)
            with torch.no_grad():
                yield f"{name}/{rank}/output", block(torch.tensor(x)).numpy()
            yield f"{name}/{rank}/input", x
            yield from ((f"{name}/{rank}/{key}", value) for key, value in whole.items())


if __name__ == "__main__":
    found = dict(pair for part in (schedules, deterministic, flows, ancestral, blocks) for pair in part())
    np.savez_compressed(FILE, start=START, **found)
    print(f"{FILE}: {len(found) + 1} arrays, {FILE.stat().st_size / 1024:.0f} KiB")
