"""Being told to stop: SIGTERM, SIGHUP, a maintenance event or the preemption of a spot machine is noted, agreed on by all
processes, and obeyed where nothing is lost.

Training notes it and saves first (`noting`); several processes must stop at the same step, or their collectives never
meet. Elsewhere one process ends at once, since whatever is on disk is whole, and several end between two batches.
JAX's own preemption service is switched off: its signal handler and its count of steps outlive a training loop, and a
run has several loops.
"""

import contextlib
import http.client
import os
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

METADATA = "computeMetadata/v1/instance"
EVENTS = ("maintenance-event", "preempted")  # of any machine, and of one that its cloud may take back (spot)
QUIET = ("", "NONE", "FALSE")  # their values as long as nothing happens
SIGNALS = (signal.SIGTERM, signal.SIGHUP)
AGAIN = 5.0  # seconds until a metadata server that gave no answer is asked again
_told = threading.Event()
_state = {"listening": False, "noting": False, "alone": True}


def listen(metadata: str | None = None) -> None:
    """From here on SIGTERM or SIGHUP ends this run as `stop` does; call it once the processes are connected.

    Args:
      metadata: a cloud machine's metadata server, `http://metadata.google.internal`, to be watched for `EVENTS`, which
        then count as SIGTERM; None: none.
    """
    _ = stopped_code()  # a wrong one is told now
    _state.update(listening=True, alone=jax.process_count() == 1)
    _heed()
    for event in EVENTS if metadata else ():
        threading.Thread(target=_watch, args=(f"{metadata}/{METADATA}/{event}",), daemon=True).start()


def stop() -> NoReturn:
    """Ends this process because it was told to, with the code FACSIMILE_STOPPED_CODE, by default 0.

    Whoever has to tell a run that is done from one to be started again sets it; the scripts set 75.
    """
    sys.exit(stopped_code())


def stopped_code() -> int:
    """FACSIMILE_STOPPED_CODE. Raises ValueError unless it is an exit code."""
    asked = os.environ.get("FACSIMILE_STOPPED_CODE", "0")
    if not (asked.isdecimal() and int(asked) < 256):
        raise ValueError(f"FACSIMILE_STOPPED_CODE={asked}: an exit code is a number from 0 to 255")
    return int(asked)


@contextlib.contextmanager
def noting() -> Iterator[Callable[[], bool]]:
    """`with noting() as told`: signals to stop are noted instead of obeyed, and `told()` says whether one came."""
    before = _heed()
    _state["noting"] = True
    try:
        yield _told.is_set
    finally:
        _state["noting"] = False
        for number, handler in before.items():
            signal.signal(number, handler)
        if not _state["listening"]:
            _told.clear()
    if _told.is_set() and _state["alone"]:
        stop()  # it came too late for whoever noted it


def flags() -> np.ndarray:
    """For each of this process's devices, whether the process was told to stop: (local devices,) int32."""
    return np.full(jax.local_device_count(), _told.is_set(), np.int32)


def stop_together() -> None:
    """Between two batches: ends all processes if any of several was told to stop.

    Not while training, which looks at held-out images in batches too: its own loop stops at a step, and saves.
    """
    if _state["noting"] or jax.process_count() == 1:
        return
    if multihost_utils.process_allgather(flags()).any():
        stop()


def _heed() -> dict[signal.Signals, Any]:
    """Has signals to stop noted, but for those that are ignored, as SIGHUP is under nohup; returns the former handlers."""
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, _note) for number in heeded}


def _note(*_: Any) -> None:
    _told.set()
    if _state["alone"] and not _state["noting"]:
        stop()


def _watch(event: str) -> None:
    """Raises SIGTERM once what is at the address `event` happens; the request itself waits until it changes, but for the
    first one and one after a pause, in which it may have changed."""
    wait = ""
    while True:
        request = urllib.request.Request(event + wait, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                value = answer.read().decode().strip()
        except (OSError, http.client.HTTPException):  # no answer, or one that broke off
            time.sleep(AGAIN)
            wait = ""
            continue
        if value.upper() not in QUIET:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        wait = "?wait_for_change=true"
