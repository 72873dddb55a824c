"""The audit: which synthetic images are copies of training patients, could copies have been seen, and what follows."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from detection import (
    baselines,
    calibrate,
    controls,
    embeddings,
    enrichment,
    evidence,
    extraction,
    neighbours,
    outputs,
    redaction,
    release,
    report,
    spaces,
    verdict,
    views,
)
from launch import checkpoint, log

PIXELS = spaces.by_correlation(views.pixels)


class Space(NamedTuple):
    """One similarity space: nearest-neighbour scores in it, all sets rendered alike, and the calibrated test of them."""

    hits: neighbours.Neighbours  # of each synthetic image among the training images
    null_M: np.ndarray  # of each validation image among the training images
    control_C: np.ndarray  # of each control image
    planted: list[controls.Planted]
    rows: dict[str, np.ndarray]  # of each set, as the space's `search` takes them


def audit(
    examiner: spaces.Space,
    sets: Mapping[str, Any],
    synthetic: Any,
    *,
    render: Callable[[jax.Array], jax.Array] | None,
    plants: controls.Plants,
    again: spaces.Space | None,
    others: Mapping[str, Any],
    losses: Callable[[jax.Array], jax.Array] | None,
    levels: Sequence[float],
    source: Path,
    in_order: Callable[..., Iterator],
    folder: Path,
    stated: bool,
    caveats: Sequence[str],
    described: Mapping[str, Any],
    redact: bool,
    policy: dict[str, float],
    release_to: Path | None,
    release_level: float,
    release_anyway: bool,
    quality: Callable[[np.ndarray], dict[str, Any]] | None,
    fdr: float,
    percentile: float,
    pairs: int,
    planted: int,
    slow_images: int,
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """Audits `synthetic` against `sets['train']`; writes `audit.json`, `verdicts.csv`, `pairs.png`, `histogram.png`.

    Args:
      examiner: the space that the verdict rests on: see `spaces.registered`.
      sets: 'train', 'val' and 'control', each with `images`, `ids` and `patients`.
      synthetic: the images to audit, with `images`, `ids`, and the `files` in the folder `source` that they are of;
        `patients` are the draws of the generator that they are of.
      render: how the generator renders an image (the autoencoder's round trip); the real images are passed through it,
        so that like is compared with like. None, for images made elsewhere: real and synthetic images are filtered to
        their common power spectrum instead.
      plants: the kinds of near-copies that the positive control plants; of `planted` training patients each.
      again: that of a detector of another seed, without registration, that examines what is released.
      others: name -> other similarity spaces to report beside the detector's; see `evidence.side_by_side`.
      losses, levels: the generator's denoising losses for the membership test, (B, *S, C) -> (B, L), at the noise levels
        t / T; None where the generator is not ours.
      described: the run's configuration and environment, for the report. redact: the report shows nothing of patients.
      stated: that the generator was trained on `sets['train']` and has seen nobody of the others is known, not assumed.
      caveats: what the reader must know before any number; in `audit.json` and above the table.
      slow_images: of each set, at random, on which slow spaces are measured (see `evidence.some`).
      policy: see `verdict.decide`.
      release_to: folder for the synthetic images without their copies; None: nothing is released. release_level: of the
        line that the filter draws for each image (`release.line`). release_anyway: also where what is left does not pass.
      quality: which synthetic images are kept, (K,) bool -> {before, after}: the quality of all and of those, for the
        report; None: not measured.
      fdr: false-discovery rate of the calibrated test, and the nominal rate of the negative control.
    Returns:
      What is in `audit.json`.
    """
    verdict.check(policy)
    if release_to:
        release.check(release_level)
        release.refuse_strangers(release_to)
    train, val, control = (sets[name] for name in ("train", "val", "control"))
    everything = {"train": train, "val": val, "control": control, "synthetic": synthetic}
    content = {name: views.fingerprint(s.images, in_order, batch) for name, s in everything.items()}
    look = views.like_for_like(sets, synthetic, render, examiner.band, in_order, batch, seed)
    chosen_Q = controls.choose(train.patients, planted, seed)

    sizes = {name: len(everything[name].ids) for name in ("train", "val", "synthetic")}
    some = evidence.some(sizes, slow_images, chosen_Q, seed)
    deciding = {"detector": examiner}
    if release_to:
        deciding |= {"detector of another seed": again, "pixel correlation": PIXELS}
    beside = {name: other for name, other in others.items() if isinstance(other, spaces.Space)}
    slow = {name: other for name, other in beside.items() if other.slow}
    quick = {name: other for name, other in ({"pixels": PIXELS} | beside | deciding).items() if name not in slow}
    how = {"in_order": in_order, "batch": batch}
    kept = {**how, "cache": folder / "embeddings"}
    view = dict.fromkeys(everything, look.real) | {"synthetic": look.synthetic}
    rows = embeddings.of_sets(quick, slow, everything, some, view, content, **kept)
    copied = [train.images[int(i)] for i in chosen_Q]
    copies = embeddings.of_plants(deciding, beside, plants, copied, look.real, seed=seed, **how)

    def space(name: str, kept_K: np.ndarray | slice = slice(None)) -> Space:
        of = {**rows[name], "synthetic": rows[name]["synthetic"][kept_K]}
        search = functools.partial(deciding[name].search, train_NxD=of["train"])
        scores = lambda one: search(of[one]).sim[:, 0]
        found = controls.planted(plants, search(copies[name]))
        return Space(search(of["synthetic"]), scores("val"), scores("control"), found, of)

    ours = space("detector")
    judging = {"policy": policy, "fdr": fdr, "seed": seed}
    alone = {name: examiner.vectors(of) for name, of in ours.rows.items()}
    as_they_are = {name: everything[name] for name in sizes}, {}, dict.fromkeys(sizes, views.as_it_is)
    vectors = examiner._replace(keep=lambda rows: examiner.vectors(examiner.keep(rows)))
    raw = embeddings.of_sets({"raw": vectors}, {}, *as_they_are, content, **kept)["raw"]
    result, test = judge(ours, train, val, control, synthetic.patients, chosen_Q, **judging)
    measure = lambda of: baselines.baselines(
        *(of["train"], of["synthetic"], synthetic.patients),
        *(of["val"], val.patients, of["control"], control.patients),
        seed=seed,
    )
    membership, no_membership = evidence.of_membership(losses, levels, sets, in_order=in_order, batch=batch, seed=seed)
    few = "they need two training images: enlarge config.data.fractions.train" if len(train.ids) < 2 else None
    result = {
        "caveats": [*caveats, *look.caveats, *evidence.of_draws(synthetic.patients)],
        **result,
        "stated": stated,
        "paper": evidence.of_paper(
            raw, alone["control"], train, control, synthetic.patients, percentile=percentile, seed=seed
        ),
        "rendering": look.report,
        "patients": report.copied_patients(train.patients[ours.hits.index[:, 0]], test.flagged_K),
        "extraction": extraction.extraction(ours.hits.index[:, 0], test.flagged_K, train.patients, fdr=fdr, seed=seed),
        "baselines": None
        if few
        else {
            **measure(rows["pixels"]),
            **({"latents": measure(rows["latents"])} if "latents" in rows else {}),
            "detector": measure(alone),
        },
        "membership": membership,
        "absent": {name: why for name, why in (("baselines", few), ("membership", no_membership)) if why},
        "spaces": evidence.side_by_side(
            others,
            spaces.Measured(ours.hits, ours.null_M, ours.planted),
            examiner.note,
            rows,
            copies,
            controls.standard(plants),
            some,
            sizes,
            train.patients[chosen_Q],
            test.flagged_K,
            synthetic.patients,
            val.patients,
            fdr=fdr,
            seed=seed,
        ),
        "histogram": outputs.histogram(ours.hits.sim[:, 0], ours.null_M, ours.control_C),
        "provenance": {
            **described,
            "data": {n: {"n": len(s.ids), "sha256": content[n]} for n, s in everything.items()},
        },
    }
    result["calibrated"] |= evidence.of_memorized(ours.hits, test, ours.null_M, val, train, fdr=fdr, seed=seed)
    result["calibrated"]["needed_score"] = None if test.flagged_K.any() else test.needed
    word, reasons = verdict.decide(result, policy)
    result = {"verdict": word, "reasons": reasons, "policy": dict(policy), **result, "release": None}
    if release_to:
        left, line = filtered(examiner, ours, test, train, val, synthetic, release_level, in_order, batch)
        looks = {name: space(name, left.keep_K) for name in deciding if name != "detector"} if left.keep_K.any() else {}
        again = examined_again(
            looks,
            lambda other: judge(other, train, val, control, synthetic.patients[left.keep_K], chosen_Q, **judging),
            {"rendering": look.report, "stated": stated},
            (ours.planted, line, train.patients[chosen_Q]),
            policy,
            seed,
        )
        recall = controls.overall(ours.planted, line, train.patients, chosen_Q, seed)
        by_kind = controls.by_kind(ours.planted, line, train.patients, chosen_Q)
        n_over, n_kept = int(left.over_K.sum()), int(left.keep_K.sum())
        word, reasons, bound = release.decide(result, recall, by_kind, n_over, n_kept, again, policy)
        said = {"verdict": word, "reasons": reasons, "released": word == "PASS" or (release_anyway and n_kept > 0)}
        level = max(release_level, result["calibrated"]["smallest_p_value"])
        counts = {"n_kept": n_kept, **left.counts, "level": level, "line": line}
        said |= {**counts, "recall": recall["recall"], "recall_ci": recall["recall_ci"], **bound}
        result["release"] = {
            "folder": str(release_to),
            **said,
            "again": again,
            "quality": quality(left.keep_K) if quality else None,
        }
        if said["released"]:
            release.write(release_to, source, synthetic.files[left.keep_K], said)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(folder / "audit.json", result)
        outputs.write_verdicts(folder / "verdicts.csv", synthetic.ids, train, ours.hits, test)
        outputs.draw(folder, ours.hits, synthetic, train, test, result, pairs)
        top = report.top_pairs(
            synthetic, train, ours.hits.index[:, 0], ours.hits.sim[:, 0], test.p_K, test.flagged_K, pairs
        )
        (folder / "audit.redacted.json").unlink(missing_ok=True)  # of an earlier audit
        if redact:
            checkpoint.write_json(folder / "audit.redacted.json", redaction.redacted(result, top))
        report.write(folder / "report.html", result, top, redact=redact, title="Copies of patients in a synthetic set")
        log.say(outputs.table(result, folder))
    return result


def judge(
    space: Space,
    train: Any,
    val: Any,
    control: Any,
    draws_K: np.ndarray,
    chosen_Q: np.ndarray,
    *,
    policy: dict[str, float],
    fdr: float,
    seed: int,
) -> tuple[dict[str, Any], calibrate.Calibrated]:
    """The calibrated test in one space with its bounds, controls and power, as `audit.json` holds them.

    Args:
      draws_K: the draw that each synthetic image is of. What is said of the generator counts these (`effective_number`).
    """
    k, n_draws, n_val_patients = len(draws_K), calibrate.effective_number(draws_K), len(np.unique(val.patients))
    scores_K = space.hits.sim[:, 0]
    test = calibrate.calibrated_test(scores_K, space.null_M, val.patients, fdr=fdr, seed=seed, draws_K=draws_K)
    pointed_at = np.unique(space.hits.index[test.flagged_K, 0])
    # What copies must outscore to be flagged: now; and if they were as few as could be flagged at all.
    above_all = float(np.nextafter(space.null_M.max(), np.float32(np.inf)))
    rare = above_all if test.needed is None else test.needed
    recall = lambda score: controls.overall(space.planted, score, train.patients, chosen_Q, seed)
    scores = {
        j: calibrate.score_at(space.null_M, val.patients, j / (n_val_patients + 1))
        for j in enrichment.ranks(n_val_patients, fdr)
    }
    recalls = {j: recall(score) for j, score in scores.items()}
    lows = {j: said["recall_ci"][0] for j, said in recalls.items()}
    bounds = enrichment.bounds(test.p_K, n_val_patients, lows, n_draws)
    fewest = calibrate.fewest_flaggable(n_val_patients, n_draws, fdr)
    seeing = enrichment.ways_of_seeing(n_draws, n_val_patients, lows)
    ways = [(fewest, recall(rare)["recall_ci"][0]), *seeing]
    line = bounds["rank"]
    by_kind = controls.by_kind(space.planted, scores[line], train.patients, chosen_Q)
    result = {
        "n_train": len(train.ids),
        "n_val": len(val.ids),
        "n_syn": k,
        "n_draws": n_draws,
        "n_train_patients": len(np.unique(train.patients)),
        "n_val_patients": n_val_patients,
        "calibrated": {
            "fdr": fdr,
            "threshold": test.threshold,
            "n_copies": int(test.flagged_K.sum()),
            "copy_rate": test.rate,
            "copy_rate_ci": list(test.rate_ci),
            "n_mem": len(pointed_at),
            "n_mem_patients": len(np.unique(train.patients[pointed_at])),
            "smallest_p_value": 1 / (1 + n_val_patients),
        },
        "bounds": {
            **bounds,
            "score": scores[line],
            "by_kind": [
                {
                    **{key: row[key] for key in ("kind", "strength", "recall", "recall_ci")},
                    "at_most_rate": float(
                        enrichment.at_most(bounds["n_above"] * n_draws / k, n_draws, row["recall_ci"][0])
                    ),
                }
                for row in by_kind
            ],
        },
        "negative_control": calibrate.negative_control(
            space.control_C, control.patients, space.null_M, val.patients, nominal=fdr, seed=seed
        ),
        "positive_control": controls.recalls(space.planted, test.threshold or rare, train.patients, chosen_Q),
        "power": {
            "min_detectable_copy_rate": finite(calibrate.detectable_rate(n_draws, ways)),
            "smallest_flaggable_copy_rate": finite(fewest / n_draws),
            "smallest_seen_copy_rate": finite(min(n for n, _ in seeing) / n_draws),
            "probability": 0.8,
            "at_max_copy_rate": calibrate.power_at(policy["max_copy_rate"], n_draws, ways),
            **recalls[line],
            "enough": enrichment.enough(
                n_draws,
                n_val_patients,
                recall_low=lows[line],
                max_rate=policy["max_copy_rate"],
                min_power=policy["min_power"],
                nominal=fdr,
            ),
        },
    }
    return result, test


def filtered(
    examiner: spaces.Space,
    ours: Space,
    test: calibrate.Calibrated,
    train: Any,
    val: Any,
    synthetic: Any,
    level: float,
    in_order: Callable[..., Iterator],
    batch: int,
) -> tuple[release.Filter, float]:
    """The synthetic images without copies, and the line that the filter draws; see `release`."""
    line = release.line(ours.null_M, val.patients, level)
    left = release.without_copies(
        ours.hits.sim[:, 0],
        test.p_K,
        test.flagged_K,
        release.training_images(synthetic.images, train.images, in_order, batch),
        ours.hits.index[:, 0],
        synthetic.patients,
        ours.rows["synthetic"],
        examiner.search,
        line=line,
        level=level,
        threshold=test.threshold,
    )
    return left, line


def examined_again(
    looks: Mapping[str, Space],
    judge: Callable[[Space], tuple[dict, calibrate.Calibrated]],
    shared: dict[str, Any],
    first: tuple[list[controls.Planted], float, np.ndarray],
    policy: dict[str, float],
    seed: int,
) -> list[dict[str, Any]]:
    """What is left after a filter, by scores that the filter did not use, so not registered: filtering hides its score.

    Args:
      judge: see `judge`. shared: sections of `audit.json` that hold for all of them.
      first: the planted copies by the filter's score, its line, and their patients.
    Returns:
      For each look: its space, the images that it flags, what it sees of the planted copies that the filter missed
      (`release.seen_of_missed`), and its verdict: FAIL, or INCONCLUSIVE, since among what is left it has no power of its
      own to show that there are none.
    """
    planted, line, patients_Q = first
    rows = []
    for name, space in looks.items():
        section, test = judge(space)
        word, reasons = verdict.decide(section | shared, policy)
        counts = {k: section["calibrated"][k] for k in ("n_copies", "copy_rate", "copy_rate_ci", "n_mem_patients")}
        from_here = test.threshold if test.threshold is not None else test.needed
        if from_here is None:
            from_here = float(np.nextafter(space.null_M.max(), np.float32(np.inf)))
        seen = release.seen_of_missed(planted, line, space.planted, from_here, patients_Q, seed)
        if word != "FAIL":
            reasons = [release.said_of_missed(seen), *(reasons if word == "INCONCLUSIVE" else [])]
        rows.append(
            {"space": name, **counts, **seen, "verdict": word if word == "FAIL" else "INCONCLUSIVE", "reasons": reasons}
        )
    return rows


def finite(rate: float) -> float | None:
    """JSON has no infinity: None where no rate is enough."""
    return rate if rate <= 1 else None
