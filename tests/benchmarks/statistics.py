"""Does the calibrated test keep its promises on simulated embeddings? Nulls and power, for sizes from 50 to 10,000.

    python -m tests.benchmarks.statistics --out=docs/benchmarks

Embeddings are Gaussian with a power-law spectrum. Nulls: training, unseen and synthetic images are alike, so nothing
is memorized and every flag is false. Power: some synthetic images are training images with noise. Unseen patients have
one image each, or one to six that are much alike. The audit's bounds of the number of copies are tested with it: that
they see none where there are none, and hold the true number otherwise. Beside them stand the paper's rule on the same
nulls, and the extrapolated tail. Writes OUT/statistics.json and OUT/statistics.md. About a quarter of an hour on two cores.
"""

import argparse
import itertools
import json
from pathlib import Path

import jax
import numpy as np
from scipy import stats

from detection import calibrate, enrichment, neighbours, tail
from launch import mesh

SIZES = (50, 200, 1000, 10_000)
RATES = (0.01, 0.02, 0.05, 0.1, 0.5)
NOISE = {"near": 0.1, "far": 0.6}  # standard deviation of what is added to a copy, beside a spread of 1
FDR, DIM, SPECTRUM, IMAGES = 0.05, 32, 1.0, 6
PLANTED = 64  # copies by which the bounds' recall is measured, as in an audit


def embeddings(rng, n, noise=0.0, of=None):
    """n draws, or noisy versions of the raw vectors `of`: (raw, standardised)."""
    scale = np.arange(1, DIM + 1) ** (-SPECTRUM / 2)
    raw = rng.standard_normal((n, DIM)) * scale if of is None else of + noise * rng.standard_normal(of.shape) * scale
    return raw.astype(np.float32), neighbours.standardise(raw)


def unseen(rng, patients, several):
    """Standardised embeddings of unseen patients' images, and their patients: one each, or one to six alike."""
    count = rng.permutation(np.resize(np.arange(IMAGES) + 1, patients)) if several else np.ones(patients, int)
    who = np.repeat(np.arange(patients), count)
    raw, one = embeddings(rng, patients)
    return (embeddings(rng, 0, 0.3, raw[who])[1] if several else one), who


def best(query, key):
    return neighbours.nearest(query, key).sim[:, 0]


def nulls(sizes=SIZES, draws=100, paper_draws=10, seed=0):
    """One row per number of training images n, unseen patients m, synthetic images k, and images a patient."""
    rows = []
    for n, several in itertools.product(sizes, (False, True)):
        rng, seen = np.random.default_rng([seed, n, several]), {}
        for draw in range(draws):
            _, train = embeddings(rng, n)
            val, who = unseen(rng, max(sizes), several)
            _, syn = embeddings(rng, max(sizes))
            null, scores = best(val, train), best(syn, train)
            with_paper = draw < paper_draws and not several
            of_train = {k: best(train, syn[:k]) for k in sizes} if with_paper else {}
            for m, k in itertools.product(sizes, sizes):
                ours = who < m
                p = calibrate.conformal_p(scores[:k], null[ours], who[ours])
                flags = calibrate.benjamini_hochberg(p, FDR)
                row = seen.setdefault(
                    (m, k), {"any": [], "share": [], "level": [], "sees": [], "copies": [], "memorized": []}
                )
                row["sees"].append(sees(p, m, FDR))
                row["any"].append(flags.any())
                row["share"].append(flags.mean())
                row["level"].append((p <= FDR).mean())
                if with_paper:
                    tau = np.percentile(best(train, val[:m]), 95)
                    row["copies"].append((scores[:k] > tau).mean())
                    row["memorized"].append((of_train[k] > tau).mean())
        rows += [null_row(n, m, k, several, row) for (m, k), row in seen.items()]
    return rows


def null_row(n, m, k, several, row):
    """Rates over simulated audits with 95 % intervals; within_nominal: of the share of audits that flag anything or by
    whose lower bound there are copies, exact, and of the share of images with p at or under nominal, Student's."""
    draws = len(row["any"])
    any_ci, sees_ci = (calibrate.clopper_pearson(sum(row[key]), draws) for key in ("any", "sees"))
    level, half = np.mean(row["level"]), stats.t.ppf(0.975, draws - 1) * np.std(row["level"], ddof=1) / draws**0.5
    mean = lambda x: float(np.mean(x)) if x else None
    return {
        "n": n,
        "m": m,
        "k": k,
        "images_a_patient": f"1 to {IMAGES}" if several else "1",
        "share_flagged": float(np.mean(row["share"])),
        "any_flagged": float(np.mean(row["any"])),
        "any_flagged_ci": list(any_ci),
        "copies_seen": float(np.mean(row["sees"])),
        "copies_seen_ci": list(sees_ci),
        "p_at_most_nominal": float(level),
        "p_at_most_nominal_ci": [float(level - half), float(level + half)],
        "nominal": FDR,
        "within_nominal": bool(any_ci[0] <= FDR and sees_ci[0] <= enrichment.ALPHA and level - half <= FDR),
        "paper_copies": mean(row["copies"]),
        "paper_memorized": mean(row["memorized"]),
    }


def power(n=1000, k=1000, unseen_patients=SIZES, rates=RATES, draws=60, seed=1):
    """One row per number of unseen patients, images a patient, kind of copy and copy rate: measured against promised."""
    rows = []
    for m, several, (kind, noise), rate in itertools.product(unseen_patients, (False, True), NOISE.items(), rates):
        rng, seen = np.random.default_rng([seed, m, several, int(1000 * noise), int(1000 * rate)]), []
        for draw in range(draws):
            raw, train = embeddings(rng, n)
            val, who = unseen(rng, m, several)
            null = best(val, train)
            copies = max(rng.binomial(k, rate), 1)
            _, copied = embeddings(rng, 0, noise, raw[rng.integers(0, n, copies)])
            scores = best(np.concatenate([copied, embeddings(rng, k - copies)[1]]), train)
            p = calibrate.conformal_p(scores, null, who)
            exact = calibrate.benjamini_hochberg(p, FDR)
            said, far = tail.extrapolated_test(scores, null, who, fdr=FDR, seed=draw)
            above = (scores[:copies] >= (calibrate.needed_score(null, who, k, FDR) or np.inf)).mean()
            planted = best(embeddings(rng, 0, noise, raw[rng.choice(n, PLANTED, replace=False)])[1], train)
            found = bounds(p, null, who, planted, FDR)
            low, high = found["at_least"], found["at_most_rate"]
            tests = said["refused"] is not None, above, low <= copies, high >= copies / k, low / copies, high
            seen.append((*outcome(exact, copies), *outcome(far, copies), *tests))
        rows.append(power_row(m, several, kind, rate, k, np.array(seen)))
    return rows


def sees(p, m, fdr):
    """Whether the lower bound of the number of copies is above 0, against m unseen patients."""
    lines = enrichment.ranks(m, fdr)
    return enrichment.set_test([enrichment.above(p, j, m) for j in lines], lines, len(p), m)[1] > 0


def bounds(p, null, who, planted, fdr):
    """`enrichment.bounds`, by the recall on copies of one kind, whose scores are `planted`."""
    m = len(np.unique(who))
    seen = {j: int((planted >= calibrate.score_at(null, who, j / (m + 1))).sum()) for j in enrichment.ranks(m, fdr)}
    return enrichment.bounds(p, m, {j: calibrate.clopper_pearson(n, len(planted))[0] for j, n in seen.items()})


def outcome(flags, copies):
    """(recall, false-discovery proportion, whether any copy is found)"""
    return flags[:copies].mean(), flags[copies:].sum() / max(flags.sum(), 1), flags[:copies].any()


def power_row(m, several, kind, rate, k, seen):
    """Means over simulated audits; false_discoveries_ci: 95 %, Student's over audits. found_promised: `power_at`, with
    the recall that a positive control would measure at the score that the fewest flaggable copies need. at_least_holds,
    at_most_holds: share of audits whose bound holds; within_promised: exact intervals of these, and false discoveries'."""
    recall, wrong, found, tail_recall, tail_wrong, tail_found, refused, above, low, high, share, rate_high = seen.mean(
        0
    )
    holds = [calibrate.clopper_pearson(int(seen[:, i].sum()), len(seen)) for i in (8, 9)]
    half = stats.t.ppf(0.975, len(seen) - 1) * seen[:, [1, 4]].std(0, ddof=1) / len(seen) ** 0.5
    fewest = calibrate.fewest_flaggable(m, k, FDR)
    return {
        "m": m,
        "images_a_patient": f"1 to {IMAGES}" if several else "1",
        "copies": kind,
        "copy_rate": rate,
        "smallest_flaggable": fewest / k if fewest <= k else None,
        "recall": recall,
        "false_discoveries": wrong,
        "false_discoveries_ci": [max(wrong - half[0], 0.0), wrong + half[0]],
        "false_discoveries_promised": FDR,
        "at_least_holds": low,
        "at_least_of_copies": share,
        "at_most_holds": high,
        "at_most_rate": rate_high,
        "bounds_promised": 1 - enrichment.ALPHA,
        "within_promised": bool(wrong - half[0] <= FDR and min(top for _, top in holds) >= 1 - enrichment.ALPHA),
        "found": found,
        "found_promised": calibrate.power_at(rate, k, [(fewest, above)]),
        "tail_recall": tail_recall,
        "tail_false_discoveries": tail_wrong,
        "tail_false_discoveries_ci": [max(tail_wrong - half[1], 0.0), tail_wrong + half[1]],
        "tail_found": tail_found,
        "tail_refused": refused,
    }


def table(rows):
    """Markdown, one row each."""

    def show(value):
        if isinstance(value, list):
            return " to ".join(show(v) for v in value)
        return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(name.replace("_", " ") for name in rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(show(v) for v in row.values()) + " |" for row in rows])


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="folder for statistics.json and statistics.md")
    options.add_argument("--draws", type=int, default=100, help="simulated audits per null")
    options.add_argument("--power_draws", type=int, default=60, help="simulated audits per row of the power table")
    given = options.parse_args()
    with jax.set_mesh(mesh.make()):
        result = {"nulls": nulls(draws=given.draws), "power": power(draws=given.power_draws)}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "statistics.json").write_text(json.dumps(result, indent=1, default=float) + "\n")
    outside = [
        sum(not row[key] for row in rows)
        for key, rows in zip(("within_nominal", "within_promised"), result.values(), strict=True)
    ]
    text = (
        f"# The calibrated test on simulated embeddings\n\n{DIM} dimensions, spectrum exponent {SPECTRUM:g}, FDR {FDR:g}; made by "
        "`python -m tests.benchmarks.statistics`. n training images, m unseen patients, k synthetic images.\n\n"
        f"## Nulls: nothing is memorized\n\n{outside[0]} of {len(result['nulls'])} rows lie above nominal by more than their "
        f"95 % interval allows.\n\n{table(result['nulls'])}\n\n## Power: planted copies among 1,000 synthetic images\n\n"
        f"{outside[1]} of {len(result['power'])} rows have more false discoveries, or bounds that hold less often, than "
        f"promised by more than their 95 % interval allows. The columns `tail` are the extrapolation, not the test.\n\n{table(result['power'])}\n"
    )
    (given.out / "statistics.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
