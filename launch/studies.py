"""What makes a model memorize: each study is a factor, its levels, and what each level overrides in the config.

To add one, add an entry to STUDIES. Levels are given at the size of `configs/brain.py`; any other key is the config's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Level(NamedTuple):
    """`x` orders the levels and is what is plotted; `after`: the level whose diffusion training this one goes on with;
    `n`: training images, where a study has curves for several."""

    name: str
    overrides: dict[str, Any]
    x: float
    after: str | None = None
    n: int | None = None


class Study(NamedTuple):
    """`paper`: what Dar et al. report of copies as the factor grows, 'rises' or 'falls'; None where they report nothing.

    `ordered`: whether the levels have an order, in which copies may rise or fall. `deciding`: the measure that answers the
    question (`measures.py`), the one that is tested.
    """

    question: str
    factor: str
    levels: Sequence[Level]
    paper: str | None = None
    ordered: bool = True
    deciding: str = "copies"


class Run(NamedTuple):
    name: str
    level: Level
    seed: int
    after: str | None  # name of the run whose diffusion training it goes on with


# of every run: an audit that found copies is no failure, and what a study does not show is not measured
ALWAYS = {"audit.exit_code": False, "audit.spaces": (), "audit.membership": False}
DUPLICATED = 8  # patients of the study of duplication who are in the training set several times
# along one training run the learning rate must not depend on where it ends
ONE_RUN = {"train.diffusion.optimiser.decay_to": 1.0}


def numbers(key: str, values: Sequence[float], name: str = "{}", **more: Any) -> list[Level]:
    """A level for each value of one key."""
    return [Level(name.format(v), {key: v, **more}, v) for v in values]


def subjects(n: int) -> dict[str, Any]:
    """Training images, one a patient: the cohort's number of subjects; real data are cut to as many images."""
    return {"data.cohort.subjects.train": n, "data.limit.train": n}


def along(steps: Sequence[int], n: int | None = None) -> list[Level]:
    """One training run, sampled and audited after so many steps; `n`: of so many subjects, and then x is steps / n."""
    levels: list[Level] = []
    for s in steps:
        name, x, size = (f"{s}", s, {}) if n is None else (f"{n} x {s}", s / n, subjects(n))
        before = levels[-1].name if levels else None
        levels.append(Level(name, {**size, "train.diffusion.steps": s, **ONE_RUN}, x, before, n))
    return levels


STUDIES = {
    "augmentation": Study(
        "Does augmentation of the diffusion model's images keep it from copying?",
        "augmentation of the diffusion model's images",
        [
            Level("none", {"augment.diffusion.flip": 0.0, "augment.diffusion.rotate": 0.0}, 0),
            Level("paper", {"augment.diffusion.flip": 0.5, "augment.diffusion.rotate": 5.0}, 1),
            Level(
                "stronger",
                {f"augment.diffusion.{k}": v for k, v in dict(flip=0.5, rotate=15.0, shift=0.1, scale=0.15).items()},
                2,
            ),
        ],
        paper="falls",
    ),
    "size": Study(
        "Do more training patients keep the model from copying, at the same number of steps?",
        "training images",
        [Level(str(n), subjects(n), n) for n in (16, 32, 64, 128)],
        paper="falls",
    ),
    "width": Study("Do larger models copy more?", "UNet width", numbers("unet.width", (16, 32, 64)), paper="rises"),
    "steps": Study(
        "Does over-training make the model copy?", "diffusion steps", along((100, 200, 400, 800, 1600)), paper="rises"
    ),
    "law": Study(
        "Does the time to memorize grow in proportion to the number of patients?",
        "diffusion steps / training images",
        [level for n in (16, 32, 64, 128) for level in along([n * r for r in (4, 8, 16, 32)], n)],
        paper="rises",
    ),
    "samples": Study(
        "Are more patients found as more images are drawn?",
        "images drawn",
        numbers("sample.n", (32, 64, 128, 256, 512)),
        deciding="patients",
    ),
    "duplication": Study(
        "Are patients copied more who are in the data several times? Eight of them are; the others once.",
        "times that eight patients are in the training set",
        [
            Level(
                str(k), {"data.cohort.duplicates": DUPLICATED if k > 1 else 0, "data.cohort.copies": max(k - 1, 1)}, k
            )
            for k in (1, 2, 5, 15)
        ],
        deciding="duplicated",
    ),
    "generator": Study(
        "Do latent diffusion models copy more than autoencoders and GANs?",
        "generator",
        [Level(name.upper(), {"generator": name}, i) for i, name in enumerate(("ldm", "vae", "gan"))],
        ordered=False,
    ),
    "sampler": Study(
        "Does the sampler matter?",
        "sampler and its steps",
        [
            Level(f"{kind} {steps}", {"sample.sampler": kind, "sample.steps": steps}, i)
            for i, (kind, steps) in enumerate([("ddim", 10), ("ddim", 50), ("ddim", 250), ("ddpm", 250), ("dpmpp", 20)])
        ],
        ordered=False,
    ),
    "latent": Study(
        "Does the autoencoder's compression matter?",
        "latent channels (fewer: stronger compression)",
        numbers("autoencoder.latent", (2, 4, 8, 16)),
    ),
}


def named(name: str) -> Study:
    """Raises ValueError where there is no such study."""
    if name not in STUDIES:
        raise ValueError(f"--study={name}: there is none; there are {', '.join(STUDIES)}")
    return STUDIES[name]


def chains(study: Study, seeds: int) -> list[list[Run]]:
    """All runs. Those of a chain go on from one another, in order; chains do not wait for each other."""
    place = {level.name: i for i, level in enumerate(study.levels)}

    def run(level: Level, seed: int) -> Run:
        name = lambda level_name: f"{place[level_name]:02d}-{level_name.replace(' ', '')}-seed{seed}"
        return Run(name(level.name), level, seed, level.after and name(level.after))

    made: list[list[Run]] = []
    for seed in range(seeds):
        for level in study.levels:
            if level.after:
                made[-1].append(run(level, seed))
            else:
                made.append([run(level, seed)])
    return made


def arguments(run: Run, config: str, folder: Path, store: Path, extra: Sequence[str]) -> list[str]:
    """Of main.py, for one run; `extra` come last, so that they win."""
    overrides = {"seed": run.seed, "share": str(store), **ALWAYS, **run.level.overrides}
    mode = ["--mode=train,sample,audit", f"--config={config}", f"--workdir={folder}"]
    return [*mode, *(f"--config.{key}={value}" for key, value in overrides.items()), *extra]
