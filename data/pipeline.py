"""The order in which images are seen: a pure function of (seed, step), on any number of processes."""

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


def batches(
    images: Sequence[Any], *, batch: int, seed: int, start: int = 0, process: tuple[int, int] = (0, 1), threads: int = 4
) -> Iterator[Any]:
    """Yields training batches for ever, from step `start` on.

    Every epoch is a fresh permutation; batches run across its end. Step s holds the same images whether the run began
    at s or before, and the global batch, joined over the processes in their order, is the same for any number of them:
    a run that resumes needs its step and no more.

    Args:
      images: random access; items are arrays or trees of arrays, of the same shapes. A plain array will do.
      batch: global batch size.
      seed: of the permutations.
      start: first step.
      process: (index, count) of this process.
      threads: each reads a batch ahead.
    Yields:
      This process's rows (batch / count, ...), floating ones as float32.
    Raises:
      ValueError: no images, or a batch that the processes cannot share.
    """
    import grain

    index, count = process
    if len(images) == 0:
        raise ValueError("no images to make batches of")
    if not 0 <= index < count or batch < 1 or batch % count:
        raise ValueError(f"a batch of {batch} cannot be shared by {count} processes (this is number {index})")
    order = grain.MapDataset.source(_Shuffled(images, seed))
    mine = order.batch(batch // count, drop_remainder=True).map(_float32)[start * count + index :: count]
    return iter(mine.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)))


def in_order(images: Sequence[Any], batch: int, *, threads: int = 4) -> Iterator[tuple[Any, int]]:
    """Yields (rows, n) once through: rows (batch, ...), of which the first n are images; the rest repeat the last."""
    import grain
    import jax

    if len(images) == 0:
        return
    once = grain.MapDataset.source(images).batch(batch, drop_remainder=False).map(_float32)
    for rows in once.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)):
        n = len(jax.tree.leaves(rows)[0])
        fill = lambda x, short=batch - n: np.concatenate([x, np.repeat(x[-1:], short, 0)]) if short else x
        yield jax.tree.map(fill, rows), n


class _Shuffled(Sequence):
    """Epoch after epoch of the images, each a permutation of its own.

    Not Grain's shuffle, whose permutations are never held in memory: it walks a cipher of 16 bits or more until an index
    is in range, 0.6 ms an image where there are forty.
    """

    def __init__(self, images: Sequence[Any], seed: int):
        self._images = images
        permutation = lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(images))
        self._permutation = functools.lru_cache(maxsize=4)(permutation)  # threads may be an epoch apart

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Any:
        epoch, i = divmod(index, len(self._images))
        return self._images[int(self._permutation(epoch)[i])]


def _float32(rows: Any) -> Any:
    import jax

    return jax.tree.map(lambda x: x.astype(np.float32, copy=False) if x.dtype.kind == "f" else x, rows)
