"""How many planted near-copies does each detector see? On patients that it was not trained on.

    python -m tests.benchmarks.detectors --nih=FOLDER --hippocampus=FOLDER --workdir=runs/detectors

For each data set, copies of every unseen (validation and control) image are planted in a gallery of those same images:
identity, rotation by 3 to 5 degrees, flip, shift by up to 4 pixels, scale by 8 %, gamma, noise, blur, and all combined.
Recall: the copy's nearest image in the gallery scores above the threshold that 1 % or 5 % of the unseen images reach with
their nearest image of another patient. Intervals resample patients. Detectors: ours, ours without registration, the
paper's, ours untrained, pixel correlation, SSIM (on the 16 nearest by pixels); those that learn also when trained on another
data set of the same rank. Writes WORKDIR/detectors.json and prints a table.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import data
import detection
import main
from configs import default
from data import augment
from detection import calibrate, neighbours, registration, spaces, views
from launch import machine, mesh
from ldm import similarity

KINDS = ("identity", "rotation", "flip", "shift", "scale", "gamma", "noise", "blur", "combined")
DRAWS = 1000


def configs(nih, hippocampus):
    """Name -> config of each data set at hand."""
    made = {"brain": default.get_config()}
    if nih:
        made["nih"] = config = default.get_config()
        config.data.path = nih
        config.data.fractions = {"train": 0.5, "select": 0.05, "val": 0.25, "control": 0.2}
        config.train.detector.steps = 600
    if hippocampus:
        made["hippocampus"] = config = default.get_config()
        config.data.update(path=hippocampus, size=(32, 48, 32), intensity="percentile:0.5:99.5", fit="pad")
        config.data.fractions = {"train": 0.5, "select": 0.1, "val": 0.2, "control": 0.2}
        config.train.detector.batch = 32
        config.audit.register = 4
    return made


def plant(kind, key, x):
    """One near-copy of each image (B, *S, 1), drawn at random within the kind; all geometry in one resampling."""
    rank, on = x.ndim - 2, lambda k: kind in (k, "combined")
    keys = jax.random.split(key, 6)
    coin = lambda key, shape: jax.random.bernoulli(key, 0.5, (len(x), *shape))
    sign = 2.0 * coin(keys[0], (1 if rank == 2 else 3,)) - 1
    turn = sign * jax.random.uniform(keys[1], sign.shape, minval=3, maxval=5) * on("rotation")
    move = jax.random.uniform(keys[2], (len(x), rank), minval=-4, maxval=4) * on("shift")
    size = jnp.where(coin(keys[3], ()), 1.08, 1 / 1.08) ** on("scale")
    mirror = jnp.ones(rank).at[-1].set(-1.0 if on("flip") else 1.0)
    if kind not in ("identity", "gamma", "noise", "blur"):
        warp = lambda image, a, m, s: augment._resample(image, augment._rotation(a) * (mirror / s), -m, "edge")
        x = jax.vmap(warp)(x, turn, move, size)
    if on("gamma"):
        x = jax.vmap(augment._gamma)(x, jnp.where(coin(keys[4], ()), 1.35, 1 / 1.35))
    x = augment.blur(x, 1.0) if on("blur") else x
    return augment.noise(keys[5], x, 0.1) if on("noise") else jnp.clip(x, -1, 1)


def rows(embed, x):
    return np.concatenate(list(mesh.stream(jax.jit(embed), data.in_order(x, 64))))


def by_vectors(embed):
    """(queries, gallery, which pairs count) -> similarity matrix, by correlation of vectors; -2 where they do not count."""
    vectors = lambda x: neighbours.standardise(rows(embed, x))
    return lambda query, gallery, counts=True: np.where(counts, vectors(query) @ vectors(gallery).T, -2)


def by_registration(embed, candidates):
    """The same after registering candidates, half by vectors and half by spectra, as the audit does; others get -1."""
    near, looks = by_vectors(embed), lambda x: rows(lambda x: registration.looks(x).reshape(len(x), -1), x)
    plain = by_vectors(lambda x: registration.spectra(registration.looks(x)))
    best = lambda sim, count: np.argsort(-sim, axis=1)[:, :count]

    def spectrum(query, gallery, counts):
        return np.maximum(plain(query, gallery, counts), plain(query[..., ::-1, :], gallery, counts))

    def similar(query, gallery, counts=True):
        vectors = near(query, gallery, counts)
        half = candidates // 2
        pick = np.concatenate([best(vectors, candidates - half), best(spectrum(query, gallery, counts), half)], 1)
        sim = np.full(vectors.shape, -1.0)
        shape = registration.shape(gallery.shape[1:-1])
        np.put_along_axis(sim, pick, spaces.overlaid(looks(query), looks(gallery), pick, shape), 1)
        return np.where(counts, sim, -2)

    return similar


def by_ssim(query, gallery, counts=True):
    """The same by SSIM, on the 16 nearest by pixels; others get -1."""
    pixels = by_vectors(views.pixels)(query, gallery, counts)
    near = np.argsort(-pixels, axis=1)[:, :16]
    score = jax.jit(similarity.ssim)
    sim = np.full(pixels.shape, -1.0)
    for i, places in enumerate(near):
        sim[i, places] = score(np.repeat(query[i : i + 1], 16, 0), gallery[places])
    return np.where(counts, sim, -2)


def recalls(similar, x, patients, copies):
    """{kind: recall at 1 %, at 5 %, share with the right image}, the mean over kinds, and its interval over patients."""
    other = patients[:, None] != patients
    unseen = similar(x, x, other).max(1)
    limits = [np.quantile(unseen, q, method="higher") for q in (0.99, 0.95)]
    rows = {}
    for kind, made in copies.items():
        sim = similar(made, x)
        best = sim.max(1)
        rows[kind] = np.stack([*(best > limit for limit in limits), sim.argmax(1) == np.arange(len(x))], 1)
    each = np.mean(list(rows.values()), 0)  # (image, figure)
    names, inverse = np.unique(patients, return_inverse=True)
    sums = np.stack([np.bincount(inverse, each[:, i]) for i in range(3)], 1)
    counts = np.bincount(inverse)
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(names), (DRAWS, len(names)))
    draws = np.array([sums[i].sum(0) / counts[i].sum() for i in picks])
    mean, mean_ci = each.mean(0), np.quantile(draws, [0.025, 0.975], axis=0).T
    mean_ci[mean == 1] = calibrate.clopper_pearson(len(names), len(names))  # draws of what is always found say nothing
    return {
        "kinds": {kind: row.mean(0).tolist() for kind, row in rows.items()},
        "mean": mean.tolist(),
        "mean_ci": mean_ci.tolist(),
        "n": len(x),
        "n_patients": len(names),
    }


def run(nih, hippocampus, workdir):
    workdir = Path(workdir)
    machine.start()
    result, candidates = {}, {}
    with jax.set_mesh(mesh.make(1)):
        made = configs(nih, hippocampus)
        sets = {name: data.load(**config.data.to_dict()) for name, config in made.items()}
        models = {}
        for name, config in made.items():
            models[name, "ours"] = main.train_detector(config, workdir / name / "ours", sets[name], purpose=2)
            candidates[name] = config.audit.register
            default.paper_detector(config)
            config.detector.update(widths=(16, 32, 64, 128), blocks=(1, 1, 1, 1))
            models[name, "paper"] = main.train_detector(config, workdir / name / "paper", sets[name], purpose=2)
        for name, parts in sets.items():
            parts = [parts["val"], parts["control"]]
            x = np.stack([image for part in parts for image in part.images])
            patients = np.concatenate([part.patients for part in parts])
            copies = {}
            for i, kind in enumerate(KINDS):
                key = jax.random.fold_in(jax.random.key(7), i)
                copies[kind] = np.asarray(jax.jit(plant, static_argnums=0)(kind, key, x))
            for (source, which), model in models.items():
                if len(model.image_shape) == x.ndim - 1:
                    label = which if source == name else f"{which}, trained on {source}"
                    embed = detection.embedder(model)
                    if which == "ours":
                        registered = by_registration(embed, candidates[name])
                        result[f"{name} | {label}"] = recalls(registered, x, patients, copies)
                        label += ", without registration"
                    result[f"{name} | {label}"] = recalls(by_vectors(embed), x, patients, copies)
            fresh = detection.untrained(models[name, "ours"], jax.random.key(1))
            for label, similar in (
                ("untrained", by_vectors(fresh)),
                ("pixels", by_vectors(views.pixels)),
                ("SSIM", by_ssim),
            ):
                result[f"{name} | {label}"] = recalls(similar, x, patients, copies)
    (workdir / "detectors.json").write_text(json.dumps(result, indent=1))
    print("| unseen images of | detector | recall at 1 % false positives | at 5 % | " + " | ".join(KINDS) + " |")
    print("|" + "---|" * (4 + len(KINDS)))
    for label, row in result.items():
        mean = [
            f"{100 * m:.1f} [{100 * a:.1f}, {100 * b:.1f}]"
            for m, (a, b) in zip(row["mean"], row["mean_ci"], strict=True)
        ]
        kinds = [f"{100 * row['kinds'][k][0]:.0f}/{100 * row['kinds'][k][1]:.0f}" for k in KINDS]
        print("| " + " | ".join([*label.split(" | "), *mean[:2], *kinds]) + " |")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--nih", help="folder of NIH ChestX-ray14 images")
    arguments.add_argument("--hippocampus", help="folder of the hippocampus volumes")
    arguments.add_argument("--workdir", default="runs/detectors", help="where detectors and the table go")
    run(**vars(arguments.parse_args()))
