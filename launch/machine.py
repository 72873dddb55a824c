"""Start of a process: processes find each other, compilations are kept, and errors a user can mend are one line."""

import ctypes
import functools
import importlib.util
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from glob import glob
from pathlib import Path

import jax
from absl import flags, logging

from launch import early, preempt
from launch.log import ROOT

OURS = ("main.py", "configs", "data", "detection", "launch", "ldm")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from malloc.h
MENDABLE = (ValueError, OSError, FloatingPointError)


def cache_folder() -> Path:
    """The user's cache folder: FACSIMILE_CACHE, else `facsimile` under XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FACSIMILE_CACHE") or Path(base) / "facsimile")


def start(batches: Sequence[int] = (), pixels: int = 1) -> None:
    """Connects the processes, where there are several, turns on JAX's persistent compilation cache, heeds signals to stop.

    Cores of a CPU are devices of their own where that is faster for these `batches` of images of so many `pixels`; see
    `cpu_devices`. A number of CPU devices that the user asked for stands.

    Several processes find each other by themselves where `launcher` says so; elsewhere set JAX_COORDINATOR_ADDRESS
    (host:port of process 0), FACSIMILE_PROCESSES and FACSIMILE_PROCESS. With FACSIMILE_METADATA, a cloud machine's
    metadata server, maintenance and preemption count as SIGTERM. Compiled code is kept per machine name, since it is made for
    the machine's own processor.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells 30 lines a checkpoint
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla" / platform.node()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # the small ones are many
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    asked = "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    by = launcher(os.environ, _has_tpu())
    keeps = not asked and use_cores(batches, pixels, alone=by is None)
    connect(by)
    refuse_a_cpu_for_a_gpu(os.environ, jax.default_backend(), sorted(glob("/dev/nvidia[0-9]*")))
    if keeps:
        keep_memory()
    preempt.listen(os.environ.get("FACSIMILE_METADATA"))


def refuse_a_cpu_for_a_gpu(env: Mapping[str, str], backend: str, cards: Sequence[str]) -> None:
    """Raises ValueError where GPUs were asked for, by their numbers or as a pod of Kubernetes that has such `cards`, and JAX
    fell back on the CPU, at a thousandth of their speed. On any other machine that has some it says so."""
    asked, given = env.get("CUDA_VISIBLE_DEVICES"), env.get("NVIDIA_VISIBLE_DEVICES", "all")
    if asked is None:
        there = f"this machine has GPUs ({cards[0]})" if cards and given not in ("", "void", "none") else None
    else:
        there = None if asked in ("", "-1", "NoDevFiles") else f"CUDA_VISIBLE_DEVICES={asked} names GPUs"
    if not there or backend != "cpu" or env.get("JAX_PLATFORMS") == "cpu":
        return
    told = (
        f"{there}, but JAX sees none and takes the CPU: install jax[cuda13] or jax[cuda12] (docs/studies.md), or ask for the "
        "CPU with JAX_PLATFORMS=cpu"
    )
    if asked is not None or "KUBERNETES_SERVICE_HOST" in env:
        raise ValueError(told)
    logging.warning("%s", told)


@functools.cache
def processor() -> frozenset[str]:
    """What this machine's processor can do, as Linux names it; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    said = re.search(r"^flags\s*:(.*)$", path.read_text() if path.exists() else "", re.MULTILINE)
    return frozenset(said[1].split() if said else ())


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worth_a_device() -> int:
    """How many pixels or voxels of a batch make it worth while to have a CPU device of its own for them.

    Several devices sum their gradients, and each takes the whole optimiser step. Under jax 0.10 a training step of the
    UNet takes 1.25 to 1.45 times as long where two cores are one device, whatever the batch. Kernels of jax 0.12 use
    several cores better: there one device of two cores takes 0.79 to 0.97 of two devices' time, with 16 or 64 images of
    64x64 as with four volumes of 64x64x64. Larger batches, and more cores, are not measured.
    """
    return 1 if early.old_kernels() else 2**21


def cpu_devices(most: int, batches: Sequence[int], pixels: int, worth: int) -> int:
    """The largest power of two that is at most `most` and 8 and splits every batch evenly, so that each device has at
    least `worth` pixels of it."""
    fits = lambda n: n <= most and all(batch % n == 0 and batch // n * pixels >= worth for batch in batches)
    return max(n for n in (1, 2, 4, 8) if n == 1 or fits(n))


def use_cores(batches: Sequence[int], pixels: int, alone: bool = True) -> bool:
    """Before JAX has devices: how many a CPU is. True where programs will run in the thread that calls them, which is
    what `keep_memory` needs."""
    devices = cpu_devices(cores(), batches, pixels, worth_a_device())
    jax.config.update("jax_num_cpu_devices", devices)
    keeps = alone and devices == 1 and worth_keeping(batches, pixels)
    jax.config.update("jax_cpu_enable_async_dispatch", not keeps)
    return keeps


def worth_keeping(batches: Sequence[int], pixels: int) -> bool:
    """Whether every batch has so many pixels or voxels that its step had better keep its memory than run beside Python.

    XLA asks for a step's working memory anew at every step. To a thread other than the main one glibc gives blocks of more
    than 64 MB as fresh pages, which the kernel must clear: a tenth of the time of a step. The main thread, on the other
    hand, cannot make the next batch ready while it runs the step. On two cores a training run with in-line steps and kept
    memory does 1.04 to 1.12 times as many steps a second with batches of 16 images of 64x64 or of four volumes of 24x32x24,
    and 0.82 and 0.89 with 32 images of 32x32; its largest memory is 0.92 to 0.95.
    """
    return min(batches, default=0) * pixels >= 2**16


def keep_memory() -> None:
    """Where JAX runs on the CPU, makes glibc keep what the main thread frees, of blocks up to 2 GiB, for what it asks next.
    Other C libraries are left alone, older glibc too, which refuses a threshold above 32 MiB (2.36 takes it)."""
    if jax.default_backend() != "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and mallopt(_MMAP_THRESHOLD, 2**31 - 1):
        mallopt(_TRIM_THRESHOLD, -1)


def launcher(env: Mapping[str, str], tpu: bool) -> str | None:
    """Who started this process as one of several: 'facsimile' (our variables), 'tpu', 'slurm', 'mpi', 'kubernetes'.

    None where it is alone: a SLURM batch script without srun, say, or one worker. On a TPU machine JAX asks the machine
    itself how many hosts there are, so 'tpu' may be one.
    """
    if "FACSIMILE_PROCESSES" in env:
        return "facsimile"
    if tpu and env.get("JAX_PLATFORMS", "tpu") == "tpu":
        # without a metadata server only its environment can tell a machine that it is part of a pod
        alone = "TPU_SKIP_MDS_QUERY" in env and "," not in env.get("TPU_WORKER_HOSTNAMES", "")
        return None if alone else "tpu"
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return "slurm"
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "mpi"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env and importlib.util.find_spec("kubernetes"):
        return "kubernetes"
    return None


def connect(by: str | None) -> None:
    """Joins the other processes that the launcher `by` started. Raises ValueError where a variable is missing."""
    jax.config.update("jax_enable_preemption_service", False)  # see preempt.py
    if by == "facsimile":
        missing = [name for name in ("JAX_COORDINATOR_ADDRESS", "FACSIMILE_PROCESS") if name not in os.environ]
        if missing:
            raise ValueError(f"FACSIMILE_PROCESSES is set, but not {' and '.join(missing)}: set all three, or none")
        count, index = (int(os.environ[name]) for name in ("FACSIMILE_PROCESSES", "FACSIMILE_PROCESS"))
        own = local_devices(os.environ, by)
        jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], count, index, local_device_ids=own)
    elif by:
        jax.distributed.initialize(local_device_ids=local_devices(os.environ, by))


def local_devices(env: Mapping[str, str], by: str) -> list[int] | None:
    """Which of the GPUs that this process sees it takes, as `jax.distributed.initialize` is told: [] is all of them.

    None leaves it to JAX, which gives each task of SLURM or Open MPI one, by the task's number on its node: right where a
    node has a task for each of its GPUs and all see all of them, but the only task of a node would leave the others idle.

    Raises:
      ValueError: where several tasks of a node see GPUs, neither one for each task nor its own alone.
    """
    if "JAX_LOCAL_DEVICE_IDS" in env or by not in ("facsimile", "slurm", "mpi"):
        return None
    tasks = 1 if by == "facsimile" else tasks_here(env, by)
    seen = len([gpu for gpu in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu])
    bound = int(env.get("SLURM_GPUS_PER_TASK", "1").rpartition(":")[2])  # a number, or TYPE:NUMBER
    if tasks == 1 or seen == bound:
        return []
    if seen not in (0, tasks) and env.get("JAX_PLATFORMS") != "cpu":
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']} in each of {tasks} tasks on a node: start one task a "
            "node, or one for each GPU (launch/slurm.sh)"
        )
    return None


def tasks_here(env: Mapping[str, str], by: str) -> int:
    """How many processes of this run SLURM ('2(x3),1': two on each of three nodes, one on a fourth) or Open MPI has started
    on this machine."""
    if by == "mpi":
        return int(env["OMPI_COMM_WORLD_LOCAL_SIZE"])
    nodes = re.findall(r"(\d+)(?:\(x(\d+)\))?", env["SLURM_STEP_TASKS_PER_NODE"])
    return [int(tasks) for tasks, times in nodes for _ in range(int(times or 1))][int(env["SLURM_NODEID"])]


def _has_tpu() -> bool:
    """Whether a TPU and its driver are here, found out without starting JAX."""
    return bool(importlib.util.find_spec("libtpu") and (glob("/dev/accel*") or glob("/dev/vfio/[0-9]*")))


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
