"""Volumes of the hippocampus region: Medical Segmentation Decathlon, Task04 (MR at 1 mm; CC BY-SA 4.0, Antonelli et al. 2022).

    python main.py --config=configs/hippocampus.py:tiny --config.data.path=PATH --mode=train,sample,audit --workdir=runs/hippocampus

PATH is Task04_Hippocampus, or a folder of its hippocampus_*.nii.gz alone: a patient a file. Intensities differ between
files by factors of thousands, so each volume is scaled by its own percentiles.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    default.only(variant, "", "tiny")
    config = default.get_config()
    default.volumes(config)
    config.augment.autoencoder.flip = 0.0  # all lie the same way round
    config.data.update(size=(32, 48, 32), intensity="percentile:0.5:99.5", fit="crop")
    # the null is by patient: the more unseen patients, the fewer copies can be told from chance
    config.data.fractions = {"train": 0.5, "select": 0.06, "val": 0.24, "control": 0.2}
    config.audit.fdr = 0.1
    if variant == "tiny":
        config.data.size = (24, 32, 24)
        config.audit.exit_code = False  # so few patients end in INCONCLUSIVE
    else:
        config.autoencoder.widths = (32, 64)
        config.unet.update(width=96)
        config.train.autoencoder.update(steps=4000)
        config.train.diffusion.update(steps=10_000)
        config.train.detector.update(steps=1000)
        config.sample.n = 128
    return config
