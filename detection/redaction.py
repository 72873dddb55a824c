"""What is left of an audit when it is shared: no id, file name or path of a real patient. Fails closed: what is not known
to be harmless is removed."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

REMOVED = "(removed)"
PER_IMAGE = (
    "every image counts as a patient of its own (data.patients='per_image'); if patients have several images, "
    "training and unseen images are related, intervals are too narrow, and memorization is understated"
)
CHOSEN = (
    "the detector's checkpoint was chosen by the unseen patients (detector.select_on='val'), as the paper's was, so they are "
    "not quite unseen"
)
PARTS = (
    "the {} synthetic images are parts of {} draws of the generator and count as {} independent ones in the bounds, the power "
    "and the intervals of rates; the intervals of the memorized and extracted take each for one"
)
LOUD = (
    "before real and synthetic images were rendered alike, synthetic ones had {} dB of the power of unseen ones in a frequency "
    "band that similarity rests on: little of what tells patients apart there may be left in both"
)
VOXELS = "voxels of the synthetic images are {} mm and the data's {} mm: set data.spacing"
# Caveats that stay. Any other is a note on the data, may name files and patients in any words, and is only counted.
OURS = (PER_IMAGE, CHOSEN, PARTS, LOUD, VOXELS)
CAVEATS = re.compile(
    "|".join(re.escape(sentence).replace(r"\{\}", r"[-+0-9.e]+(?: x [-+0-9.e]+)*") for sentence in OURS)
    + r"|[0-9]+ pairs? of images of different or unknown patients are the same image \((?:planted by data\.cohort|accepted by "
    r"data\.accept_duplicates)\), [0-9]+ across splits(?:; unseen images that are training images in truth make copies "
    r"look innocent)?"
)
# Strings of the configuration that stay: choices among names that the code defines. Any other may name a folder, a
# file, a patient or a person.
# fmt: off
SETTINGS = frozenset((
    "layout", "patients", "intensity", "fit", "on_error", "arch", "select_on", "schedule", "predict", "rule", "sampler",
    "objective", "dtype", "precision",
))
SECTIONS = frozenset((
    "verdict", "reasons", "policy", "caveats", "n_train", "n_val", "n_syn", "n_draws", "stated", "n_train_patients",
    "n_val_patients", "paper", "calibrated", "bounds", "negative_control", "rendering", "power", "positive_control",
    "spaces", "baselines", "extraction", "membership", "absent", "release", "patients", "histogram", "provenance",
))
# Where strings may stand, all made by the code out of its own words and numbers.
TEXT = frozenset((
    "verdict", "reasons", "caveats", "kind", "strength", "note", "method", "refused", "absent", "membership", "baselines",
    "space", "reason", "of", "worst_of",
))
ENVIRONMENT = frozenset(("git_commit", "python", "versions", "devices", "processes"))
RELEASE = frozenset((
    "verdict", "reasons", "released", "n_kept", "n_flagged", "n_over_line", "n_duplicates", "n_removed_with_them", "level",
    "line", "recall", "recall_ci", "copies_left_at_most", "copy_rate_at_most", "again", "quality",
))
# fmt: on
PATH = re.compile(
    r"""
      (?<=['"])(?:~?/|\.{1,2}/|[A-Za-z]:[\\/]|\\\\)[^'"\n]*(?=['"])  # '/home/ann smith/x', quoted
    | (?<![\w/<.])(?:
          (?:~|\.{1,2})?/[^\s'",;:()<]+              # /home/ann/x, ./x, ~/x
        | [A-Za-z]:[\\/][^\s'",;()<]*                # C:\x
        | \\\\[^\s'",;()<]+                          # \\host\x
        | [\w.+-]+://[^\s'",;()<]+                   # gs://x
        | [\w.+-]+(?:[/\\][\w.+-]+)*[/\\][\w+-]*\.[A-Za-z]\w*  # a/b.png
        | [\w.+-]+(?:[/\\][\w.+-]+){2,}              # a/b/c
      )""",
    re.VERBOSE,
)


def redacted(result: Mapping[str, Any], pairs: Sequence[Any] = ()) -> dict[str, Any]:
    """`audit.json` as it may be shared, beside a redacted report.

    Patients become 'patient 1', 'patient 2' ..., by first appearance among the pairs and then by number of copies. The
    outcome depends on similarities and counts and not on the ids, so it cannot be undone without the data. Paths, file
    names, ids in sentences, notes on the data, keys and places of text that this module does not know, and strings of the
    configuration that are not a choice among the code's own names are removed.
    """
    known = {key: value for key, value in result.items() if key in SECTIONS - {"caveats"}}
    clean = changed(strings_under(TEXT, known), scrubber(result, pairs))
    if "caveats" in result:
        said = list(result["caveats"] or [])
        kept = [caveat for caveat in said if CAVEATS.fullmatch(caveat)]
        left = len(said) - len(kept)
        more = [f"{left} more, on the data, left out here since they may name files or patients"] if left else []
        clean = {"caveats": kept + more, **clean}
    if result.get("patients"):
        names = pseudonyms(result, pairs)
        rows = [(-row["n_copies"], int(names[row["patient"]].split()[1])) for row in result["patients"]]
        clean["patients"] = [{"patient": f"patient {i}", "n_copies": -copies} for copies, i in sorted(rows)]
    if clean.get("release"):
        kept = {key: value for key, value in clean["release"].items() if key in RELEASE}
        clean["release"] = {"folder": REMOVED, **kept}
    source = clean.get("provenance")
    if source:
        clean["provenance"] = {
            "config": strings_under(SETTINGS, source.get("config") or {}),
            "environment": {k: v for k, v in (source.get("environment") or {}).items() if k in ENVIRONMENT},
            "data": {
                name: {k: v for k, v in found.items() if k in ("n", "sha256")}
                for name, found in (source.get("data") or {}).items()
            },
        }
    return clean


def anonymous(result: Mapping[str, Any], pairs: Sequence[Any]) -> list[Any]:
    """The pairs under pseudonyms, those of `redacted`; the images stay, and are the report's to withhold."""
    names = pseudonyms(result, pairs)
    return [
        pair._replace(
            patient=names[pair.patient],
            training_id=f"an image of {names[pair.patient]}",
            synthetic_id=f"synthetic image {number}",
        )
        for number, pair in enumerate(pairs, 1)
    ]


def pseudonyms(result: Mapping[str, Any], pairs: Sequence[Any]) -> dict[str, str]:
    """Patient -> 'patient 1' and on. Which of two patients with equal counts comes first shows nowhere."""
    known = dict.fromkeys(pair.patient for pair in pairs)
    known |= dict.fromkeys(row["patient"] for row in sorted(result.get("patients") or [], key=lambda r: -r["n_copies"]))
    return {patient: f"patient {i}" for i, patient in enumerate(known, 1)}


def strings_under(keys: frozenset[str], tree: Any, key: str = "") -> Any:
    """A tree with every string removed that is not under one of `keys`."""
    if isinstance(tree, Mapping):
        return {k: strings_under(keys, v, k) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [strings_under(keys, v, key) for v in tree]
    return REMOVED if isinstance(tree, str) and key not in keys else tree


def scrubber(result: Mapping[str, Any], pairs: Sequence[Any]) -> Callable[[str], str]:
    """A function that removes paths, known ids and the configuration's private strings from a sentence.

    An id of digits only would take ordinary numbers with it, so it is removed only after a word that announces one.
    """
    config = (result.get("provenance") or {}).get("config") or {}
    secret = {
        text
        for text, kept in zip(strings(config), strings(strings_under(SETTINGS, config)), strict=True)
        if text != kept
    }
    secret |= {text for pair in pairs for text in (pair.synthetic_id, pair.training_id, pair.patient)}
    secret |= {row["patient"] for row in result.get("patients") or []}
    secret |= {(result.get("release") or {}).get("folder") or ""}
    longest_first = sorted((text for text in secret if text.strip()), key=lambda text: (-len(text), text))
    words = "|".join(re.escape(text) for text in longest_first if not text.isdigit()) or r"(?!)"
    digits = "|".join(re.escape(text) for text in longest_first if text.isdigit()) or r"(?!)"
    word = re.compile(rf"(?<!\w)(?:{words})(?!\w)")
    digit = re.compile(rf"\b(patients?|subjects?|images?|ids?|scans?)([\s:=#'\x22]+)(?:{digits})(?!\w)", re.IGNORECASE)

    def hide(text: str) -> str:
        return PATH.sub(REMOVED, digit.sub(rf"\1\2{REMOVED}", word.sub(REMOVED, text)))

    return hide


def strings(tree: Any) -> Iterator[str]:
    """Every string of a tree, in order; keys are not among them."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for part in tree:
            yield from strings(part)
    elif isinstance(tree, str):
        yield tree


def changed(tree: Any, change: Callable[[str], str]) -> Any:
    """A tree with every string changed, keys included; keys that come out alike are numbered."""
    if isinstance(tree, Mapping):
        out = {}
        for key, value in tree.items():
            name = change(key)
            name = name if name not in out else f"{name} {len(out) + 1}"
            out[name] = changed(value, change)
        return out
    if isinstance(tree, list | tuple):
        return [changed(value, change) for value in tree]
    return change(tree) if isinstance(tree, str) else tree
