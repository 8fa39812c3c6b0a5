"""Latent diffusion on CIFAR-10 in two stages in one run: a KL autoencoder (32x32x3 -> 16x16x4; configs/autoencoder_cifar.py), then a
class-conditional denoiser in its latents, which are encoded once and kept on disk.

    python -m ldm_jax.main --config=configs/ldm_cifar.py --workdir=runs/ldm_cifar

Sized for one GPU or a TPU pod; time and result there: not yet measured. The first use downloads CIFAR-10 and prepares it.
`:laptop` runs both stages on two CPU cores, with latents of 8x8x4: a first stage of 25.2 dB, and samples of which 49.8 % are labelled as
asked by a classifier of real pictures (chance: 10 %). `:smoke` shows the path in two or three minutes.
"""
import os
import runpy

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

FIRST_STAGE = runpy.run_path(os.path.join(os.path.dirname(__file__), "autoencoder_cifar.py"))["get_config"]


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "laptop", "smoke"):
        raise ValueError(f"unknown variant {variant!r} of configs/ldm_cifar.py; there are 'laptop' and 'smoke'")
    config = ConfigDict()
    config.system = "latent"
    config.seed = 0
    config.init_from = ""  # a published checkpoint's directory, whose nets are then trained on in place of those below
    config.first_stage = FIRST_STAGE(variant)
    config.first_stage_dir = ""  # the workdir of a finished first stage, to be used in place of training one
    config.init_dir = ""  # the workdir of a run of both stages to go on from: its parameters, in a run of its own
    config.init_part = ""  # of that run: "" its averages, "params" what was averaged, or a path such as "ema/net"
    config.latents = dict(cache=True, dir="")  # the first stage's latents on disk, in WORKDIR/latents unless dir names another place
    config.data = config.first_stage.data  # one object: what is set for one stage is set for both
    config.process = dict(schedule=dict(name="cosine"), parameterization="v", times="uniform", weight="simple",
                          learned_variance=False)
    config.conditioners = {"class": {"drop": 0.1}}
    config.net = dict(
        name="unet",
        unet=dict(width=128, mults=(1, 2, 2), num_res_blocks=2, attention=(8,), num_heads=4, dropout=0.1, norm_groups=placeholder(int)),
        dit=dict(size="S", patch=2, time_shift=1.0))
    config.optimizer = dict(name="adamw", learning_rate=2e-4, warmup_steps=1000, decay="constant", clip_norm=1.0,
                            adamw=dict(weight_decay=0.0), muon=dict(adam_ratio=0.05))
    config.train = dict(batch_size=256, steps=200_000, accumulate=1, ema_decay=0.9999, log_every=100, save_every=10_000, keep=2,
                        keep_every=0, keep_best="", averages=dict(stds=(), every=1000))
    config.sampler = dict(name="ddim", steps=50, guidance=1.5, grid="uniform", batch_size=250,
                          ddim=dict(eta=0.0), ddpm=dict(variance="small"))
    config.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1, rules=())
    config.eval = dict(samples=1000, real=5000, seed=1)
    if variant:
        config.net.unet.update(width=48, mults=(1, 2), num_res_blocks=1, attention=(4,), dropout=0.0)
        config.net.dit.update(patch=1, width=192, depth=6, num_heads=6)
        config.optimizer.update(name="muon", learning_rate=0.02, warmup_steps=50, decay="cosine")
        config.train.update(batch_size=64, steps=2000, ema_decay=0.998, log_every=50, save_every=500)
        config.sampler.update(steps=25, guidance=2.0)
        config.data.limit = 20_000
    if variant == "smoke":
        config.data.limit = 2048
        config.net.unet.update(width=32)
        config.net.dit.update(width=64, depth=2, num_heads=2)
        config.train.update(batch_size=32, steps=100, ema_decay=0.98, log_every=20, save_every=100)
        config.sampler.steps = 10
        config.eval.update(samples=200, real=1000)
    return config
