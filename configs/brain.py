"""A semi-synthetic brain MR cohort that needs no download: few subjects, long training, so that the model memorizes.

python main.py --config=configs/brain.py --mode=train,sample,audit --workdir=runs/brain

Two CPU cores: about four minutes and 1.7 GiB. Every sample is expected to be a copy; with `:early` and `:large` none.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
    default.only(variant, "", "early", "large", "small", "tiny")
    config = default.get_config()
    config.audit.exit_code = False  # a demonstration whose verdict is known: FAIL
    config.train.autoencoder.steps = 1000  # a decoder that blurs hides what was copied
    config.train.detector.batch = 32  # not more than there are subjects: an image is no negative of itself
    if variant == "early":  # the same subjects, stopped early
        config.train.diffusion.steps = 200
    if variant == "large":  # many more subjects
        config.data.cohort.subjects.train = 1024
    if variant == "small":
        default.small(config)
    if variant == "tiny":
        config.data.cohort.subjects = {"train": 16, "select": 8, "val": 24, "control": 16}
        default.shrink(config)
    return config
