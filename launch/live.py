"""The table that a study shows while it runs, on a terminal: its levels against its seeds, from what lies in its folder."""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import rich.console
import rich.live
import rich.table

from launch import studies


def cell(folder: Path, products: Sequence[str], running: bool) -> str:
    """What is known of one run: its copies once it is done, how far it is while it runs."""
    if all((folder / name).exists() for name in products):
        return copies(folder)
    if running:
        return doing(folder)
    return "stopped" if (folder / "log.txt").exists() else "·"


@functools.cache
def copies(folder: Path) -> str:
    """Of a run that is done, which stays as it is."""
    return f"{json.loads((folder / 'audit' / 'audit.json').read_text())['calibrated']['copy_rate']:.1%}"


def doing(folder: Path) -> str:
    """The stage that a run is in and its last step that was told, such as 'diffusion 640/1024'."""
    told = [path for path in folder.glob("*/metrics.jsonl") if path.stat().st_size]
    if not told or not (folder / "config.json").exists():
        return "starting"
    newest = max(told, key=lambda path: path.stat().st_mtime)
    stage = newest.parent.name
    lines = newest.read_text().splitlines()
    step = max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
    settings = json.loads((folder / "config.json").read_text())["train"]
    total = settings[stage.removesuffix("-again")]["steps"]  # a release trains a second detector as the first
    if step < total:
        return f"{stage} {step}/{total}"
    return "auditing" if (folder / "samples").exists() else f"after {stage}"


def table(
    study: studies.Study, runs: Sequence[studies.Run], workdir: Path, products: Sequence[str], live: set[str], head: str
) -> rich.table.Table:
    """Levels in rows, seeds in columns. live: names of the runs that run now."""
    seeds = sorted({run.seed for run in runs})
    drawn = rich.table.Table(title=head, caption="copies by the calibrated test; · waits", title_justify="left")
    for column in (study.factor, *(f"seed {seed}" for seed in seeds)):
        drawn.add_column(column, overflow="fold")
    at = {(run.level.name, run.seed): run.name for run in runs}
    for level in study.levels:
        names = [at.get((level.name, seed)) for seed in seeds]
        cells = [cell(workdir / "runs" / name, products, name in live) if name else "" for name in names]
        drawn.add_row(level.name, *cells)
    return drawn


@contextlib.contextmanager
def shown(draw: Callable[[], rich.table.Table]) -> Iterator[Callable[[str], None]]:
    """Shows what `draw` returns, four times in ten seconds, on a terminal; yields how to say a line, there or in a log."""
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: print(text, file=sys.stderr, flush=True)
        return
    with rich.live.Live(get_renderable=draw, console=console, refresh_per_second=0.4):
        yield lambda text: console.print(text, markup=False, highlight=False)
