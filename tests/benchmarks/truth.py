"""How many copies that a generator really made does each space see? Ground truth by latent distances, not by any detector.

    python -m tests.benchmarks.truth --config=configs/xray.py:compare --config.data.path=NIH --workdir=runs/ldm

WORKDIR is that of a finished run, of the same settings. A synthetic image is a copy where its distance to the nearest
training image, in the autoencoder's latents, is under a third of that to the second (`baselines.close_to_one`). Found:
those above the threshold that 1 % or 5 % of unseen images, passed through the autoencoder, reach. Intervals are exact and
take synthetic images for independent. Prints one line a space.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from absl import app

import data
import detection
import ldm
import main
from detection import baselines, calibrate, euclidean, spaces, views
from launch import machine, mesh


def run(_):
    config, workdir = main._CONFIG.value, Path(main._WORKDIR.value)
    machine.start()
    with jax.set_mesh(mesh.make(1)):
        sets = data.load(**config.data.to_dict())
        model = main.train_detector(config, workdir / "detector", sets, purpose=2)
        generator = main.build_generator(config, workdir)
        reading = {name: config.data[name] for name in ("size", "fit", "on_error", "cache")}
        made = data.read_folder(workdir / "samples", **reading, intensity=main.form_of(config, workdir).reading).images
        unseen = [image for name in ("val", "control") for image in sets[name].images]
        render, encode = ldm.round_trip(generator), ldm.latents(generator)
        run_over = lambda fn, images: np.concatenate(list(mesh.stream(jax.jit(fn), data.in_order(images, 64))))
        near = euclidean.nearest(run_over(encode, made), run_over(encode, sets["train"].images), k=2)
        copy_K, one_K = baselines.close_to_one(near), near.index[:, 0]
        print(
            f"{copy_K.sum()} of {len(copy_K)} synthetic images are copies, of {len(set(one_K[copy_K]))} training images"
        )
        if not copy_K.any():
            return
        embed = detection.embedder(model)
        for name, space in {
            "registered": detection.registered(embed, model.image_shape, config.audit.register),
            "detector alone": spaces.by_correlation(embed),
            "untrained": spaces.by_correlation(detection.untrained(model, jax.random.key(1))),
            "pixels": spaces.by_correlation(views.pixels),
        }.items():
            alike = lambda x, space=space: space.embed(render(x))
            train = space.keep(run_over(alike, sets["train"].images))
            null_M = space.search(space.keep(run_over(alike, unseen)), train).sim[:, 0]
            hits = space.search(space.keep(run_over(space.embed, made)), train)
            told = []
            for rate in (0.01, 0.05):
                above_K = hits.sim[:, 0] > np.quantile(null_M, 1 - rate, method="higher")
                seen, n = int(above_K[copy_K].sum()), int(copy_K.sum())
                low, high = calibrate.clopper_pearson(seen, n)
                told.append(f"{100 * seen / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}] at {rate:.0%}")
            right = np.mean(hits.index[:, 0][copy_K] == one_K[copy_K])
            print(f"{name:<16} {', '.join(told)}; the right training image {right:.1%}; {len(null_M)} unseen images")


if __name__ == "__main__":
    app.run(run, [*sys.argv, "--mode=audit"])
