"""`python -m data`: what it says is what is there."""

import csv
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from data import look
from tests.conftest import ROOT


def run(tmp_path, *args, config="configs/default.py"):
    return subprocess.run(
        [sys.executable, "-m", "data", f"--config={config}", f"--out={tmp_path / 'look.png'}", *args],
        cwd=ROOT,
        env={**os.environ, "FACSIMILE_CACHE": str(tmp_path / "cache"), "FACSIMILE_QUIET": "1"},
        capture_output=True,
        text=True,
    )


def column(text, name):
    """The line of a split: [images, patients, ...]."""
    return next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1:]


def folder_of(tmp_path, images):
    """(name, picture) -> a folder; the patient is the name's beginning."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, picture in images:
        PIL.Image.fromarray(picture).save(folder / name)
    quarters = [f"--config.data.fractions.{name}=0.25" for name in ("train", "select", "val", "control")]
    patients = r"--config.data.patient_pattern=^p\d+"
    return f"--config.data.path={folder}", patients, "--config.data.size=(24, 24)", *quarters


def pictures(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 24, 24), np.uint8)


def test_counts_of_a_folder(tmp_path):
    images = [(f"p{i // 2}_{i % 2}.png", picture) for i, picture in enumerate(pictures(60))]
    done = run(tmp_path, *folder_of(tmp_path, images))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert column(done.stdout, "together")[:2] == ["60", "30"]
    assert sum(int(column(done.stdout, name)[1]) for name in ("train", "select", "val", "control")) == 30
    assert "60 of 60 looked at: 24x24 (60)" in done.stdout and "uint8, values from 0 to 255" in done.stdout
    assert "prepared   24x24, 1 channel" in done.stdout and "neither inside a split nor across" in done.stdout
    with PIL.Image.open(tmp_path / "look.png") as sheet:
        assert sheet.size[0] == look.LABEL + look.COLUMNS * (look.TILE + look.GAP) and np.asarray(sheet).std() > 10
    assert not (tmp_path / "look.csv").exists()


def test_the_splits_it_writes_are_the_splits_it_takes(tmp_path):
    images = [(f"p{i}.png", picture) for i, picture in enumerate(pictures(40))]
    where = folder_of(tmp_path, images)
    first = run(tmp_path, *where, "--config.data.fractions.train=0.1")
    assert "splits     by a hash of their ids for 40 patients. All: " in first.stdout
    written = (tmp_path / "look.splits.csv").read_text()
    split_of = dict(line.split(",") for line in written.splitlines())
    counts = {name: list(split_of.values()).count(name) for name in ("train", "select", "val", "control", "none")}
    assert split_of.pop("patient_id") == "split" and len(split_of) == 40 and counts["none"] > 0
    (tmp_path / "given.csv").write_text(written)
    again = run(tmp_path, *where, f"--config.data.splits={tmp_path / 'given.csv'}")
    assert f"splits     by {tmp_path / 'given.csv'} for 40 patients. All: " in again.stdout
    assert {name: int(column(again.stdout, name)[1]) for name in counts if name != "none"} == {
        name: count for name, count in counts.items() if name != "none"
    }
    assert (tmp_path / "look.splits.csv").read_text() == written
    (tmp_path / "given.csv").write_text("patient_id,split\np0,train\n")
    refused = run(tmp_path, *where, f"--config.data.splits={tmp_path / 'given.csv'}")
    assert refused.returncode == 1 and "PROBLEM    " in refused.stdout and "39 of 40 patients are not" in refused.stdout
    assert not (tmp_path / "look.splits.csv").exists()


def test_leaks_end_with_an_exit_code_and_a_list(tmp_path):
    some = pictures(40)
    images = [(f"p{i}.png", picture) for i, picture in enumerate([*some, *some[:15]])]
    where = folder_of(tmp_path, images)
    done = run(tmp_path, *where)
    assert done.returncode == 1 and done.stderr == ""
    assert "15 pairs of images of different or unknown patients (15 equal" in done.stdout
    assert done.stdout.count(" = ") == 10 and "and 5 more" in done.stdout
    with open(tmp_path / "look.csv") as listing:
        rows = list(csv.DictReader(listing))
    pair = lambda row: tuple(sorted(int(row[k][1:-4]) for k in ("image", "other")))
    assert {pair(row) for row in rows} == {(i, 40 + i) for i in range(15)}
    assert all((row["leak"] == "1") == (row["split"] != row["other_split"]) for row in rows)
    accepted = run(tmp_path, *where, "--config.data.accept_duplicates=all")
    assert accepted.returncode == 0 and "15 accepted" in accepted.stdout


def test_what_is_left_out_is_said(tmp_path):
    where = folder_of(tmp_path, [(f"p{i}.png", picture) for i, picture in enumerate(pictures(40))])
    (tmp_path / "images" / "p90.png").write_bytes(b"")
    for args, code in (([], 1), (["--config.data.on_error=skip"], 0)):
        done = run(tmp_path, *where, *args)
        assert done.returncode == code and done.stderr == ""
        assert "1 of 41 images could not be read and are left out" in done.stdout
        assert column(done.stdout, "together")[:2] == ["40", "40"]
        with open(tmp_path / "look.left_out.csv") as listing:
            ((file, problem),) = [(row["file"], row["problem"]) for row in csv.DictReader(listing)]
        assert file == str(tmp_path / "images" / "p90.png") and problem.startswith("the file is empty")
    (tmp_path / "images" / "p90.png").unlink()
    assert run(tmp_path, *where).returncode == 0 and not (tmp_path / "look.left_out.csv").exists()


def test_it_looks_when_a_look_is_needed(tmp_path):
    """Splits that are empty or contradict each other, images without a patient, bad files and lines: all in one look."""
    folder_of(tmp_path, [(f"p{i}.png", picture) for i, picture in enumerate(pictures(6))])
    (tmp_path / "images" / "p90.png").write_bytes(b"")
    rows = [
        "p0.png,1,train",
        "p1.png,1,val",
        "p2.png,2,train",
        "p3.png,3,train",
        "p4.png,,train",
        "p90.png,5,val",
        ",6,",
    ]
    (tmp_path / "images" / "manifest.csv").write_text("\n".join(["path,patient_id,split", *rows, "p5.png,7"]) + "\n")
    shares = [
        f"--config.data.fractions.{name}={share}" for name, share in (("train", 1.0), ("select", 0.0), ("control", 0.0))
    ]
    where = [f"--config.data.path={tmp_path / 'images'}", "--config.data.size=(24, 24)", *shares]
    done = run(tmp_path, *where, "--config.data.fractions.val=0.0")
    assert done.returncode == 1 and done.stderr == "", done.stderr
    problems = [line for line in done.stdout.splitlines() if line.startswith("PROBLEM")]
    assert len(problems) == 2
    assert "1 of 6 images have no patient id (p4.png); set data.patient_pattern" in problems[0]
    assert "patient 1 is in the splits train and val; correct the manifest" in problems[1]
    assert column(done.stdout, "together")[:2] == ["5", "4"] and column(done.stdout, "val")[:2] == ["0", "0"]
    with open(tmp_path / "look.left_out.csv") as listing:
        lines = [row["problem"] for row in csv.DictReader(listing)]
    assert len(lines) == 3 and any("the file is empty" in line for line in lines)
    assert any("has no path" in line for line in lines) and any(
        "has not the header's 3 fields" in line for line in lines
    )
    with PIL.Image.open(tmp_path / "look.png") as sheet:
        assert np.asarray(sheet).std() > 10
    (tmp_path / "images" / "manifest.csv").write_text("path,patient_id\np0.png,1\np1.png,2\n")
    done = run(tmp_path, *where[:2])
    assert done.returncode == 1 and "PROBLEM    the split " in done.stdout, done.stderr


def test_prepared_sets_are_listed_and_dropped(tmp_path):
    where = folder_of(tmp_path, [(f"p{i}.png", picture) for i, picture in enumerate(pictures(40))])
    assert run(tmp_path, *where).returncode == 0
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700

    def cache(*args):
        done = subprocess.run(
            [sys.executable, "-m", "data", *args],
            cwd=ROOT,
            env={**os.environ, "FACSIMILE_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    code, listed, _ = cache("--cache=list")
    (name,) = [line.split()[-1] for line in listed.splitlines()[1:]]
    assert code == 0 and name.startswith("images-") and "holds 1 prepared" in listed
    assert cache("--cache=absent")[0] == 1 and "holds no prepared data set 'absent'" in cache("--cache=absent")[2]
    assert cache(f"--cache={name}")[:2] == (0, f"deleted {name}\n") and not (tmp_path / "cache" / name).exists()
    assert cache("--cache=all")[1] == "nothing to delete\n"
    code, _, told = cache()
    assert code == 2 and told.count("\n") == 1 and "use --config=FILE, or --cache=list" in told


@pytest.mark.parametrize(
    ("args", "told", "code"),
    [
        (["--config.data.path=/nowhere"], "/nowhere: there is no such file or folder; correct data.path", 1),
        (["--config.data.sise=(8,8)"], "size", 2),
        (["extra"], "unexpected argument 'extra'", 1),
        (["--out=/nowhere/x.png"], "--out must be a .png in a folder that exists", 1),
    ],
)
def test_a_mistake_is_one_line(tmp_path, args, told, code):
    done = run(tmp_path, *args)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert told in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_config_is_one_line(tmp_path):
    done = run(tmp_path, config="configs/xrai.py")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_no_model_and_no_compilation():
    code = "import sys; from data import __main__; from data import builder; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_planes_of_a_volume_stand_upright():
    """Axial: anterior above; coronal and sagittal: superior above; widths in the proportions of the spacing."""
    volume = np.full((4, 8, 16, 1), -1.0)
    volume[-1] = 1  # the most superior section
    whole = np.asarray(look.tile(volume, (4.0, 2.0, 1.0)))
    axial, coronal, sagittal = look.TILE, look.TILE, look.TILE  # each of these is as tall as wide
    assert whole.shape == (axial + coronal + sagittal + 2 * look.GAP, look.TILE, 3)
    for top in (axial + look.GAP, axial + coronal + 2 * look.GAP):
        assert (
            whole[top : top + look.TILE // 4].min() == 255 and whole[top + look.TILE // 4 : top + look.TILE].max() == 0
        )


@pytest.mark.slow
def test_real_folders(tmp_path, real_data):
    """The counts that the folder's own README gives."""
    nih = run(tmp_path, f"--config.data.path={real_data / 'nih_cxr64'}")
    assert nih.returncode == 0 and column(nih.stdout, "together")[:2] == ["1000", "264"], nih.stderr
    volumes = ["--config.data.size=(32,48,32)", "--config.data.intensity=percentile:0.5:99.5"]
    mr = run(tmp_path, f"--config.data.path={real_data / 'msd_hippocampus'}", *volumes)
    assert mr.returncode == 0 and column(mr.stdout, "together")[:2] == ["131", "131"], mr.stderr
    assert "spacing 1 x 1 x 1 mm" in mr.stdout
    window = "--config.data.intensity=window:-1000:400"
    ct = run(tmp_path, f"--config.data.path={real_data / 'tcga_luad_ct'}", window)
    assert ct.returncode == 0 and column(ct.stdout, "together")[:2] == ["30", "10"], ct.stderr
    assert "512x512 (30)" in ct.stdout and column(ct.stdout, "together")[2] == "4"
    assert "-1 to 1 are -1000 to 400" in ct.stdout
