"""Facsimile: train a latent diffusion model on patients' images, sample it, and audit the samples for copies.

python main.py --config=configs/brain.py --mode=train,sample,audit --workdir=runs/brain
"""

from launch import early

if __name__ == "__main__":
    early.settle()

import contextlib
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

import data
import detection
import ldm
from data import augment, copies, export
from launch import checkpoint, cost, log, loop, machine, mesh, stage
from ldm import controls, imagenet

MODES = ("train", "sample", "audit")
RENOISE = (0.2, 0.4, 0.6)  # noise levels t / T of planted copies
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file; a variant follows after a colon.", lock_config=True
)
_MODE = flags.DEFINE_list("mode", None, f"What to do: {', '.join(MODES)}, or several in order.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; the same command goes on where it stopped.")
flags.mark_flags_as_required(["config", "mode", "workdir"])
flags.register_validator("mode", lambda m: not m or set(m) <= set(MODES), f"use one or more of {', '.join(MODES)}")


def main(argv: list[str]) -> int:
    """Runs the modes in order; the exit code is 0, or what the audit's verdict asks for."""
    if argv[1:]:
        raise ValueError(f"unexpected argument {argv[1]!r}: every option is --name=value")
    config, workdir = _CONFIG.value, Path(_WORKDIR.value)
    trained = [config.train[name] for name in (*ldm.stages(config.generator), "detector")]
    parts = [s.batch // s.get("accumulate", 1) for s in trained]
    batches = [*parts, config.sample.batch, config.audit.batch, config.quality.batch]
    machine.start(batches, math.prod(config.data.size))
    if config.dry_run:
        return dry_run(config)
    with jax.set_mesh(mesh.make(**config.mesh.to_dict())):
        stage.describe(workdir, config.to_dict(), log.provenance())
        codes = [{"train": train, "sample": sample, "audit": audit}[mode](config, workdir) for mode in _MODE.value]
    return max(code or 0 for code in codes)


def train(config: ConfigDict, workdir: Path) -> None:
    """The generator's stages, then the copy detector; stages that are done are skipped."""
    form_of(config, workdir)  # samples that cannot be written are refused before anything is read
    sets = data.load(**config.data.to_dict(), need=("train", "select", config.detector.select_on))
    content = data.content(sets, *LEARNED)
    generator = build_generator(config, workdir)
    for name in ldm.stages(config.generator):
        decay = config.train[name].optimiser.decay_to
        with claim(config, workdir / name, content, *made_of(config, name), grow=GROW.get((name, decay), ())):
            said = {name: getattr(sets["train"], name) for name in ("spacing", "window", "top", "affine")}
            said |= {"intensity": config.data.intensity, "content": content}
            checkpoint.write_json(workdir / "data.json", said)
            ldm.train(
                generator,
                name,
                sets["train"].images,
                sets["select"].images,
                **pipeline_of(config),
                patients=(sets["train"].patients, sets["select"].patients),
                augment=augmentation(config.augment[name]),
                key=key(config, PURPOSE[name]),
                guard=config.train.guard,
                **config.train[name].to_dict(),
            )
    train_detector(config, workdir / "detector", sets, purpose=2)


def sample(config: ConfigDict, workdir: Path) -> None:
    """Image files `samples/000000.*` and on, as `sample.format` says; those that exist are kept."""
    folder, form, last = workdir / "samples", form_of(config, workdir), ldm.stages(config.generator)[-1]
    draw, source = drawing(config, build_generator(config, workdir))
    content = (stage.made_with(workdir / last) or {}).get(stage.CONTENT)  # of what the generator learned from
    settings = settings_with(config, content, *made_of(config, last), "sample")
    stage.claim(folder, settings, grow=("sample.n",))
    paths = [folder / f"{i:06d}{form.suffix}" for i in range(len(source))]
    missing = absent(paths)
    items = source if len(missing) == len(paths) else source[missing] if len(missing) else []
    with log.progress("sampling", len(paths), len(paths) - len(missing), unit="image") as bar:
        done = 0
        for images in mesh.stream(draw, data.in_order(items, config.sample.batch)):
            for number, image in zip(missing[done:], images, strict=False):
                if jax.process_index() == 0:
                    export.write_image(paths[number], image, form)
            done += len(images)
            bar.update(len(images))
    stage.barrier("samples")


def absent(paths: Sequence[Path]) -> np.ndarray:
    """Which of the paths are not there, as process 0 sees them: it writes while others may still be looking."""
    (numbers,) = np.nonzero(mesh.from_first(np.array([not path.exists() for path in paths], bool)))
    return numbers.astype(np.int32)


def drawing(config: ConfigDict, generator: ldm.Generator) -> tuple[Callable, Sequence]:
    """A jitted function, and the items that it makes samples of: numbers, or for a control the held-out images."""
    how = {name: config.sample[name] for name in ("sampler", "steps", "eta")} | {"key": key(config, 3)}
    control = config.sample.control
    if control == "held_out":
        unseen = data.load(**config.data.to_dict(), need=("control",))["control"]
        return ldm.round_trip(generator) or jax.jit(lambda x: x), unseen.images
    if control:
        controls.check(control)
        return ldm.sampler(*ldm.optimal(generator), **how), np.arange(config.sample.n, dtype=np.int32)
    return ldm.sampler(generator, load(config, generator), **how), np.arange(config.sample.n, dtype=np.int32)


def audit(config: ConfigDict, workdir: Path) -> int:
    """Compares synthetic images, ours or any folder's, with the training images; writes `audit/` and `quality.json`."""
    settings = config.audit.to_dict()
    own = ("synthetic", "reading", "release", "exit_code", "spaces", "membership", "embeddings", "register", "bf16")
    foreign, reading, release, exit_code, beside, member, vectors, candidates, bf16 = (
        settings.pop(name) for name in own
    )
    ours = foreign is None
    source = workdir / "samples" if ours else Path(foreign).expanduser()
    if release and source.is_file():
        raise ValueError(f"{source}: audit.release copies files, and this is one: save its images one by one")
    need = ("train", config.detector.select_on, "val", "control")  # the null and the negative control are no luxury
    sets = data.load(**config.data.to_dict(), need=need)
    if ours:  # else who trained the generator might be among the unseen patients
        learned = {stage.CONTENT: data.content(sets, *LEARNED)}
        for made in (*ldm.stages(config.generator), "samples"):
            stage.check(workdir / made, learned)
    synthetic = data.read_folder(source, **reading_of(config, workdir, reading if not ours else None))
    if release and synthetic.unread:
        raise ValueError(f"{source}: audit.release copies whole files, but {synthetic.unread}: nobody judged the rest")
    given = {}
    if vectors:
        ids = {"train": sets["train"].ids, "val": sets["val"].ids, "synthetic": synthetic.ids}
        given["audit.embeddings"] = ldm.read_features(Path(vectors), ids, "config.audit.embeddings")
    model = train_detector(config, workdir / "detector", sets, purpose=2)
    again = train_detector(config, workdir / "detector-again", sets, purpose=4) if release else None
    embed = detection.embedder(model)
    generator = build_generator(config, workdir) if ours else None
    render = ldm.round_trip(generator) if ours else None
    plants, losses = copies.grid(), None
    if render:
        plants["autoencoder", 1.0] = lambda key, x: render(x)
    if ours and config.generator == "ldm" and not config.sample.control:
        weights = load(config, generator)
        plants |= {("re-noise", level): fn for level, fn in ldm.renoised(generator, weights, RENOISE).items()}
        if member:
            losses = ldm.loss_levels(generator, weights, key=key(config, 6), levels=settings["levels"], draws=2)
    compare = functools.partial(quality, config, sets, embed)
    whole, kept = workdir / "quality.json", workdir / "quality-released.json"
    others = detection.spaces_of(
        beside,
        model.image_shape,
        trained=embed if candidates else None,
        untrained=detection.untrained(model, key(config, 5)),
        ssim=ldm.ssim,
        latents=ldm.latents(generator) if render else None,
        bf16=bf16,
    )
    result = detection.audit(
        detection.registered(embed, model.image_shape, candidates, bf16=bf16),
        sets,
        synthetic,
        render=render,
        plants=plants,
        again=again and detection.by_correlation(detection.embedder(again), bf16=bf16),
        others=others | given,
        losses=losses,
        described={"config": config.to_dict(), "environment": log.provenance()},
        source=source,
        in_order=data.in_order,
        folder=workdir / "audit",
        stated=ours or sets["train"].stated,
        caveats=caveats_of(config, sets, synthetic),
        release_to=Path(release).expanduser() if release else None,
        quality=lambda keep_K: (
            ldm.before_and_after(compare(synthetic, whole), compare(data.subset(synthetic, keep_K), kept), "synthetic")
            if config.quality.enabled
            else None
        ),
        seed=config.seed,
        **settings,
    )
    if not (config.quality.enabled and release):  # then it is measured already
        compare(synthetic, whole)
    return detection.exit_code(result) if exit_code else 0


def quality(config: ConfigDict, sets: dict, embed: Callable, synthetic: data.ImageSet, path: Path) -> dict | None:
    """Compares the synthetic images with unseen real ones in feature spaces; writes `path`. See `ldm.evaluate`."""
    settings = config.quality.to_dict()
    if settings["reference"] not in ("val", "train"):
        raise ValueError(f"config.quality.reference={settings['reference']!r}: use 'val' or 'train'")
    if not settings["enabled"]:
        return ldm.not_measured(path, "config.quality.enabled is False")
    spaces = {"detector": embed}
    if settings["imagenet"]:
        spaces[imagenet.NAME] = imagenet.features()
    if settings["features"]:
        spaces["features of config.quality.features"] = Path(settings["features"])
    return ldm.evaluate(
        sets[settings["reference"]],
        {"synthetic": synthetic, "unseen real": sets["control"]},
        spaces=spaces,
        in_order=data.in_order,
        path=path,
        seed=config.seed,
        **{k: settings[k] for k in ("neighbours", "pairs", "batch")},
    )


def train_detector(config: ConfigDict, folder: Path, sets: dict, purpose: int) -> detection.Detector:
    """The copy detector in `folder`, trained unless it is there; another `purpose` is another seed."""
    model = detection.build(shape_of(config), folder, **detector_of(config))
    with claim(config, folder, data.content(sets, "train", config.detector.select_on), "detector", "train.detector"):
        detection.train(
            model,
            sets["train"].images,
            sets[config.detector.select_on].images,
            **pipeline_of(config),
            augment=augmentation(config.detector.augment),
            both=config.detector.both,
            key=key(config, purpose),
            **config.train.detector.to_dict(),
        )
    return model


def dry_run(config: ConfigDict) -> int:
    """Prints what training and sampling cost on the machine that is planned for, for people and then as JSON."""
    here = 1 if jax.default_backend() == "cpu" else jax.device_count()  # a CPU's cores are no accelerators
    layout = {"devices": config.plan.devices or here, **config.mesh.to_dict()}
    generator, found, names = build_generator(config, Path()), {}, ldm.stages(config.generator)
    named = lambda *sections: stage.key_of(settings_of(config, *sections))
    for name in names:
        settings, augment = config.train[name].to_dict(), augmentation(config.augment[name])
        s = ldm.stage(generator, name, steps=settings["steps"], optimiser=settings["optimiser"], augment=augment)
        extra = {"ema": tuple(settings.get("ema", ())), "accumulate": settings["accumulate"]}
        one = cost.of(s.task, cost.batch(s.item, settings["batch"]), tx=s.tx, prepare=s.prepare, **extra, **layout)
        found[name] = cost.Stage(one, settings["steps"], named(*made_of(config, name)))
    weights, numbered = ldm.weights(generator), lambda batch: jax.ShapeDtypeStruct((batch,), np.int32)
    if "diffusion" in names and config.train.guard != "off":
        one = cost.drawing(ldm.one_look(generator), weights, numbered(settings["batch"]), **layout)
        found["looks"] = cost.Stage(one, -(-settings["steps"] // settings["eval_every"]), named(*made_of(config, name)))
    settings = config.train.detector.to_dict()
    model = detection.build(shape_of(config), Path(), **detector_of(config))
    item = jax.ShapeDtypeStruct(model.image_shape, np.float32)
    task = detection.task(model, augmentation(config.detector.augment), config.detector.both)
    tx = loop.optimiser(steps=settings["steps"], **settings["optimiser"])
    one = cost.of(task, cost.batch(item, settings["batch"]), tx=tx, select=True, **layout)
    found["detector"] = cost.Stage(one, settings["steps"], named("detector", "train.detector"))
    how = {name: config.sample[name] for name in ("sampler", "steps", "eta")} | {"key": key(config, 3)}
    draw = lambda weights, numbers: ldm.sampler(generator, weights, **how)(numbers)
    one = cost.drawing(draw, weights, numbered(config.sample.batch), **layout)
    named_last = named(*made_of(config, names[-1]), "sample")
    found["sampling"] = cost.Stage(one, -(-config.sample.n // config.sample.batch), named_last)
    print(cost.table(found, config.plan.utilisation))
    print(json.dumps(cost.described(found, config.plan.utilisation)))
    return 0


# ---- what of the config a stage is made of

MODELS = {
    "autoencoder": ("autoencoder",),
    "diffusion": ("unet", "diffusion", "train.guard"),
    "vae": ("vae",),
    "gan": ("gan",),
}
PURPOSE = {"autoencoder": 0, "diffusion": 1, "vae": 7, "gan": 8}  # of the seed; the others are detectors and samples
LEARNED = ("train", "select")  # splits that the generator has seen
GROW = {("diffusion", 1.0): ("train.diffusion.steps",)}  # by decay_to: a rate that decays does so towards its last step


def made_of(config: ConfigDict, last: str) -> list[str]:
    """Sections that the generator's stages up to `last` depend on."""
    names = ldm.stages(config.generator)
    names = names[: names.index(last) + 1]
    return ["generator", "dtype", *(s for name in names for s in (*MODELS[name], f"augment.{name}", f"train.{name}"))]


def build_generator(config: ConfigDict, workdir: Path) -> ldm.Generator:
    return ldm.build(
        config.generator,
        shape_of(config),
        workdir,
        first=config[ldm.stages(config.generator)[0]].to_dict(),
        net=config.unet.to_dict(),
        process=config.diffusion.to_dict(),
        dtype=config.dtype,
        remat=config.remat,
    )


def load(config: ConfigDict, generator: ldm.Generator) -> Any:
    """The weights that `config.sample` asks for."""
    of, ema = config.train[ldm.stages(config.generator)[-1]], config.sample.ema
    return ldm.load(generator, ema=ema, decays=of.get("ema", ()), steps=of.steps, guard=config.train.guard)


def detector_of(config: ConfigDict) -> dict:
    return {k: v for k, v in config.detector.to_dict().items() if k not in ("augment", "both", "select_on")}


def form_of(config: ConfigDict, workdir: Path) -> export.Form:
    """How samples are stored: invertible, so that an audit reads back what was sampled, in the training data's units,
    and lying as the training data lies."""
    said = checkpoint.read_json(workdir / "data.json") or {}
    form = {"channels": config.data.channels, "intensity": config.data.intensity}
    form |= {name: said.get(name) for name in ("spacing", "top")}
    if said.get("affine"):
        form["affine"] = export.placed(np.array(said["affine"]), config.data.size)
    return export.form(config.sample.format, config.data.size, **form)


def reading_of(config: ConfigDict, workdir: Path, foreign: dict | None) -> dict:
    """How synthetic images are read: ours as they were written; others as the data, but for what `foreign` says."""
    same = {name: config.data[name] for name in ("size", "channels", "fit", "on_error", "cache", "workers")}
    if foreign is None:
        return same | {"intensity": form_of(config, workdir).reading}
    return same | {name: config.data.get(name) if value is None else value for name, value in foreign.items()}


def caveats_of(config: ConfigDict, sets: dict, synthetic: data.ImageSet) -> list[str]:
    """What the reader must know of the images, real and synthetic; names of files only after the first ': ' of each."""
    said = [detection.PER_IMAGE] if config.data.patients == "per_image" else []
    said += [detection.CHOSEN] if config.detector.select_on == "val" else []
    real, made = sets["train"].spacing, synthetic.spacing
    if real and made and len(real) == len(made) and not np.allclose(real, made, rtol=0.05):
        said.append(detection.VOXELS.format(*(" x ".join(f"{mm:.3g}" for mm in one) for one in (made, real))))
    return list(dict.fromkeys([*said, *sets["train"].notes, *synthetic.notes]))


def shape_of(config: ConfigDict) -> tuple[int, ...]:
    return (*config.data.size, config.data.channels)


def augmentation(section: ConfigDict):
    """`augment(key, x) -> x`, or None where the section asks for nothing."""
    settings = section.to_dict()
    active = any(value for name, value in settings.items() if not name.endswith(("_p", "_axis")))
    return functools.partial(augment.augment, **settings) if active else None


def pipeline_of(config: ConfigDict) -> dict:
    process = (jax.process_index(), jax.process_count())
    return {"batches": functools.partial(data.batches, seed=config.seed, process=process), "in_order": data.in_order}


def key(config: ConfigDict, purpose: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.seed), purpose)


def settings_of(config: ConfigDict, *sections: str) -> dict:
    """What decides a stage's result: these sections, the data and the seed; flat."""
    no_matter = ("data.cache", "data.workers", "data.beam", "data.accept_duplicates", "sample.batch")
    flat = stage.flatten(config.to_dict()) | dict.fromkeys(no_matter)  # these change no result
    if config.train.guard != "stop":
        flat["train.guard"] = None  # it changes none either
    mine = ("seed", "data", *sections)
    return {k: v for k, v in flat.items() if any(k == s or k.startswith(s + ".") for s in mine)}


def settings_with(config: ConfigDict, content: str | None, *sections: str) -> dict:
    """`settings_of`, and of which images: so it matters not where they lie, who split them, how those left out were met."""
    told_by_content = dict.fromkeys(("data.path", "data.splits", "data.on_error"))
    return settings_of(config, *sections) | told_by_content | {stage.CONTENT: content}


@contextlib.contextmanager
def claim(config: ConfigDict, folder: Path, content: str, *sections: str, grow: tuple[str, ...] = ()) -> Iterator[None]:
    """`with claim(...)`: train a stage that may be shared; refuses a folder made with other settings, or of other images.

    Args:
      content: of the images that the stage learns from, see `data.content`.
    """
    settings = settings_with(config, content, *sections)
    with stage.shared(folder, settings, config.share and Path(config.share).expanduser()):
        stage.claim(folder, settings, grow)
        yield


if __name__ == "__main__":
    early.loaded()
    sys.exit(machine.one_line_errors(lambda: app.run(main, flags_parser=machine.parse_flags)))
