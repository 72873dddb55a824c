"""Who started a process, what is told where the environment is half set, and how a CPU is used."""

import os
import platform
import socket
import subprocess
import sys

import pytest

from launch import machine
from tests.conftest import ROOT

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("env", "tpu", "by"),
    [
        ({}, False, None),
        ({"FACSIMILE_PROCESSES": "2"}, False, "facsimile"),
        ({**SLURM}, False, None),  # a batch script of four tasks that has started none of them
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, False, None),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "4"}, False, "slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, False, "mpi"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, None),  # no TPU in sight
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, "tpu"),
        ({}, True, "tpu"),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
        ({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, True, "tpu"),
        ({"JAX_PLATFORMS": "cpu"}, True, None),
        ({"KUBERNETES_SERVICE_HOST": "h"}, False, None),
    ],
)
def test_who_started_this_process(env, tpu, by):
    assert machine.launcher(env, tpu) == by


def test_kubernetes_needs_its_package(monkeypatch):
    env = {"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"}
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert machine.launcher(env, False) is None
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: name == "kubernetes")
    assert machine.launcher(env, False) == "kubernetes"


@pytest.mark.parametrize("missing", ["JAX_COORDINATOR_ADDRESS", "FACSIMILE_PROCESS"])
def test_half_an_environment_is_told(monkeypatch, missing):
    for name, value in (("JAX_COORDINATOR_ADDRESS", "localhost:1"), ("FACSIMILE_PROCESS", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(ValueError, match=f"not {missing}: set all three"):
        machine.connect("facsimile")


def test_our_variables_are_passed_on(monkeypatch):
    called = []
    monkeypatch.setattr(machine.jax.distributed, "initialize", lambda *args, **more: called.append((*args, more)))
    for name, value in (
        ("JAX_COORDINATOR_ADDRESS", "h:1"), ("FACSIMILE_PROCESSES", "4"), ("FACSIMILE_PROCESS", "3"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    machine.connect("facsimile")
    machine.connect("tpu")
    machine.connect(None)
    assert called == [("h:1", 4, 3, {"local_device_ids": []}), ({"local_device_ids": None},)]


ONE, EIGHT = {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, {"SLURM_STEP_TASKS_PER_NODE": "8(x2),1"}
ALL = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


@pytest.mark.parametrize(
    ("by", "env", "own"),
    [
        ("slurm", ONE | ALL, []),
        ("slurm", ONE, []),
        ("slurm", EIGHT | ALL, None),  # the one of its number
        ("slurm", EIGHT | ALL | {"SLURM_NODEID": "2"}, []),
        ("slurm", EIGHT | {"CUDA_VISIBLE_DEVICES": "5"}, []),  # bound to it
        ("slurm", EIGHT | ALL | {"SLURM_GPUS_PER_TASK": "1"}, None),  # --gpu-bind=none
        ("slurm", {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_GPUS_PER_TASK": "a100:3", "CUDA_VISIBLE_DEVICES": "3,4,5"}, []),
        ("slurm", EIGHT, None),  # no GPU
        ("slurm", ONE | ALL | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),  # the user's word
        ("slurm", {"SLURM_STEP_TASKS_PER_NODE": "2"} | ALL | {"JAX_PLATFORMS": "cpu"}, None),
        ("mpi", {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"} | ALL, []),
        ("mpi", {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"} | ALL, None),
        ("facsimile", ALL, []),
        ("kubernetes", ALL, None),
    ],
)  # fmt: skip
def test_a_task_takes_the_gpus_that_are_its_own(monkeypatch, by, env, own):
    called = []
    monkeypatch.setattr(machine.jax.distributed, "initialize", lambda *_, **more: called.append(more))
    ours = {"JAX_COORDINATOR_ADDRESS": "h:1", "FACSIMILE_PROCESSES": "2", "FACSIMILE_PROCESS": "0"}
    for name, value in ({"SLURM_NODEID": "0"} | ours | env).items():
        monkeypatch.setenv(name, value)
    machine.connect(by)
    assert called == [{"local_device_ids": own}]


def test_gpus_that_tasks_would_leave_idle_are_told():
    with pytest.raises(
        ValueError, match=r"=0,1,2,3,4,5,6,7 in each of 2 tasks on a node: start one task a node, or one"
    ):
        machine.local_devices({"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1"} | ALL, "slurm")


@pytest.mark.slow
@pytest.mark.parametrize(("tasks", "visible"), [("1", "all"), ("2", "0")])
def test_what_jax_makes_of_it(tasks, visible):
    """Of one task a node, and of several: JAX itself, told where to find SLURM's first task."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    env = SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0"}
    env |= {"SLURM_STEP_TASKS_PER_NODE": tasks, "JAX_COORDINATOR_PORT": port, "JAX_PLATFORMS": "cpu"}
    code = "from jax._src import xla_bridge as xla; from launch import machine\n"
    code += "machine.connect('slurm'); print(xla.CUDA_VISIBLE_DEVICES.value)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | env, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == visible, done.stderr


POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("env", "backend", "refused"),
    [
        ({**POD, "CARD": "/dev/nvidia0"}, "cpu", True),  # no variable says so
        ({**POD, "CARD": "/dev/nvidia0", "NVIDIA_VISIBLE_DEVICES": "GPU-1a2b"}, "cpu", True),
        (POD, "cpu", False),
        ({**POD, "CARD": "/dev/nvidia0"}, "gpu", False),
        ({**POD, "CARD": "/dev/nvidia0", "JAX_PLATFORMS": "cpu"}, "cpu", False),
        ({**POD, "CARD": "/dev/nvidia0", "CUDA_VISIBLE_DEVICES": ""}, "cpu", False),
        ({**POD, "CARD": "/dev/nvidia0", "NVIDIA_VISIBLE_DEVICES": "void"}, "cpu", False),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, "cpu", False),  # NVIDIA's images say so on any machine
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "cpu", True),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1a2b"}, "cpu", True),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "gpu", False),
        ({"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cpu"}, "cpu", False),
        ({"CUDA_VISIBLE_DEVICES": ""}, "cpu", False),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "cpu", False),
        ({}, "cpu", False),
    ],
)
def test_gpus_that_were_asked_for_and_are_not_there_are_told(env, backend, refused):
    cards = [env["CARD"]] if "CARD" in env else []
    if not refused:
        machine.refuse_a_cpu_for_a_gpu(env, backend, cards)
        return
    said = "names GPUs" if "CUDA_VISIBLE_DEVICES" in env else r"this machine has GPUs \(/dev/nvidia0\)"
    with pytest.raises(ValueError, match=said + r", but JAX sees none.*install jax\[cuda13\]"):
        machine.refuse_a_cpu_for_a_gpu(env, backend, cards)


def test_a_workstation_whose_gpu_jax_does_not_see_runs_and_says_so(monkeypatch):
    """The README's command on a machine with a card, after an installation for CPUs."""
    told = []
    monkeypatch.setattr(machine.logging, "warning", lambda text, *args: told.append(text % args))
    machine.refuse_a_cpu_for_a_gpu({}, "cpu", ["/dev/nvidia0"])
    assert len(told) == 1 and told[0].startswith("this machine has GPUs (/dev/nvidia0), but JAX sees none")
    machine.refuse_a_cpu_for_a_gpu({"JAX_PLATFORMS": "cpu"}, "cpu", ["/dev/nvidia0"])
    machine.refuse_a_cpu_for_a_gpu({}, "cpu", [])
    assert len(told) == 1


def test_cores_are_devices_as_far_as_the_batches_divide():
    devices = lambda most, batches, pixels=1, worth=1: machine.cpu_devices(most, batches, pixels, worth)
    assert devices(2, [16, 32, 64]) == 2
    assert devices(64, [16, 32, 64]) == 8
    assert devices(64, [16, 12]) == 4
    assert devices(3, [], worth=2**17) == 2
    assert devices(8, [15]) == devices(1, [16]) == 1
    assert devices(8, [64, 128], 64**2, 2**17) == devices(2, [4], 64**3, 2**17) == 2
    assert devices(8, [16, 128], 64**2, 2**17) == 1


def test_steps_are_in_line_where_every_batch_is_large():
    assert machine.worth_keeping([16, 64], 64**2) and machine.worth_keeping([4], 24 * 32 * 24)
    assert not machine.worth_keeping([16, 64], 32**2) and not machine.worth_keeping([], 64**3)


FAULTS = """
import sys, resource
import numpy as np
from launch import machine

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.full(100 << 20, 1, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    machine.keep_memory()
print(faults(), faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.36"), reason="older glibc refuses it")
def test_memory_that_is_kept_is_not_cleared_again():
    of = lambda how: subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    first, *later = map(int, of("keep").stdout.split())
    assert first >= 50 and max(later) <= 5
    assert min(map(int, of("leave").stdout.split())) >= 50
