"""Decoders of other people's C and C++, in a process of their own: at a damaged file some end it, or never end.

Measured with files changed at random: MetaIO (in SimpleITK) corrupts its heap, GDCM aborts. The process is started when the
first such file comes, and ends with this one.
"""

import contextlib
import os
import pickle
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

SECONDS = 300.0  # for one file
_lock = threading.Lock()
_child: list[subprocess.Popen] = []


class Died(Exception):
    """The decoder ended its process, or did not end."""


def start(code: str) -> subprocess.Popen:
    """A Python process that runs `code` with the project importable; it should end when its input does.

    Not multiprocessing's: JAX's threads do not survive a fork, and a spawned child would run the user's script again.
    """
    one_thread = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")
    environment = {**os.environ, **one_thread, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)  # not reached by Ctrl-C


def stop(child: subprocess.Popen) -> int:
    """Kills a process of `start`; returns how it had ended, or -9."""
    child.kill()
    child.wait()
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    child.stdout.close()
    return child.returncode


def call(function: Callable, *args: Any) -> Any:
    """function(*args), of a module-level function, in the decoders' process; what it raises is raised here.

    Raises:
      Died: the process ended, or took longer than SECONDS.
    """
    with _lock:
        if not _child:
            _child.append(start("from data import sandbox; sandbox.serve()"))
        child = _child[0]
        try:
            child.stdin.write(pickle.dumps((function, args)))
            child.stdin.flush()
            if not select.select([child.stdout], [], [], SECONDS)[0]:
                raise EOFError
            result, error = pickle.load(child.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            _child.clear()
            raise Died(f"exit {stop(child)}") from None
    if error is not None:
        raise error
    return result


def answers():
    """Of a child: the stream to its parent. Whatever a decoder prints goes to stderr and does not mix with it."""
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return stream


def serve() -> None:
    """The process: answers each (function, args) with (result, None) or (None, error)."""
    stream = answers()
    with contextlib.suppress(EOFError):
        while True:
            function, args = pickle.load(sys.stdin.buffer)
            try:
                answer = pickle.dumps((function(*args), None))
            except Exception as error:  # of any kind: it is raised again where it was asked for
                try:
                    answer = pickle.dumps((None, error))
                    pickle.loads(answer)
                except Exception:  # some cannot be pickled
                    answer = pickle.dumps((None, RuntimeError(type(error).__name__)))
            stream.write(answer)
            stream.flush()
