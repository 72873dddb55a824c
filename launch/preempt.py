"""Being told to stop: SIGTERM or a maintenance event is noted, agreed on by all processes, and obeyed where nothing is lost.

Training notes it and saves first (`noting`); several processes must stop at the same step, or their collectives never
meet. Elsewhere one process ends at once, since whatever is on disk is whole, and several end between two batches.
JAX's own preemption service is switched off: its signal handler and its count of steps outlive a training loop, and a
run has several loops.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

METADATA = "computeMetadata/v1/instance/maintenance-event"
_told = threading.Event()
_state = {"listening": False, "noting": False, "alone": True}


def listen(metadata: str | None = None) -> None:
    """From here on SIGTERM ends this run with exit code 0; call it once the processes are connected.

    Args:
      metadata: a cloud machine's metadata server, `http://metadata.google.internal`, to be watched for maintenance
        events, which then count as SIGTERM; None: none.
    """
    _state.update(listening=True, alone=jax.process_count() == 1)
    signal.signal(signal.SIGTERM, _note)
    if metadata:
        threading.Thread(target=_watch, args=(metadata,), daemon=True).start()


@contextlib.contextmanager
def noting() -> Iterator[Callable[[], bool]]:
    """`with noting() as told`: SIGTERM is noted instead of obeyed, and `told()` says whether it came."""
    before = signal.signal(signal.SIGTERM, _note)
    _state["noting"] = True
    try:
        yield _told.is_set
    finally:
        _state["noting"] = False
        signal.signal(signal.SIGTERM, before)
        if not _state["listening"]:
            _told.clear()
    if _told.is_set() and _state["alone"]:
        sys.exit(0)  # it came too late for whoever noted it


def flags() -> np.ndarray:
    """For each of this process's devices, whether the process was told to stop: (local devices,) int32."""
    return np.full(jax.local_device_count(), _told.is_set(), np.int32)


def stop_together() -> None:
    """Between two batches: ends all processes with exit code 0 if any of several was told to stop."""
    if jax.process_count() > 1 and multihost_utils.process_allgather(flags()).any():
        sys.exit(0)


def _note(*_: Any) -> None:
    _told.set()
    if _state["alone"] and not _state["noting"]:
        sys.exit(0)


def _watch(server: str) -> None:
    """Raises SIGTERM on the first maintenance event; the request itself waits until there is one."""
    wait = ""
    while True:
        request = urllib.request.Request(f"{server}/{METADATA}{wait}", headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                event = answer.read().decode().strip()
        except (urllib.error.URLError, TimeoutError):
            time.sleep(5)
            continue
        if event not in ("", "NONE"):
            os.kill(os.getpid(), signal.SIGTERM)
            return
        wait = "?wait_for_change=true"
