"""A whole audit.json with plausible numbers, for the tests of the report; nothing here was measured."""

import json

import numpy as np

from detection import calibrate, enrichment, report

KINDS = {
    "identity": [0.0],
    "flip": [1.0],
    "rotation": [4.0, 8.0],
    "shift": [0.06, 0.12],
    "scale": [1.08, 0.92, 1.15],
    "crop": [0.9, 0.8],
    "local": [0.7, 0.5],
    "gamma": [1.4, 0.7, 2.0],
    "bias": [0.3, 0.6],
    "noise": [0.05, 0.1, 0.2],
    "blur": [1.0, 2.0],
    "combined": [1.0],
    "autoencoder": [1.0],
    "re-noise": [0.2, 0.4, 0.6, 0.8],
    "JPEG-like": ["weak", "strong"],
}


def around(rate, n, rng):
    half = 1.96 * np.sqrt(rate * (1 - rate) / n) + rng.uniform(0.001, 0.01)
    return [max(rate - half, 0.0), min(rate + half, 1.0)]


def scores(k, m, c, seed, copies=0.9):
    """Similarities of K synthetic, M unseen and C control images, patients pointed at, flags."""
    rng = np.random.default_rng(seed)
    null, control = (np.clip(rng.normal(0.72, 0.09, n), -1, 0.9) for n in (m, c))
    is_copy = rng.random(k) < copies
    sim = np.where(is_copy, 1 - rng.gamma(2.0, 0.012, k), np.clip(rng.normal(0.72, 0.09, k), -1, 0.9))
    patients = np.array([f"sub-{int(p):04d}" for p in 40 * rng.beta(1, 1.6, k)])
    return {"sim": sim, "null": null, "control": control, "patients": patients, "flagged": is_copy & (sim > 0.86)}


def measured(found, seed=0):
    """The keys that the audit has always written, for these similarities."""
    rng = np.random.default_rng(seed)
    k, m, c = (len(found[name]) for name in ("sim", "null", "control"))
    n, flagged = 40, found["flagged"]
    copies, patients = int(flagged.sum()), len(np.unique(found["patients"][flagged]))
    return {
        "caveats": [],
        "n_train": n,
        "n_val": m,
        "n_syn": k,
        "n_train_patients": n,
        "n_val_patients": m,
        "paper": {
            "threshold": 0.8364507555961609,
            "n_mem": 35,
            "n_copies": int(0.8 * k),
            "mem_rate": 0.875,
            "mem_rate_ci": [0.7319670826382796, 0.975],
            "n_mem_patients": 35,
            "copy_rate": 0.7734375,
            "copy_rate_ci": [0.6910934522635384, 0.8427132647105071],
            "null_mem_rate": 0.07981610063808861,
            "null_mem_rate_extrapolated": True,
            "null_copy_rate": 0.025,
            "null_copy_rate_ci": [0.0, 0.07132319415690505],
        },
        "calibrated": {
            "fdr": 0.05,
            "threshold": float(found["sim"][flagged].min()) if copies else None,
            "needed_score": None if copies else 0.8812,
            "n_copies": copies,
            "copy_rate": copies / k,
            "copy_rate_ci": around(copies / k, k, rng),
            "n_mem": patients,
            "n_mem_patients": patients,
            "smallest_p_value": 1 / (1 + m),
        },
        "negative_control": {
            "n": c,
            "n_patients": c,
            "flag_rate": 0.09166666666666666,
            "flag_rate_ci": [0.041666666666666664, 0.1647916666666667],
            "nominal": 0.05,
            "excess_p_value": 0.08574850488658448,
            "smallest_excess_p_value": 3.1e-09,
            "bh_flag_rate": 0.0,
        },
        "rendering": {
            "kind": "round trip through the autoencoder",
            "gap_db": [round(float(g), 3) for g in rng.normal(0, 0.3, 32)],
            "worst_gap_db": -0.489,
            "p_value": 0.129,
            "differs": False,
        },
    }


def bounds(found):
    """The section of that name, with recalls of made-up planted copies."""
    k, m, counted = (
        len(found["sim"]),
        len(found["null"]),
        [kind for kind in KINDS if kind not in ("local", "re-noised")],
    )
    lines = enrichment.ranks(m, 0.05)
    p_K = calibrate.conformal_p(found["sim"], found["null"], np.arange(m))
    made = enrichment.bounds(p_K, m, dict.fromkeys(lines, 0.9108))
    recalls = [(kind, round(63.6 - i**1.5) / 64) for i, kind in enumerate(counted)]
    rows = [
        {
            "kind": kind,
            "strength": KINDS[kind][0],
            "recall": recall,
            "recall_ci": (ci := list(calibrate.beta_interval(recall, 64))),
            "at_most_rate": float(enrichment.at_most(made["n_above"], k, ci[0])),
        }
        for kind, recall in recalls
    ]
    score = calibrate.score_at(found["null"], np.arange(m), made["rank"] / (m + 1))
    return {**made, "score": score, "by_kind": rows}


def complete(result, found, verdict="FAIL", seed=0):
    """`result` with every section that a finished audit has."""
    rng = np.random.default_rng(seed + 1)
    k, flagged = len(found["sim"]), found["flagged"]
    draws = sorted({int(d) for d in np.geomspace(1, 4 * k, 60)} | {k})
    names, counts = np.unique(found["patients"][flagged], return_counts=True)
    share = counts / k

    def curve(total):
        mean = [float((1 - (1 - share) ** d).sum()) * total for d in draws]
        return mean, [[max(x - 1.5 - 0.1 * x, 0.0), x + 1.5 + 0.1 * x] for x in mean]

    images, patients = curve(1.2), curve(1.0)
    low = min(float(min(found[name].min() for name in ("sim", "null", "control"))), 0.5)
    edges = np.linspace(low, 1, 61)
    sets = (("synthetic", "sim"), ("unseen", "null"), ("control", "control"))
    counted = {"edges": edges.tolist(), **{n: np.histogram(found[key], edges)[0].tolist() for n, key in sets}}
    levels = [round(x, 3) for x in np.linspace(0.05, 0.95, 10)]
    auc = [float(0.5 + 0.28 * np.exp(-(((t - 0.4) / 0.25) ** 2))) for t in levels]
    val_loss = [float(1.2 * np.exp(-3.2 * t) + 0.02) for t in levels]
    best = int(np.argmax(auc))
    deciding = {
        "FAIL": "the lower bound of the copy rate is above max_copy_rate",
        "PASS": "the upper bound of the copy rate is below max_copy_rate, and planted copies are found",
        "INCONCLUSIVE": "too few unseen patients: a copy rate at max_copy_rate would go unnoticed",
    }
    return {
        "verdict": verdict,
        "reasons": [deciding[verdict], "the negative control is within what chance allows"],
        "policy": {
            "max_copy_rate": 0.01,
            "max_patients": 0,
            "min_recall": 0.9,
            "min_recall_of_kind": 0.5,
            "min_power": 0.8,
        },
        **result,
        "caveats": ["a caveat of the data"],
        "paper": {
            **result["paper"],
            "mem_rate_size_matched": 0.8812,
            "mem_rate_size_matched_ci": [0.7551, 0.9614],
            "mem_rate_size_matched_extrapolated": False,
            "histogram": counted,
        },
        "calibrated": {
            **result["calibrated"],
            "n_mem_ci": [33.4, 42.1],
            "n_mem_patients_ci": [32.9, 41.7],
            "size_matched_to": 160,
            "size_matched_extrapolated": True,
            "n_mem_size_matched": 37.83,
            "n_mem_size_matched_ci": [32.14, 41.27],
            "n_mem_patients_size_matched": 36.41,
            "n_mem_patients_size_matched_ci": [31.52, 40.33],
            "tail": {
                "method": "EXTRAPOLATION along a generalised Pareto tail that ends at similarity 1",
                "refused": None,
                "threshold": 0.8412,
                "n_patients_above": 25.0,
                "exponent": 3.417,
                "exponent_ci": [2.211, 4.883],
                "heavier_p_value": 0.4321,
                "smallest_p_value": 3.17e-05,
                "n_copies": 118,
                "n_copies_cautious": 112,
            },
        },
        "rendering": {
            **result["rendering"],
            "band": [0.063, 0.3],
            "effects": [
                {"of": of, "effect": effect, "p_value": p}
                for of, effect, p in (
                    ("power at 0.22 to 0.31 of Nyquist", -0.214, 0.129),
                    ("intensity, 95 % quantile", 0.103, 0.934),
                    ("gradient", 0.052, 1.0),
                    ("dispersion of power at 0.22 to 0.31 of Nyquist", 0.117, 0.871),
                )
            ],
            "worst_of": "power at 0.22 to 0.31 of Nyquist",
            "worst_effect": -0.214,
            "tolerance": 0.8,
            "raw_worst_gap_db": -11.318,
            "raw_gap_db": [-11.3 / 32 * i for i in range(33)][1:],
        },
        "power": {
            "min_detectable_copy_rate": 0.1562,
            "smallest_flaggable_copy_rate": 0.125,
            "smallest_seen_copy_rate": 0.0391,
            "probability": 0.8,
            "at_max_copy_rate": 0.0213,
            "n": 40,
            "recall": 0.9474,
            "recall_ci": [0.9108, 0.9714],
            "enough": {"n_syn": 3417, "n_val_patients": None},
        },
        "n_draws": result["n_syn"],
        "stated": True,
        "bounds": bounds(found),
        "positive_control": [
            {
                "kind": kind,
                "strength": strength,
                "standard": i == 0 and kind not in ("local", "re-noised"),
                "n": 64,
                "recall": (recall := float(np.clip(0.995 - 0.35 * i * rng.random(), 0, 1))),
                "recall_ci": around(recall, 64, rng),
                "right_patient": float(rng.uniform(0.94, 1)),
            }
            for kind, strengths in KINDS.items()
            for i, strength in enumerate(strengths)
        ],
        "spaces": {
            name: {
                "auc": area,
                "auc_ci": [area - 0.008, min(area + 0.006, 1.0)],
                "recall_at_fpr_01": at_1,
                "recall_at_fpr_01_ci": around(at_1, 64, rng),
                "recall_at_fpr_05": at_5,
                "recall_at_fpr_05_ci": around(at_5, 64, rng),
                "n_flagged": n_flagged,
                "flag_rate_ci": None if n_flagged is None else around(n_flagged / max(k, n_flagged), k, rng),
                "agreement": agreement,
                "agreement_ci": None if agreement is None else [agreement * 0.9, agreement * 0.9 + 0.1],
                "kappa": None if agreement is None else agreement - 0.07,
            }
            for name, area, at_1, at_5, n_flagged, agreement in (
                ("detector", 0.9981, 0.9724, 0.9912, int(flagged.sum()), 1.0),
                ("untrained detector", 0.9312, 0.5211, 0.7127, 61, 0.5213),
                ("pixel correlation", 0.9127, 0.4523, 0.7381, 70, 0.5983),
                ("pixel correlation, best shift and flip", 0.9704, 0.8112, 0.9004, 99, 0.8462),
                ("SSIM", 0.8743, 0.3021, 0.5534, 41, 0.3504),
                ("autoencoder latent", 0.9223, 0.4788, 0.7511, None, None),
            )
        },
        "baselines": {
            "d1_d2": {
                "rate": 0.6406,
                "rate_ci": [0.5511, 0.7233],
                "null_rate": 0.0063,
                "null_rate_ci": [0.0002, 0.0343],
            },
            "c_t": {
                "statistic": -14.21,
                "p_value": 3.9e-46,
                "cells": 3,
                "null_statistic": -0.31,
                "null_p_value": 0.3783,
            },
            "auth_pct": {"value": 0.0781, "ci": [0.0381, 0.1389], "null": 0.8125, "null_ci": [0.7433, 0.8697]},
        },
        "extraction": {
            "draws": draws,
            "images": images[0],
            "images_ci": images[1],
            "patients": patients[0],
            "patients_ci": patients[1],
            "unseen_images": {"estimate": 2.4, "ci": [0.3, 11.9], "without_false_flags": 1.1},
            "unseen_patients": {"estimate": 1.2, "ci": [0.1, 8.7], "without_false_flags": 0.6},
            "extrapolated": [d > k for d in draws],
        },
        "membership": {
            "levels": levels,
            "train_loss": [loss * (1 - 0.5 * (a - 0.5)) for loss, a in zip(val_loss, auc, strict=True)],
            "val_loss": val_loss,
            "gap": [loss * 0.5 * (a - 0.5) for loss, a in zip(val_loss, auc, strict=True)],
            "gap_ci": [
                [loss * 0.5 * (a - 0.5) - 0.03 * loss, loss * 0.5 * (a - 0.5) + 0.03 * loss]
                for loss, a in zip(val_loss, auc, strict=True)
            ],
            "p_value": 0.001,
            "control": {
                "auc": [0.5 + 0.03 * np.sin(9 * t) for t in levels],
                "auc_ci": [[0.44, 0.56] for _ in levels],
                "p_value": 0.4371,
            },
            "auc": auc,
            "auc_ci": [[a - 0.05, a + 0.05] for a in auc],
            "best": {
                "level": levels[best],
                "auc": auc[best],
                "auc_ci": [auc[best] - 0.05, auc[best] + 0.05],
                "recall_at_fpr_01": 0.1531,
                "recall_at_fpr_01_ci": [0.0571, 0.2984],
                "recall_at_fpr_05": 0.3313,
                "recall_at_fpr_05_ci": [0.1867, 0.4911],
                "fpr_01_ci": [0.0, 0.0451],
                "fpr_05_ci": [0.0138, 0.1223],
                "n_train_patients": 20,
                "n_val_patients": 80,
            },
            "n_train": 40,
            "n_val": 160,
            "n_train_patients": 40,
            "n_val_patients": 160,
            "n_control": 120,
            "n_control_patients": 120,
        },
        "absent": {},
        "release": {
            "folder": "/srv/hospital/ann/runs/brain/release",
            "verdict": "FAIL",
            "reasons": ["pixel correlation: 1 of 11 synthetic images is flagged as a copy"],
            "released": False,
            "n_kept": int(k - flagged.sum()),
            "n_flagged": int(flagged.sum()),
            "n_over_line": 0,
            "n_duplicates": 0,
            "n_removed_with_them": 0,
            "level": 0.05,
            "line": 0.8712,
            "recall": 0.9474,
            "recall_ci": [0.9108, 0.9714],
            "copies_left_at_most": 19,
            "copy_rate_at_most": 0.4872,
            "again": [
                {
                    "space": space,
                    "n_copies": n_copies,
                    "copy_rate": rate,
                    "copy_rate_ci": ci,
                    "n_mem_patients": n_copies,
                    "n_missed": missed,
                    "recall": recall,
                    "recall_ci": recall and around(recall, missed, rng),
                    "verdict": word,
                    "reasons": [f"why {space} says so"],
                }
                for space, n_copies, rate, ci, missed, recall, word in (
                    ("detector of another seed", 0, 0.0, [0.0, 0.2849], 27, 0.3311, "INCONCLUSIVE"),
                    ("pixel correlation", 1, 0.0909, [0.0023, 0.4128], 3, None, "FAIL"),
                )
            ],
            "quality": {
                when: {
                    "detector": {
                        name: {"value": value, "ci": [0.9 * value, 1.1 * value]}
                        for name, value in zip(
                            ("frechet", "frechet_infinity", "kernel", "precision", "recall", "density", "coverage"),
                            values,
                            strict=True,
                        )
                    },
                    "ms_ssim": {"value": values[0] / 100, "ci": [values[0] / 110, values[0] / 90]},
                }
                for when, values in (
                    ("before", (12.31, 10.11, 0.2113, 0.7113, 0.4127, 0.6512, 0.5522)),
                    ("after", (31.72, 28.43, 0.4311, 0.6402, 0.2217, 0.6011, 0.4218)),
                )
            }
            | {"reason": None},
        },
        "patients": [
            {"patient": str(name), "n_copies": int(count)}
            for name, count in sorted(zip(names, counts, strict=True), key=lambda row: (-row[1], row[0]))
        ],
        "histogram": counted,
        "provenance": {
            "config": {
                "seed": 0,
                "data": {
                    "path": "/srv/hospital/ann smith/ward 7",
                    "size": [64, 64],
                    "cache": None,
                    "intensity": "type",
                    "patient_pattern": "WARD7_(\\d+)",
                },
                "audit": {
                    "fdr": 0.05,
                    "percentile": 95.0,
                    "pairs": 16,
                    "synthetic": "C:\\Users\\ann\\made elsewhere",
                    "release": "release of ward seven",
                },
                "unet": {"width": 64, "mults": [1, 2], "attention": [False, True]},
                "diffusion": {"schedule": "cosine", "predict": "v", "steps": 1000},
            },
            "environment": {
                "git_commit": "64dab0f0c0ffee",
                "python": "3.11.7",
                "versions": {"jax": "0.10.2", "numpy": "2.4.6"},
                "devices": "1 x cpu",
                "processes": 1,
            },
            "data": {
                name: {"n": n, "sha256": ("%064x" % (7919 ** (i + 9)))[:64]}
                for i, (name, n) in enumerate({"train": 40, "val": 160, "control": 120, "synthetic": k}.items())
            },
        },
    }


def example(k=128, m=160, c=120, verdict="FAIL", copies=0.9, seed=0):
    found = scores(k, m, c, seed, copies)
    result = complete(measured(found, seed), found, verdict, seed)
    return json.loads(json.dumps(result, allow_nan=False))


def pairs(n=16, size=(24, 20), seed=0, flagged=lambda i: i < 12, name="sub"):
    """Pairs whose synthetic image is the training image with noise where flagged, and another image where not."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        nearest = rng.uniform(-1, 1, (*size, 1)).astype(np.float32)
        other = rng.uniform(-1, 1, (*size, 1)).astype(np.float32)
        near = np.clip(nearest + rng.normal(0, 0.1, nearest.shape), -1, 1).astype(np.float32)
        made.append(
            report.Pair(
                near if flagged(i) else other,
                nearest,
                f"{i:06d}.png",
                f"{name}-{i % 40:04d}_scan-0",
                f"{name}-{i % 40:04d}",
                0.99 - 0.005 * i,
                0.006211180124223602 * (1 + (not flagged(i)) * i),
                flagged(i),
            )
        )
    return made
