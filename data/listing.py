"""What every layout is made of: rows, the files below a folder, the lines of a table, and what is left out and said."""

import collections
import contextlib
import csv
import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from data import dicom
from data.readers import READERS, suffix

# What lies beside images and is none; files of other kinds that are left out are counted.
BESIDE = {"", ".csv", ".tsv", ".json", ".txt", ".md", ".xml", ".yaml", ".yml", ".html", ".pdf", ".log", ".py"}
BESIDE |= {".raw", ".zraw", ".gz", ".bval", ".bvec"}  # of detached headers, tables, diffusion series


class Row(NamedTuple):
    """One file of a manifest, or the files of one image. `path` is also the image's id, so it is unique."""

    path: str  # relative to the manifest's root
    patient: str = ""
    study: str = ""
    slice: str = ""
    split: str = ""  # one of splits.NAMES or 'test', or '' where it is left to the hash
    label: str = ""
    parts: tuple[str, ...] = ()  # where `path` is no file: the files of a series, or of one channel each
    item: str = ""  # which array, row or record of the file
    centres: tuple[tuple[str, float, float, float, str], ...] = ()  # of sub-volumes: name, z, y, x, unit


class Manifest(NamedTuple):
    root: str  # folder that the rows' paths are relative to
    rows: list[Row]
    notes: list[str] = []  # noqa: RUF012  one line each: what the user should know of; names only after the first ': '
    left_out: list[str] = []  # noqa: RUF012  one line for each file or line that cannot be used
    kinds: dict[str, int] = {}  # noqa: RUF012  of series or files that were taken together unasked: how many of each
    standing_in: str = ""  # a note: what counts as a patient where the collection says none, unless a pattern does


@dataclasses.dataclass(frozen=True)
class Ask:
    """What the user asked for, as layouts need it."""

    kind: str | None = None  # which images, of a collection with several kinds
    volumes: bool = False  # DICOM series are wanted, not their slices
    skip: bool = False  # what cannot be used is left out and counted, not an error
    cache: str | None = None  # folder for what was read of headers
    left_out: list[str] = dataclasses.field(default_factory=list)
    ignored: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # suffix -> files not read

    def refuse(self, problem: str) -> None:
        """Raises ValueError of this one line, or counts it."""
        if not self.skip:
            raise ValueError(problem)
        self.left_out.append(problem)


def image_files(root: str, ask: Ask, wanted: Callable[[str], bool] | None = None) -> list[str]:
    """Relative paths, sorted, '/' between folders, of files with an image's suffix, or `wanted(path)`; see `walk`."""
    if not os.path.isdir(root):
        raise ValueError(f"{root}: is not a folder; correct data.path or data.layout")
    mend = "mend its permissions or move it away"
    refuse = lambda error: ask.refuse(f"{error.filename}: cannot be listed ({error.strerror}); {mend}")
    found = []
    for folder, names in walk(root, refuse):
        inside = os.path.relpath(folder, root)
        for name in names:
            path = os.path.join(folder, name)
            if not (wanted(path) if wanted else suffix(name) in READERS):
                if suffix(name) not in BESIDE or (not suffix(name) and dicom.is_dicom(path)):
                    ask.ignored[suffix(name) or "DICOM without a suffix"] += 1
                continue
            name = os.path.normpath(os.path.join(inside, name)).replace(os.sep, "/")
            if not name.isascii() and name.encode(errors="replace").decode() != name:
                ask.refuse(f"{root}: the name {name!a} is not UTF-8; rename it")
            else:
                found.append(name)
    found.sort()
    return found


def walk(root: str, onerror: Callable[[OSError], None] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yields (folder, names of its files) of a tree, in order, also where links lead; nothing hidden, and nothing twice."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=onerror):
        real = os.path.realpath(folder)
        if real in seen:  # a link back to where we have been
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield folder, sorted(name for name in names if not name.startswith("."))


def records(path: str, ask: Ask, *needed: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, record) of a CSV, .csv.gz or TSV whose header has the needed columns.

    A record's keys are in lower case and without spaces around them, however the header writes them.
    """
    opened = gzip.open if path.endswith(".gz") else open
    try:
        with opened(path, "rt", newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, strict=True, delimiter="\t" if path.endswith(".tsv") else ",")
            header = reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
            if missing := [name for name in needed if name not in header]:
                has = ", ".join(header) or "nothing"
                raise ValueError(f"{path}: no column {missing[0]!r}, its header has {has}; add or rename it")
            if twice := [name for name in (*needed, *Row._fields, "patient_id") if header.count(name) > 1]:
                raise ValueError(f"{path}: its header has two columns {twice[0]!r}; rename one")
            for record in reader:
                if None in record or None in record.values():
                    ask.refuse(f"{path}: line {reader.line_num} has not the header's {len(header)} fields; mend it")
                else:
                    yield reader.line_num, record
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num} is not CSV ({error}); mend it") from None
    except (OSError, EOFError) as error:
        why = getattr(error, "strerror", None) or "damaged"
        raise ValueError(f"{path}: cannot be read ({why}); mend its permissions or restore it") from None


def join(root: str, found: dict[str, str], listed: Iterator[tuple[str, Row]], table: str) -> Manifest:
    """Rows of what a table lists and a folder holds. `found`: name in the table -> path; `listed`: (name, row)."""
    rows, absent, named = [], 0, set()
    for name, row in listed:
        if name in found:
            rows.append(row._replace(path=found[name]))
            named.add(name)
        else:
            absent += 1
    notes = [f"{absent} of the images listed are not there and are left out: {table}"] if absent else []
    if extra := len(found) - len(named):
        notes.append(f"{extra} images are not listed and are left out: {table}")
    return Manifest(root, sorted(rows), notes)


def notes(root: str, ask: Ask) -> list[str]:
    """What was left out in listing, as notes."""
    said = []
    if ask.left_out:
        said.append(f"{len(ask.left_out)} files or lines are left out; the first: {ask.left_out[0]}")
    if ask.ignored:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(ask.ignored.items()))
        said.append(f"{sum(ask.ignored.values())} files are of kinds that are not read: {kinds} in {root}")
    return said


def choose(root: str, found: list[tuple[str, Row]], ask: Ask) -> list[Row]:
    """The rows of the kinds that data.kind says, parted by commas, or 'all'; refuses to mix kinds unasked."""
    kinds = sorted({kind for kind, _ in found})
    wanted = kinds if ask.kind == "all" else (ask.kind or "").split(",")
    if not ask.kind and len(kinds) < 2:
        return [row for _, row in found]
    if unknown := [kind for kind in wanted if kind not in kinds]:
        said = f"no images of kind {unknown[0]!r}" if ask.kind else "several kinds of images"
        raise ValueError(f"{root}: {said} here; set data.kind to one of {', '.join(kinds) or 'none'}, or 'all'")
    return [row for kind, row in found if kind in wanted]


def private(folder: str) -> None:
    """Makes a folder that only its owner reads: it holds patients' images and ids. One that is there stays as it is, but
    for the default one; what is put there is readable by its owner alone.

    Raises:
      OSError: it cannot be made.
    """
    ours = not os.path.isdir(folder) or os.path.abspath(folder) == os.path.expanduser("~/.cache/facsimile")
    os.makedirs(folder, exist_ok=True)
    if ours:
        os.chmod(folder, 0o700)


def remember(ask: Ask, root: str, state: Any, make: Callable[[Any], Any]) -> Any:
    """make(known), JSON, kept in the cache: `known` is what it was when `root` was in the same `state` (JSON), or None."""
    if ask.cache is None:
        return make(None)
    name = lambda *content: hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    stem = f"headers-{name(os.path.realpath(root))}"
    path = pathlib.Path(ask.cache, f"{stem}-{name(state)}.json")
    known, kept = None, ""
    with contextlib.suppress(OSError, ValueError):  # not there, or not whole
        kept = path.read_text(encoding="utf-8")
        known = json.loads(kept)
    result = make(known)
    if (text := json.dumps(result)) == kept:
        return result
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time and no more
        private(ask.cache)
        aside = path.with_name(f".{os.uname().nodename}-{os.getpid()}.{path.name}")
        aside.touch(mode=0o600)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
        for old in path.parent.glob(f"{stem}-*.json"):
            if old != path:
                old.unlink()
    return result
