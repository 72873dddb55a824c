"""The entrypoint as a user runs it: whole, killed and continued, in two processes, and with mistakes."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import nibabel
import numpy as np
import PIL.Image
import pytest

from tests.conftest import ROOT

TINY = "--config=configs/brain.py:tiny"


def command(workdir, *args, config=TINY):
    return [sys.executable, "main.py", config, f"--workdir={workdir}", *args]


def environment(cache, **extra):
    return {**os.environ, "FACSIMILE_CACHE": str(cache), "JAX_PLATFORMS": "cpu", "FACSIMILE_QUIET": "1", **extra}


def run(workdir, *args, cache, config=TINY, **extra):
    return subprocess.run(
        command(workdir, *args, config=config),
        cwd=ROOT,
        env=environment(cache, **extra),
        capture_output=True,
        text=True,
    )


def products(workdir):
    """What a run ends in: every sample and the audit."""
    samples = {p.name: p.read_bytes() for p in sorted((workdir / "samples").glob("*.png"))}
    return (
        samples,
        json.loads((workdir / "audit" / "audit.json").read_text()),
        (workdir / "audit" / "verdicts.csv").read_text(),
    )


@pytest.fixture(scope="session")
def whole(tmp_path_factory, cache):
    """A copy of one finished run: of two workers, the second waits for the first one's."""
    with open(cache.parent / "whole.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made := cache.parent / "whole").exists():
            done = run(cache.parent / "whole.aside", "--mode=train,sample,audit", cache=cache)
            assert done.returncode == 0, done.stderr
            assert "Warning" not in done.stderr, done.stderr
            (cache.parent / "whole.aside").rename(made)
    return shutil.copytree(made, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.slow
def test_the_whole_path(whole):
    samples, audit, verdicts = products(whole)
    assert len(samples) == 12 and PIL.Image.open(whole / "samples" / "000003.png").size == (32, 32)
    assert (audit["n_train"], audit["n_val"], audit["n_syn"], audit["n_train_patients"]) == (16, 24, 12, 16)
    rates = [
        *audit["calibrated"]["copy_rate_ci"],
        audit["calibrated"]["copy_rate"],
        *audit["negative_control"]["flag_rate_ci"],
    ]
    rates += [audit["paper"]["null_mem_rate"], audit["paper"]["null_copy_rate"], audit["negative_control"]["flag_rate"]]
    assert all(0 <= rate <= 1 for rate in rates)
    assert audit["calibrated"]["n_copies"] == sum(line.endswith(",1") for line in verdicts.splitlines()[1:])
    assert verdicts.splitlines()[0] == "image,nearest,nearest_patient,similarity,p_value,flagged"
    assert {"jpeg", "autoencoder", "re-noise"} <= {planted["kind"] for planted in audit["positive_control"]}
    assert audit["spaces"].keys() == {
        "detector",
        "detector alone",
        "untrained",
        "pixels",
        "shifted pixels",
        "SSIM",
        "latents",
    }
    for name in ("pairs.png", "histogram.png"):
        assert np.asarray(PIL.Image.open(whole / "audit" / name)).std() > 1
    judged = json.loads((whole / "quality.json").read_text())
    assert (
        judged["sets"]["synthetic"]["n"] == 12
        and 0 <= judged["spaces"]["detector"]["synthetic"]["recall"]["value"] <= 1
    )
    described = json.loads((whole / "config.json").read_text()), json.loads((whole / "environment.json").read_text())
    assert described[0]["unet"]["width"] == 16 and described[1]["versions"]["jax"]


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(whole, cache, tmp_path):
    """SIGKILL at random, several times, then the same command to its end."""
    rng = np.random.default_rng(int.from_bytes(os.urandom(4)))
    for _ in range(4):
        process = subprocess.Popen(
            command(tmp_path, "--mode=train,sample,audit"), cwd=ROOT, env=environment(cache), stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(4, 20))
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run(tmp_path, "--mode=train,sample,audit", cache=cache)
    assert done.returncode == 0, done.stderr
    assert products(tmp_path) == products(whole)


@pytest.mark.slow
def test_two_processes_train_and_agree_with_one(whole, cache, tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    settings = dict(JAX_COORDINATOR_ADDRESS=f"localhost:{port}", FACSIMILE_PROCESSES="2", JAX_NUM_CPU_DEVICES="2")
    both = [
        subprocess.Popen(
            command(tmp_path, "--mode=train,sample,audit", "--config.mesh.fsdp=2"),
            cwd=ROOT,
            env=environment(cache, FACSIMILE_PROCESS=str(i), **settings),
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    errors = [process.communicate(timeout=500)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    one, two = products(whole), products(tmp_path)
    assert one[0].keys() == two[0].keys()
    picture = lambda run, name: np.asarray(PIL.Image.open(run / "samples" / name), float)
    worst = max(np.abs(picture(whole, name) - picture(tmp_path, name)).max() for name in one[0])
    assert worst <= 2, "grey levels of 255"
    assert two[1]["paper"]["threshold"] == pytest.approx(one[1]["paper"]["threshold"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 32), (8, 16, 12)])
def test_any_folder_of_images_is_audited(cache, tmp_path, size):
    """Training images under other names are all copies, with no generator of ours in the workdir: PNG and NIfTI."""
    import data
    from configs import brain

    config = brain.get_config("tiny").data.to_dict()
    sets = data.load(**{**config, "cache": str(cache), "size": size})
    folder = tmp_path / "made elsewhere"
    folder.mkdir()
    grey = [np.round((image[..., 0] + 1) * 127.5).astype(np.uint8) for image in sets["train"].images]
    for i, image in enumerate(grey):
        if image.ndim == 2:
            PIL.Image.fromarray(image).save(folder / f"x{i}.png")
        else:  # (D, H, W), upside down on the display: to (x, y, z) in RAS+
            nibabel.save(nibabel.Nifti1Image(image.T[:, ::-1], np.diag([1, 1, 1, 1])), folder / f"x{i}.nii.gz")
    made = sorted(folder.iterdir())
    vectors = {f"synthetic/{path.name}": grey[int(path.name[1:].split(".")[0])].ravel() for path in made}
    for name in ("train", "val"):
        vectors |= {f"{name}/{i}": x.ravel() for i, x in zip(sets[name].ids, sets[name].images, strict=True)}
    np.savez(tmp_path / "vectors.npz", ids=list(vectors), features=np.stack(list(vectors.values())))
    flags = [f"--config.audit.synthetic={folder}", "--config.audit.fdr=0.2", f"--config.data.size={size}"]
    flags += [f"--config.audit.embeddings={tmp_path / 'vectors.npz'}"]
    done = run(tmp_path / "run", "--mode=audit", *flags, cache=cache)
    assert done.returncode == 0, done.stderr
    audit = json.loads((tmp_path / "run" / "audit" / "audit.json").read_text())
    assert audit["calibrated"]["copy_rate"] == 1 and audit["calibrated"]["n_mem"] == 16
    assert audit["paper"]["n_copies"] == audit["paper"]["n_mem"] == 16
    assert audit["spaces"]["audit.embeddings"]["agreement"] == 1


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--mode=trane"], "use one or more of train, sample, audit"),
        (["--mode=train", "--config.unet.widht=64"], "width"),
        (["--mode=train", "--config.unet.width=wide"], "config.unet.width"),
        (
            ["--mode=train", "--config.data.path=/nowhere"],
            "/nowhere: there is no such file or folder; correct data.path",
        ),
        (["--mode=train", "--config.autoencoder.patch=3"], "must be a multiple of"),
        (["--mode=train", "--config.diffusion.predict=mu"], "config.diffusion.predict='mu'"),
        (["--mode=sample"], "run --mode=train with this --workdir first"),
        (["--mode=audit", "--config.audit.synthetic=tests/benchmarks/__pycache__"], "correct audit.synthetic"),
        (["--mode=audit"], "or run --mode=sample first"),
        (["--mode=train", "extra"], "unexpected argument 'extra'"),
    ],
)
@pytest.mark.slow
def test_a_mistake_is_one_line(tmp_path, cache, args, told):
    done = run(tmp_path / "run", *args, cache=cache)
    assert done.returncode in (1, 2)
    assert told in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.strip()]) == 1, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("config", ["--config=configs/brian.py", "--config=configs/brain.py:huge"])
def test_a_wrong_config_is_one_line(tmp_path, cache, config):
    done = run(tmp_path / "run", "--mode=train", cache=cache, config=config)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_other_settings_are_refused(whole, cache):
    done = run(whole, "--mode=train", "--config.unet.width=32", cache=cache)
    assert done.returncode == 1
    assert "made with config.unet.width=16, not 32" in done.stderr


@pytest.mark.slow
def test_training_less_than_was_trained_is_refused(whole, cache):
    done = run(whole, "--mode=train", "--config.train.diffusion.steps=4", cache=cache)
    assert done.returncode == 1
    assert "made with config.train.diffusion.steps=8, not 4" in done.stderr


@pytest.mark.slow
def test_samples_of_more_steps_than_were_trained_are_refused(whole, cache):
    done = run(whole, "--mode=sample", "--config.train.diffusion.steps=16", cache=cache)
    assert done.returncode == 1
    assert "holds weights of step 8, not of config.train.diffusion.steps=16: run --mode=train" in done.stderr


@pytest.mark.parametrize("decay", [1.0, 0.1])
def test_steps_may_grow_where_the_rate_does_not_decay(tmp_path, monkeypatch, decay):
    """A rate that has decayed would jump, and the stage would pass for one of so many steps from the start."""
    import main
    from configs import brain

    config = brain.get_config("tiny")
    config.train.diffusion.optimiser.decay_to = decay
    images = types.SimpleNamespace(images=[], patients=[], spacing=None, window=None, top=None, affine=None)
    monkeypatch.setattr(main.data, "load", lambda **_: {"train": images, "select": images})
    monkeypatch.setattr(main.data, "content", lambda *_: "content")
    trained = []
    monkeypatch.setattr(main.ldm, "train", lambda generator, name, *_, steps, **__: trained.append((name, steps)))
    monkeypatch.setattr(main, "train_detector", lambda *_, **__: None)
    main.train(config, tmp_path)
    config.train.diffusion.steps = 16
    if decay == 1.0:
        main.train(config, tmp_path)
        assert trained[1::2] == [("diffusion", 8), ("diffusion", 16)]
    else:
        with pytest.raises(
            ValueError, match=r"made with config\.train\.diffusion\.steps=8, not 16: use another --workdir"
        ):
            main.train(config, tmp_path)


@pytest.mark.slow
def test_an_audit_without_a_negative_control_is_refused_at_once(whole, cache, tmp_path):
    folder = whole / "samples"
    flags = [f"--config.data.path={folder}", "--config.data.patients=per_image", f"--config.audit.synthetic={folder}"]
    flags += ["--config.data.fractions.train=0.6", "--config.data.fractions.val=0.3"]
    flags += ["--config.data.fractions.select=0.1", "--config.data.fractions.control=0.0"]
    done = run(tmp_path / "run", "--mode=audit", *flags, cache=cache)
    assert done.returncode == 1 and "data.fractions.control=0: give it a share" in done.stderr
    assert not (tmp_path / "run" / "detector").exists(), "nothing was trained for it"


@pytest.mark.slow
def test_a_release_that_does_not_pass_writes_no_folder_and_costs_are_told(whole, cache, tmp_path):
    """By the command: 24 unseen patients say too little; with release_anyway the folder says so itself."""
    flags = [
        f"--config.audit.release={tmp_path / 'out'}",
        "--config.audit.exit_code=True",
        "--config.audit.redact=True",
    ]
    done = run(whole, "--mode=audit", *flags, cache=cache)
    said = json.loads((whole / "audit" / "audit.json").read_text())["release"]
    assert done.returncode == {"FAIL": 3, "INCONCLUSIVE": 4}[said["verdict"]], done.stderr
    assert not said["released"] and not (tmp_path / "out").exists()
    assert said["quality"]["before"]["detector"]["precision"]["value"] >= 0
    assert (said["quality"]["after"] is None) == (said["quality"]["reason"] is not None)
    assert (whole / "audit" / "audit.redacted.json").exists()
    anyway = run(whole, "--mode=audit", *flags, "--config.audit.release_anyway=True", cache=cache)
    assert anyway.returncode == done.returncode, anyway.stderr
    written = json.loads((tmp_path / "out" / "RELEASE.json").read_text())
    assert written["verdict"] == said["verdict"] and written["reasons"]


@pytest.mark.slow
def test_images_without_patients_carry_the_warning(whole, cache, tmp_path):
    source = whole / "samples"
    done = run(
        tmp_path / "run",
        "--mode=audit",
        f"--config.data.path={source}",
        "--config.data.patients=per_image",
        "--config.data.fractions.train=0.25",
        "--config.data.fractions.select=0.25",
        "--config.data.fractions.val=0.25",
        "--config.data.fractions.control=0.25",
        f"--config.audit.synthetic={source}",
        cache=cache,
    )
    assert done.returncode == 0, done.stderr
    audit = json.loads((tmp_path / "run" / "audit" / "audit.json").read_text())
    assert "every image counts as a patient" in audit["caveats"][0]
    assert not audit["stated"] and any("nobody stated" in reason for reason in audit["reasons"])
