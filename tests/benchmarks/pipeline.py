"""The input pipeline alone against the training steps that it feeds, in one run on one machine.

A stage is trained for a few steps on one batch that is there from the start, which times the step without any input;
then its real input is drawn and thrown away. `ratio` is how many times faster the input comes than the step eats it.
"""

import tempfile
import time
from pathlib import Path

import jax

import data
import main
from configs import brain
from launch import mesh

STEPS, WARM = 16, 6
STAGES = ("autoencoder", "diffusion", "detector")


def measure() -> dict:
    """2D: the default config. 3D: volumes of 32x40x32 with small models."""
    volumes = brain.get_config()
    volumes.data.size = (32, 40, 32)
    volumes.data.cohort.subjects = {"train": 24, "select": 8, "val": 2, "control": 2}
    volumes.autoencoder.widths = (8, 16, 32)
    volumes.unet.width = 32
    for name in STAGES:
        volumes.train[name].batch = 8
    return {"2D": of_config(brain.get_config()), "3D": of_config(volumes)}


def of_config(config) -> dict:
    fed = {}  # stage, by its order -> (images, batch, seconds a step)

    def one_batch(images, *, batch, start=0):
        rows = next(data.batches(images, batch=batch, seed=0))
        times = []
        fed[len(fed)] = images, batch, times
        while True:
            times.append(time.perf_counter())
            yield rows

    for name in STAGES:
        config.train[name].update(steps=STEPS, eval_every=10**6, save_every=10**6)
    real, main.pipeline_of = main.pipeline_of, lambda config: {"batches": one_batch, "in_order": data.in_order}
    try:
        with tempfile.TemporaryDirectory() as workdir, jax.set_mesh(mesh.make(1)):
            main.train(config, Path(workdir))
            return {
                name: compared(images, batch, (times[-1] - times[WARM]) / (len(times) - 1 - WARM))
                for name, (images, batch, times) in zip(STAGES, fed.values(), strict=True)
            }
    finally:
        main.pipeline_of = real


def compared(images, batch: int, step: float, seconds: float = 3.0) -> dict:
    batches = data.batches(images, batch=batch, seed=0)
    for _ in range(8):
        next(batches)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        next(batches)
        count += 1
    alone = (time.perf_counter() - begin) / count
    return {
        "images_per_s_pipeline": round(batch / alone, 1),
        "images_per_s_step": round(batch / step, 1),
        "ratio": round(step / alone, 1),
    }
