"""How good and how varied the synthetic images are: distances to unseen real images in feature spaces, and MS-SSIM of pairs.

Beside the synthetic images stand other real ones, of patients that neither the reference nor the training set has: what
they score is what a perfect generator would.
"""

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from launch import checkpoint, log, mesh
from ldm import distances, similarity


def evaluate(
    reference: Any,
    candidates: Mapping[str, Any],
    *,
    spaces: Mapping[str, Callable[[jax.Array], jax.Array] | Path],
    in_order: Callable[..., Iterator],
    path: Path,
    neighbours: int,
    pairs: int,
    batch: int,
    seed: int,
) -> dict[str, Any] | None:
    """Compares each candidate set with the reference, writes `path` (JSON) and prints one table.

    Args:
      reference, candidates: sets with `images`, `ids` and `patients`; those of synthetic images are the generator's draws.
      spaces: name -> a jitted function images (B, *S, C) -> features (B, D); or a file for `read_features`. The latter's
        are taken as they are. The former's are put on a sphere (`on_sphere`).
      neighbours: k of precision, recall, density and coverage.
      pairs: about how many pairs of each set MS-SSIM is averaged over.
    Returns:
      What is in the file; None, as `not_measured`, where a set has too few patients to measure anything.
    """
    sets = {"reference": reference, **candidates}
    for name, one in sets.items():
        count = len(np.unique(one.patients))
        if count < distances.FEWEST:
            return not_measured(path, f"the set {name!r} has {count} patients and {distances.FEWEST} are needed")
    result: dict[str, Any] = {
        "interval": f"95 %, {distances.GROUPS} groups of patients left out in turn",
        "neighbours": neighbours,
        "sets": {name: {"n": len(one.ids), "n_patients": len(np.unique(one.patients))} for name, one in sets.items()},
        "spaces": {},
    }
    for space, source in spaces.items():
        found = features_of(space, sets, source, in_order, batch)
        standard = {name: distances.features(found[name], one.patients, seed=seed) for name, one in sets.items()}
        result["spaces"][space] = {
            name: compare(standard["reference"], standard[name], neighbours) for name in candidates
        }
    result["ms_ssim"] = {
        "scales": similarity.scales(reference.images[0].shape[:-1]),
        **{name: diversity(one, in_order=in_order, pairs=pairs, batch=batch, seed=seed) for name, one in sets.items()},
    }
    checkpoint.write_json(path, result)
    log.say(table(result, path))
    return result


def not_measured(path: Path, reason: str) -> None:
    """Writes {`reason`} as `path`, so that an audit without these figures is told from one that was stopped before them."""
    checkpoint.write_json(path, {"reason": reason})
    log.say(f"quality: not measured: {reason}")


def before_and_after(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """What two results of `evaluate`, of a whole set and of a part of it, say of the set called `name`.

    Returns:
      before, after: {space: {figure: {value, ci}}, 'ms_ssim': {value, ci}}, None where there was too little to measure,
      and then `reason` says so; it is None otherwise.
    """

    def of(result: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if result is None:
            return None
        short = lambda f: {"value": f["value"], "ci": f["ci"]}
        figures = {
            space: {key: short(f) for key, f in rows[name].items() if isinstance(f, Mapping)}
            for space, rows in result["spaces"].items()
        }
        return figures | {"ms_ssim": short(result["ms_ssim"][name])}

    short = [when for when, result in (("whole", before), ("released", after)) if result is None]
    reason = (
        f"the {short[0]} set, or the real ones beside it, have fewer than {distances.FEWEST} patients"
        if short
        else None
    )
    return {"before": of(before), "after": of(after), "reason": reason}


def features_of(
    space: str, sets: Mapping[str, Any], source: Callable | Path, in_order: Callable, batch: int
) -> dict[str, np.ndarray]:
    """name -> (n, D) features of each set, in the order of its images."""
    if not callable(source):
        return read_features(source, {name: one.ids for name, one in sets.items()})
    with log.progress(f"{space} space", sum(len(one.ids) for one in sets.values()), unit="image") as bar:

        def read(images: Sequence) -> Iterator[np.ndarray]:
            for part in mesh.stream(source, in_order(images, batch)):
                bar.update(len(part))
                yield part

        return {name: on_sphere(np.concatenate(list(read(one.images)))) for name, one in sets.items()}


def on_sphere(x_NxD: np.ndarray) -> np.ndarray:
    """Rows scaled to the norm sqrt(D), so that x . y / D is the cosine: an encoder trained by a contrastive loss says
    nothing by a row's length, and the kernel distance's kernel wants numbers of about one."""
    x = np.asarray(x_NxD, np.float64)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x * np.sqrt(x.shape[1]) / np.maximum(norm, 1e-12)


def read_features(
    path: Path, ids: Mapping[str, Sequence[str]], key: str = "config.quality.features"
) -> dict[str, np.ndarray]:
    """Anyone's features of the sets' images: an .npz with `ids` (N,) and `features` (N, D), matched by id.

    `key` of the configuration named the file. An id may be written `set/id`, as in 'synthetic/000001.png'; it must be where two sets share an id.

    Raises:
      FileNotFoundError, ValueError: one line that names the file, what it lacks, and the mend.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file; correct {key}")
    try:
        file = np.load(path, allow_pickle=False)
        lacking = {"ids", "features"} - set(file.files)
        names, x = [None if lacking else file[name] for name in ("ids", "features")]
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not an .npz file of plain arrays; write it with numpy.savez") from error
    if lacking:
        raise ValueError(f"{path}: holds {sorted(file.files)}, not {sorted(lacking)}; write both `ids` and `features`")
    names = names.astype(str)
    if x.ndim != 2 or len(x) != len(names) or x.dtype.kind not in "fiu":
        raise ValueError(
            f"{path}: features are {x.dtype} of shape {x.shape}; {len(names)} ids need numbers ({len(names)}, D)"
        )
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: the features of {str(names[~np.isfinite(x).all(1)][0])!r} hold NaN or infinity")
    row = {name: i for i, name in enumerate(names)}
    if len(row) < len(names):
        values, counts = np.unique(names, return_counts=True)
        raise ValueError(f"{path}: the id {str(values[counts.argmax()])!r} is there {counts.max()} times")
    found = {}
    for one, members in ids.items():
        plain = [name for name in members if f"{one}/{name}" not in row]
        absent = [name for name in plain if name not in row]
        if absent:
            raise ValueError(
                f"{path}: no features of {str(absent[0])!r} and {len(absent) - 1} more of the {len(members)} images of {one!r}"
            )
        shared = [name for name in plain if any(name in other for key, other in ids.items() if key != one)]
        if shared:
            raise ValueError(f"{path}: two sets have an image {str(shared[0])!r}; write its id as '{one}/{shared[0]}'")
        found[one] = x[[row.get(f"{one}/{name}", row.get(name)) for name in members]].astype(np.float64)
    return found


def compare(reference: distances.Features, candidate: distances.Features, neighbours: int) -> dict[str, Any]:
    """The figures of one candidate in one space; each with `value` and `ci`."""
    plain = distances.frechet(reference.x, candidate.x)
    infinite = distances.frechet_infinity(reference, candidate)
    spread = ((reference.x - reference.x.mean(0)) ** 2).sum() / (len(reference) - 1)
    without = lambda statistic: distances.without_each_group(statistic, reference, candidate)
    shares = distances.prdc(reference, candidate, neighbours)
    smallest = min(len(reference), len(candidate)) // max(distances.PARTS)
    return {
        "dimensions": reference.x.shape[1],
        "frechet": figure(distances.jackknife(plain, without(lambda x, y: distances.frechet(x.x, y.x)))),
        "frechet_infinity": figure(distances.jackknife(infinite, without(distances.frechet_infinity)))
        | {"of_variance": infinite / spread, "enough_images": bool(smallest > reference.x.shape[1])},
        "kernel": figure(distances.kernel_distance(reference, candidate)),
        **{name: figure(share) for name, share in shares._asdict().items()},
        "coverage_if_equal": distances.coverage_if_equal(len(reference), len(candidate), neighbours),
    }


def figure(estimate: distances.Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "ci": [estimate.low, estimate.high]}


# ---- diversity


class Pairs:
    """Random access to pairs of images, (2, *S, C)."""

    def __init__(self, images: Sequence, index_Px2: np.ndarray):
        self._images, self._index = images, index_Px2

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> np.ndarray:
        return np.stack([np.asarray(self._images[j], np.float32) for j in self._index[i]])


def diversity(one: Any, *, in_order: Callable, pairs: int, batch: int, seed: int) -> dict[str, Any]:
    """Mean MS-SSIM between images of different patients of a set: high where the images are alike (Odena et al. 2017).

    Returns:
      value, ci (by leaving out groups of patients with all their pairs), n_pairs.
    """
    index = pairs_of(one.patients, pairs, seed)
    measure = jax.jit(lambda both: similarity.ms_ssim(both[:, 0], both[:, 1]))
    value = np.concatenate(list(mesh.stream(measure, in_order(Pairs(one.images, index), batch)))).astype(np.float64)
    turn = distances.features(np.zeros((len(one.ids), 1)), one.patients, seed=seed).turn[index]
    groups = min(distances.GROUPS, int(turn.max()) + 1)
    without = [value[(turn % groups != g).all(1)].mean() for g in range(groups)]
    return figure(distances.jackknife(value.mean(), np.array(without))) | {"n_pairs": len(value)}


def pairs_of(patients: np.ndarray, pairs: int, seed: int) -> np.ndarray:
    """About `pairs` pairs of images of different patients, each image in about as many: (P, 2)."""
    order = np.random.default_rng(seed).permutation(len(patients))
    rounds = min(-(-pairs // len(patients)), (len(patients) - 1) // 2)
    index = np.concatenate([np.stack([order, np.roll(order, -turn)], 1) for turn in range(1, max(rounds, 1) + 1)])
    return index[patients[index[:, 0]] != patients[index[:, 1]]][:pairs]


# ---- for the terminal


def table(result: dict[str, Any], path: Path) -> str:
    """One table: a row per set and space."""
    span = lambda f, digits: f"{f['value']:.{digits}f} [{f['ci'][0]:.{digits}f}, {f['ci'][1]:.{digits}f}]"
    heads = ("Frechet, infinite n", "kernel distance", "precision", "recall", "coverage")
    lines = [
        f"quality against {result['sets']['reference']['n']} unseen real images of "
        f"{result['sets']['reference']['n_patients']} patients; 95 % intervals",
        f"{'':38}" + "".join(f"{head:>24}" for head in heads),
    ]
    few = False
    for space, rows in result["spaces"].items():
        for name, row in rows.items():
            enough = row["frechet_infinity"]["enough_images"]
            few = few or not enough
            shown = [span(row["frechet_infinity"], 2) + ("" if enough else " *"), span(row["kernel"], 3)]
            shown += [span(row[share], 2) for share in ("precision", "recall", "coverage")]
            title = f"{name} ({result['sets'][name]['n']}), {space}"
            lines.append(f"{title:38}" + "".join(f"{cell:>24}" for cell in shown))
    if few:
        lines.append(
            "* too few images for the space's dimensions: its bias is not all removed (enough_images in the report)"
        )
    scales = result["ms_ssim"]["scales"]
    cells = [f"{name} {span(f, 3)}" for name, f in result["ms_ssim"].items() if name != "scales"]
    lines.append(f"MS-SSIM of pairs ({scales} of 5 scales; high: alike): " + "; ".join(cells))
    lines.append(f"report: {path}")
    return "\n".join(lines)
