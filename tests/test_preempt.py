"""Runs of several processes that are told to stop, or killed, and go on with another number of them."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from launch import preempt
from tests.conftest import ROOT

STEPS, DEVICES = 90, 4


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(folder, processes, seconds=0.04, told_at=0, **more):
    """So many processes, four devices in all."""
    port = free_port()
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "FACSIMILE_QUIET": "1",
        "JAX_NUM_CPU_DEVICES": str(DEVICES // processes),
        **more,
    }
    if processes > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "FACSIMILE_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.worker", str(folder), str(STEPS), str(seconds), str(told_at)],
            cwd=ROOT, env={**env, "FACSIMILE_PROCESS": str(i)} if processes > 1 else env,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip


def finish(processes, code=0):
    errors = [p.communicate(timeout=120)[1] for p in processes]
    assert [p.returncode for p in processes] == [code] * len(processes), errors


def lines(folder):
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last(folder, key="loss"):
    return max((line["step"] for line in lines(folder) if key in line), default=0)


def curve(folder):
    """(step, metric) -> value; each once."""
    values = [((line["step"], key), value) for line in lines(folder) for key, value in line.items() if key != "step"]
    assert len(dict(values)) == len(values)
    return dict(values)


def written(folder):
    path = folder / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


def wait_for(folder, step, processes, before):
    """Until these processes, and not those before them, have written a line of that step."""
    deadline = time.time() + 120
    while written(folder) == before or last(folder) < step:
        assert time.time() < deadline and all(p.poll() is None for p in processes), [
            p.communicate()[1] for p in processes if p.poll() is not None
        ]
        time.sleep(0.02)


def saved(folder):
    return max((int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()), default=0)


@pytest.mark.slow
def test_killed_or_told_to_stop_on_any_number_of_processes_the_curve_is_the_same(tmp_path):
    """One process without interruption, against 4 of which one is told to stop, 2 killed, 1 told to stop, 2 to the end."""
    rng = np.random.default_rng(int.from_bytes(os.urandom(4)))
    whole = start(tmp_path / "whole", 1, seconds=0)
    folder = tmp_path / "broken"
    for count, number in ((4, signal.SIGTERM), (2, signal.SIGKILL), (1, signal.SIGTERM)):
        step = (saved(folder) if folder.exists() else 0) + rng.integers(2, 16)
        stale = written(folder)
        processes = start(folder, count)
        wait_for(folder, step, processes, stale)
        victim = processes[rng.integers(count)]
        before = last(folder)
        victim.send_signal(number)
        if number == signal.SIGKILL:
            for p in processes:
                p.kill()  # as whoever started them does
                p.wait()
        else:
            finish(processes)
            assert saved(folder) >= before, "steps were lost"
            assert last(folder) == saved(folder), "steps went on after the checkpoint"
    assert saved(folder) < STEPS
    finish(start(folder, 2, seconds=0))
    finish(whole)
    one, other = curve(tmp_path / "whole"), curve(folder)
    assert one.keys() == other.keys() and len(one) == 2 * STEPS + 2 * (STEPS // 10)
    for place, value in one.items():
        assert other[place] == pytest.approx(value, rel=2e-4, abs=1e-6), place


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_told_while_it_is_looked_at_it_saves(tmp_path, processes):
    """Looking streams over batches, where processes that do not train end; these have steps to lose."""
    finish(start(tmp_path, processes, seconds=0, told_at=20, FACSIMILE_STOPPED_CODE="75"), code=75)
    assert 20 <= saved(tmp_path) == last(tmp_path) < 25
    assert last(tmp_path, "seen") == 20


@pytest.mark.slow
def test_told_before_the_first_step(tmp_path):
    """A signal during compilation is obeyed after the step that is compiled."""
    processes = start(tmp_path, 1)
    deadline = time.time() + 120
    while not (tmp_path / "checkpoints").exists() and time.time() < deadline:
        time.sleep(0.01)
    processes[0].send_signal(signal.SIGTERM)
    finish(processes)
    assert 1 <= saved(tmp_path) == last(tmp_path) < STEPS


@pytest.mark.parametrize(
    ("event", "quiet", "loud"),
    [("maintenance-event", b"NONE", b"TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", b"FALSE", b"TRUE")],
)
def test_an_event_counts_as_sigterm(monkeypatch, event, quiet, loud):
    """Also after an answer that broke off, and one that never came."""
    asked = []
    monkeypatch.setattr(preempt, "AGAIN", 0.01)

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if not self.path.startswith(f"/computeMetadata/v1/instance/{event}"):
                self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")  # of the other event there is nothing to tell
                return
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            if len(asked) == 2:
                return  # RemoteDisconnected
            body = quiet if len(asked) < 5 else loud
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) + 9 * (len(asked) == 3)))  # IncompleteRead
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = {number: signal.getsignal(number) for number in preempt.SIGNALS}
    with preempt.noting() as told:
        preempt.listen(f"http://localhost:{server.server_port}")
        deadline = time.time() + 10
        while not told() and time.time() < deadline:
            time.sleep(0.01)
        assert told()
        preempt._state["listening"] = False
    for number, handler in before.items():
        signal.signal(number, handler)
    server.shutdown()
    path = f"/computeMetadata/v1/instance/{event}"
    now, at_a_change = (path, "Google"), (path + "?wait_for_change=true", "Google")
    assert asked == [now, at_a_change, now, now, at_a_change], "after a pause it may have happened already"


@pytest.mark.parametrize("number", preempt.SIGNALS)
def test_signals_to_stop_are_noted_and_end_the_process_later(monkeypatch, number):
    monkeypatch.setenv("FACSIMILE_STOPPED_CODE", "75")
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)  # the suite itself may run under nohup
    with pytest.raises(SystemExit) as stop, preempt.noting() as told:
        assert not told()
        signal.raise_signal(number)
        assert told()
        preempt._state["listening"] = True  # as in a run of main.py, which is to end then
    preempt._state["listening"] = False
    preempt._told.clear()
    assert stop.value.code == 75


def test_a_signal_that_is_ignored_stays_so():
    """A run under nohup outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with preempt.noting() as told:
        signal.raise_signal(signal.SIGHUP)
        assert not told()
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


def test_a_code_that_is_none_is_told(monkeypatch):
    monkeypatch.setenv("FACSIMILE_STOPPED_CODE", "soon")
    with pytest.raises(ValueError, match="FACSIMILE_STOPPED_CODE=soon"):
        preempt.stopped_code()
