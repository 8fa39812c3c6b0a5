"""DDPM on CIFAR-10 pixels: the 35.7M-parameter U-Net, linear betas, eps-prediction and 1000 ancestral steps of Ho et al. 2020.

    python -m ldm_jax.main --config=configs/ddpm_cifar.py --workdir=runs/ddpm_cifar

Unconditional, batch 128, 800,000 updates, sized for one GPU or more; FID 3.17 in the paper. Time and result here: not yet measured.
"""
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ldm_jax.recipe import cifar10_or_shapes


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(f"unknown variant {variant!r} of configs/ddpm_cifar.py; there is 'smoke'")
    config = ConfigDict()
    config.system = "pixel"
    config.seed = 0
    config.init_dir = ""  # the workdir of a run whose parameters are started from
    config.init_part = ""  # of that run: "" its averages, "params" what was averaged, or a path such as "ema/net"
    config.init_from = ""  # a published checkpoint's directory, whose nets are then trained on in place of those below
    config.data = dict(name="tfds", tfds=dict(name="cifar10", data_dir=placeholder(str)), image_shape=(32, 32, 3), num_classes=None,
                       flip=True, num_workers=0)
    config.process = dict(schedule=dict(name="linear", linear=dict(timesteps=1000, beta_start=1e-4, beta_end=0.02)),
                          parameterization="eps", times="uniform", weight="simple", learned_variance=False)
    config.conditioners = {}
    config.net = dict(
        name="unet",
        unet=dict(width=128, mults=(1, 2, 2, 2), num_res_blocks=2, attention=(16,), dropout=0.1, timesteps=1000,
                  norm_groups=placeholder(int)),
        dit=dict(size="S", patch=2, time_shift=1.0))
    config.optimizer = dict(name="adam", learning_rate=2e-4, warmup_steps=5000, decay="constant", clip_norm=1.0)
    config.train = dict(batch_size=128, steps=800_000, accumulate=1, ema_decay=0.9999, log_every=100, save_every=10_000, keep=2,
                        keep_every=0, keep_best="", averages=dict(stds=(), every=1000))
    config.sampler = dict(name="ddpm", steps=1000, guidance=1.0, grid="uniform", batch_size=256,
                          ddpm=dict(variance="large"), ddim=dict(eta=0.0))
    config.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1, rules=())
    config.eval = dict(samples=1000, real=5000, seed=1)
    if variant == "smoke":
        config.data = dict(**cifar10_or_shapes(), image_shape=(32, 32, 3), num_classes=None, flip=True, num_workers=0)
        config.optimizer.warmup_steps = 5
        config.train.update(batch_size=16, steps=20, save_every=10, log_every=5)
        config.net.unet.update(width=16, num_res_blocks=1)
        config.net.dit.update(patch=4, width=32, depth=2, num_heads=2)
        config.sampler.steps = 10
    return config
