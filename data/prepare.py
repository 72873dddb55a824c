"""Reads every raw image once, on all cores, into a cache folder whose name is a hash of all that made its content."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import pickle
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from absl import logging
from tqdm import tqdm

from data import files

SERIAL_SECONDS = 5.0  # worker processes start only where more than this is left to do: each takes a second to start


class Prepared(NamedTuple):
    folder: str  # of the data set, for builder.Stored
    ids: list[str]  # of its images, in its order
    skipped: list[str]  # one line for each image that could not be made
    resized: int  # how many had another shape than asked for


def prepare(
    name: str,
    tasks: Mapping[str, Any],
    make: Callable[[Any], files.Image],
    *,
    shape: Sequence[int],
    inputs: Any,
    code: Sequence[ModuleType],
    eight_bit: bool = False,
    on_error: str = "raise",
    cache: str | os.PathLike | None = None,
    workers: int | None = None,
) -> Prepared:
    """Makes the image of every task, or finds them made.

    Args:
      name: begins the cache folder's name, for people.
      tasks: id of an image -> what `make` is called with for it.
      make: picklable and pure; returns an image of `shape`, or raises a ValueError of one line.
      inputs: JSON of all that `make`'s results depend on besides its code.
      code: the modules of that code; where they change, images are made afresh.
      eight_bit: store 8 bits if all images come from 8 bits (exact for intensity 'type'); else 16.
      on_error: 'raise', or 'skip': leave out what cannot be made, and say so in the result.
      cache: folder; None is FACSIMILE_CACHE or else ~/.cache/facsimile.
      workers: processes; None is one for each core that this process may use.
    Raises:
      ValueError: the first image's error, or nothing could be made.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"data.on_error must be 'raise' or 'skip', not {on_error!r}")
    cache = os.path.expanduser(os.fspath(cache or os.environ.get("FACSIMILE_CACHE") or "~/.cache/facsimile"))
    sources = [pathlib.Path(module.__file__).read_text(encoding="utf-8") for module in code]
    settings = json.dumps([list(tasks), inputs, list(shape), eight_bit, on_error, sources])
    final = os.path.join(cache, f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:20]}")
    if not os.path.exists(final):
        try:
            os.makedirs(cache, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{cache}: cannot make the cache folder ({error.strerror}); set data.cache") from None
        with _alone(final) as alone:
            if not os.path.exists(final):  # another process may have made it while we waited
                for left in pathlib.Path(cache).glob(f"{os.path.basename(final)}.partial*") if alone else ():
                    shutil.rmtree(left)
                _write(final, tasks, make, shape, ("uint8", "uint16") if eight_bit else ("uint16",), on_error, workers)
    return Prepared(final, **json.loads(pathlib.Path(final, "prepared.json").read_text(encoding="utf-8")))


def _write(final: str, tasks, make, shape, dtypes, on_error, workers) -> None:
    """Writes aside, then renames: a kill leaves nothing that looks finished. Tries the dtypes until one holds all."""
    from data import builder

    partial = f"{final}.partial-{os.uname().nodename}-{os.getpid()}"
    try:
        for dtype in dtypes:
            report = _Report()
            stream = _stream(tasks, _Attempt(make, dtype), on_error, workers, report)
            folder = builder.write(partial, stream, length=len(tasks), shape=shape, dtype=dtype)
            if not report.wider:
                break
            shutil.rmtree(partial)
        if not report.ids:
            raise ValueError(f"none of {len(tasks)} images could be read; the first: {report.skipped[0]}")
        content = {"ids": report.ids, "skipped": report.skipped, "resized": report.resized}
        pathlib.Path(folder, "prepared.json").write_text(json.dumps(content), encoding="utf-8")
        try:
            os.rename(folder, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise  # else another machine finished the same thing first
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclasses.dataclass
class _Report:
    ids: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    resized: int = 0
    wider: bool = False  # an image came that 8 bits do not hold, so the stream ended early


class _Attempt(NamedTuple):
    """task -> its image in the form that is stored, or its error's one line."""

    make: Callable
    dtype: str

    def __call__(self, task: Any) -> files.Image | str:
        try:
            image = self.make(task)
        except ValueError as error:
            return str(error)
        too_wide = self.dtype == "uint8" and not image.eight_bit
        return image if too_wide else image._replace(array=files.encode(image.array, self.dtype))


def _stream(tasks: Mapping[str, Any], attempt: _Attempt, on_error: str, workers, report: _Report) -> Generator:
    """Yields (id, stored image), and fills in the report."""
    for name, result in zip(tasks, _work(attempt, list(tasks.values()), workers), strict=True):
        if isinstance(result, str):
            if on_error == "raise":
                raise ValueError(result)
            report.skipped.append(result)
        elif result.array.dtype != attempt.dtype:
            report.wider = True
            return
        else:
            report.ids.append(name)
            report.resized += result.resized
            yield name, result.array


def _work(attempt: Callable, tasks: Sequence[Any], workers: int | None) -> Iterator[Any]:
    """Yields attempt(task) for every task in order. Memory does not grow with their number."""
    workers = workers or len(os.sched_getaffinity(0))
    live = sys.stderr.isatty()
    pace = {"mininterval": 0.2 if live else 15, "dynamic_ncols": live, "delay": 2}  # short work shows no progress line
    quiet = bool(os.environ.get("FACSIMILE_QUIET"))
    with tqdm(desc="reading", total=len(tasks), unit="image", disable=quiet, **pace) as progress:
        done, begin = 0, None
        for task in tasks:
            yield attempt(task)
            progress.update()
            done += 1
            begin = begin or time.monotonic()  # the first one pays for imports
            spent = time.monotonic() - begin
            if workers > 1 and spent > 0.5 and spent / done * (len(tasks) - done) > SERIAL_SECONDS:
                break
        for result in _parallel(attempt, tasks[done:], workers):
            yield result
            progress.update()


def _parallel(attempt: Callable, tasks: Sequence[Any], workers: int) -> Iterator[Any]:
    if not tasks:
        return
    children = queue.SimpleQueue()
    with contextlib.ExitStack() as stack:
        for _ in range(workers):
            children.put(stack.enter_context(_child()))
        pool = concurrent.futures.ThreadPoolExecutor(workers)
        stack.callback(pool.shutdown, cancel_futures=True)
        pending = collections.deque()
        for task in tasks:
            pending.append(pool.submit(_ask, children, attempt, task))
            if len(pending) >= 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextlib.contextmanager
def _child() -> Iterator[subprocess.Popen]:
    """A worker process; it ends when its input does, so with its parent, however that dies.

    Not multiprocessing's: JAX's threads do not survive a fork, and a spawned child would run the user's script again.
    """
    one_thread = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")
    environment = {**os.environ, **one_thread, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    command = [sys.executable, "-c", "from data import prepare; prepare.serve()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)  # not reached by Ctrl-C
    try:
        yield child
    finally:
        child.kill()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        child.stdout.close()
        child.wait()


def _ask(children: queue.SimpleQueue, attempt: Callable, task: Any) -> Any:
    child = children.get()
    try:
        child.stdin.write(pickle.dumps((attempt, task)))
        child.stdin.flush()
        return pickle.load(child.stdout)
    except (EOFError, BrokenPipeError):
        lost = f"a worker process died (exit {child.wait()}) while reading images; out of memory? lower data.workers"
        raise ValueError(lost) from None
    finally:
        children.put(child)


def serve() -> None:
    """A worker: answers each (attempt, task) on its input with attempt(task) on its output, until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a decoder prints must not mix with the answers
    with contextlib.suppress(EOFError):
        while True:
            attempt, task = pickle.load(sys.stdin.buffer)
            answers.write(pickle.dumps(attempt(task)))
            answers.flush()


@contextlib.contextmanager
def _alone(final: str) -> Iterator[bool]:
    """Holds a lock that dies with the process; False where the file system has none: at worst work is done twice."""
    with open(f"{final}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError as error:
            logging.info("%s: no file locks here (%s)", final, error.strerror)
            alone = False
        yield alone
