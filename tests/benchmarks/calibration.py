"""Does the calibrated test keep its promises on real images? Nulls and power, by resampling unseen patients.

    python -m tests.benchmarks.calibration --config=configs/xray.py --config.data.path=NIH --workdir=runs/calibration/xray

Trains the config's detector on the training patients (or takes it from the workdir), embeds everything once, and then
splits the patients that no model saw many times: some are the null, others stand for synthetic images, alone (nulls) or
beside planted copies of training images (power). Writes WORKDIR/calibration.json and prints two tables.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from absl import app

import data
import detection
import main
from data import copies
from detection import calibrate, controls, embeddings, enrichment, views
from launch import machine, mesh
from tests.benchmarks import statistics

DRAWS = 400
RATES = (0.01, 0.02, 0.05, 0.1, 0.5)


def scores(config, workdir):
    """Scores to the nearest training image: of every unseen image, with its patient; of copies by (kind, strength)."""
    sets = data.load(**config.data.to_dict())
    model = main.train_detector(config, workdir / "detector", sets, purpose=2)
    space = detection.registered(detection.embedder(model), model.image_shape, config.audit.register)
    how = {"in_order": data.in_order, "batch": config.audit.batch}
    rows = lambda name: np.concatenate(
        [space.keep(part) for part in mesh.stream(space.embed, data.in_order(sets[name].images, config.audit.batch))]
    )
    gallery = rows("train")
    search = lambda query: space.search(query, gallery)
    unseen = [search(rows(name)).sim[:, 0] for name in ("val", "control")]
    patients = np.concatenate([sets[name].patients for name in ("val", "control")])
    chosen = controls.choose(sets["train"].patients, 128, config.seed)
    copied = embeddings.Some(sets["train"].images, chosen)
    made = embeddings.of_copies({"": space}, copies.grid(), copied, views.as_it_is, seed=config.seed, **how)
    planted = controls.planted(copies.grid(), search(made[""]))
    return np.concatenate(unseen), patients, planted


def split(rng, patients, share, one_each):
    """Indices of the null images (all images of `share` of the patients) and of the others (one image each, or all)."""
    names = rng.permutation(np.unique(patients))
    cut = round(share * len(names))
    null = np.flatnonzero(np.isin(patients, names[:cut]))
    rest = rng.permutation(np.flatnonzero(np.isin(patients, names[cut:])))
    if one_each:
        rest = rest[np.unique(patients[rest], return_index=True)[1]]
    return null, rng.permutation(rest)


def nulls(unseen, patients, fdr):
    """Unseen patients in the place of synthetic images: how often is anything flagged, which should be at most `fdr`?"""
    rows = []
    for one_each in (True, False):
        for share in (0.3, 0.5, 0.7, 0.9):
            rng = np.random.default_rng(0)
            any_, level, sees = [], [], []
            for _ in range(DRAWS):
                null, rest = split(rng, patients, share, one_each)
                p = calibrate.conformal_p(unseen[rest], unseen[null], patients[null])
                any_.append(calibrate.benjamini_hochberg(p, fdr).any())
                level.append((p <= fdr).mean())
                n_null = len(np.unique(patients[null]))
                sees.append(statistics.sees(p, n_null, fdr))
            rows.append(
                {
                    "images": "one a patient" if one_each else "all",
                    "null_patients": n_null,
                    "k": len(rest),
                    "draws": DRAWS,
                    "any_flagged": float(np.mean(any_)),
                    "any_flagged_ci": list(calibrate.clopper_pearson(sum(any_), DRAWS)),
                    "copies_seen": float(np.mean(sees)),
                    "copies_seen_ci": list(calibrate.clopper_pearson(sum(sees), DRAWS)),
                    "copies_seen_promised": enrichment.ALPHA,
                    "p_below_nominal": float(np.mean(level)),
                    "nominal": fdr,
                }
            )
    return rows


def power(unseen, patients, planted, fdr):
    """Copies of one kind among unseen patients: recall and false-discovery proportion, measured and promised."""
    rows = []
    for copy in planted:
        for rate in RATES:
            rng = np.random.default_rng(1)
            recall, wrong, found, holds = [], [], [], []
            for _ in range(DRAWS // 4):
                null, rest = split(rng, patients, 0.75, True)
                n_copies = max(round(rate / (1 - rate) * len(rest)), 1)
                pick = rng.choice(len(copy.sim_Q), min(n_copies, len(copy.sim_Q)), replace=False)
                p = calibrate.conformal_p(np.append(copy.sim_Q[pick], unseen[rest]), unseen[null], patients[null])
                flagged = calibrate.benjamini_hochberg(p, fdr)
                recall.append(flagged[: len(pick)].mean())
                wrong.append(flagged[len(pick) :].sum() / max(flagged.sum(), 1))
                found.append(flagged.any())
                said = statistics.bounds(p, unseen[null], patients[null], copy.sim_Q, fdr)
                holds.append(
                    (said["at_least"] <= len(pick), said["at_most_rate"] >= len(pick) / len(p), said["at_least"] > 0)
                )
            k = len(pick) + len(rest)
            n_null = len(np.unique(patients[null]))
            above = float((copy.sim_Q > unseen.max()).mean())
            rows.append(
                {
                    "kind": copy.kind,
                    "strength": copy.strength,
                    "copy_rate": len(pick) / k,
                    "k": k,
                    "null_patients": n_null,
                    "recall": float(np.mean(recall)),
                    "false_discoveries": float(np.mean(wrong)),
                    "false_discoveries_promised": fdr,
                    "found": float(np.mean(found)),
                    **dict(
                        zip(("at_least_holds", "at_most_holds", "copies_seen"), np.mean(holds, 0).tolist(), strict=True)
                    ),
                    "smallest_flaggable": calibrate.fewest_flaggable(n_null, k, fdr) / k,
                    "above_all_unseen": above,
                }
            )
    return rows


def table(rows):
    show = lambda v: (
        f"{v:.3f}" if isinstance(v, float) else " to ".join(f"{x:.3f}" for x in v) if isinstance(v, list) else v
    )
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(str(show(v)) for v in row.values()) + " |" for row in rows])


def run(_):
    config, workdir = main._CONFIG.value, Path(main._WORKDIR.value)
    machine.start()
    with jax.set_mesh(mesh.make(1)):
        unseen, patients, planted = scores(config, workdir)
    fdr = config.audit.fdr
    result = {"nulls": nulls(unseen, patients, fdr), "power": power(unseen, patients, planted, fdr)}
    (workdir / "calibration.json").write_text(json.dumps(result, indent=1))
    print(table(result["nulls"]), table(result["power"]), sep="\n\n")


if __name__ == "__main__":
    app.run(run, [*sys.argv, "--mode=audit"])
