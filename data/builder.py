"""The prepared form of a data set: ArrayRecord files written and read through tensorflow_datasets, without TensorFlow.

Imported only when needed: tensorflow_datasets takes a second. A `ShardBasedBuilder`, because it keeps our order, because
what is in a shard is known before it is made, and because the generator-based one needs TensorFlow as soon as a data set
passes 1 GB.
"""

import contextlib
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from data import files

SPLIT = "images"  # one split: who trains is decided at load time, so that changing it reads no pixel again
Examples = Callable[[], Iterator[tuple[str, Any]]]  # yields (id, {"id": id, "image": array})


class Facsimile(tfds.core.ShardBasedBuilder):
    """Writes shards of (id, image), here or on Apache Beam, where they are not written yet."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, shards: Sequence[Examples], *, shape: Sequence[int], dtype: str, data_dir: str):
        self._shards, self._features = shards, features(shape, dtype)
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=self._features)

    def _shard_iterators_per_split(self, dl_manager):
        return {SPLIT: self._shards}

    def _example_writer(self):
        return _Whole()

    def finish(self, beam: str | None) -> None:
        """Writes what is missing and the data set's description.

        Not `download_and_prepare`, which works in a folder of a new name each time, so that nothing could be resumed.
        """
        config = tfds.download.DownloadConfig
        if beam:
            self._download_and_prepare(None, config(**_beam(beam)))
        # Again after Beam: all is there, and only counted. tensorflow_datasets 4.9.10 takes the lengths of Beam's shards in
        # the order of their numbers as text (0, 1, 10, 2), so that from the eleventh on it would read another image.
        self._download_and_prepare(None, config())
        self.info.write_to_directory(self.data_dir)


class _Whole:
    """Writes a file of records whole or not at all, and leaves one that is there."""

    def write(self, path: str | os.PathLike, examples: Iterable[tuple[str, bytes]]) -> None:
        path = os.fspath(path)
        if os.path.exists(path):
            return
        aside = f"{path}.{os.uname().nodename}-{os.getpid()}"
        writer = ArrayRecordWriter(aside, "group_size:1")
        try:
            for _, record in examples:
                writer.write(record)
            writer.close()
            os.replace(aside, path)
        except RuntimeError as error:  # as the writer tells of a full disk
            if aside not in str(error):
                raise
            reason = str(error).split(";")[0]
            raise ValueError(f"{aside}: {reason}; make room, or set data.cache to another disk") from None
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(aside)


def features(shape: Sequence[int], dtype: str) -> tfds.features.FeaturesDict:
    # Encoding 'none' would store a list of integers, ten times slower to read.
    image = tfds.features.Tensor(shape=tuple(shape), dtype=np.dtype(dtype), encoding="bytes")
    return tfds.features.FeaturesDict({"id": tfds.features.Text(), "image": image})


def path_of(folder: str, index: int, count: int) -> str:
    """Where the builder of `folder` keeps shard `index` of `count`."""
    return os.path.join(folder, "facsimile", "1.0.0", f"facsimile-{SPLIT}.array_record-{index:05d}-of-{count:05d}")


def write_shard(path: str, examples: Iterable[tuple[str, Any]], *, shape: Sequence[int], dtype: str) -> None:
    """Writes one shard as the builder would, in any process."""
    form = features(shape, dtype)
    _Whole().write(path, ((key, form.serialize_example(example)) for key, example in examples))


def finish(
    where: str, shards: Sequence[Examples], *, shape: Sequence[int], dtype: str, beam: str | None = None
) -> None:
    """Makes a data set of the shards in the folder `where`, which `path_of` chose, and of those still missing."""
    folder = os.path.dirname(os.path.dirname(where))
    Facsimile(shards, shape=shape, dtype=dtype, data_dir=folder).finish(beam)


def _beam(text: str) -> dict:
    """Runner and options of Apache Beam from a line like '--runner=DirectRunner --direct_num_workers=4'."""
    try:
        from apache_beam.options import pipeline_options
    except ImportError:
        raise ValueError(
            "data.beam needs Apache Beam, which is not installed: pip install 'apache-beam>=2.70'"
        ) from None
    options = pipeline_options.PipelineOptions(shlex.split(text))
    runner = options.view_as(pipeline_options.StandardOptions).runner or "DirectRunner"
    return {"beam_runner": runner, "beam_options": options}


class Stored(Sequence):
    """Images of a prepared data set, read when asked for: `images[i]` is float32 (*size, C) in [-1, 1].

    An array of numbers, or of bools, gives these images, still on disk.
    """

    def __init__(self, folder: str, indices: np.ndarray):
        self._source = tfds.builder_from_directory(folder).as_data_source(SPLIT)
        self.folder, self.indices = folder, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | np.ndarray) -> "np.ndarray | Stored":
        if isinstance(index, np.ndarray):
            return Stored(self.folder, self.indices[index])
        return files.decode(self._source[int(self.indices[index])]["image"])
