"""Images in [-1, 1] -> files that anyone's viewer opens: PNG in 2D, NIfTI in 3D."""

import os
from pathlib import Path

import numpy as np


def suffix(rank: int) -> str:
    """Of the files `write_image` makes for images of this rank."""
    return ".png" if rank == 2 else ".nii.gz"


def intensity(rank: int) -> str:
    """The policy by which `read_folder` recovers [-1, 1] from those files."""
    return "type" if rank == 2 else "window:-1:1"


def write_image(path: Path, image: np.ndarray) -> None:
    """Writes one image (*size, C), float in [-1, 1], whole or not at all.

    2D with one or three channels: 8-bit PNG. 3D with one channel: NIfTI in float32, axes turned from ours (inferior to
    superior, anterior to posterior, right to left) to NIfTI's, 1 mm voxels.
    """
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    if image.ndim == 3:
        import PIL.Image

        grey = np.round((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)
        PIL.Image.fromarray(grey[..., 0] if grey.shape[-1] == 1 else grey).save(aside, format="png")
    else:
        import nibabel

        array = np.ascontiguousarray(image[..., 0].swapaxes(0, 2)[::-1, ::-1], dtype=np.float32)
        nibabel.Nifti1Image(array, np.eye(4)).to_filename(aside)
    os.replace(aside, path)
