"""Knee MR slices of fastMRI (NYU): 320x320, proton density without fat suppression, split by patient.

    python main.py --config=configs/fastmri.py --config.data.path=FASTMRI --mode=train,sample,audit --workdir=runs/fastmri

FASTMRI is a folder with singlecoil_train/ and singlecoil_val/ (or multicoil_*), whose .h5 files hold their reconstruction,
their acquisition and their patient. Every second section of the middle half of each volume is an image; the slices of a
patient stay together. NYU's training volumes train; its validation volumes are the audit's null and negative control. Other
acquisitions: `--config.data.kind=CORPDFS_FBK`, or `AXT2` and the like in the brain set. Dar et al. (arXiv 2402.01054) used
fastMRI; which part, and at what size, is not published.

Hardware: one accelerator of 8 GB: by `--config.dry_run=True --config.plan.devices=1` no stage takes more than 7.1 GB (40
GB without 16 bits and recomputation). It was not run here: no other cost and no result is claimed. `:tiny`, for a
laptop, has the default's models of 64x64 images, which take minutes on two cores; it was not run on fastMRI either.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    default.only(variant, "", "tiny")
    config = default.get_config()
    config.data.update(
        layout="fastmri", kind="CORPD_FBK", slices="z:25%:75%:2", intensity="percentile:0:99.8", fit="crop"
    )
    config.audit.fdr = 0.1
    if variant == "tiny":
        return config
    config.data.size = (320, 320)
    config.update(dtype="bfloat16", remat=True)
    config.autoencoder.update(widths=(64, 128, 128, 128), strides=(2, 2, 2), patch=1, latent=4, blocks=2)
    config.autoencoder.kl_weight = 1e-6  # per pixel, as in Rombach et al. 2022, who sum errors and KL alike
    config.unet.update(width=128, mults=(1, 2, 4), blocks=2, attention=(False, True, True))
    config.detector.update(widths=(32, 64, 128), blocks=(1, 2, 2), dim=128)
    config.train.autoencoder.update(steps=40_000, batch=16)
    config.train.autoencoder.optimiser.rate = 1e-4
    config.train.diffusion.update(steps=60_000, batch=32, ema=(0.999, 0.9999))
    config.train.diffusion.optimiser.rate = 1e-4
    config.train.detector.steps = 5000
    config.sample.update(n=2000, batch=64)
    return config
