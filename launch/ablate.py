"""Runs a study: one command, which goes on where it was stopped.

    python -m launch.ablate --study=size --config=configs/brain.py --workdir=runs/size
    python -m launch.ablate --study=size --config=configs/brain.py --workdir=runs/size --config.plan.devices=8 --dry_run

Every run is main.py in `WORKDIR/runs/NAME`, with its output in `log.txt`; stages that runs have in common are trained once,
in `WORKDIR/shared`. Runs that are done are skipped, one that fails is tried again and then named. The result is
`study.csv`, `study.html` and pictures in WORKDIR. Trailing --config.KEY=VALUE override the config of all runs. --dry_run
prints every command and what it costs: not what it would in all, since audits are left out of account. On a terminal, a table
of levels and seeds shows what each run is doing and what it found.
"""

import argparse
import collections
import contextlib
import fcntl
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from launch import findings, live, machine, preempt, stage, studies
from launch.log import ROOT

TOLD_TO_STOP = 75  # exit code of one chain: an array job is to be queued again
PRODUCTS = ("audit/audit.json", "quality.json")  # of a run that is done, the last one last


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and the overrides that all runs get."""
    flags = argparse.ArgumentParser(prog="python -m launch.ablate", allow_abbrev=False)
    flags.add_argument("--study", required=True, help=", ".join(studies.STUDIES))
    flags.add_argument("--config", required=True, help="of main.py")
    flags.add_argument("--workdir", required=True, type=Path)
    flags.add_argument("--seeds", type=int, default=3, help="repetitions; more can be added later")
    flags.add_argument("--tries", type=int, default=2, help="how often a run that fails is started")
    main_py = shlex.join([sys.executable, str(ROOT / "main.py")])
    flags.add_argument("--main", default=main_py, help="what runs main.py: a script that starts it elsewhere, say")
    flags.add_argument("--devices", default="", help="GPUs, as 0,1,2: one run on each at a time; none: runs in order")
    flags.add_argument("--only", type=int, help="run only this chain of runs, as an array job does; writes no result")
    flags.add_argument("--count", action="store_true", help="print the number of chains and end")
    flags.add_argument("--collect", action="store_true", help="only write the result of what is done")
    flags.add_argument("--dry_run", action="store_true", help="print every command and end")
    known, extra = flags.parse_known_args(argv)
    strange = [arg for arg in extra if not arg.startswith("--config.") or "=" not in arg]
    if strange:
        raise ValueError(f"unexpected argument {strange[0]!r}: overrides are --config.KEY=VALUE")
    if known.seeds < 1 or known.tries < 1:
        raise ValueError("--seeds and --tries must be at least 1")
    return known, extra


def main(argv: Sequence[str]) -> int:
    """The exit code is 0 if all runs are done, 1 if some failed, `preempt.stopped_code()` if the study was told to stop; see
    also TOLD_TO_STOP."""
    jax.config.update("jax_platforms", "cpu")  # here: the accelerators are for the runs
    flags, extra = parse(argv)
    study, workdir = studies.named(flags.study), flags.workdir.absolute()
    chains = studies.chains(study, flags.seeds)
    if flags.count:
        print(len(chains))
        return 0
    if flags.only is not None and not 0 <= flags.only < len(chains):
        raise ValueError(f"--only={flags.only}: this study has chains 0 to {len(chains) - 1}")
    asked = chains if flags.only is None else [chains[flags.only]]
    work = Work(workdir, shlex.split(flags.main), flags.config, extra, flags.tries)
    if flags.dry_run:
        work.plan(asked)
        return 0
    levels = {level.name: level.overrides for level in study.levels}
    asked_for = {"study": flags.study, "config": flags.config, "overrides": extra, "levels": levels}
    stage.claim(workdir, stage.flatten(asked_for))
    if not flags.collect:
        runs = [run for chain in asked for run in chain]
        with live.shown(lambda: live.table(study, runs, workdir, PRODUCTS, set(work.live), work.clock())) as work.tell:
            work.everything(asked, flags.devices.split(",") if flags.devices else [None])
    if work.stopping.is_set():
        print("study: told to stop; the same command goes on from here", file=sys.stderr)
        return preempt.stopped_code() if flags.only is None else TOLD_TO_STOP
    if flags.only is None:
        print(findings.write(flags.study, study, [run for chain in chains for run in chain], workdir))
    failed = [run.name for chain in asked for run in chain if not work.done(run)]
    for name in failed:
        print(f"not done: {name}: {last_line(workdir / 'runs' / name / 'log.txt')}", file=sys.stderr)
    return int(bool(failed))


class Work:
    """How runs are run, and which are being run."""

    def __init__(self, workdir: Path, main: list[str], config: str, extra: list[str], tries: int):
        self.workdir, self.main, self.config, self.extra, self.tries = workdir, main, config, extra, tries
        self.stopping = threading.Event()
        self.live: dict[str, subprocess.Popen] = {}  # by the name of the run
        self.tell: Callable[[str], None] = print
        self._started = time.monotonic()
        self._said = threading.Lock()

    def folder(self, run: studies.Run) -> Path:
        return self.workdir / "runs" / run.name

    def command(self, run: studies.Run) -> list[str]:
        return [*self.main, *studies.arguments(run, self.config, self.folder(run), self.workdir / "shared", self.extra)]

    def handover(self, run: studies.Run) -> tuple[Path, Path]:
        """The diffusion folder that a run goes on with, and its own."""
        return self.workdir / "runs" / run.after / "diffusion", self.folder(run) / "diffusion"

    def plan(self, chains: list[list[studies.Run]]) -> None:
        """Prints the commands of all runs, each with its cost, and the cost of all."""
        runs = [run for chain in chains for run in chain]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # a level costs the same with every seed
            levels = {run.level.name: run for run in runs}
            stages = dict(zip(levels, pool.map(self.cost, levels.values()), strict=True))
        total = collections.Counter[str]()
        seen: set[tuple[int, str, str]] = set()
        for run in runs:
            if run.after:
                print(shlex.join(["cp", "-RL", *map(str, self.handover(run))]))
            print(shlex.join(self.command(run)))
            mine = collections.Counter[str]()
            for name, found in stages[run.level.name].items():
                if (run.seed, name, found["key"]) in seen:
                    continue  # trained by another run
                seen.add((run.seed, name, found["key"]))
                before = (
                    stages[run.level.after][name]["steps"] if run.level.after and name in ("diffusion", "looks") else 0
                )
                share = 1 - before / found["steps"]
                mine.update({"FLOP": share * found["steps"] * found["flops"]})
                mine.update({kind: share * seconds for kind, seconds in found["seconds"].items()})
            total.update(mine)
            print(f"#   {told(mine)}; {max(found['memory'] for found in stages[run.level.name].values()) / 1e9:.3g} GB")
        print(f"# all {len(runs)} runs, without their audits: {told(total)}")

    def cost(self, run: studies.Run) -> dict[str, dict]:
        """What main.py's own dry run says of each stage; asked on this machine, wherever runs are."""
        here = [sys.executable, str(ROOT / "main.py")]
        arguments = studies.arguments(run, self.config, self.folder(run), self.workdir / "shared", self.extra)
        command = [*here, *arguments, "--config.dry_run=True"]
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}  # nothing is computed
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{run.name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        return json.loads(done.stdout.splitlines()[-1])

    def done(self, run: studies.Run) -> bool:
        return all((self.folder(run) / name).exists() for name in PRODUCTS)

    def everything(self, chains: list[list[studies.Run]], devices: list[str | None]) -> None:
        """All runs, a chain on each device at a time; ends early, children stopped, on SIGINT or what else says so."""
        heeded = [s for s in (*preempt.SIGNALS, signal.SIGINT) if signal.getsignal(s) is not signal.SIG_IGN]
        before = {s: signal.signal(s, self._stop) for s in heeded}
        free: queue.Queue[str | None] = queue.Queue()
        for device in devices:
            free.put(device)

        def follow(chain: list[studies.Run]) -> None:
            device = free.get()
            try:
                for run in chain:
                    if self.stopping.is_set() or not self.one(run, device):
                        break
            finally:
                free.put(device)

        try:
            with ThreadPoolExecutor(len(devices)) as pool:
                waiting = [pool.submit(follow, chain) for chain in chains]
                for future in waiting:
                    future.result()
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def one(self, run: studies.Run, device: str | None) -> bool:
        """Runs it to its end unless it is done; whether it is done then."""
        folder = self.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            self._wait_for(lock, run)
            for attempt in range(1, self.tries + 1):
                if self.done(run) or self.stopping.is_set():
                    break
                start = time.monotonic()
                code = self._start(run, device, lock)
                minutes = (time.monotonic() - start) / 60
                if self.stopping.is_set():
                    break
                if self.done(run):
                    self.say(f"{run.name}: done, {minutes:.1f} minutes")
                else:
                    self.say(
                        f"{run.name}: exit code {code}, not done (try {attempt} of {self.tries}): {folder}/log.txt"
                    )
        return self.done(run)

    def _wait_for(self, lock, run: studies.Run) -> None:
        """A run inherits its lock: if a study is killed, its orphan keeps it, and the next study waits for that."""
        told = False
        while not self.stopping.is_set():
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    self.say(f"{run.name}: being run by another process; waiting for it")
                told = True
                time.sleep(0.2)

    def _start(self, run: studies.Run, device: str | None, lock) -> int:
        if run.after and not self.handover(run)[1].exists():
            source, target = self.handover(run)
            aside = target.with_name(".diffusion")
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(source, aside)
            os.replace(aside, target)
        self.say(f"{run.name}: started")
        with (self.folder(run) / "log.txt").open("a") as log:
            process = subprocess.Popen(
                self.command(run),
                cwd=ROOT,
                env=os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {}),
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # Ctrl-C reaches it through `_stop`, as SIGTERM: it saves and ends
            )
        self.live[run.name] = process
        if self.stopping.is_set():  # told between the look and the start
            terminate(process)
        try:
            return process.wait()
        finally:
            del self.live[run.name]

    def _stop(self, *_) -> None:
        self.stopping.set()
        for process in list(self.live.values()):
            terminate(process)

    def say(self, text: str) -> None:
        with self._said:
            self.tell(f"[{self.clock()}] {text}")

    def clock(self) -> str:
        every = list(self.workdir.glob("runs/*"))  # none yet when the table is first drawn
        done = sum(all((folder / name).exists() for name in PRODUCTS) for folder in every)
        return f"{(time.monotonic() - self._started) / 60:6.1f} min, {done} done"


def terminate(process: subprocess.Popen) -> None:
    """SIGTERM to a run and all that it started: --main may be a script, whose own death its main.py would not notice."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)


def told(cost: Mapping[str, float]) -> str:
    hours = (f"{kind} {seconds / 3600:.3g} h" for kind, seconds in cost.items() if kind != "FLOP")
    return ", ".join([f"{cost['FLOP'] / 1e12:.4g} TFLOP", *hours])


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else "never started"


if __name__ == "__main__":
    codes: list[int] = []
    sys.exit(machine.one_line_errors(lambda: codes.append(main(sys.argv[1:]))) or codes[0])
