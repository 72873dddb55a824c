"""A look at a data set before anything is trained: no model, seconds once the files are prepared.

    python -m data --config=configs/xray.py --config.data.path=PATH --out=look.png

Prints the counts of images and patients in each split, who says the splits, shapes, spacings, intensities, what was left
out, and images that are there twice; draws a contact sheet, and lists beside it the repeats (look.csv), the files that were
left out (look.left_out.csv), and each patient's split (look.splits.csv): for whoever trains another generator, and to be
given back as data.splits. Exits with 1 where training would refuse the data: an empty split, images without a patient, files that
cannot be read (unless data.on_error is 'skip'), or different patients who share an image that `data.accept_duplicates` does
not name.

    python -m data --cache=list

prints what the cache folder holds of patients; `--cache=NAME` deletes one, `--cache=all` everything.
"""

import os
import sys
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

import data
from data import duplicates, look, prepare, sets

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; a variant follows after a colon.")
_OUT = flags.DEFINE_string("out", "look.png", "The contact sheet, a PNG; repeats go into a CSV of the same name.")
_CACHE = flags.DEFINE_string(
    "cache", None, "Instead of a look: 'list' the prepared data sets, or delete a NAME or 'all'."
)
flags.register_multi_flags_validator(
    ["config", "cache"], lambda given: given["config"] or given["cache"], "use --config=FILE, or --cache=list"
)


def main(argv: list[str]) -> int:
    if argv[1:]:
        raise ValueError(f"unexpected argument {argv[1]!r}: every option is --name=value")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # what would be warned of is printed below
    if _CACHE.value:
        return cache(_CONFIG.value and _CONFIG.value.data.cache, _CACHE.value)
    settings, out = _CONFIG.value.data.to_dict(), Path(_OUT.value).expanduser()
    if out.suffix.lower() != ".png" or not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: --out must be a .png in a folder that exists")
    accept, path = settings.pop("accept_duplicates"), settings["path"]
    trouble = sets.Trouble([], [])
    splits = data.load(**settings, trouble=trouble)
    listed = sets.listed(**settings, trouble=sets.Trouble([], []))
    part = sets.partition_of(listed, **settings, trouble=sets.Trouble([], []))
    planted = sets.planted(path, settings["cohort"])
    found = duplicates.find(splits, [*accept, *planted])
    lines = [f"{path or 'the embedded semi-synthetic cohort'}", *look.table(splits, found.within)]
    lines += look.splits(listed, part, settings, out.with_suffix(".splits.csv"), write=not trouble.problems)
    lines += look.raw(listed) if path else []
    lines += look.prepared(splits)
    lines += [f"note       {note}" for note in dict.fromkeys(n for s in splits.values() for n in s.notes)]
    lines += look.alike(found, out.with_suffix(".csv"))
    lines += look.left_out(trouble.left_out, out.with_suffix(".left_out.csv"))
    lines += [f"PROBLEM    {problem}" for problem in trouble.problems]
    look.contact_sheet(out, splits)
    print("\n".join([*lines, f"pictures   {out}"]))
    refused = trouble.problems or (trouble.left_out and settings["on_error"] == "raise")
    return 1 if found.pairs or refused else 0


def cache(folder: str | None, what: str) -> int:
    """Lists the prepared data sets, or deletes some."""
    if what == "list":
        kept = prepare.kept(folder)
        lines = [f"{size / 2**20:>10.1f} MiB {days:>6.1f} days  {name}" for name, size, days in kept]
        print(
            "\n".join([f"{prepare.folder(folder)} holds {len(kept)} prepared data sets and lists of headers", *lines])
        )
    else:
        print("\n".join(f"deleted {name}" for name in prepare.drop(folder, what)) or "nothing to delete")
    return 0


def parse(argv: list[str]) -> list[str]:
    """Flags from the command line; anything wrong with them is one line and exit code 2."""
    try:
        rest = flags.FLAGS(argv)
        _ = (
            flags.FLAGS["config"].value and flags.FLAGS["config"].value.data
        )  # a config file that could not be read is told on first use
        return rest
    except (ValueError, OSError, flags.Error, AttributeError, KeyError, TypeError, SyntaxError, ImportError) as error:
        sys.exit(report(str(error).strip().splitlines()[-1].removeprefix("ValueError: "), 2))


def report(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


def run() -> int:
    """An error for the user to mend, as this project's code raises it, is one line and exit code 1."""
    try:
        app.run(main, flags_parser=parse)
    except (ValueError, OSError) as error:
        raiser = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = raiser.is_relative_to(Path(__file__).resolve().parent)
        if not (ours or isinstance(error, OSError)) or os.environ.get("FACSIMILE_TRACEBACK"):
            raise
        return report(str(error), 1)
    return 0


if __name__ == "__main__":
    sys.exit(run())
