"""A look at a data set before anything is trained: no model, seconds once the files are prepared.

    python -m data --config=configs/xray.py --config.data.path=PATH --out=look.png

Prints the counts of images and patients in each split, shapes, spacings, intensities, what was left out, and images that
are there twice; draws a contact sheet, and lists the repeats in a CSV beside it. Exits with 1 where different patients
share an image that `data.accept_duplicates` does not name, as training would.
"""

import os
import sys
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

import data
from data import duplicates, look, sets

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; a variant follows after a colon.")
_OUT = flags.DEFINE_string("out", "look.png", "The contact sheet, a PNG; repeats go into a CSV of the same name.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> int:
    if argv[1:]:
        raise ValueError(f"unexpected argument {argv[1]!r}: every option is --name=value")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # what would be warned of is printed below
    settings, out = _CONFIG.value.data.to_dict(), Path(_OUT.value).expanduser()
    if out.suffix.lower() != ".png" or not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: --out must be a .png in a folder that exists")
    accept, path = settings.pop("accept_duplicates"), settings["path"]
    splits = data.load(**settings)
    planted = sets.planted(path, settings["cohort"])
    found = duplicates.find(splits, [*accept, *planted])
    lines = [f"{path or 'the embedded semi-synthetic cohort'}", *look.table(splits, found.within)]
    lines += look.raw(sets.listed(**settings)) if path else []
    lines += look.prepared(splits)
    lines += [f"note       {note}" for note in dict.fromkeys(n for s in splits.values() for n in s.notes)]
    lines += look.alike(found, out.with_suffix(".csv"))
    look.contact_sheet(out, splits)
    print("\n".join([*lines, f"pictures   {out}"]))
    return 1 if found.pairs else 0


def parse(argv: list[str]) -> list[str]:
    """Flags from the command line; anything wrong with them is one line and exit code 2."""
    try:
        rest = flags.FLAGS(argv)
        _ = flags.FLAGS["config"].value.data  # a config file that could not be read is told on first use
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
