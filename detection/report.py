"""`report.html`: the audit for people. One file, no script, nothing fetched; drawn from `audit.json` and the pairs alone."""

import base64
import functools
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import PIL.Image
from markupsafe import Markup

from detection import charts, figures, redaction, verdict
from launch import checkpoint

BYTES = 2_000_000  # of all pictures together, before base64 makes a third more of them
MOST_PATIENTS = 60  # rows of the table of patients
FULL_DIFFERENCE = 1.0  # half of the grey range has the deepest colour
UNITS = {  # of the strengths of planted copies
    "rotation": "degrees",
    "shift": "of the side",
    "scale": "times",
    "crop": "kept",
    "local": "of the side",
    "blur": "px",
    "re-noise": "t / T",
}


class Pair(NamedTuple):
    """A synthetic image and its nearest training image; images (*size, C) in [-1, 1]."""

    synthetic: np.ndarray
    nearest: np.ndarray
    synthetic_id: str
    training_id: str
    patient: str
    similarity: float
    p_value: float
    flagged: bool


def top_pairs(
    synthetic: Any, train: Any, nearest_K: np.ndarray, sim_K: np.ndarray, p_K: np.ndarray, flagged_K: np.ndarray, n: int
) -> list[Pair]:
    """The n most similar pairs of the sets `synthetic` and `train` (`images`, `ids`, `patients`), most similar first.

    Args:
      nearest_K: index of the nearest training image of each synthetic image; sim_K, p_K, flagged_K: what is said of it.
    """
    pairs = []
    for i in np.argsort(-sim_K, kind="stable")[:n]:
        j = int(nearest_K[i])
        names = str(synthetic.ids[i]), str(train.ids[j]), str(train.patients[j])
        images = np.asarray(synthetic.images[int(i)]), np.asarray(train.images[j])
        pairs.append(Pair(*images, *names, float(sim_K[i]), float(p_K[i]), bool(flagged_K[i])))
    return pairs


def copied_patients(patients_K: np.ndarray, flagged_K: np.ndarray) -> list[dict[str, Any]]:
    """`patients` of `audit.json`: whom flagged images point at and how many do, most first, then by id.

    Args:
      patients_K: patient of the nearest training image of each synthetic image.
    """
    names, counts = np.unique(np.asarray(patients_K)[np.asarray(flagged_K, bool)], return_counts=True)
    return [{"patient": str(names[i]), "n_copies": int(counts[i])} for i in np.argsort(-counts, kind="stable")]


def write(path: Path, result: Mapping[str, Any], pairs: Sequence[Pair], *, redact: bool, title: str) -> None:
    """Writes the report, whole or not at all.

    Args:
      result: what is in `audit.json` (docs/audit.md); sections that are absent or None are said to be missing.
      pairs: the most similar pairs, most similar first.
      redact: for sharing: no image, id or file name of a real patient and no path; see `redaction`.
      title: heading of the page.
    """
    checkpoint.write_text(path, render(result, pairs, redact=redact, title=title))


def render(result: Mapping[str, Any], pairs: Sequence[Pair], *, redact: bool, title: str) -> str:
    """The page as text; see `write`."""
    if redact:
        title = redaction.scrubber(result, pairs)(title)
        result, pairs = redaction.redacted(result, pairs), redaction.anonymous(result, pairs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=printable,
    )
    page = environment.get_template("report.html.j2").render(
        r=result,
        pairs=[picture(pair, len(pairs), redact, result.get("verdict")) for pair in pairs],
        redact=redact,
        title=title,
        charts=charts,
        rates=charts.rates(result),
        ranked=sorted(enumerate(result.get("patients") or []), key=lambda row: -row[1]["n_copies"]),
        most_patients=MOST_PATIENTS,
        units=UNITS,
        doubt=verdict.DOUBT,
        flat=flat,
        **readers(result),
    )
    return page


# ---- numbers: each is shown with the place in audit.json it comes from


def readers(result: Mapping[str, Any]) -> dict[str, Callable[..., Markup]]:
    """Functions for the template that show the number at a path of keys, or say that it was not measured."""

    def reader(text_of: Callable[[Any], str]) -> Callable[..., Markup]:
        def show(*keys: str | int) -> Markup:
            value = look(result, *keys)
            if value is None:
                return Markup('<span class="absent">not measured</span>')
            return Markup('<data value="{}" data-key="{}" title="{} = {}">{}</data>').format(
                json.dumps(value), pointer(keys), ".".join(map(str, keys)), json.dumps(value), text_of(value)
            )

        return show

    return {
        "percent": reader(percent),
        "percents": reader(lambda ci: f"[{percent(ci[0], '')}, {percent(ci[1], '')}]"),
        "count": reader(lambda n: f"{n:,.1f}".removesuffix(".0")),
        "counts": reader(lambda ci: f"[{ci[0]:,.1f}, {ci[1]:,.1f}]"),
        "score": reader(lambda s: f"{s:.3f}"),
        "scores": reader(lambda ci: f"[{ci[0]:.3f}, {ci[1]:.3f}]"),
        "chance": reader(lambda p: f"{p:.3f}" if p >= 0.0005 else f"{p:.1g}"),
        "decibel": reader(lambda g: f"{g:+.1f} dB"),
        "deviations": reader(lambda d: f"{d:+.2f} SD"),
        "plain": reader(plain),
        "look": functools.partial(look, result),
    }


def look(tree: Any, *keys: str | int) -> Any:
    """The value at a path of keys; None where it ends early."""
    for key in keys:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def pointer(keys: Sequence[str | int]) -> str:
    """JSON pointer (RFC 6901)."""
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


def percent(rate: float, unit: str = " %") -> str:
    return f"{round(100 * rate, 1) + 0.0:.1f}{unit}"  # + 0.0: no minus zero


def plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(plain, value)) + "]"
    return str(value)


def printable(value: Any) -> Any:
    """What the template prints: text with characters written out, like `\\x00`, that HTML or UTF-8 cannot hold or that
    turn the direction of reading."""
    if not isinstance(value, str):
        return value
    clean = re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]",
        lambda m: ascii(m[0])[1:-1],
        value,
    )
    return Markup(clean) if isinstance(value, Markup) else clean


def flat(tree: Mapping[str, Any], prefix: tuple = ()) -> list[tuple[tuple, Any]]:
    """[(path of keys, value)] of nested dicts, in order."""
    rows = []
    for key, value in tree.items():
        rows += flat(value, (*prefix, key)) if isinstance(value, Mapping) and value else [((*prefix, key), value)]
    return rows


# ---- pictures


def picture(pair: Pair, n: int, redact: bool, word: str | None) -> dict[str, Any]:
    """A pair for the template: images as data URIs, or None where they are withheld.

    Redacted: the training image and the difference (which, added to the synthetic image, gives it) never. The
    synthetic one only if it is not flagged and the audit passed: with any other verdict an unflagged image among the
    most similar ones may be a copy that was missed.
    """
    pixels = BYTES // (3 * max(n, 1))  # a byte a pixel is the most that a grey or indexed PNG takes, near enough
    synthetic, nearest = figures.planes(pair.synthetic), figures.planes(pair.nearest)
    shown = not redact or (word == "PASS" and not pair.flagged)
    grey = lambda x: data_uri((np.clip(x, -1, 1) + 1) / 2, pixels)
    return {
        **pair._asdict(),
        "synthetic": grey(synthetic) if shown else None,
        "nearest": None if redact else grey(nearest),
        "difference": None
        if redact
        else data_uri(np.clip((synthetic - nearest) / FULL_DIFFERENCE, -1, 1) / 2 + 0.5, pixels, "RdBu_r"),
        "volume": np.ndim(pair.synthetic) == 4,
        "reduced": synthetic.size > pixels,
    }


def data_uri(x: np.ndarray, most_pixels: int, colours: str | None = None) -> str:
    """A PNG of at most `most_pixels` pixels of a 2D array in [0, 1], in grey or in a colour map of 256 steps."""
    shrink = min(1.0, (most_pixels / x.size) ** 0.5)
    if shrink < 1:
        size = [max(int(n * shrink), 1) for n in x.shape[::-1]]
        x = np.asarray(PIL.Image.fromarray(x.astype(np.float32)).resize(size, PIL.Image.Resampling.BOX))
    image = PIL.Image.fromarray(np.round(np.clip(x, 0, 1) * 255).astype(np.uint8))
    if colours:
        from matplotlib import colormaps  # see figures.blank

        image = image.copy()
        image.putpalette((colormaps[colours](np.arange(256))[:, :3] * 255).round().astype(np.uint8).tobytes())
    out = io.BytesIO()
    image.save(out, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
