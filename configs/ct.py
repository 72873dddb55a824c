"""Sub-volumes of CT around given places, such as plaques, at the size of Dar et al. (arXiv 2402.01054): 64x64x64.

    python main.py --config=configs/ct.py --config.data.path=PATH --config.data.centres=centres.csv \\
        --mode=train,sample,audit --workdir=runs/ct

PATH is a tree of DICOM series, a folder of NIfTI, NRRD or MHA volumes (with `--config.data.patient_pattern`), or a CSV
with path,patient_id. centres.csv has a line for each sub-volume: path,z,y,x and, if wanted, name,unit; `unit` is voxel or
mm; `path` is the volume's file relative to PATH ('a/scan.nii.gz'), of a DICOM series its folder ('patient/study/series'),
or FOLDER#SERIESINSTANCEUID where a folder holds several. The sub-volumes of a patient stay together. `python -m data`
shows them before anything is trained. Without centres nothing runs; `--config.data.centres=none` takes the middle of whole
volumes.

Settings are for a few hundred sub-volumes of coronary CT angiography on a grid of 0.4 mm: for other organs, set
`data.spacing` and `data.intensity`, and the steps for other numbers. The paper's set is private, its exact spacing and
window are not published.

Hardware: one accelerator of 8 GB: by `--config.dry_run=True --config.plan.devices=1` no stage takes more than 6.1 GB. It
was not run here: no other cost and no result is claimed.

`:paper` has the published settings of the copy detector (Dar et al. and the authors' code): strided convolutions to 4x4x4,
batches of 10, 200 epochs, one view turned by up to 5 degrees and flipped. Their generators' settings are not published;
both variants follow MONAI's 3D latent diffusion tutorial.

`:tiny` for a laptop: 24x24x24 at 1 mm and small models; not run either, it has fewer voxels than
configs/hippocampus.py:tiny, whose cost is measured, and the same models.
"""

from ml_collections import ConfigDict

from configs import default

SUB_VOLUMES = 240  # in training, about: what the numbers of steps are for


def get_config(variant: str = "") -> ConfigDict:
    default.only(variant, "", "tiny", "paper")
    config = default.get_config()
    # HU: fat and lung are dark, calcium is not cut off
    config.data.update(size=(64, 64, 64), spacing=(0.4, 0.4, 0.4), intensity="window:-200:1000", fit="exact")
    config.data.centres = ""  # must be given
    if variant == "tiny":
        default.volumes(config)
        config.data.update(size=(24, 24, 24), spacing=(1.0, 1.0, 1.0))
        return config
    default.monai_volumes(config, images=SUB_VOLUMES)
    if variant == "paper":
        default.paper_detector(config)
        config.detector.update(arch="strided", strides=((2, 2, 2),) * 4, hidden=16, dim=32)
        default.paper_detector_training(config, images=SUB_VOLUMES, batch=10)
        config.augment.autoencoder.update(flip=0.0, rotate=0.0, shift=0.0, scale=0.0)
    return config
