"""Reads every raw image once, on all cores, into a cache folder whose name is a hash of all that made its content."""

import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import pathlib
import pickle
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from data import files, listing, sandbox
from data.shards import Report, Shard

# A worker process takes a second to start. One helps this process with HELPED_TASKS or more from the start, and where more
# than HELPED_SECONDS are left to do; where more than SHARED_SECONDS are, one for every core does the rest.
HELPED_TASKS, HELPED_SECONDS, SHARED_SECONDS = 512, 1.5, 5.0
SHARD_BYTES = 1 << 25
SHARDS = 64  # at least so many, of eight tasks or more: what a kill can cost, and what the workers share
FORM = 3  # of what a prepared set says of itself; another one is made afresh
FORGOTTEN_DAYS = 14  # after which a preparation that nobody resumed is deleted


class Prepared(NamedTuple):
    folder: str  # of the data set, for builder.Stored
    parts: list[str]  # of its images, in its order: what each adds to the id of its task
    digests: list[str]  # of their pixels
    counts: list[int]  # images of each task
    skipped: list[str]  # one line for each task whose image could not be made
    resized: int  # how many had another shape than asked for
    cut: int  # of how many the files show more, see `files.Image`
    spacing: tuple[float, ...] | None  # mm between voxels, median over the images that say it
    unspaced: int  # how many do not
    top: float | None  # by their type the files' numbers run from 0 to that; None: not the same for all, or not known
    affine: list | None  # (4, 4) of the images, likewise; see `files.Image`


def prepare(
    name: str,
    tasks: Sequence[tuple],
    make: Callable[[tuple], Iterable[files.Image]],
    *,
    shape: Sequence[int],
    inputs: Iterable[Any],
    code: Sequence[ModuleType],
    eight_bit: bool = False,
    several: int = 1,
    on_error: str = "raise",
    cache: str | os.PathLike | None = None,
    workers: int | None = None,
    beam: str | None = None,
) -> Prepared:
    """Makes the images of every task, or finds them made. One that was killed goes on with the shards that are done.

    Args:
      name: begins the cache folder's name, for people.
      tasks: the first item of each is its id.
      make: picklable and pure; called with a task it returns images of `shape`, or raises a ValueError of one line.
      inputs: JSON of all that `make`'s results depend on besides its code.
      code: the modules of that code; where they change, images are made afresh.
      eight_bit: store 8 bits if all images come from 8 bits (exact for intensity 'type'); else 16.
      several: how many images a task makes, about.
      on_error: 'raise', or 'skip': leave out what cannot be made, and say so in the result; but `files.NotNow` is raised.
      cache: folder; None is FACSIMILE_CACHE or else ~/.cache/facsimile.
      workers: processes; None is one for each core that this process may use.
      beam: options of Apache Beam, which then does the work instead: '--runner=DirectRunner'. Its workers need the raw
        files and the cache folder under the same paths.
    Raises:
      ValueError: the first image's error, or nothing could be made.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"data.on_error must be 'raise' or 'skip', not {on_error!r}")
    cache = folder(cache)
    sources = [pathlib.Path(module.__file__).read_text(encoding="utf-8") for module in code]
    key = hashlib.sha256(json.dumps([FORM, list(shape), eight_bit, sources]).encode())
    for part in itertools.chain((task[0] for task in tasks), inputs):
        key.update(json.dumps(part).encode())
    stem = os.path.join(cache, f"{name}-{key.hexdigest()[:20]}")
    final = f"{stem}-{on_error}"
    if not os.path.exists(final):
        try:
            listing.private(cache)
        except OSError as error:
            raise ValueError(f"{cache}: cannot make the cache folder ({error.strerror}); set data.cache") from None
        _forget_old(cache)
        with _alone(stem) as alone:
            if not os.path.exists(final):  # another process may have made it while we waited
                partial = f"{stem}.partial" + ("" if alone else f"-{os.uname().nodename}-{os.getpid()}")
                os.makedirs(partial, 0o700, exist_ok=True)
                os.utime(partial)  # it is not forgotten
                shards = functools.partial(
                    _shards, partial, tasks, make, shape, several, on_error == "raise" and not beam
                )
                write = functools.partial(_write, final, shape, on_error, workers, beam)
                if not (eight_bit and write(shards("uint8"), "uint8")):
                    write(shards("uint16"), "uint16")
                shutil.rmtree(partial)
    made = Prepared(final, **json.loads(pathlib.Path(final, "prepared.json").read_text(encoding="utf-8")))
    return made._replace(spacing=made.spacing and tuple(made.spacing))


def folder(cache: str | os.PathLike | None) -> str:
    """The cache folder."""
    return os.path.expanduser(os.fspath(cache or os.environ.get("FACSIMILE_CACHE") or "~/.cache/facsimile"))


def kept(cache: str | os.PathLike | None) -> list[tuple[str, int, float]]:
    """(name, bytes, days since it was made) of what the cache folder holds of patients, the largest first."""
    found = []
    for path in pathlib.Path(folder(cache)).glob("*"):
        if re.search(r"-(raise|skip)$|\.partial|^headers-.*\.json$", path.name):
            inside = [path, *path.rglob("*")] if path.is_dir() else [path]
            size = sum(p.stat().st_size for p in inside if p.is_file())
            found.append((path.name, size, (time.time() - path.stat().st_mtime) / 86400))
    return sorted(found, key=lambda one: (-one[1], one[0]))


def drop(cache: str | os.PathLike | None, name: str) -> list[str]:
    """Deletes one of those, or 'all'; returns their names. Whoever needs it prepares it again.

    Raises:
      ValueError: there is none of this name.
    """
    there = [one for one, *_ in kept(cache)]
    chosen = there if name == "all" else [one for one in there if one == name]
    if not chosen and name != "all":
        raise ValueError(f"{folder(cache)}: holds no prepared data set {name!r}; --cache=list prints their names")
    for one in chosen:
        path = pathlib.Path(folder(cache), one)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return chosen


def _shards(partial: str, tasks, make, shape, several: int, strict: bool, dtype: str) -> list[Shard]:
    """The same tasks always make the same shards, so that they can be resumed."""
    from data import builder

    fit = SHARD_BYTES // (int(np.prod(shape)) * np.dtype(dtype).itemsize * several)
    each = max(1, min(fit, max(8, -(-len(tasks) // SHARDS))))
    count = -(-len(tasks) // each)
    too_wide = f"{partial}/too_wide" if dtype == "uint8" else ""
    where = [builder.path_of(f"{partial}/{dtype}", i, count) for i in range(count)]
    return [
        Shard(path, tasks[i * each : (i + 1) * each], make, dtype, strict, too_wide) for i, path in enumerate(where)
    ]


def _write(final: str, shape, on_error: str, workers, beam, shards: list[Shard], dtype: str) -> bool:
    """Writes the shards that are missing and makes them a data set; False if `dtype` does not hold an image."""
    from data import builder

    where, too_wide = os.path.dirname(shards[0].path), shards[0].too_wide
    if not os.path.exists(too_wide):
        os.makedirs(where, 0o700, exist_ok=True)  # it stays so where it is put in the end
        for shard in shards:
            lost = os.path.exists(shard.path) and not shard.done()  # without its report
            if lost or (on_error == "raise" and shard.done() and shard.report().skipped):
                os.remove(shard.path)  # what was left out then is an error now, if it still is one
        if not beam:
            _make(shards, shape, dtype, workers)
    if not os.path.exists(too_wide):
        builder.finish(where, shards, shape=shape, dtype=dtype, beam=beam)
    if os.path.exists(too_wide):
        shutil.rmtree(where, ignore_errors=True)
        return False
    report = Report()
    for shard in shards:
        report.add(shard.report())
    if report.skipped and (on_error == "raise" or not report.parts):
        shutil.rmtree(where)
        count = len(report.counts)
        none = "" if report.parts else f"none of {count} images could be read; the first: "
        raise ValueError(none + report.skipped[0])
    content = {name: getattr(report, name) for name in ("parts", "digests", "counts", "skipped", "resized", "cut")}
    content |= {"spacing": None, "unspaced": len(report.parts) - sum(report.spacings.values())}
    only = lambda values: values[0] if len(values) == 1 else None
    content |= {"top": only(report.tops), "affine": only(report.affines)}
    if report.spacings:
        values = np.repeat(list(report.spacings), list(report.spacings.values()), axis=0)
        content["spacing"] = np.median(values, axis=0).tolist()
    pathlib.Path(where, "prepared.json").write_text(json.dumps(content), encoding="utf-8")
    try:
        os.rename(where, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise  # else another machine finished the same thing first
    for shard in shards:  # only now: without them the shards would be of no use after a kill
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(final, f"{os.path.basename(shard.path)}.json"))
    return True


# ---- on all cores of this machine


def _make(shards: list[Shard], shape, dtype: str, workers: int | None) -> None:
    """Whoever is free makes the next shard: this process, and as many helpers as there is work for."""
    workers = workers or len(os.sched_getaffinity(0))
    left = collections.deque(shard for shard in shards if not shard.done())
    total, remaining = (sum(len(shard.tasks) for shard in some) for some in (shards, left))
    live = sys.stderr.isatty()
    pace = {"mininterval": 0.2 if live else 15, "dynamic_ncols": live, "delay": 2}  # short work shows no progress line
    quiet = bool(os.environ.get("FACSIMILE_QUIET"))
    with tqdm(desc="reading", total=total, initial=total - remaining, unit="file", disable=quiet, **pace) as progress:
        begin, lock = [], threading.Lock()

        def tick(name: str) -> None:
            with lock:
                progress.update()

        def tick_here(name: str) -> None:
            if len(begin) < 2:
                begin.append(time.monotonic())  # the first task pays for imports
            tick(name)

        ask, done = functools.partial(_ask, shape=shape, dtype=dtype, tick=tick), 0
        with _helpers(left, workers, ask) as (helpers, add):
            if workers > 1 and remaining >= HELPED_TASKS:
                add()
            while len(helpers) < workers and (shard := _next(left)):
                write(shard, shape, dtype, tick_here)
                done += len(shard.tasks)
                spent = time.monotonic() - begin[-1] if begin else 0.0
                rest = spent / max(1, done - 1) * sum(len(shard.tasks) for shard in tuple(left)) / (1 + len(helpers))
                if workers > 1 and spent > 0.1 and rest > HELPED_SECONDS:
                    while len(helpers) < (1 if rest <= SHARED_SECONDS else workers):
                        add()
                for helper in helpers:
                    if helper.done():
                        helper.result()
            for helper in concurrent.futures.as_completed(helpers):
                helper.result()


def write(shard: Shard, shape: Sequence[int], dtype: str, tick: Callable[[str], None]) -> None:
    from data import builder

    builder.write_shard(shard.path, shard(tick), shape=shape, dtype=dtype)


def _next(left: collections.deque) -> Shard | None:
    with contextlib.suppress(IndexError):  # another may have taken the last
        return left.popleft()


@contextlib.contextmanager
def _helpers(
    left: collections.deque, most: int, ask: Callable
) -> Iterator[tuple[list[concurrent.futures.Future], Callable[[], None]]]:
    """(those there are, `add()` for one more): each a process, and a thread that hands it one shard of `left` after the
    other by `ask(process, shard)`."""
    helpers = []

    def hand(child: subprocess.Popen) -> None:
        while left and not select.select([child.stdout], [], [], 0.05)[0]:
            pass  # it takes a second to start, in which others may do all there is
        if left:
            _answer(child, "a worker process died at its start")
        while shard := _next(left):
            ask(child, shard)

    with concurrent.futures.ThreadPoolExecutor(most) as pool, contextlib.ExitStack() as children:
        children.callback(left.clear)

        def add() -> None:
            child = sandbox.start("from data import prepare; prepare.serve()")
            children.callback(sandbox.stop, child)
            helpers.append(pool.submit(hand, child))

        yield helpers, add


def _ask(child: subprocess.Popen, shard: Shard, *, shape, dtype: str, tick: Callable[[str], None]) -> None:
    name = shard.tasks[0][0]
    with contextlib.suppress(BrokenPipeError):  # told below
        child.stdin.write(pickle.dumps((shard, shape, dtype)))
        child.stdin.flush()
    while True:
        name, error = _answer(child, f"{name}: the worker process that read it died", "remove it if it is damaged; ")
        if error is not None:
            raise ValueError(error)
        if name is None:
            return
        tick(name)


def _answer(child: subprocess.Popen, died: str, mend: str = "") -> tuple[str | None, str | None]:
    """What `serve` tells next. Raises ValueError where it tells nothing any more."""
    try:
        return pickle.load(child.stdout)
    except (EOFError, pickle.UnpicklingError):
        raise ValueError(f"{died} (exit {child.wait()}); {mend}if memory ran out, lower data.workers") from None


def serve() -> None:
    """A worker: says (None, None) when it is ready, then makes each shard on its input, and tells (task, None) as it goes and
    (None, error or None) at its end."""
    answers = sandbox.answers()

    def tell(name: str | None, error: str | None = None) -> None:
        answers.write(pickle.dumps((name, error)))
        answers.flush()

    from data import builder  # noqa: F401, it takes longest to load

    tell(None)
    with contextlib.suppress(EOFError):
        while True:
            shard, shape, dtype = pickle.load(sys.stdin.buffer)
            try:
                write(shard, shape, dtype, tell)
            except ValueError as error:
                tell(None, str(error))
            else:
                tell(None)


# ---- who may write


@contextlib.contextmanager
def _alone(stem: str) -> Iterator[bool]:
    """Holds a lock that dies with the process; False where the file system has none: at worst work is done twice."""
    with open(f"{stem}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError as error:
            logging.info("%s: no file locks here (%s)", stem, error.strerror)
            alone = False
        yield alone


def _forget_old(cache: str) -> None:
    for left in pathlib.Path(cache).glob("*.partial*"):
        with contextlib.suppress(OSError):  # another process may be deleting it, too
            if time.time() - left.stat().st_mtime > FORGOTTEN_DAYS * 86400:
                shutil.rmtree(left)
