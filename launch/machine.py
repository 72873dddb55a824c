"""Start of a process: processes find each other, compilations are kept, and errors a user can mend are one line."""

import os
import platform
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags, logging

from launch.log import ROOT

OURS = ("main.py", "configs", "data", "detection", "launch", "ldm")
MENDABLE = (ValueError, OSError, FloatingPointError)


def cache_folder() -> Path:
    """The user's cache folder: FACSIMILE_CACHE, else `facsimile` under XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FACSIMILE_CACHE") or Path(base) / "facsimile")


def start() -> None:
    """Connects the processes, where there are several, and turns on JAX's persistent compilation cache.

    Several processes are found by JAX itself on TPU pods, SLURM, Open MPI and Kubernetes; elsewhere set
    JAX_COORDINATOR_ADDRESS, FACSIMILE_PROCESSES and FACSIMILE_PROCESS. Compiled code is kept per machine name, since it
    is made for the machine's own processor.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells 30 lines a checkpoint
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla" / platform.node()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if "FACSIMILE_PROCESSES" in os.environ:
        count, index = (int(os.environ[name]) for name in ("FACSIMILE_PROCESSES", "FACSIMILE_PROCESS"))
        jax.distributed.initialize(num_processes=count, process_id=index)
    elif int(os.environ.get("SLURM_NTASKS", 1)) > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def parse_flags(argv: list[str]) -> list[str]:
    """Flags from the command line; anything wrong with them is one line and exit code 2."""
    try:
        rest = flags.FLAGS(argv)
        _ = flags.FLAGS["config"].value.seed  # a config file that could not be read is told on first use
        return rest
    except Exception as error:
        if isinstance(error, MENDABLE + (flags.Error, AttributeError, KeyError, TypeError, SyntaxError, ImportError)):
            sys.exit(report(str(error).strip().splitlines()[-1].removeprefix("ValueError: "), 2))
        raise


def one_line_errors(run: Callable[[], None]) -> int:
    """Runs; an error for the user to mend is one line and exit code 1, any other a traceback.

    Those are what our own code raises for the user's sake, and whatever the file system refuses.
    """
    try:
        run()
    except MENDABLE as error:
        raiser = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = raiser.is_relative_to(ROOT) and raiser.relative_to(ROOT).parts[0] in OURS
        if not (ours or isinstance(error, OSError)) or os.environ.get("FACSIMILE_TRACEBACK"):
            raise
        return report(str(error), 1)
    return 0


def report(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code
