"""A semi-synthetic brain MR cohort that needs no download: few subjects, long training, so that the model memorizes.

    python main.py --config=configs/brain.py --mode=train,sample,audit --workdir=runs/brain
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = '') -> ConfigDict:
    default.only(variant, '', 'early', 'large', 'tiny')
    config = default.get_config()
    if variant == 'early':  # the same subjects, stopped early
        config.train.diffusion.steps = 200
    if variant == 'large':  # many more subjects
        config.data.cohort.subjects.train = 1024
    if variant == 'tiny':  # seconds: for tests of the path, not of the result
        config.data.cohort.subjects = {'train': 16, 'select': 8, 'val': 24, 'control': 16}
        config.data.size = (32, 32)
        config.autoencoder.update(widths=(8, 16), strides=(2,), latent=4)
        config.unet.update(width=16, blocks=1)
        config.detector.update(widths=(8, 16), blocks=(1, 1), dim=16)
        for stage in config.train.values():
            stage.update(steps=8, batch=8, eval_every=4, save_every=4, log_every=2)
        config.sample.update(n=12, batch=8, steps=4)
        config.audit.update(batch=8, pairs=4)
    return config
