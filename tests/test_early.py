"""Settings that must precede JAX."""

import json
import os
import subprocess
import sys

import pytest

from launch import early


@pytest.mark.parametrize(
    ("env", "version", "expected"),
    [
        ({}, "0.12.0.1", "--xla_cpu_experimental_ynn_fusion_type=individual_dot,reduce"),
        ({"XLA_FLAGS": "--a=1"}, "0.12.1", "--a=1 --xla_cpu_experimental_ynn_fusion_type=individual_dot,reduce"),
        ({"XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=dot"}, "0.12.0.1", None),
        ({}, "0.10.2", None),
        ({}, "0.13.0", None),
    ],
)
def test_kernels_are_chosen_only_where_the_flag_is_known_and_free(env, version, expected):
    assert early.xla_flags(env, version) == expected


def test_huge_pages_are_asked_for_only_where_somebody_heeds_and_nobody_chose():
    offered = "always [madvise] never"
    assert early.wants_huge_pages({}, "glibc", offered)
    assert not early.wants_huge_pages({}, "glibc", "[always] madvise never")
    assert not early.wants_huge_pages({}, "", offered)
    assert not early.wants_huge_pages({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc", offered)


def test_the_command_that_starts_again_is_the_same_command(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\nfrom launch import early\nearly.settle()\n"
        "print(json.dumps([sys.argv[1:], os.environ.get('GLIBC_TUNABLES', ''), 'jax' in sys.modules]))\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "XLA_FLAGS")} | {
        "PYTHONPATH": os.getcwd()
    }
    run = subprocess.run(
        [sys.executable, str(script), "--a=b c", "d"], env=env, capture_output=True, text=True, check=True
    )
    argv, tunables, loaded = json.loads(run.stdout)
    assert argv == ["--a=b c", "d"] and not loaded
    heeded = early.wants_huge_pages({}, *_machine())
    assert (early.HUGE_PAGES in tunables) == heeded


def test_what_is_needed_late_is_not_loaded_at_every_start():
    """SciPy's statistics and matplotlib were a third of the time to load."""
    code = "import sys, main; print(*{'matplotlib', 'scipy.stats', 'scipy.spatial', 'tensorflow_datasets'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "\n"


def _machine() -> tuple[str, str]:
    import platform
    from pathlib import Path

    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return platform.libc_ver()[0], switch.read_text() if switch.exists() else ""
