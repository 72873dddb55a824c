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


def start(folder, processes, seconds=0.04):
    """So many processes, four devices in all."""
    port = free_port()
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "FACSIMILE_QUIET": "1",
        "JAX_NUM_CPU_DEVICES": str(DEVICES // processes),
    }
    if processes > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "FACSIMILE_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.worker", str(folder), str(STEPS), str(seconds)],
            cwd=ROOT, env={**env, "FACSIMILE_PROCESS": str(i)} if processes > 1 else env,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip


def finish(processes):
    errors = [p.communicate(timeout=120)[1] for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), errors


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
    assert one.keys() == other.keys() and len(one) == 2 * STEPS + STEPS // 10
    for place, value in one.items():
        assert other[place] == pytest.approx(value, rel=2e-4, abs=1e-6), place


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


def test_a_maintenance_event_counts_as_sigterm():
    asked = []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            body = b"NONE" if len(asked) < 3 else b"TERMINATE_ON_HOST_MAINTENANCE"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with preempt.noting() as told:
        threading.Thread(target=preempt._watch, args=(f"http://localhost:{server.server_port}",), daemon=True).start()
        deadline = time.time() + 10
        while not told() and time.time() < deadline:
            time.sleep(0.01)
        assert told()
    server.shutdown()
    path = "/computeMetadata/v1/instance/maintenance-event"
    assert asked == [(path, "Google")] + [(path + "?wait_for_change=true", "Google")] * 2
