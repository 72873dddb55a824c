"""A folder keeps to the settings it was made with; files are whole; the disk is asked first."""

import collections
import json
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from launch import checkpoint, stage
from tests.conftest import ROOT


def test_flatten_and_json_types():
    assert stage.flatten({"a": {"b": (1, 2), "c": {}}, "d": None}) == {"a.b": [1, 2], "d": None}


def test_settings_may_grow_but_never_shrink(tmp_path):
    claim = lambda steps, rate=1.0: stage.claim(
        tmp_path / "s", {"train.steps": steps, "rate": rate}, grow=("train.steps",)
    )
    claim(5)
    claim(9)
    with pytest.raises(ValueError, match=r"made with config\.train\.steps=9, not 5: use another --workdir"):
        claim(5)
    with pytest.raises(ValueError, match=r"config\.rate=1\.0, not 2\.0"):
        claim(9, rate=2.0)
    assert json.loads((tmp_path / "s" / "settings.json").read_text()) == {"train.steps": 9, "rate": 1.0}


def test_a_setting_that_is_new_is_a_difference(tmp_path):
    stage.claim(tmp_path / "s", {"a": 1})
    with pytest.raises(ValueError, match=r"config\.b=None, not 2"):
        stage.claim(tmp_path / "s", {"a": 1, "b": 2})


def test_a_full_disk_is_told_before_writing(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "free")(free=100)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with checkpoint.manager(tmp_path / "c") as checkpoints:
        with pytest.raises(OSError, match="needs 4 MiB and the disk has 0; free some"):
            checkpoint.save(checkpoints, 1, {"a": jnp.zeros(2**20)})
        assert checkpoints.latest_step() is None


def test_json_refuses_nan_and_leaves_the_old_file(tmp_path):
    checkpoint.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_what_is_there_is_what_the_first_process_sees(tmp_path, monkeypatch):
    """A disk of several machines may hide a new file from the others for a while."""
    ask = lambda: [
        checkpoint.read_json(tmp_path / "x.json"),
        checkpoint.exists(tmp_path),
        checkpoint.published(tmp_path),
    ]
    checkpoint.write_json(tmp_path / "x.json", {"a": 1})
    checkpoint.publish(tmp_path, 7, {"a": jnp.zeros(2)})
    sent = []
    monkeypatch.setattr(checkpoint.mesh, "from_first", lambda value: sent.append(value) or value)
    assert ask() == [{"a": 1}, True, 7]

    def received(value):
        theirs = sent.pop(0)
        assert (np.shape(value), np.asarray(value).dtype) == (np.shape(theirs), np.asarray(theirs).dtype)
        return theirs

    monkeypatch.setattr(checkpoint.mesh, "from_first", received)
    monkeypatch.setattr(checkpoint.Path, "exists", lambda path: False)
    assert ask() == [{"a": 1}, True, 7] and not sent


def test_pods_that_are_all_process_1_do_not_write_over_each_other(tmp_path, monkeypatch):
    """Two machines at the same file, each with the same process number; and a folder's settings are written once."""
    machines = iter([types.SimpleNamespace(nodename="pod-a"), types.SimpleNamespace(nodename="pod-b")])
    monkeypatch.setattr(checkpoint.os, "uname", lambda: next(machines))
    monkeypatch.setattr(checkpoint.os, "getpid", lambda: 1)
    aside = []
    monkeypatch.setattr(checkpoint.os, "replace", lambda source, target: aside.append(source))
    for _ in range(2):
        checkpoint.write_json(tmp_path / "x.json", {"a": 1})
    assert len(set(aside)) == 2 and all(path.name.startswith(".") for path in aside)
    monkeypatch.undo()
    stage.claim(tmp_path / "s", {"a": 1})
    monkeypatch.setattr(checkpoint, "write_json", lambda *_: pytest.fail("it is as it was"))
    stage.claim(tmp_path / "s", {"a": 1})


def test_runs_with_the_same_settings_share_a_stage(tmp_path):
    def run(workdir, rate):
        with stage.shared(workdir / "coder", {"rate": rate, "steps": 5}, tmp_path / "store"):
            stage.claim(workdir / "coder", {"rate": rate, "steps": 5}, grow=("steps",))
            made = workdir / "coder" / "weights"
            if not made.exists():
                made.write_text(workdir.name)
        return made.read_text()

    assert [run(tmp_path / name, rate) for name, rate in (("a", 1.0), ("b", 1.0), ("c", 2.0))] == ["a", "a", "c"]
    assert len(list((tmp_path / "store").glob("coder-*/settings.json"))) == 2
    with pytest.raises(ValueError, match=r"made with config\.steps=5, not 9"):  # it would be found under a false name
        stage.claim(tmp_path / "a" / "coder", {"rate": 1.0, "steps": 9}, grow=("steps",))
    (tmp_path / "moved").mkdir()
    for name in ("a", "store"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert (tmp_path / "moved" / "a" / "coder" / "weights").read_text() == "a"


def test_a_folder_that_is_there_stays_its_own(tmp_path):
    (tmp_path / "run" / "coder").mkdir(parents=True)
    with stage.shared(tmp_path / "run" / "coder", {"rate": 1.0}, tmp_path / "store"):
        assert not (tmp_path / "run" / "coder").is_symlink()


AT_WORK = """
import sys, time, pathlib
from launch import stage
run, store, seconds = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), float(sys.argv[3])
with stage.shared(run / "coder", {"rate": 1.0}, store):
    log = run / "coder" / "log"
    log.open("a").write(f"{run.name} in\\n")
    time.sleep(seconds)
    log.open("a").write(f"{run.name} out\\n")
"""


@pytest.mark.slow
def test_the_same_stage_is_done_by_one_at_a_time_and_a_kill_frees_it(tmp_path):
    start = lambda name, seconds: subprocess.Popen(
        [sys.executable, "-c", AT_WORK, tmp_path / name, tmp_path / "store", seconds], cwd=ROOT
    )
    first = start("a", "600")
    while not (tmp_path / "a" / "coder" / "log").exists():
        time.sleep(0.1)
    others = [start(name, "0.3") for name in "bc"]
    time.sleep(4)
    log = tmp_path / "a" / "coder" / "log"
    assert log.read_text().split("\n")[:-1] == ["a in"]
    first.kill()
    first.wait()
    assert [process.wait(60) for process in others] == [0, 0]
    lines = log.read_text().split("\n")[:-1]
    assert [x.split()[1] for x in lines] == ["in", "in", "out", "in", "out"]
    assert lines[1][0] == lines[2][0] and {lines[1][0], lines[3][0]} == {"b", "c"}
