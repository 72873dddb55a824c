"""Chest X-rays of NIH ChestX-ray14, split by patient.

    python main.py --config=configs/xray.py --config.data.path=NIH --mode=train,sample,audit --workdir=runs/xray

NIH is a folder with Data_Entry*.csv and images*/, an image folder, or a CSV manifest. Default: 64x64, two cores, minutes.
Where NIH's train_val_list.txt and test_list.txt lie in it, they are the split: patients of the first train, those of the second
are unseen; `--config.data.splits=hash` leaves them out of account.

`:compare` is for the comparison of generators in RESULTS.md, each with `--config.generator=ldm`, `vae` and `gan`: few
training images, so that what memorizes does so within minutes, and as many training steps as give each the same FLOPs by
XLA's count of the uncompiled step.

`:paper` holds the published settings of the copy detector (Dar et al., arXiv 2402.01054, and the authors' code) at
512x512: 10,000 training and 200 validation images, ResNet-50 from scratch (theirs starts from ImageNet weights), whose
checkpoint is chosen on validation as they did. It needs two accelerators of 80 GB or more: by `--config.dry_run=True
--config.plan.devices=1` the generator's stages take 23 GB at most, the detector on its batches of 64 takes 95 GB, which
devices share. It was not run here. The generator of their X-ray experiment is not published; the one here follows MONAI's
2D latent diffusion tutorial, whose KL weight is 1e-6 on images of 64x64.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    default.only(variant, "", "compare", "small", "tiny", "paper")
    config = default.get_config()
    # the null is by patient: the more unseen patients, the fewer copies can be told from chance
    config.data.fractions = {"train": 0.5, "select": 0.05, "val": 0.25, "control": 0.2}
    config.audit.fdr = 0.1
    config.train.autoencoder.update(steps=500)
    config.train.diffusion.update(steps=1000)
    config.train.detector.update(steps=600, batch=64)
    config.sample.n = 192
    if variant == "small":
        default.small(config)
        config.data.fractions = {"train": 0.45, "select": 0.05, "val": 0.4, "control": 0.1}
        config.data.limit.train = 32
    if variant == "tiny":
        default.shrink(config)
    if variant == "compare":
        config.data.fractions = {"train": 0.2, "select": 0.05, "val": 0.4, "control": 0.35}
        config.data.limit.train = 48
        config.train.detector.batch = 32  # not more than there are images: an image is no negative of itself
        config.train.vae.steps, config.train.gan.steps = 1300, 990
        for stage in ("autoencoder", "diffusion", "vae", "gan"):
            config.train[stage].eval_every = 500
    if variant == "paper":
        config.data.update(size=(512, 512), intensity="minmax")
        config.data.limit = {"train": 10_000, "val": 200}
        config.augment.autoencoder.update(flip=0.0, rotate=0.0, shift=0.0, scale=0.0)
        config.update(dtype="bfloat16", remat=True)
        config.train.autoencoder.accumulate = config.train.diffusion.accumulate = 2
        config.autoencoder.update(widths=(128, 128, 256), strides=(2, 2), patch=1, latent=3, blocks=2)
        config.autoencoder.kl_weight = default.monai_kl(1e-6, (64, 64))
        config.unet.update(width=128, mults=(1, 2, 4), blocks=2, attention=(False, True, True))
        config.diffusion.update(schedule="linear", beta=(0.0015, 0.0195), predict="eps")
        default.paper_detector(config)
        config.detector.update(widths=(64, 128, 256, 512), blocks=(3, 4, 6, 3), bottleneck=True, stem=7, dim=128)
        default.paper_detector_training(config, images=10_000, batch=64)
        config.train.autoencoder.update(steps=100 * 10_000 // 16, batch=16)
        config.train.autoencoder.optimiser.update(rate=1e-4)
        config.train.diffusion.update(steps=150 * 10_000 // 32, batch=32)
        config.train.diffusion.optimiser.update(rate=1e-4)
        config.sample.update(n=10_000, batch=16, sampler="ddpm", steps=1000)
    return config
