"""Every layout in a tiny tree with the collection's own file names and table headers."""

import csv
import gzip
import os

import h5py
import numpy as np
import pydicom
import pytest

import data
from data import layouts, manifest
from tests import make_files

NIFTI = ".nii.gz"


def test_a_pattern_that_does_not_match_is_no_patient(tmp_path):
    """Not the header's instead: one person would have two names, in two splits."""
    for name in ("p1_a", "p1_b", "other"):
        make_files.dicom(tmp_path / f"{name}.dcm", make_files.EIGHT, PatientID="HOSPITAL-7")
    told = r"1 of 3 images have no patient id \(other\.dcm\)"
    for layout in ("auto", "folder"):
        with pytest.raises(ValueError, match=told):
            manifest.read(tmp_path, patient_pattern=r"p\d", layout=layout)
        rows = manifest.read(tmp_path, patient_pattern=r"p\d", layout=layout, patients="per_image").rows
        assert [r.patient for r in rows] == ["other.dcm", "p1", "p1"]
    assert {r.patient for r in manifest.read(tmp_path, layout="folder").rows} == {"HOSPITAL-7"}
    (tmp_path / "m.csv").write_text("path,patient_id\np1_a.dcm,\nother.dcm,\np1_b.dcm,x9\n")
    rows = manifest.read(tmp_path / "m.csv", patient_pattern=r"p\d", patients="per_image").rows
    assert [r.patient for r in rows] == ["p1", "other.dcm", "x9"]  # what a table says stays


def test_layouts_where_a_case_stands_for_the_patient_say_so(tmp_path):
    touch(tmp_path, "m/BraTS2021_00000/BraTS2021_00000_t1.nii.gz", "d/imagesTr/hippocampus_001.nii.gz")
    for folder in "md":
        (note,) = manifest.read(tmp_path / folder).notes
        assert "says no patients, so each case counts as one: " in note


def test_a_pattern_takes_the_place_of_what_stands_for_the_patient(tmp_path):
    """And then nothing is said of cases: the user has said who is who."""
    touch(tmp_path, "b/BraTS20_7_1/BraTS20_7_1_t1.nii.gz", "b/BraTS20_7_2/BraTS20_7_2_t1.nii.gz")
    touch(
        tmp_path,
        "d/imagesTr/la_071.nii.gz",
        "d/imagesTr/la_072.nii.gz",
        "m/train/axial/071.npy",
        "m/valid/axial/072.npy",
    )
    for folder in "bdm":
        assert len({r.patient for r in manifest.read(tmp_path / folder).rows}) == 2
        found = manifest.read(tmp_path / folder, patient_pattern=r"7(?=_?\d)")
        assert {r.patient for r in found.rows} == {"7"} and found.notes == []
        with pytest.raises(ValueError, match="2 of 2 images have no patient id"):
            manifest.read(tmp_path / folder, patient_pattern="P(.)")


def test_one_file_named_so_is_no_decathlon(tmp_path):
    touch(tmp_path, "lung_1001.nii.gz", "other_1001.nii.gz")
    assert len(manifest.read(tmp_path, patients="per_image").rows) == 2
    (tmp_path / "other_1001.nii.gz").unlink()
    (note,) = manifest.read(tmp_path).notes
    assert note.startswith("the Decathlon says no patients")


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def write_csv(path, *rows):
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "wt", newline="") as file:
        csv.writer(file).writerows(rows)


def read(root, **how):
    found = manifest.read(root, **how)
    return found, [(r.path, r.patient, r.study, r.split) for r in found.rows]


def test_chexpert(tmp_path):
    base, header = "CheXpert-v1.0-small", ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", "Edema"]
    frontal, lateral = "train/patient00001/study1/view1_frontal.jpg", "train/patient00002/study2/view2_lateral.jpg"
    valid = "valid/patient64541/study1/view1_frontal.jpg"
    touch(tmp_path, frontal, lateral, valid, "train/patient00009/study1/view1_frontal.jpg")
    rows = (
        [f"{base}/{frontal}", "Female", 68, "Frontal", "AP", 1.0, ""],
        [f"{base}/{lateral}", "Male", 9, "Lateral", "", "", ""],
    )
    write_csv(
        tmp_path / "train.csv",
        header,
        *rows,
        [f"{base}/train/patient00003/study1/view1_frontal.jpg", "", 1, "Frontal", "", "", ""],
    )
    write_csv(tmp_path / "valid.csv", header, [f"{base}/{valid}", "Male", 73, "Frontal", "AP", 0.0, ""])
    with pytest.raises(
        ValueError, match=r"several kinds of images here; set data.kind to one of Frontal, Lateral, or 'all'"
    ):
        manifest.read(tmp_path)
    found, rows = read(tmp_path, kind="Frontal")
    assert rows == [(frontal, "patient00001", "study1", "train"), (valid, "patient64541", "study1", "val")]
    assert (
        len(found.notes) == 2
        and "1 of the images listed" in found.notes[0]
        and "1 images are not listed" in found.notes[1]
    )
    assert (
        len(manifest.read(tmp_path, kind="all").rows) == len(manifest.read(tmp_path, kind="Frontal,Lateral").rows) == 3
    )
    with pytest.raises(ValueError, match="no images of kind 'Oblique'"):
        manifest.read(tmp_path, kind="Oblique")


@pytest.mark.parametrize("kind", [".jpg", ".dcm"])
def test_mimic_cxr(tmp_path, kind):
    ids = "02aa804e-bde0afdd-112c0b34-7bc16630-4e384014", "174413ec-4ec4c1f7-34ea26b7-c5f994f8-79ef1962"
    paths = f"files/p10/p10000032/s50414267/{ids[0]}{kind}", f"files/p11/p11000011/s51029426/{ids[1]}{kind}"
    touch(tmp_path, *paths)
    study = lambda path: path.split("/")[3][1:]
    split = [[i, study(p), p[11:19], s] for i, p, s in zip(ids, paths, ("train", "validate"), strict=True)]
    write_csv(tmp_path / "mimic-cxr-2.0.0-split.csv.gz", ["dicom_id", "study_id", "subject_id", "split"], *split)
    _, rows = read(tmp_path)
    assert rows == [(paths[0], "10000032", "50414267", "train"), (paths[1], "11000011", "51029426", "val")]
    header = ["dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows"]
    views = [
        [ids[0], "10000032", "50414267", "CHEST (PA AND LAT)", "PA", 3056],
        [ids[1], "11000011", "51029426", "", "LATERAL", 2],
    ]
    write_csv(tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz", header, *views)
    assert [r.patient for r in manifest.read(tmp_path, kind="PA").rows] == ["10000032"]
    touch(tmp_path, f"files/loose{kind}")
    with pytest.raises(ValueError, match="is not at pNN/pPATIENT/sSTUDY/"):
        manifest.read(tmp_path, kind="PA")
    assert len(manifest.read(tmp_path, kind="PA", on_error="skip").rows) == 1


def test_mrnet(tmp_path):
    for plane in ("axial", "coronal", "sagittal"):
        touch(tmp_path, f"train/{plane}/0000.npy", f"train/{plane}/0001.npy", f"valid/{plane}/1130.npy")
    write_csv(tmp_path / "train-acl.csv", ["0000", 0], ["0001", 1])
    found, rows = read(tmp_path, kind="sagittal")
    assert [row[:2] + row[3:] for row in rows] == [
        ("train/sagittal/0000.npy", "0000", "train"),
        ("train/sagittal/0001.npy", "0001", "train"),
        ("valid/sagittal/1130.npy", "1130", "val"),
    ]
    assert "each exam counts as one" in found.notes[0]
    with pytest.raises(ValueError, match="axial, coronal, sagittal"):
        manifest.read(tmp_path)


def test_ixi(tmp_path):
    names = (
        "IXI002-Guys-0828-T1",
        "IXI002-Guys-0828-T2",
        "IXI012-HH-1211-T1",
        "IXI012-HH-1211-DTI-00",
        "IXI012-HH-1211-DTI-01",
    )
    touch(tmp_path, *(name + NIFTI for name in names))
    _, rows = read(tmp_path, kind="T1")
    assert rows == [(names[0] + NIFTI, "IXI002", "0828", ""), (names[2] + NIFTI, "IXI012", "1211", "")]
    assert len(manifest.read(tmp_path, kind="DTI").rows) == 2


@pytest.mark.parametrize(
    "folder, file, patient, study, kind",
    [
        ("BraTS20_Training_001", "BraTS20_Training_001_{}.nii", "BraTS20_Training_001", "", "t1ce"),
        ("BraTS2021_00000", "BraTS2021_00000_{}.nii.gz", "BraTS2021_00000", "", "flair"),
        ("BraTS-GLI-00000-001", "BraTS-GLI-00000-001-{}.nii.gz", "BraTS-GLI-00000", "001", "t1n"),
        ("HGG/Brats18_2013_2_1", "Brats18_2013_2_1_{}.nii.gz", "Brats18_2013_2_1", "", "t1"),
    ],
)
def test_brats(tmp_path, folder, file, patient, study, kind):
    kinds = [kind, "t1c" if kind == "t1n" else "t2", "seg"]
    touch(tmp_path, *(f"{folder}/{file.format(k)}" for k in kinds))
    how = {"layout": "brats"} if folder.startswith("HGG") else {}
    _, rows = read(tmp_path, kind=kind, **how)
    assert rows == [(f"{folder}/{file.format(kind)}", patient, study, "")]
    (row,) = manifest.read(tmp_path, kind=",".join(kinds[:2]), **how).rows
    assert row.parts == tuple(f"{folder}/{file.format(k)}" for k in kinds[:2]) and row.path == folder.split("/")[-1]
    with pytest.raises(ValueError, match=f"holds the sequences {', '.join(sorted(kinds[:2]))}; set data.kind"):
        manifest.read(tmp_path, **how)
    os.remove(tmp_path / folder / file.format(kinds[1]))
    touch(tmp_path, f"other/{file.format(kinds[1]).replace('0', '7')}")
    with pytest.raises(ValueError, match=f"has no {kind}"):
        manifest.read(tmp_path, kind=kind, **how)


def test_decathlon(tmp_path, real_data):
    names = "imagesTr/hippocampus_001.nii.gz", "imagesTr/hippocampus_003.nii.gz", "imagesTs/hippocampus_002.nii.gz"
    touch(tmp_path, *names, "labelsTr/hippocampus_001.nii.gz", "imagesTr/._hippocampus_001.nii.gz")
    (tmp_path / "dataset.json").write_text("{}")
    _, rows = read(tmp_path)
    assert [row[:2] for row in rows] == [(name, name[9:24]) for name in names]
    _, rows = read(real_data / "msd_hippocampus")
    assert len(rows) == len({row[1] for row in rows}) == 131


def test_bids(tmp_path):
    names = "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz", "sub-02/anat/sub-02_acq-mprage_run-1_T1w.nii.gz"
    others = (
        "sub-01/ses-a/func/sub-01_ses-a_task-rest_bold.nii.gz",
        "derivatives/fmriprep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
    )
    touch(tmp_path, *names, *others)
    (tmp_path / "dataset_description.json").write_text("{}")
    _, rows = read(tmp_path, kind="T1w")
    assert rows == [(names[0], "sub-01", "ses-a", ""), (names[1], "sub-02", "", "")]
    with pytest.raises(ValueError, match="one of T1w, bold"):
        manifest.read(tmp_path)


def fastmri_file(path, patient, acquisition, key="reconstruction_rss"):
    """As NYU's: x of the header's reconSpace is the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["kspace"] = np.zeros((2, 3, 8, 8), np.complex64)
        if key:
            file[key] = make_files.RNG.uniform(0, 1e-4, (2, 8, 6)).astype(np.float32)
        file.attrs.update(patient_id=patient, acquisition=acquisition, max=1e-4, norm=0.1)
        space = "<matrixSize><x>8</x><y>6</y><z>1</z></matrixSize><fieldOfView_mm><x>24.0</x><y>12.0</y><z>4.5</z></fieldOfView_mm>"
        header = f"<ismrmrdHeader><encoding><encodedSpace/><reconSpace>{space}</reconSpace></encoding></ismrmrdHeader>"
        file["ismrmrd_header"] = header.encode()


def test_fastmri(tmp_path):
    root = tmp_path / "knee"
    fastmri_file(root / "multicoil_train/file1000001.h5", "aa", "CORPD_FBK")
    fastmri_file(root / "multicoil_train/file1000002.h5", "aa", "CORPDFS_FBK")
    fastmri_file(root / "singlecoil_val/file1000003.h5", "bb", "CORPD_FBK", "reconstruction_esc")
    fastmri_file(root / "multicoil_test_v2/file1000004.h5", "cc", "CORPD_FBK", key=None)
    found, rows = read(root, kind="all", cache=tmp_path / "cache")
    assert [row[1:] for row in rows] == [
        ("aa", "file1000001.h5", "train"),
        ("aa", "file1000002.h5", "train"),
        ("bb", "file1000003.h5", "val"),
    ]
    assert "1 files hold no reconstructed image" in found.notes[0]
    assert [r.study for r in manifest.read(root, kind="CORPD_FBK").rows] == ["file1000001.h5", "file1000003.h5"]
    with pytest.raises(ValueError, match="several kinds"):
        manifest.read(root)
    sets = data.load(
        path=root,
        kind="all",
        size=(2, 8, 6),
        intensity="minmax",
        fractions={"train": 1.0},
        cache=tmp_path,
        splits="hash",
    )
    assert len(sets["train"].ids) == 3 and sets["train"].spacing == (4.5, 3.0, 2.0)


def test_medmnist(tmp_path):
    arrays = {}
    for split, n in (("train", 5), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = make_files.RNG.integers(0, 256, (n, 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = make_files.RNG.integers(0, 2, (n, 1), dtype=np.uint8)
    np.savez_compressed(tmp_path / "pneumoniamnist.npz", **arrays)
    how = dict(
        path=tmp_path / "pneumoniamnist.npz", patients="per_image", fractions={"train": 0.5, "val": 0.5}, cache=tmp_path
    )
    with pytest.raises(ValueError, match="10 of 10 images have no patient id"):
        manifest.read(how["path"])
    sets = data.load(**how, size=(8, 8))
    assert [len(s.ids) for s in sets.values()] == [5, 0, 2, 3] and sets["val"].ids[1] == "pneumoniamnist.npz#val/000001"
    for split, name in (("train", "train"), ("val", "val"), ("control", "test")):
        got = np.stack([image[..., 0] for image in sets[split].images])
        np.testing.assert_allclose(got, arrays[f"{name}_images"] / 127.5 - 1, atol=1e-6)
    rows = manifest.read(how["path"], patients="per_image").rows
    assert [int(r.label) for r in rows[:5]] == arrays["train_labels"].ravel().tolist()
    volumes = {
        f"{s}_images": make_files.RNG.integers(0, 256, (2, 6, 7, 8), dtype=np.uint8) for s in ("train", "val", "test")
    }
    np.savez(tmp_path / "organmnist3d.npz", **volumes)
    sets = data.load(**(how | {"path": tmp_path / "organmnist3d.npz"}), size=(6, 7, 8))
    np.testing.assert_allclose(sets["val"].images[1][..., 0], volumes["val_images"][1] / 127.5 - 1, atol=1e-6)
    colour = {
        f"{s}_images": make_files.RNG.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8) for s in ("train", "val", "test")
    }
    np.savez(tmp_path / "pathmnist.npz", **colour)
    sets = data.load(**(how | {"path": tmp_path / "pathmnist.npz"}), size=(8, 8), channels=3)
    np.testing.assert_allclose(sets["val"].images[1], colour["val_images"][1] / 127.5 - 1, atol=1e-6)


def tcia(root):
    """Two patients: one with a series of 5 in two studies' folders, one with two series in one folder and a report."""
    volume = make_files.RNG.integers(-1000, 1000, (5, 6, 8), dtype=np.int16)
    given = dict(SeriesDescription="CHEST 5MM", StudyInstanceUID="2.1")
    make_files.series(
        root / "LUNG-001/01-01-2000-NA/3000-CHEST 5MM-17", volume, uid="1.1", PatientID="LUNG-001", **given
    )
    mixed = root / "LUNG-002/02-02-2001-NA/mixed"
    make_files.series(mixed, volume, uid="1.2", PatientID="LUNG-002", **given)
    for path in mixed.iterdir():
        path.rename(path.with_name("a" + path.stem))  # without a suffix
    make_files.series(
        mixed, volume[:2, :4], uid="1.3", PatientID="LUNG-002", **(given | {"SeriesDescription": "SCOUT"})
    )
    make_files.dicom(
        root / "LUNG-002/seg.dcm", volume[0], Modality="SEG", PatientID="LUNG-002", SeriesInstanceUID="1.4"
    )
    (root / "LICENSE").write_text("text")
    return volume


def scout_tags(path):
    file = pydicom.dcmread(path)
    names = [
        "SeriesInstanceUID",
        "StudyInstanceUID",
        "PatientID",
        "SeriesDescription",
        "ImageOrientationPatient",
        "PixelSpacing",
    ]
    return {name: file[name].value for name in names} | {"SOPInstanceUID": "1.3.99"}


def test_dicom_tree(tmp_path):
    root = tmp_path / "tree"
    volume = tcia(root)
    first, mixed = "LUNG-001/01-01-2000-NA/3000-CHEST 5MM-17", "LUNG-002/02-02-2001-NA/mixed"
    found = manifest.read(root, volumes=True)
    assert [(r.path, r.patient, r.study, len(r.parts)) for r in found.rows] == [
        (first, "LUNG-001", "2.1", 5),
        (f"{mixed}#1.2", "LUNG-002", "2.1", 5),
        (f"{mixed}#1.3", "LUNG-002", "2.1", 2),
    ]
    assert [r.path for r in manifest.read(root, volumes=True, kind="^CT CHEST").rows] == [first, f"{mixed}#1.2"]
    assert found.notes[0].startswith(
        "2 kinds of series are taken together, since data.kind is not set: 'CT CHEST 5MM' (2)"
    )
    assert (
        found.kinds == {"CT CHEST 5MM": 2, "CT SCOUT": 1} and not manifest.read(root, volumes=True, kind="CHEST").kinds
    )
    with pytest.raises(
        ValueError, match=r"no images of kind 'MR' here; set data\.kind to one of 'CT CHEST 5MM' \(2\), "
    ):
        manifest.read(root, volumes=True, kind="MR")
    slices = manifest.read(root).rows
    assert len(slices) == 12 and {r.patient for r in slices} == {"LUNG-001", "LUNG-002"}
    by_date = manifest.read(root, patient_pattern=r"\d\d-\d\d-\d{4}").rows  # where headers say nonsense
    assert {r.patient for r in by_date} == {"01-01-2000", "02-02-2001"}
    how = dict(
        path=root, kind="CHEST", size=(5, 6, 8), intensity="window:-1000:1000", fractions={"train": 1.0}, cache=tmp_path
    )
    told = r"has gaps.*; there are several kinds of series, of which data\.kind chooses: 'CT CHEST 5MM' \(2\), 'CT SCOUT' \(1\)$"
    scouts = list((root / mixed).glob("1-*.dcm"))
    for number, path in enumerate(scouts):
        file = pydicom.dcmread(path)
        file.ImagePositionPatient = [0, 0, 3.0 * number]
        file.save_as(path)
    make_files.dicom(root / mixed / "far", volume[0, :4], ImagePositionPatient=[0, 0, 99.0], **scout_tags(scouts[0]))
    with pytest.raises(ValueError, match=told) as error:
        data.load(**(how | {"kind": None}))
    assert "\n" not in str(error.value)
    sets = data.load(**how)
    assert sets["train"].patients.tolist() == ["LUNG-001", "LUNG-002"] and sets["train"].spacing == (3.0, 0.5, 0.7)
    assert sets["train"].window == (-1000.0, 1000.0)
    for image in sets["train"].images:
        np.testing.assert_allclose(image[..., 0], volume / 1000, atol=4e-5)


def test_headers_are_read_once(tmp_path, monkeypatch):
    root, calls = tmp_path / "tree", []
    tcia(root)
    real = layouts._header
    monkeypatch.setattr(layouts, "_header", lambda path: calls.append(path) or real(path))
    again = lambda: (calls.clear(), manifest.read(root, volumes=True, cache=tmp_path / "cache"), len(calls))[1:]
    whole, cached = again(), again()
    assert whole[1] == 13 and cached[1] == 0 and whole[0] == cached[0]
    os.utime(root / "LUNG-002/seg.dcm", ns=(1, 1))
    assert again()[1] == 13 and len(list((tmp_path / "cache").iterdir())) == 1
    (root / "LUNG-001/cut.dcm").write_bytes((root / "LUNG-002/seg.dcm").read_bytes()[:140])
    (root / "LUNG-001/text.dcm").write_text("secret")
    with pytest.raises(
        ValueError, match=r"text\.dcm: its header cannot be read \(InvalidDicomError\).*on_error='skip'"
    ) as error:
        again()
    assert "secret" not in str(error.value)
    found = manifest.read(root, volumes=True, on_error="skip")
    assert len(found.rows) == 3 and "1 files or lines are left out" in found.notes[-1]


def test_a_header_that_could_not_be_read_is_tried_again(tmp_path, monkeypatch):
    """A failure of the network, under 'skip': of what was left out nothing is kept."""
    (tmp_path / "x").mkdir()
    for name in ("a", "b", "c"):
        make_files.dicom(tmp_path / "x" / f"{name}.dcm", make_files.EIGHT, PatientID=name)
    failing, calls, real = {"b.dcm"}, [], layouts.dicom.header

    def header(path):
        calls.append(os.path.basename(path))
        if calls[-1] in failing:
            raise OSError(5, "Input/output error", path)
        return real(path)

    monkeypatch.setattr(layouts.dicom, "header", header)
    again = lambda: (calls.clear(), manifest.read(tmp_path / "x", on_error="skip", cache=tmp_path / "cache"))[1]
    assert [r.patient for r in again().rows] == ["a", "c"] and sorted(calls) == ["a.dcm", "b.dcm", "c.dcm"]
    assert len(again().left_out) == 1 and calls == ["b.dcm"]
    failing.clear()
    assert [r.patient for r in again().rows] == ["a", "b", "c"] and calls == ["b.dcm"]
    again()
    assert calls == []


def test_a_header_behind_a_link_is_stale_when_the_file_changes(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.dcm").symlink_to(tmp_path / "a.dcm")
    for patient in ("before", "after"):
        make_files.dicom(tmp_path / "a.dcm", make_files.EIGHT, PatientID=patient)
        assert [r.patient for r in manifest.read(tmp_path / "x", cache=tmp_path / "cache").rows] == [patient]


def test_the_patient_of_a_loose_dicom_file_is_in_its_header(tmp_path, real_data):
    make_files.dicom(tmp_path / "a.dcm", make_files.EIGHT, PatientID="p7")
    make_files.picture(tmp_path / "b.png", make_files.EIGHT)
    (tmp_path / "m.csv").write_text("path,patient_id\na.dcm,\nb.png,p8\n")
    assert [r.patient for r in manifest.read(tmp_path / "m.csv").rows] == ["p7", "p8"]
    rows = manifest.read(real_data / "tcga_luad_ct").rows
    assert len(rows) == 30 and len({r.patient for r in rows}) == 10 and all(r.patient.startswith("TCGA-") for r in rows)


def test_tensorflow_datasets(tmp_path):
    import tensorflow_datasets as tfds

    images = make_files.RNG.integers(0, 256, (6, 12, 16, 1), dtype=np.uint8)

    class Knees(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(12, 16, 1)),
                "patient": tfds.features.Text(),
                "age": np.int32,
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(range(4)), "validation": self._generate_examples(range(4, 6))}

        def _generate_examples(self, which):
            for i in which:
                yield i, {"image": str(tmp_path / f"{i}.png"), "patient": f"p{i // 2}", "age": i}

    for i, image in enumerate(images):
        make_files.picture(tmp_path / f"{i}.png", image[..., 0])
    builder = Knees(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    found = manifest.read(builder.data_dir, cache=tmp_path / "cache")
    splits = {r.path: r.split for r in found.rows}
    assert (
        sorted(r.patient for r in found.rows) == ["p0", "p0", "p1", "p1", "p2", "p2"]
        and splits["validation/0000001"] == "val"
    )
    sets = data.load(
        path=builder.data_dir, size=(12, 16), fractions={"train": 0.5, "val": 0.5}, cache=tmp_path / "cache"
    )
    assert len(sets["train"].ids) == 4 and len(sets["val"].ids) == 2
    stored = {image.tobytes() for image in images}
    for image in [*sets["train"].images, *sets["val"].images]:
        assert np.round((image + 1) * 127.5).astype(np.uint8).tobytes() in stored
    with pytest.raises(ValueError, match="tfds:no_such_set: no prepared data set of tensorflow_datasets"):
        manifest.read("tfds:no_such_set")
    with pytest.raises(ValueError, match=r"has the image features image; set data.kind"):
        manifest.read(builder.data_dir, kind="mask")


def test_prepared_sets_of_ours_are_data_sets_too(tmp_path):
    """What we prepared is read by anyone's tensorflow_datasets, and by ourselves."""
    for i in range(6):
        make_files.picture(tmp_path / f"p{i}.png", np.roll(make_files.EIGHT, i))
    sets = data.load(
        path=tmp_path, patient_pattern="p.", size=(12, 16), fractions={"train": 1.0}, cache=tmp_path / "cache"
    )
    (folder,) = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    again = data.load(
        path=folder, patients="per_image", size=(12, 16), fractions={"train": 1.0}, cache=tmp_path / "cache"
    )
    np.testing.assert_array_equal(list(again["train"].images), list(sets["train"].images))
