"""What must be settled before JAX is loaded: how memory is mapped, and which of XLA's kernels a CPU uses.

Everything here is about speed on a CPU; results differ by rounding at most.
"""

import gc
import os
import platform
import sys
from pathlib import Path

HUGE_PAGES = "glibc.malloc.hugetlb=1"
KERNELS = "--xla_cpu_experimental_ynn_fusion_type"


def settle() -> None:
    """Sets the environment, and starts this very command again where only a new process can heed it.

    XLA allocates a step's working memory anew for every step; in small pages, the kernel's page faults were 15 to 20 %
    of a training step (`python -m tests.benchmarks --what=training`). Call it first: before JAX is loaded it costs 20 ms.

    Python stops looking for garbage until `loaded`: modules being loaded make none, and to look for it was a seventh of
    the time that they take.
    """
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if wants_huge_pages(os.environ, platform.libc_ver()[0], switch.read_text() if switch.exists() else ""):
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [os.environ.get("GLIBC_TUNABLES"), HUGE_PAGES]))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if flags := xla_flags(os.environ, version()):
        os.environ["XLA_FLAGS"] = flags
    gc.disable()


def loaded() -> None:
    """To be called once all modules are loaded: they stay, and are not looked through for garbage again."""
    gc.freeze()
    gc.enable()


def version() -> str:
    """Of jaxlib, which is not loaded for it."""
    from importlib import metadata  # takes as long to load as all else here, and not every process comes to need it

    return metadata.version("jaxlib")


def old_kernels() -> bool:
    """Whether jaxlib is 0.10 or 0.11, whose kernels for a CPU are older than those of 0.12."""
    return version().startswith(("0.10.", "0.11."))


def xla_flags(env: dict[str, str], jaxlib: str) -> str | None:
    """XLA_FLAGS with jaxlib 0.12's convolutions by Eigen, whose kernel gradients take 0.6 of the time; None: leave them.

    A flag that a version does not know ends the process, so other versions get none.
    """
    now = env.get("XLA_FLAGS", "")
    if not jaxlib.startswith("0.12.") or KERNELS in now:
        return None
    return f"{now} {KERNELS}=individual_dot,reduce".strip()


def wants_huge_pages(env: dict[str, str], libc: str, switch: str) -> bool:
    """Whether the C library can be asked for huge pages, the kernel gives them to those who ask, and nobody has chosen."""
    return libc == "glibc" and "[madvise]" in switch and "glibc.malloc.hugetlb" not in env.get("GLIBC_TUNABLES", "")
