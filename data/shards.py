"""The unit of preparation: a few tasks -> one file of images and a report beside it, in whatever process."""

import collections
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from data import files


@dataclasses.dataclass
class Report:
    """What came of tasks."""

    parts: list[str] = dataclasses.field(default_factory=list)  # of each image, in order: its id less its task's
    digests: list[str] = dataclasses.field(default_factory=list)  # of each image's pixels at 16 bits
    counts: list[int] = dataclasses.field(default_factory=list)  # images of each task
    skipped: list[str] = dataclasses.field(default_factory=list)  # one line for each task that failed
    resized: int = 0  # images that had another shape
    cut: int = 0  # images whose files show more than they do
    tops: list[float | None] = dataclasses.field(default_factory=list)  # of their types: those that occur, two at most
    affines: list[list | None] = dataclasses.field(default_factory=list)  # likewise
    spacings: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # mm -> images

    def add(self, other: "Report") -> None:
        self.parts += other.parts
        self.digests += other.digests
        self.counts += other.counts
        self.skipped += other.skipped
        self.resized += other.resized
        self.cut += other.cut
        self.spacings.update(other.spacings)
        for top in other.tops:
            occurs(self.tops, top)
        for affine in other.affines:
            occurs(self.affines, affine)

    def dumps(self) -> str:
        spacings = [[list(mm), n] for mm, n in self.spacings.items()]
        return json.dumps({**dataclasses.asdict(self), "spacings": spacings})

    @classmethod
    def loads(cls, text: str) -> "Report":
        content = json.loads(text)
        return cls(**{**content, "spacings": collections.Counter({tuple(mm): n for mm, n in content["spacings"]})})


def occurs(values: list, value: Any) -> None:
    """Notes a value; two different ones are enough to know that it is not the same for all."""
    if value not in values and len(values) < 2:
        values.append(value)


@dataclasses.dataclass(frozen=True)
class Shard:
    """Examples for the builder: called, it makes its images, or repeats how many there are if they are written."""

    path: str  # file of records; there only when the shard is done
    tasks: Sequence[tuple]  # what `make` is called with; the first item is the task's id
    make: Callable[[Any], Iterable[files.Image]]
    dtype: str
    strict: bool  # the first task that fails ends it all
    too_wide: str  # a file; there once an image was met that `dtype` does not hold, so that all is in vain

    def done(self) -> bool:
        """Whether it is written and said what came of it; a file of records alone is of no use."""
        return os.path.exists(self.path) and os.path.exists(f"{self.path}.json")

    def report(self) -> Report:
        with open(f"{self.path}.json", encoding="utf-8") as file:
            return Report.loads(file.read())

    def __call__(self, tick: Callable[[str], None] = lambda name: None) -> Iterator[tuple[str, Any]]:
        """Yields (id, example), and calls `tick` with each task's id before its images are made.

        Raises:
          ValueError: a task's one line, if `strict`, or where the machine failed.
        """
        if self.done():
            yield from ((part, None) for part in self.report().parts)
            return
        report = Report()
        for task in self.tasks:
            if os.path.exists(self.too_wide):
                break
            tick(task[0])
            count = 0
            try:
                for image in self.make(task):
                    if self.dtype == "uint8" and not image.eight_bit:
                        open(self.too_wide, "w").close()
                        break
                    key = task[0] + image.part
                    sixteen = files.encode(image.array, "uint16")
                    kept = sixteen if self.dtype == "uint16" else files.encode(image.array, self.dtype)
                    yield key, {"id": key, "image": kept}
                    count += 1
                    report.parts.append(image.part)
                    # of 16 bits even where 8 are stored, so that it does not depend on the other images
                    report.digests.append(hashlib.blake2b(sixteen.tobytes(), digest_size=8).hexdigest())
                    report.resized += image.resized
                    report.cut += image.cut
                    occurs(report.tops, image.top)
                    occurs(report.affines, image.affine if image.affine is None else image.affine.round(4).tolist())
                    if image.spacing:
                        report.spacings[tuple(float(f"{mm:.5g}") for mm in image.spacing)] += 1
            except ValueError as error:
                if self.strict or isinstance(error, files.NotNow):
                    raise
                report.skipped.append(str(error))
            report.counts.append(count)
        aside = f"{self.path}.json.{os.uname().nodename}-{os.getpid()}"
        with open(aside, "w", encoding="utf-8") as file:
            file.write(report.dumps())
        os.replace(aside, f"{self.path}.json")
