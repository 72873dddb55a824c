"""Volumes of the hippocampus region: Medical Segmentation Decathlon, Task04 (MR at 1 mm; CC BY-SA 4.0, Antonelli et al. 2022).

    python main.py --config=configs/hippocampus.py:tiny --config.data.path=PATH --mode=train,sample,audit --workdir=runs/hippocampus

PATH is Task04_Hippocampus, or a folder of its hippocampus_*.nii.gz alone: a patient a file. Intensities differ between
files by factors of thousands, so each volume is scaled by its own percentiles.

`:tiny`, 24x32x24, on 131 of the volumes (71 train, 10 select, 28 null, 22 control): 9 min 38 s and 3.2 GiB on two CPU cores, one
of which another run used half of the time. The 64 samples look like the data, slightly smoother. None is flagged as a copy (0.0 %
[0.0, 5.6]; the paper's rule says 21.9 % [12.5, 34.0], and 9.1 % [0.0, 29.2] of unseen patients), all planted copies are seen, 100
% [79.4, 100], and at most 7.1 % of the samples are copies. The verdict is INCONCLUSIVE: 28 unseen patients are far too few to notice a
copy rate of 5 %.

VQ as well as KL: with `--config.autoencoder.codes=512` and 400 steps of the autoencoder, ten unseen volumes are
reconstructed at a PSNR of 22.0 dB and an SSIM of 0.79, 98 % of the codes in use (perplexity 414); KL at as many steps, 22.8
dB and 0.83. After 500 steps of the diffusion model on the VQ latents its samples look like the data, blurred; they were
not audited.

The default, 32x48x32 with larger models and some ten times the steps, is for an accelerator. It was not run.
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
