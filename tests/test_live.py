"""The table that a study shows while it runs: every state of a run is told from its files; and Weights & Biases."""

import importlib.machinery
import json
import os
import sys
import types

import pytest
import rich.console

from launch import live, log, studies

PRODUCTS = ("audit/audit.json", "quality.json")


@pytest.fixture
def folder(tmp_path):
    def made(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return made


CONFIG = json.dumps({"train": {"autoencoder": {"steps": 40}, "diffusion": {"steps": 1024}, "detector": {"steps": 30}}})
TRAINED = {"config.json": CONFIG, "log.txt": "", "autoencoder/metrics.jsonl": '{"step": 40}\n'}


@pytest.mark.parametrize(
    ("files", "running", "told"),
    [
        ({}, False, "·"),
        ({"log.txt": ""}, False, "stopped"),
        ({"log.txt": ""}, True, "starting"),
        (TRAINED, True, "after autoencoder"),
        (
            {**TRAINED, "autoencoder/metrics.jsonl": "", "detector-again/metrics.jsonl": '{"step": 20}\n'},
            True,
            "detector-again 20/30",
        ),
        ({**TRAINED, "samples/0.png": ""}, True, "auditing"),
        ({**TRAINED, "autoencoder/metrics.jsonl": '{"step": 20}\n{"step": 4'}, True, "autoencoder 20/40"),
        ({PRODUCTS[0]: '{"calibrated": {"copy_rate": 0.125}}', PRODUCTS[1]: "{}"}, False, "12.5%"),
    ],
)
def test_what_is_told_of_a_run(folder, files, running, told):
    assert live.cell(folder(files), PRODUCTS, running) == told


def test_the_stage_that_wrote_last_is_told(folder):
    made = folder({**TRAINED, "diffusion/metrics.jsonl": '{"step": 20}\n{"step": 640}\n'})
    os.utime(made / "autoencoder/metrics.jsonl", (1, 1))
    assert live.doing(made) == "diffusion 640/1024"


def test_levels_in_rows_and_seeds_in_columns(folder):
    study = studies.named("width")
    runs = [run for chain in studies.chains(study, 2) for run in chain]
    workdir = folder({f"runs/{runs[0].name}/log.txt": ""})
    console = rich.console.Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(live.table(study, runs, workdir, PRODUCTS, set(), "0.0 min"))
    lines = console.export_text().splitlines()
    assert [line.split() for line in lines if line.startswith("│")] == [
        ["│", "16", "│", "stopped", "│", "·", "│"],
        ["│", "32", "│", "·", "│", "·", "│"],
        ["│", "64", "│", "·", "│", "·", "│"],
    ]


def test_a_log_gets_lines(capsys):
    with live.shown(lambda: pytest.fail("drawn where there is no terminal")) as tell:
        tell("a run: started")
    assert capsys.readouterr().err == "a run: started\n"


@pytest.mark.parametrize("project", [None, "copies"])
def test_weights_and_biases_gets_numbers_and_only_where_a_project_is_named(tmp_path, monkeypatch, project):
    told = []
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.Settings = lambda **settings: settings
    run = types.SimpleNamespace(log=lambda values, step: told.append((step, values)), finish=lambda: told.append("end"))
    fake.init = lambda **how: told.append((how["id"], how["resume"])) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    if project:
        monkeypatch.setenv("WANDB_PROJECT", project)
    for start in (0, 20):
        metrics = log.Metrics(tmp_path, start)
        metrics.write(start + 10, {"loss": 0.5})
        metrics.close()
    if not project:
        assert told == []
        return
    first, second = told[:3], told[3:]
    assert first[0] == second[0] and first[0][1] == "allow", "a run that goes on is the same run"
    assert first[1:] == [(10, {"loss": 0.5}), "end"] and second[1:] == [(30, {"loss": 0.5}), "end"]
