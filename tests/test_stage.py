"""A folder keeps to the settings it was made with; files are whole; the disk is asked first."""

import collections
import json

import jax.numpy as jnp
import pytest

from launch import checkpoint, stage


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
