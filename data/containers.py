"""Data sets in one file or one builder: MedMNIST's .npz, and whatever tensorflow_datasets has prepared."""

import functools
import os
import re

from data import readers
from data.listing import Ask, Manifest, Row, remember

SPLITS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
PATIENT = ("patient_id", "patient", "subject_id", "subject")  # names of a feature that says the patient


def medmnist(path: str, ask: Ask) -> Manifest:
    """MedMNIST, 2D or 3D and of any size: an .npz with train_images, val_images, test_images and their labels."""
    import numpy as np

    name, rows = os.path.basename(path), []
    try:
        with np.load(path, allow_pickle=False) as file:
            labels = {split: file[f"{split}_labels"] for split in SPLITS if f"{split}_labels" in file.files}
            splits = [split for split in SPLITS if f"{split}_images" in file.files]
        counts = {split: readers.rows_of(path, f"{split}_images").count for split in splits}
    except readers.Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # as for pixels: anything may be raised at a damaged file
        why = f"cannot be read as .npz ({type(error).__name__}): damaged or of another kind"
        raise ValueError(f"{path}: {why}; restore it") from None
    for split, count in counts.items():
        if split in labels and len(labels[split]) != count:
            raise ValueError(
                f"{path}: {count} {split}_images but {len(labels[split])} {split}_labels; restore the file"
            )
        for i in range(count):
            label = " ".join(map(str, np.ravel(labels[split][i]))) if split in labels else ""
            item = f"{split}_images/{i}"
            row = Row(f"{name}#{split}/{i:06d}", split=SPLITS[split], label=label, parts=(name,), item=item)
            rows.append(row)
    return Manifest(os.path.dirname(path) or ".", rows, [f"MedMNIST says no patients: {path}"])


def tfds(path: str, ask: Ask) -> Manifest:
    """A prepared data set of tensorflow_datasets, as ArrayRecord: its folder, or 'tfds:NAME[/CONFIG]'.

    The image is the feature that data.kind names, or 'image', or the only one with two or more axes; the patient the one
    named patient_id, patient, subject_id or subject.
    """
    builder = _builder(path)
    root = os.fspath(builder.data_dir)
    features = builder.info.features
    arrays = [name for name, feature in features.items() if feature.shape is not None and len(feature.shape) >= 2]
    wanted = ask.kind or ("image" if "image" in arrays else arrays[0] if len(arrays) == 1 else "")
    if wanted not in arrays:
        raise ValueError(f"{path}: has the image features {', '.join(arrays) or 'none'}; set data.kind to one of them")
    patient = next((name for name in PATIENT if name in features), None)
    rows = []
    for split, info in builder.info.splits.items():
        said = _patients(root, split, patient, wanted, ask) if patient else [""] * info.num_examples
        for i, who in enumerate(said):
            item = f"{split}/{i}/{wanted}"
            row = Row(f"{split}/{i:07d}", who, split=SPLITS.get(split, ""), parts=(INFO,), item=item)
            rows.append(row)
    return Manifest(root, rows)


INFO = "dataset_info.json"


def record(path: str, item: str) -> readers.Pixels:
    """The image of one record; `path` is its data set's dataset_info.json, `item` 'SPLIT/INDEX/FEATURE'."""
    import numpy as np

    split, index, feature = item.split("/", 2)
    array = np.asarray(_source(os.path.dirname(path), split)[int(index)][feature])
    return readers.plain(array)


def _builder(path: str):
    import tensorflow_datasets

    name = path.removeprefix("tfds:")
    try:
        builder = (
            tensorflow_datasets.builder_from_directory(path) if name == path else tensorflow_datasets.builder(name)
        )
        if builder.info.file_format is None or not builder.info.splits:
            raise FileNotFoundError
    except Exception as error:  # it raises its own for unknown names, and others for unreadable folders
        make = "tfds.builder(NAME).download_and_prepare(file_format='array_record')"
        why = f"no prepared data set of tensorflow_datasets ({type(error).__name__})"
        raise ValueError(f"{path}: {why}; correct data.path, or prepare it by {make}") from None
    if not re.search("array_record|riegeli", str(builder.info.file_format.value)):
        raise ValueError(
            f"{path}: is stored as {builder.info.file_format.value}, which cannot be read at random; prepare it with "
            "file_format='array_record'"
        )
    return builder


@functools.lru_cache(maxsize=8)
def _source(folder: str, split: str, skip: str | None = None):
    import tensorflow_datasets

    builder = tensorflow_datasets.builder_from_directory(folder)
    decoders = {skip: tensorflow_datasets.decode.SkipDecoding()} if skip else None
    return builder.as_data_source(split, decoders=decoders)


def _patients(root: str, split: str, feature: str, image: str, ask: Ask) -> list[str]:
    status = os.stat(os.path.join(root, INFO))
    text = lambda value: value.decode() if isinstance(value, bytes) else str(value)
    make = lambda known: known or [text(record[feature]) for record in _source(root, split, image)]
    return remember(ask, os.path.join(root, split), [feature, status.st_size, status.st_mtime_ns], make)
