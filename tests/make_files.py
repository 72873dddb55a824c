"""Small files of every format, for tests."""

import io

import h5py
import nibabel
import numpy as np
import PIL.Image
import pydicom
import pydicom.encaps
import SimpleITK
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

RNG = np.random.default_rng(0)
EIGHT = RNG.integers(0, 256, (12, 16), dtype=np.uint8)
SIXTEEN = RNG.integers(0, 65536, (12, 16), dtype=np.uint16)


def picture(path, array, **how):
    PIL.Image.fromarray(array).save(path, **how)
    return path


def dicom(path, array, bits=None, syntax=ExplicitVRLittleEndian, **tags):
    """A DICOM file of (H, W) or (frames, H, W); `tags` are attributes of the header."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = tags.get("SOPInstanceUID", "1.2.3")
    header = pydicom.Dataset()
    header.file_meta, header.PatientID, header.Modality = meta, "p1", "CT"
    header.Rows, header.Columns, header.SamplesPerPixel = *array.shape[-2:], 1
    if array.ndim == 3:
        header.NumberOfFrames = len(array)
    header.BitsAllocated = 8 * array.dtype.itemsize
    header.BitsStored = bits or header.BitsAllocated
    header.HighBit, header.PixelRepresentation = header.BitsStored - 1, int(array.dtype.kind == "i")
    header.PhotometricInterpretation = "MONOCHROME2"
    header.PixelData = array.tobytes()
    header["PixelData"].VR = "OB" if array.dtype.itemsize == 1 else "OW"
    for tag, value in tags.items():
        setattr(header, tag, value)
    if syntax == JPEG2000Lossless:
        _encapsulate(header, array, syntax, "JPEG2000", irreversible=False)
    elif syntax == JPEGBaseline8Bit:
        _encapsulate(header, array, syntax, "JPEG", quality=95)
    elif syntax == RLELossless:
        header.compress(syntax, encoding_plugin="pydicom", generate_instance_uid=False)
    elif syntax != ExplicitVRLittleEndian:
        _by_gdcm(path, header, syntax)
        return path
    pydicom.dcmwrite(path, header, enforce_file_format=True)
    return path


def _encapsulate(header, array, syntax, form, **how):
    stream = io.BytesIO()
    PIL.Image.fromarray(array).save(stream, form, **how)
    codestream = stream.getvalue()
    if form == "JPEG2000":
        codestream = codestream[codestream.index(b"\xff\x4f\xff\x51") :]  # without the boxes around it
    header.PixelData = pydicom.encaps.encapsulate([codestream])
    header["PixelData"].is_undefined_length, header["PixelData"].VR = True, "OB"
    header.file_meta.TransferSyntaxUID = syntax


def _by_gdcm(path, header, syntax):
    import gdcm

    pydicom.dcmwrite(path, header, enforce_file_format=True)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def series(
    folder, volume, *, spacing=(3.0, 0.5, 0.7), origin=(10.0, 20.0, -30.0), axes=(1, 0, 0, 0, 1, 0), uid="1.9", **tags
):
    """A DICOM series, one file a slice, named out of order: `volume` (D, H, W) lies along the normal of `axes`."""
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(axes[:3], axes[3:])
    order = RNG.permutation(len(volume))
    for name, k in enumerate(order):
        place = np.array(origin) + k * spacing[0] * normal
        given = {
            "SeriesInstanceUID": uid,
            "StudyInstanceUID": "1.8",
            "SOPInstanceUID": f"{uid}.{k}",
            "ImagePositionPatient": [round(float(v), 6) for v in place],
            "ImageOrientationPatient": list(map(float, axes)),
            "PixelSpacing": list(spacing[1:]),
        }
        dicom(folder / f"1-{name:03d}.dcm", volume[k], **(given | tags))
    return folder


def everything(folder):
    """One readable file of 12 x 16 (or 1 x 12 x 16) of every format; returns their paths."""
    for bits, array in (("8", EIGHT), ("16", SIXTEEN)):
        for kind in (".png", ".tif"):
            picture(folder / (bits + kind), array)
        np.save(folder / f"{bits}.npy", array)
        nibabel.save(nibabel.Nifti1Image(array[:, :, None], np.eye(4)), folder / f"{bits}.nii")
        nibabel.save(nibabel.Nifti1Image(array[:, :, None], np.eye(4)), folder / f"{bits}.nii.gz")
        image = SimpleITK.GetImageFromArray(array[None])
        for name in (f"{bits}.nrrd", f"{bits}.mha"):
            SimpleITK.WriteImage(image, str(folder / name))
            SimpleITK.WriteImage(image, str(folder / f"gz{name}"), useCompression=True)
        dicom(folder / f"{bits}.dcm", array)
        dicom(folder / f"{bits}rle.dcm", array, syntax=RLELossless)
        dicom(folder / f"{bits}j2k.dcm", array, syntax=JPEG2000Lossless)
        dicom(folder / f"{bits}jpegll.dcm", array, syntax="1.2.840.10008.1.2.4.70")
        dicom(folder / f"{bits}jpegls.dcm", array, syntax="1.2.840.10008.1.2.4.80")
        np.savez_compressed(folder / f"{bits}.npz", image=array)
        with h5py.File(folder / f"{bits}.h5", "w") as file:
            file.create_dataset(
                "reconstruction_rss",
                data=array,
                chunks=(4, 4) if bits == "8" else None,
                compression=None if bits == "16" else "gzip",
            )
            file.attrs["patient_id"] = "p1"
    dicom(folder / "jpeg.dcm", EIGHT, syntax=JPEGBaseline8Bit)
    picture(folder / "8.jpg", EIGHT)
    picture(folder / "rgb.png", np.stack([EIGHT] * 3, -1))
    picture(folder / "lzw.tif", SIXTEEN, compression="tiff_lzw")
    picture(folder / "zip.tif", SIXTEEN, compression="tiff_deflate")
    return sorted(path for path in folder.iterdir())
