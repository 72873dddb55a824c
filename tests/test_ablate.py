"""Studies: what is run, that any interruption ends in the same table, failures, and the shell scripts."""

import csv
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import cohort
from launch import ablate, findings, law, measures, ranks, studies
from tests.conftest import ROOT

FAKE = f"--main={shlex.join([sys.executable, str(ROOT / 'tests' / 'fake_main.py')])}"


def flags(study, workdir, *more):
    return [f"--study={study}", "--config=configs/brain.py:tiny", f"--workdir={workdir}", *more]


def results(workdir):
    pictures = {p.name: p.read_bytes() for p in workdir.glob("*.png")}
    return (workdir / "study.csv").read_text(), (workdir / "study.html").read_text(), pictures


def rows(workdir):
    return list(csv.DictReader((workdir / "study.csv").open()))


@pytest.mark.parametrize("name", studies.STUDIES)
def test_every_override_is_a_key_of_the_config(name):
    from configs import default

    config, study = default.get_config(), studies.STUDIES[name]
    for level in study.levels:
        for key in [*level.overrides, *studies.ALWAYS]:
            if key == "generator" and "generator" not in config:
                pytest.skip("this config has one generator")
            section = config
            for part in key.split("."):
                assert part in section, key
                section = section[part]
    assert len({level.name for level in study.levels}) == len(study.levels)
    assert study.paper in (None, "rises", "falls")


def test_a_study_runs_and_is_not_run_again(tmp_path, capsys):
    assert ablate.main([*flags("width", tmp_path), FAKE]) == 0
    assert [(row["run"], float(row["x"])) for row in rows(tmp_path)][:2] == [("00-16-seed0", 16), ("01-32-seed0", 32)]
    assert len(rows(tmp_path)) == 9 and not list(tmp_path.glob("runs/*/COLLISION"))
    before = results(tmp_path)
    assert set(before[2]) == {"factor.png", "plane.png"}
    html = before[1]
    assert "The mean copy rate rises from each level to the next" in html and "reproduced here" in html
    half = {row["x"]: (float(row["copies_high"]) - float(row["copies_low"])) / 2 for row in rows(tmp_path)}
    ends = sorted(half, key=float)
    reach = 100 * math.hypot(half[ends[0]], half[ends[-1]])  # every seed says the same; each run knows only so much
    assert f"by +48.0 percentage points [{48 - reach:+.1f}, {min(48 + reach, 100):+.1f}]" in html and reach > 1
    assert "report that copies rise" in html
    assert "<td>15.0 %</td>" in html and "<th>planted copies seen</th>" in html
    capsys.readouterr()
    assert ablate.main([*flags("width", tmp_path), FAKE]) == 0
    assert "started" not in capsys.readouterr().err and results(tmp_path) == before
    with pytest.raises(ValueError, match=r"config\.config='configs/brain\.py:tiny', not 'x'"):
        ablate.main(["--study=width", "--config=x", f"--workdir={tmp_path}", FAKE])


def test_a_study_without_quality_comes_to_its_end(tmp_path, capsys):
    """Of its measures those of quality are missing, and named so; the others are as ever."""
    assert ablate.main([*flags("width", tmp_path, "--config.quality.enabled=False"), FAKE]) == 0
    assert len(rows(tmp_path)) == 9 and {row["kernel"] for row in rows(tmp_path)} == {""}
    assert "The mean copy rate rises" in capsys.readouterr().out
    html = (tmp_path / "study.html").read_text()
    assert html.count("<td>not measured</td>") == 2 * (3 + 9) and "nan" not in html
    assert {path.name for path in tmp_path.glob("*.png")} == {"factor.png", "plane.png"}


def test_one_training_run_is_handed_on(tmp_path):
    assert ablate.main([*flags("steps", tmp_path, "--seeds=2"), FAKE]) == 0
    last = json.loads((tmp_path / "runs" / "04-1600-seed1" / "diffusion" / "steps.json").read_text())
    assert last == [100, 200, 400, 800, 1600]


def test_the_law_finds_the_exponent(tmp_path):
    assert ablate.main([*flags("law", tmp_path, "--seeds=1", "--config.unet.width=0"), FAKE]) == 0
    assert "no exponent" in (tmp_path / "study.html").read_text()
    rates = {2: 0.0, 4: 0.25, 8: 0.75}  # of steps / n
    made = [
        {"seed": seed, "group": n, "x": x, "copies": rate, "copies_low": rate, "copies_high": rate, "blind": ""}
        for seed in range(3)
        for n in (16, 32, 64, 128)
        for x, rate in rates.items()
    ]
    said = law.law(made)
    assert "to the power 1.00 [1.00, 1.00] over 3 seeds, images and patients, n from 16 to 128" in said
    assert "audited after 2 to 8 steps a training image (published: 1)." in said
    late = [row | ({"copies": 0.4} if (row["seed"], row["group"], row["x"]) == (1, 128, 8) else {}) for row in made]
    assert "(published: 1); no crossing there: seed 1 at 128." in law.law(late)
    made = [{**row, "copies": row["copies"] / row["group"]} for row in made if row["group"] < 128]
    (said,) = findings.by_size(made)
    assert said.startswith("After the same 128 steps")
    assert "16: 4.7 %, 32: 0.8 %, 64: 0.0 % of" in said and "it falls" in said


def test_the_laws_interval_has_that_of_the_rates():
    """Against rates drawn anew from their intervals."""
    rng, sizes, rates = np.random.default_rng(0), (16, 32, 64, 128), {2: 0.1, 4: 0.3, 8: 0.75}

    def rows(off=lambda: 0.0):
        return [
            {"seed": 0, "group": n, "x": x, "copies": r + off(), "copies_low": r - 0.04, "copies_high": r + 0.04}
            for n in sizes
            for x, r in rates.items()
        ]

    def slope(rows):
        return law.exponent({n: law.crossing(sorted(
            (r["x"] * n, r["copies"], r["copies_low"], r["copies_high"]) for r in rows if r["group"] == n
        )) for n in sizes})  # fmt: skip

    value, below, above = slope(rows())
    drawn = [slope(rows(lambda: rng.normal(0, 0.04 / 1.96)))[0] for _ in range(2000)]
    assert value == pytest.approx(1.0)
    assert 1.96 * np.std(drawn) == pytest.approx(below, rel=0.1) == pytest.approx(above, rel=0.1)
    assert f"[{1 - below:.2f}, {1 + above:.2f}] over images and patients of one seed" in law.law(rows())


def test_one_repetition_has_its_own_interval():
    for value, low, high in ((0.0, 0.0, 0.056), (1.0, 0.944, 1.0), (0.9, 0.6, 0.95)):
        below, above = findings.reach(*np.array([[value], [low], [high]]))
        assert ranks.mean_interval(np.array([value]), below, above, 0.0, 1.0) == pytest.approx([value, low, high])
        three = ranks.mean_interval(np.full(3, value), np.full(3, value - low), np.full(3, high - value), 0.0, 1.0)
        assert three == pytest.approx([value, low, high]), "seeds that agree do not narrow what all share"
    mean, low, high = ranks.mean_interval(np.array([0.1, 0.2, 0.3]), np.full(3, 0.05), np.full(3, 0.2))
    between = 4.302653 * 0.1 / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((0.2, 0.2 - math.hypot(0.05, between), 0.2 + math.hypot(0.2, between)))


def test_a_difference_takes_the_far_side_of_each_interval():
    """From 0 of 64 to 64 of 64: each knows 5.6 % on its inner side."""
    study = studies.named("width")
    ends = {16: (0.0, 0.0, 0.056), 32: (0.5, 0.4, 0.6), 64: (1.0, 0.944, 1.0)}
    rows = [
        {"seed": 0, "group": 0, "x": x, "level": str(x)}
        | {f"{key}{end}": v for key in measures.of(study) for end, v in zip(("", "_low", "_high"), of, strict=True)}
        for x, of in ends.items()
    ]
    test = findings.tested(study, rows)["copies"]
    assert [test["change"], *test["change_ci"]] == pytest.approx([1.0, 1 - math.hypot(0.056, 0.056), 1.0])


def test_levels_that_could_not_be_seen_are_left_out(tmp_path):
    """At the lowest width nothing is found: by audits that see 90 % of planted copies, and by some that see 30 %."""
    for seen, said in (("0.9", "reproduced here"), ("0.3", "not shown here")):
        folder = tmp_path / seen
        assert ablate.main([*flags("width", folder, "--config.less=0.2", f"--config.seen={seen}"), FAKE]) == 0
        text = (folder / "study.html").read_text()
        assert f"Dar et al. report that copies rise: {said}" in text, seen
        left_out = (
            "16: left out of the test, since these audits could not have seen copies (of planted copies fewer than"
        )
        assert (left_out in text) == (seen == "0.3")
        lowest = [row for row in rows(folder) if row["level"] == "16"]
        assert all(float(row["copies"]) == 0 and row["least"] == "0.15" and row["seen"] == seen for row in lowest)
        assert all(bool(row["blind"]) == (seen == "0.3") for row in lowest)


def test_why_an_audit_was_blind():
    audit = {
        "verdict": "INCONCLUSIVE",
        "policy": {"min_recall": 0.8},
        "power": {"recall": 0.9},
        "rendering": {"differs": True},
        "negative_control": {"excess_p_value": 0.001},
    }
    why = "synthetic and real images are rendered differently"
    assert measures.blind(audit) == why and measures.blind({**audit, "verdict": "FAIL"}) == ""
    assert measures.blind({**audit, "rendering": {"differs": False}}) == "", "a high control hides nothing"
    assert measures.doubtful(audit) and not measures.doubtful({**audit, "negative_control": {"excess_p_value": 0.02}})


def test_each_reason_is_said_once():
    rows = [{"x": 0, "copies": 0.0, "blind": reasons} for reasons in ("few", "few; rendered differently", "")]
    said = "2 of the 3 audits that found nothing could not have seen copies (few, rendered differently)"
    assert findings.could_not_see(rows, [0]) == said and not findings.could_not_see(rows, [1])


def test_levels_without_an_order_name_those_that_could_not_be_seen():
    study = studies.named("generator")
    rows = [
        {
            "seed": seed,
            "group": 0,
            "x": x,
            "level": name,
            "blind": "" if x < 2 else "rendered differently",
            "doubtful": x == 1,
        }
        | {f"{key}{end}": float(x == 0) for key in measures.of(study) for end in ("", "_low", "_high")}
        | {"least": 0.1}
        for seed in range(3)
        for x, name in enumerate(("LDM", "VAE", "GAN"))
    ]
    first, *more = findings.said(study, rows, findings.summary(study, rows), findings.tested(study, rows))
    assert first.startswith("Levels are not shown to differ in the copy rate (exact Friedman test over 3 repetitions")
    why = "these audits could not have seen copies (rendered differently)"
    assert more[0].startswith("In 3 of the 9 audits the negative control is too high")
    assert more[1:] == [f"GAN: {why}; a difference from it is not shown."]


@pytest.mark.parametrize("times", [1, 2, 5])
def test_duplicated_people_are_told_from_single_ones(tmp_path, times):
    """As the cohort itself plants them, of which four of eight are found, and three of the 24 others."""
    level = next(level for level in studies.named("duplication").levels if level.x == times)
    plan = {key.removeprefix("data.cohort."): value for key, value in level.overrides.items()}
    truth = cohort.records(subjects={"train": 32}, **plan)
    sources = cohort.records(subjects={"train": 32}, duplicates=8)[32:]
    several = [row.duplicate_of.removesuffix("_scan-0") for row in sources]
    planted = {row.patient: row.duplicate_of.removesuffix("_scan-0") for row in truth if row.duplicate_of}
    named = [next((p for p in planted if planted[p] == who), who) for who in several[:3]] + [several[3]]
    single = [row.patient for row in truth if not row.duplicate_of and row.patient not in several]
    verdicts = [(who, 1) for who in named * 2 + single[:3]] + [(single[4], 0), (several[5], 0)]
    (tmp_path / "audit").mkdir()
    lines = [f"{i},x,{who},0.9,0.1,{flag}" for i, (who, flag) in enumerate(verdicts)]
    head = "image,nearest,nearest_patient,similarity,p_value,flagged"
    (tmp_path / "audit" / "verdicts.csv").write_text("\n".join([head, *lines]))
    config = {"data": {"cohort": {"subjects": {"train": 32}, **plan}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    value, low, high = measures.of(studies.named("duplication"))["duplicated"].of({}, {}, tmp_path)
    assert value == pytest.approx(4 / 8 - 3 / 24)
    assert -0.05 < low < value < high < 0.75


def test_each_study_is_decided_by_what_it_asks():
    deciding = {name: study.deciding for name, study in studies.STUDIES.items() if study.deciding != "copies"}
    assert deciding == {"samples": "patients", "duplication": "duplicated"}
    for study in studies.STUDIES.values():
        assert next(iter(measures.of(study))) == study.deciding
    assert "duplicated" not in measures.of(studies.named("size"))


def test_failures_are_retried_then_named(tmp_path, capsys):
    assert ablate.main([*flags("width", tmp_path, "--config.fail=1", "--seeds=2"), FAKE]) == 0
    assert "04" not in capsys.readouterr().out
    assert ablate.main([*flags("width", tmp_path / "b", "--config.fail=always", "--seeds=1"), FAKE]) == 1
    told = capsys.readouterr()
    assert "not done: 02-64-seed0: error: fail: always" in told.err and "no run is done yet" in told.out
    assert told.err.count("00-16-seed0: exit code 1") == 2


def test_what_is_missing_is_said_and_not_counted(tmp_path, capsys):
    assert ablate.main([*flags("width", tmp_path, "--only=5"), FAKE]) == 0
    assert not (tmp_path / "study.csv").exists()
    assert ablate.main([*flags("width", tmp_path, "--collect"), FAKE]) == 1
    assert len(rows(tmp_path)) == 1 and "00-16-seed0" in (tmp_path / "study.html").read_text()
    assert "Too few runs are done for a test" in capsys.readouterr().out


def test_runs_at_the_same_time_have_a_device_each(tmp_path, capfd):
    assert ablate.main([*flags("width", tmp_path, "--seeds=1", "--devices=0,1"), FAKE]) == 0
    assert len(rows(tmp_path)) == 3


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--study=weight"], "there is none; there are augmentation, size"),
        (["--seed=2"], "unexpected argument '--seed=2'"),
        (["--seeds=0"], "--seeds and --tries must be at least 1"),
        (["--only=9"], "this study has chains 0 to 8"),
    ],
)
def test_mistakes_are_one_line(tmp_path, more, told):
    with pytest.raises(ValueError, match=told):
        ablate.main([*flags("width", tmp_path), *more])


def test_dry_run_prints_every_command_and_its_cost(tmp_path, capsys, monkeypatch):
    def cost(work, run):
        steps = run.level.overrides["train.diffusion.steps"]
        one = {"flops": 1e12, "seconds": {"A100": 3600.0 * steps}, "memory": 2e9}
        return {
            "detector": {**one, "steps": 1, "seconds": {"A100": 3600.0}, "key": "same"},
            "diffusion": {**one, "steps": steps, "key": f"{steps}"},
            "looks": {
                **one,
                "flops": 1e11,
                "steps": steps // 100,
                "seconds": {"A100": 36.0 * steps},
                "key": f"{steps}",
            },
        }

    monkeypatch.setattr(ablate.Work, "cost", cost)
    assert ablate.main([*flags("steps", tmp_path / "none", "--seeds=1", "--config.sample.n=9", "--dry_run")]) == 0
    told = capsys.readouterr().out.splitlines()
    lines = [line for line in told if not line.startswith("#")]
    assert len(lines) == 9 and not (tmp_path / "none").exists()
    assert lines[1].startswith("cp -RL ") and lines[1].endswith("01-200-seed0/diffusion")
    assert lines[2].endswith("--config.sample.n=9") and "--config.train.diffusion.steps=200" in lines[2]
    # the detector is trained once; of 200 steps the first 100 are the run before's
    assert told[1] == "#   101.1 TFLOP, A100 102 h; 2 GB" and told[4] == "#   100.1 TFLOP, A100 101 h; 2 GB"
    assert told[-1] == "# all 5 runs, without their audits: 1603 TFLOP, A100 1.62e+03 h"
    ablate.main([*flags("law", tmp_path / "none", "--count")])
    assert capsys.readouterr().out == "12\n"


# the suite itself may run under nohup, or in the background of a script, where a shell has SIGHUP or SIGINT ignored
HEED = """
import os, signal, sys
for number in (signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.executable, sys.argv[1:])
"""


def study(workdir, *more, seconds="0.15"):
    command = [sys.executable, "-m", "launch.ablate", *flags("steps", workdir, "--seeds=2", *more), FAKE]
    return subprocess.Popen(
        [sys.executable, "-c", HEED, *command],
        cwd=ROOT,
        env={**os.environ, "FAKE_SECONDS": seconds},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_study_killed_ten_times_ends_with_the_same_table(tmp_path):
    """SIGKILL of the study alone (its run lives on), SIGTERM, and SIGINT, at random."""
    whole = study(tmp_path / "whole", seconds="0.01")
    assert whole.wait() == 0
    rng, done = np.random.default_rng(0), []
    for number in range(10):
        process = study(tmp_path / "killed", seconds="0.3")
        next((line for line in process.stderr if "started" in line), None)
        time.sleep(rng.uniform(0.0, 0.8))
        how = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[number % 3]
        process.send_signal(how)
        process.wait(20)
        process.stderr.close()
        done.append(len(list(tmp_path.glob("killed/runs/*/quality.json"))))
    assert done[5] < 10 and done[-1] > 0, "the kills came too late, or too early, to show anything"
    assert study(tmp_path / "killed").wait() == 0
    assert not list(tmp_path.glob("killed/runs/*/COLLISION"))
    assert len(rows(tmp_path / "killed")) == 10
    expected, seen = results(tmp_path / "whole"), results(tmp_path / "killed")
    assert seen[0] == expected[0] and seen[2] == expected[2]
    assert seen[1].replace("killed", "whole") == expected[1]


@pytest.mark.slow
def test_told_to_stop_it_stops_its_run(tmp_path):
    process = study(tmp_path, seconds="30")
    while not list(tmp_path.glob("runs/*/busy")):
        time.sleep(0.05)
    run = int(next(tmp_path.glob("runs/*/busy")).read_text() or 0)
    process.terminate()
    assert process.wait(20) == 0 and "told to stop; the same command goes on" in process.stderr.read()
    with pytest.raises(ProcessLookupError):
        os.kill(run, 0)


@pytest.mark.parametrize("code", ["", "75"])
def test_told_to_stop_it_stops_what_a_script_runs_for_it(tmp_path, monkeypatch, code):
    """SIGTERM to the script alone would leave main.py at work."""
    script = tmp_path / "elsewhere.sh"
    script.write_text(f'#!/bin/sh\n{FAKE.removeprefix("--main=")} "$@"\necho left\n')
    script.chmod(0o755)
    env = {**os.environ, "FAKE_SECONDS": "600"} | ({"FACSIMILE_STOPPED_CODE": code} if code else {})
    command = [sys.executable, "-m", "launch.ablate", *flags("steps", tmp_path / "w"), f"--main={script}"]
    process = subprocess.Popen([sys.executable, "-c", HEED, *command], cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    try:
        deadline = time.time() + 120
        while not (found := [p for p in tmp_path.glob("w/runs/*/busy") if p.read_text()]):
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP if code else signal.SIGTERM)
        assert process.wait(120) == int(code or 0)
    finally:
        process.kill()
    deadline = time.time() + 20
    while at_work(int(found[0].read_text())):
        assert time.time() < deadline, "main.py is still at work"
        time.sleep(0.05)


def at_work(process: int) -> bool:
    """Whether a process runs: one that has ended and is not yet waited for by its parent does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_real_study_shares_its_stages(tmp_path, cache):
    """Two widths of the tiny brain configuration: one autoencoder and one detector, trained once."""
    script = (
        "import sys; from launch import ablate, studies\n"
        "study = studies.STUDIES['width']\n"
        "studies.STUDIES['width'] = study._replace(levels=study.levels[:2])\n"
        "sys.exit(ablate.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *flags("width", tmp_path, "--seeds=1", "--config.audit.spaces=()")],
        cwd=ROOT,
        env={**os.environ, "FACSIMILE_CACHE": str(cache), "FACSIMILE_QUIET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + "".join(p.read_text() for p in tmp_path.glob("runs/*/log.txt"))
    assert [row["level"] for row in rows(tmp_path)] == ["16", "32"]
    shared = sorted(p.name.split("-")[0] for p in (tmp_path / "shared").iterdir() if p.is_dir())
    assert shared == ["autoencoder", "detector", "diffusion", "diffusion"]
    one, two = (tmp_path / "runs" / f"{name}-seed0" for name in ("00-16", "01-32"))
    assert (one / "autoencoder").resolve() == (two / "autoencoder").resolve()
    assert (one / "diffusion").resolve() != (two / "diffusion").resolve()


def test_friedmans_p_and_the_least_that_ties_allow():
    agreed = np.tile([0.1, 0.5, 0.9], (3, 1))
    assert ranks.differ(agreed) == pytest.approx((1 / 36, 1 / 36)), "two further blocks, each one order of six"
    tied = np.tile([0.9, 0.0, 0.0], (3, 1))
    assert ranks.differ(tied) == pytest.approx((1 / 9, 1 / 9)), "the highest is the same of three, twice"
    p, least = ranks.differ(np.array([[0.1, 0.5, 0.9], [0.5, 0.1, 0.9], [0.9, 0.5, 0.1]]))
    assert p > 0.5 and least == pytest.approx(1 / 36)
