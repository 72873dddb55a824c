"""The prepared form of a data set: ArrayRecord files written and read through tensorflow_datasets, without TensorFlow.

Imported only when needed: tensorflow_datasets takes a second. A `ShardBasedBuilder`, because it keeps our order, and
because the generator-based one needs TensorFlow as soon as a data set passes 1 GB.
"""

import contextlib
import itertools
import os
from collections.abc import Generator, Sequence

import numpy as np
import tensorflow_datasets as tfds

from data import files

SPLIT = "images"  # one split: who trains is decided at load time, so that changing it reads no pixel again
SHARD_BYTES = 1 << 27  # the writer holds one shard's images in memory


class Facsimile(tfds.core.ShardBasedBuilder):
    """Writes a stream of (id, image) in its order. At most `length` come; fewer may."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, stream: Generator, *, length: int, shape: Sequence[int], dtype: str, data_dir: str):
        self._stream, self._length, self._shape, self._dtype = stream, length, tuple(shape), np.dtype(dtype)
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        # Encoding 'none' would store a list of integers, ten times slower to read.
        image = tfds.features.Tensor(shape=self._shape, dtype=self._dtype, encoding="bytes")
        features = tfds.features.FeaturesDict({"id": tfds.features.Text(), "image": image})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _shard_iterators_per_split(self, dl_manager):
        per_shard = max(1, SHARD_BYTES // (int(np.prod(self._shape)) * self._dtype.itemsize))
        count = itertools.count()
        shard = lambda: ((next(count), {"id": i, "image": x}) for i, x in itertools.islice(self._stream, per_shard))
        return {SPLIT: [shard] * -(-self._length // per_shard)}

    def _log_download_bytes(self):  # this and the next print on stdout about downloads
        pass

    def _log_download_done(self):
        pass


def write(folder: str, stream: Generator, *, length: int, shape: Sequence[int], dtype: str) -> str:
    """Writes a stream below `folder`; returns the folder of the data set."""
    skip = tfds.download.ComputeStatsMode.SKIP
    with contextlib.closing(stream):
        builder = Facsimile(stream, length=length, shape=shape, dtype=dtype, data_dir=folder)
        config = tfds.download.DownloadConfig(try_download_gcs=False, compute_stats=skip)
        builder.download_and_prepare(download_config=config)
    return os.fspath(builder.data_dir)


class Stored(Sequence):
    """Images of a prepared data set, read when asked for: `images[i]` is float32 (*size, C) in [-1, 1]."""

    def __init__(self, folder: str, indices: np.ndarray):
        self._source = tfds.builder_from_directory(folder).as_data_source(SPLIT)
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> np.ndarray:
        return files.decode(self._source[int(self._indices[index])]["image"])
