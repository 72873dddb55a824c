"""Knee MR of MRNet, sagittal exams, at the size of Dar et al. (arXiv 2402.01054): 32x256x256.

    python main.py --config=configs/mri.py --config.data.path=MRNet-v1.0 --mode=train,sample,audit --workdir=runs/mri

MRNet-v1.0 is Stanford's folder with train/sagittal/0000.npy and valid/sagittal/1130.npy: 1,250 exams. The five-fold split
of the paper's numbers: 904 exams train and 226 are unseen; the other 120, as many as Stanford keeps for validation, choose
checkpoints and are the audit's negative control. `--config.data.fold=0` to 4 are the five folds: each of the 1,130 is unseen
in one of them, and the other 120 stay. `--config.data.splits=FILE`, a CSV with patient_id,split that names every exam
(0000, 0001, ...), is any other partition, without folds.
MRNet names no patients, so each exam counts as one, of which every report warns: by Stanford's account its 1,130 training
exams are of 1,088 patients, so a few patients may be in two splits.

Hardware: one accelerator of 24 GB; 6 GB of disk for prepared volumes and latents. By `--config.dry_run=True
--config.plan.devices=1` the autoencoder takes 7.8 GB in all (49 GB without the settings of memory below), the diffusion
model 2.7, the detector 7.1, looks and sampling 8.7. It was not run here: no other cost and no result is claimed.

`:paper` has the published settings of the copy detector (Dar et al. and the authors' code): strided convolutions to 4x4x4,
batches of 10, 200 epochs, one view turned by up to 5 degrees and flipped. Their generators' settings are not published;
both variants follow MONAI's 3D latent diffusion tutorial.

`:tiny` for a laptop: 8x48x48 and small models; not run either, it has as many voxels and the same models as
configs/hippocampus.py:tiny, whose cost is measured.
"""

from ml_collections import ConfigDict

from configs import default

TRAIN, VAL, SELECT, CONTROL = 904, 226, 20, 100  # of MRNet's 1,250 exams


def get_config(variant: str = "") -> ConfigDict:
    default.only(variant, "", "tiny", "paper")
    config = default.get_config()
    config.data.update(layout="mrnet", kind="sagittal", size=(32, 256, 256), intensity="minmax", fit="exact")
    exams = TRAIN + VAL + SELECT + CONTROL
    counts = {"train": TRAIN, "select": SELECT, "val": VAL, "control": CONTROL}
    config.data.fractions = {split: count / exams for split, count in counts.items()}
    config.data.update(splits="hash", seed=3, fold=0)  # gives 904, 226, 18 and 102 exams
    if variant == "tiny":
        default.volumes(config)
        config.data.update(size=(8, 48, 48), fit="crop")
        return config
    default.monai_volumes(config, images=TRAIN)
    # of memory: activations in 16 bits and computed again for the backward pass, two volumes at a time
    config.update(dtype="bfloat16", remat=True)
    config.train.autoencoder.accumulate = 2
    if variant == "paper":
        default.paper_detector(config)
        config.detector.update(arch="strided", strides=((2, 2, 2),) * 3 + ((1, 2, 2),) * 3, hidden=16, dim=32)
        default.paper_detector_training(config, images=TRAIN, batch=10)
        config.augment.autoencoder.update(flip=0.0, rotate=0.0, shift=0.0, scale=0.0)
    return config
