"""Preparation: many images, in parallel, killed and resumed, and on Apache Beam."""

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data import builder, files, prepare

ROOT = Path(__file__).resolve().parent.parent


def square(i):
    if i == 13:
        raise ValueError("thirteen is refused")
    return [files.Image(np.full((2, 2, 1), min(i / 50 - 1, 1), np.float32), eight_bit=False, resized=i % 2 == 0)]


def sleepy(i):
    time.sleep(0.02)
    return square(i)


def fatal(i):
    os._exit(7) if "prepare.serve" in Path("/proc/self/cmdline").read_text() else None
    return sleepy(i)


def made(make, tmp_path, n=100, **how):
    given = dict(shape=(2, 2, 1), inputs=(), code=[files], cache=tmp_path, on_error="skip")
    return prepare.prepare("x", [(str(i), i) for i in range(n)], functools.partial(second, make), **(given | how))


def second(make, task):
    return make(task[1])


@pytest.fixture
def eager(monkeypatch):
    """Worker processes as soon as may be."""
    monkeypatch.setattr(prepare, "HELPED_SECONDS", 0.0)
    monkeypatch.setattr(prepare, "SHARED_SECONDS", 0.0)


def test_workers_give_what_one_process_gives(tmp_path, eager):
    one, two = made(square, tmp_path / "1", workers=1), made(sleepy, tmp_path / "2", workers=2)
    counts = [int(i != 13) for i in range(100)]
    assert one[1:] == two[1:] and len(set(one.digests)) == 99
    assert one._replace(digests=[])[1:] == ([""] * 99, [], counts, ["thirteen is refused"], 50, 0, None, 99, None, None)
    for i, number in enumerate(np.flatnonzero(counts)):
        values = [builder.Stored(p.folder, np.arange(99))[i] for p in (one, two)]
        np.testing.assert_array_equal(*values)
        assert abs(values[0] - (number / 50 - 1)).max() < 2e-5


def signed(folder, i):
    with open(folder / str(i), "a") as file:
        file.write(f"{os.getpid()} ")
    return sleepy(i)


def test_short_work_is_done_by_one_worker_and_by_this_process(tmp_path, eager, monkeypatch):
    monkeypatch.setattr(prepare, "SHARED_SECONDS", 60.0)
    signatures = tmp_path / "signatures"
    signatures.mkdir()
    done = made(functools.partial(signed, signatures), tmp_path / "2", workers=8, n=400)
    assert done[1:] == made(square, tmp_path / "1", workers=1, n=400)[1:]
    by = [path.read_text().split() for path in signatures.iterdir()]
    assert len(by) == 400 and all(len(who) == 1 for who in by)
    assert len({who for (who,) in by}) == 2 and [str(os.getpid())] in by


@pytest.mark.parametrize(("n", "helped"), [(prepare.HELPED_TASKS - 1, False), (prepare.HELPED_TASKS, True)])
def test_many_tasks_are_helped_from_the_start(tmp_path, monkeypatch, n, helped):
    """Before anything is known of how long they take; fewer of them are done before a helper could start."""
    monkeypatch.setattr(prepare, "HELPED_SECONDS", float("inf"))  # a machine that stalls calls for none
    started, start = [], prepare.sandbox.start
    monkeypatch.setattr(prepare.sandbox, "start", lambda code: started.append(code) or start(code))
    done = made(square, tmp_path / "2", workers=4, n=n)
    assert done[1:] == made(square, tmp_path / "1", workers=1, n=n)[1:] and len(started) == helped


def test_a_worker_that_starts_late_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "HELPED_SECONDS", float("inf"))
    never = "import time; time.sleep(600)"
    start = prepare.sandbox.start
    monkeypatch.setattr(prepare.sandbox, "start", lambda code: start(never))
    assert len(made(square, tmp_path, workers=2, n=prepare.HELPED_TASKS).parts) == prepare.HELPED_TASKS - 1


def test_a_worker_that_cannot_start_is_one_line(tmp_path, eager, monkeypatch):
    start = prepare.sandbox.start
    monkeypatch.setattr(prepare.sandbox, "start", lambda code: start("raise SystemExit(5)"))
    with pytest.raises(ValueError, match=r"a worker process died at its start \(exit 5\)"):
        made(sleepy, tmp_path, workers=2)


def test_a_worker_that_dies_is_one_line_that_names_the_image(tmp_path, eager):
    with pytest.raises(ValueError, match=r"\d+: the worker process that read it died \(exit 7\); remove it"):
        made(fatal, tmp_path, workers=2)
    assert not any(name.endswith("-skip") for name in os.listdir(tmp_path))


@pytest.mark.parametrize("workers", [1, 2])
def test_what_cannot_be_written_is_one_line(tmp_path, eager, workers):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    try:
        with pytest.raises(ValueError, match=r"array_record.*write\(\) failed: [^;]*; make room, or set data.cache"):
            made(sleepy, tmp_path, workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert len(made(square, tmp_path).parts) == 99


def test_many_shards_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_BYTES", 7 * 8)  # seven images of 2x2 at 16 bits
    done = made(square, tmp_path)
    assert len([name for name in os.listdir(done.folder) if "array_record" in name]) == 15
    values = [image[0, 0, 0] for image in builder.Stored(done.folder, np.arange(99))]
    np.testing.assert_allclose(values, [i / 50 - 1 for i in range(100) if i != 13], atol=2e-5)
    assert json.loads(Path(done.folder, "dataset_info.json").read_text())["fileFormat"] == "array_record"


def several(i):
    """0 to 3 images; the third image of 7 fails."""
    for k in range(i % 4):
        if i == 7 and k == 2:
            raise ValueError("seven breaks off")
        array = np.full((2, 2, 1), i / 50 - 1, np.float32)
        yield files.Image(array, eight_bit=i < 40, resized=False, spacing=(1.0, 1.0 + (i > 25)), part=f"#{k}")


def test_tasks_of_several_images(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_BYTES", 80)
    narrow, wide = (made(several, tmp_path, n=n, eight_bit=True) for n in (40, 60))
    for done, n, dtype in ((narrow, 40, "uint8"), (wide, 60, "uint16")):
        assert done.counts == [min(i % 4, 2) if i == 7 else i % 4 for i in range(n)]
        assert done.parts == [f"#{k}" for i in range(n) for k in range(done.counts[i])]
        assert done.skipped == ["seven breaks off"] and done.spacing == (1.0, 1.0 + (n == 60))
        stored = builder.Stored(done.folder, np.arange(len(done.parts)))
        assert stored._source[0]["image"].dtype == dtype and stored._source[3]["id"] == b"3#0"
        wanted = np.repeat(np.arange(n), done.counts) / 50 - 1
        np.testing.assert_allclose([image[0, 0, 0] for image in stored], wanted, atol=4e-3)


# ---- resuming


def counted(folder, make=sleepy):
    """As `make`; each call leaves a line in the file `count`."""

    def call(i):
        with open(os.path.join(folder, "count"), "a") as file:
            file.write(f"{i}\n")
        return make(i)

    return call


def calls(folder):
    path = Path(folder) / "count"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def failing(i):
    if i == 70:
        raise ValueError("seventy is refused")
    return square(i + 100)


def interrupted(i):
    if i == 90:
        raise KeyboardInterrupt
    return failing(i)


def test_a_preparation_that_failed_goes_on_where_it_was(tmp_path):
    cache, make = tmp_path / "cache", counted(tmp_path, failing)
    with pytest.raises(ValueError, match=r"^seventy is refused$"):
        made(make, cache, on_error="raise")
    assert calls(tmp_path) == list(range(71))
    made(make, cache)  # skips it
    first = calls(tmp_path)[71:]
    assert first == list(range(64, 100))  # shards of eight
    with pytest.raises(ValueError, match=r"^seventy is refused$"):
        made(make, cache, on_error="raise")
    assert len(made(counted(tmp_path, lambda i: square(i + 100)), cache, on_error="raise").parts) == 100


def test_a_skipped_failure_is_an_error_when_asked_and_is_tried_again(tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        made(counted(tmp_path, interrupted), cache)
    assert calls(tmp_path) == list(range(91))
    with pytest.raises(ValueError, match=r"^seventy is refused$"):
        made(counted(tmp_path, failing), cache, on_error="raise")
    assert calls(tmp_path)[91:] == list(range(64, 71))  # the shard that had left it out, and no other


def test_a_kill_at_the_very_end_leaves_what_can_be_used(tmp_path, monkeypatch):
    """Killed before the finished folder is in place, or after; and shards that lost their reports are made again."""
    rename, cache = os.rename, tmp_path / "cache"
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        made(counted(tmp_path, square), cache)
    monkeypatch.setattr(os, "rename", rename)
    (partial,) = cache.glob("*.partial")
    reports = sorted(partial.rglob("*.json"))
    lost = [path for path in reports if "array_record-00003" in path.name]
    assert len(lost) == 1
    lost[0].unlink()
    before = len(calls(tmp_path))
    done = made(counted(tmp_path, square), cache)
    assert before == 100 and calls(tmp_path)[100:] == list(range(24, 32))  # the shard without a report, and no other
    assert len(done.parts) == 99 and not list(cache.glob("*.partial"))
    assert not [name for name in os.listdir(done.folder) if "array_record" in name and name.endswith(".json")]
    rmtree = prepare.shutil.rmtree
    monkeypatch.setattr(os, "remove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # after the rename, with reports left behind
        made(square, tmp_path / "other", on_error="skip")
    monkeypatch.undo()
    assert rmtree is prepare.shutil.rmtree
    late = made(square, tmp_path / "other", on_error="skip")
    assert late[1:] == done[1:] and len(builder.Stored(late.folder, np.arange(99))) == 99
    np.testing.assert_array_equal(
        builder.Stored(late.folder, np.arange(99))[98], builder.Stored(done.folder, np.arange(99))[98]
    )


def test_old_remains_are_forgotten(tmp_path):
    for name, days in (("x-1.partial", 15), ("x-2.partial-host-3", 15), ("x-4.partial", 13), ("x-5-skip", 99)):
        (tmp_path / name / "uint8").mkdir(parents=True)
        os.utime(tmp_path / name, (time.time() - days * 86400,) * 2)
    done = made(square, tmp_path)
    left = {name for name in os.listdir(tmp_path) if not name.endswith(".lock")}
    assert left == {"x-4.partial", "x-5-skip", os.path.basename(done.folder)}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_kill_leaves_nothing_half_done(tmp_path, workers):
    script = "from tests import test_data_prepare as t; from data import prepare; from pathlib import Path; import sys;"
    script += f"prepare.HELPED_SECONDS = prepare.SHARED_SECONDS = 0.0; t.made(t.sleepy, Path(sys.argv[1]), workers={workers}, n=1000)"
    child = subprocess.Popen([sys.executable, "-c", script, tmp_path], cwd=ROOT)
    present = lambda: [name for name in os.listdir(tmp_path) if not name.endswith(".lock")]
    written = lambda: [p for p in tmp_path.glob("*.partial/*/*/*/*array_record*") if p.name.endswith("-of-00063")]
    deadline = time.monotonic() + 60
    while len(written()) < 5 or len(children_of(child.pid)) < ((0, 0, 2)[workers]):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    helpers = children_of(child.pid)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert present() and all(name.endswith(".partial") for name in present())
    while any(os.path.exists(f"/proc/{pid}") for pid in helpers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    kept = len(written())
    again = tmp_path / "again"
    again.mkdir()
    done = made(counted(again, square), tmp_path, workers=1, n=1000)  # the same key
    assert len(done.parts) == 999 and {*present()} == {os.path.basename(done.folder), "again"}
    assert kept >= 5 and len(calls(again)) == 1000 - 16 * kept  # shards of 16
    values = [image[0, 0, 0] for image in builder.Stored(done.folder, np.arange(999))]
    np.testing.assert_allclose(values, [min(i / 50 - 1, 1) for i in range(1000) if i != 13], atol=2e-5)


def children_of(parent):
    return [int(process.name) for process in Path("/proc").glob("[0-9]*") if ppid(process) == parent]


def ppid(process):
    try:
        return int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None  # it ended


def test_two_processes_at_once_make_it_once(tmp_path):
    script = "from tests import test_data_prepare as t; from pathlib import Path; import sys;"
    script += "t.made(t.counted(sys.argv[1]), Path(sys.argv[1]) / 'cache', n=60, workers=1)"
    children = [subprocess.Popen([sys.executable, "-c", script, tmp_path], cwd=ROOT) for _ in range(2)]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    assert calls(tmp_path) == list(range(60))


def test_progress_shows_only_for_long_work(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("FACSIMILE_QUIET", raising=False)
    made(square, tmp_path)
    assert capfd.readouterr() == ("", "")
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    slow = lambda i: (setattr(clock, "now", clock.now + 1), square(i))[1]
    made(slow, tmp_path, n=50)
    assert "reading" in capfd.readouterr().err


# ---- on Apache Beam


def test_without_beam_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam.options", None)
    with pytest.raises(ValueError, match=r"^data\.beam needs Apache Beam, which is not installed: pip install"):
        made(square, tmp_path, beam="--runner=DirectRunner")


def test_beam_gives_what_one_machine_gives(tmp_path):
    pytest.importorskip("apache_beam")
    here = made(square, tmp_path / "here", workers=1)
    there = made(square, tmp_path / "there", beam="--runner=DirectRunner --direct_num_workers=2")
    assert here[1:] == there[1:]
    for a, b in zip(*(builder.Stored(done.folder, np.arange(99)) for done in (here, there)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"^thirteen is refused$"):
        made(square, tmp_path / "strict", beam="--runner=DirectRunner", on_error="raise")
    mixed = made(several, tmp_path / "mixed", n=60, eight_bit=True, beam="--runner=DirectRunner")
    assert mixed[1:] == made(several, tmp_path / "here", n=60, eight_bit=True)[1:]
