"""What stored numbers mean: windows, palettes, tables, padding; and channels of every type."""

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK

from tests import make_files
from tests.test_data_volumes import RNG, VOLUME, read, series_source


@pytest.mark.parametrize(
    "centre, width, low, high", [(0, 400, -200, 199), (-600, 1500, -1350, 149), (40, 0, None, None)]
)
def test_a_window_about_zero_is_a_window(tmp_path, centre, width, low, high):
    path = make_files.dicom(tmp_path / "x.dcm", VOLUME[0], WindowCenter=centre, WindowWidth=width)
    if low is None:
        with pytest.raises(ValueError, match="its header recommends no window"):
            read(path, (6, 8), "header")
        return
    wanted = np.clip((VOLUME[0].astype(float) - low) / (high - low), 0, 1) * 2 - 1
    np.testing.assert_allclose(read(path, (6, 8), "header")[0].array[..., 0], wanted, atol=1e-5)


def palette(colours, bits=8):
    """Header of a table of colours (N, 3)."""
    names = [f"{name}PaletteColorLookupTable" for name in ("Red", "Green", "Blue")]
    tags = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, values in zip(names, np.transpose(colours), strict=True):
        tags[f"{name}Descriptor"] = [len(colours), 0, bits]
        tags[f"{name}Data"] = values.astype(np.uint8 if bits == 8 else np.uint16).tobytes()
    return tags


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_is_looked_up(tmp_path, bits):
    index = RNG.integers(0, 256, (6, 8), dtype=np.uint8)
    grey = RNG.permutation(256)  # shuffled: the index itself is no image
    top = 2**bits - 1
    table = np.stack([grey * (top // 255)] * 3, -1)
    path = make_files.dicom(tmp_path / "x.dcm", index, **palette(table, bits))
    np.testing.assert_allclose(read(path, (6, 8), "type")[0].array[..., 0], grey[index] / 127.5 - 1, atol=1e-6)
    coloured = make_files.dicom(tmp_path / "y.dcm", index, **palette(RNG.integers(0, 256, (256, 3))))
    with pytest.raises(ValueError, match="is a colour image"):
        read(coloured, (6, 8), "type")


def test_a_table_of_modality_values_is_looked_up(tmp_path):
    index = RNG.integers(0, 16, (6, 8), dtype=np.uint16)
    values = RNG.permutation(4096)[:16].astype(np.uint16)
    item = pydicom.Dataset()
    item.LUTDescriptor, item.ModalityLUTType, item.LUTData = [16, 0, 12], "US", values.tobytes()
    path = make_files.dicom(tmp_path / "x.dcm", index, bits=8, ModalityLUTSequence=[item])
    np.testing.assert_allclose(read(path, (6, 8), "type")[0].array[..., 0], values[index] / 4095.0 * 2 - 1, atol=1e-6)


@pytest.mark.parametrize("limit", [None, -1990])
@pytest.mark.parametrize("inverted", [False, True])
def test_padding_is_no_image(tmp_path, limit, inverted):
    """Corners outside a scanner's field neither widen the range of intensities nor are brighter than the image."""
    stored = VOLUME + 1024
    corner = np.zeros(VOLUME.shape, bool)
    corner[:, :2, :2] = True
    padded = np.where(corner, -2000 if limit is None else RNG.integers(-2000, -1989, VOLUME.shape), stored)
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1024, "PixelPaddingValue": -2000}
    tags |= {} if limit is None else {"PixelPaddingRangeLimit": limit}
    tags |= {"PhotometricInterpretation": "MONOCHROME1"} if inverted else {}
    make_files.series(tmp_path / "x", padded.astype(np.int16), **tags)
    (image,) = read(series_source(tmp_path / "x"), intensity="minmax")
    body = VOLUME[~corner]
    wanted = (body - body.min()) / (body.max() - body.min()) * 2.0 - 1
    np.testing.assert_allclose(image.array[..., 0][~corner], -wanted if inverted else wanted, atol=1e-4)
    assert (image.array[..., 0][corner] == -1).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", ["x.nii.gz", "x.nrrd", "x.mha", "x.npy"])
def test_every_channel_of_a_4d_file_is_there(tmp_path, name, count, dtype):
    """Whatever the type: the last of two or four is not taken for transparency."""
    several = RNG.integers(0, 256, (*VOLUME.shape, count)).astype(dtype)
    several[..., -1] = 255  # as an opaque alpha channel would be
    several[0, 0, 0, -1] = 254
    if name == "x.npy":
        np.save(tmp_path / name, several)
    elif name == "x.nii.gz":
        nibabel.save(nibabel.Nifti1Image(several.transpose(2, 1, 0, 3)[::-1, ::-1].copy(), np.eye(4)), tmp_path / name)
    else:
        one = [SimpleITK.GetImageFromArray(several[..., k]) for k in range(count)]
        SimpleITK.WriteImage(SimpleITK.JoinSeries(one), str(tmp_path / name))
    (image,) = read(tmp_path / name, channels=count, intensity="window:0:255")
    np.testing.assert_allclose(image.array, several / 127.5 - 1, atol=1e-6)
    (image,) = read(tmp_path / name, channel=count - 1, intensity="window:0:255")
    np.testing.assert_allclose(image.array, several[..., -1:] / 127.5 - 1, atol=1e-6)
