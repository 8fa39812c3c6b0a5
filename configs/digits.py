"""Class-conditional diffusion on scikit-learn's 1,797 handwritten digits, 8x8: from nothing to pictures in minutes on a laptop.

    python -m ldm_jax.main --config=configs/digits.py --workdir=runs/digits
    python -m ldm_jax.main --workdir=runs/digits --mode=eval

2 min 26 s from start to pictures on two cores of an AMD EPYC virtual machine (float32, jax 0.10.2), compilation included. Of 1,000
samples 100 % are labelled as asked by a classifier of real digits; a classifier of samples alone labels 97.0 % of real test digits right.
"""
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(f"unknown variant {variant!r} of configs/digits.py; there is 'smoke'")
    config = ConfigDict()
    config.system = "pixel"
    config.seed = 0
    config.init_dir = ""  # the workdir of a run whose parameters are started from
    config.init_part = ""  # of that run: "" its averages, "params" what was averaged, or a path such as "ema/net"
    config.init_from = ""  # a published checkpoint's directory, whose nets are then trained on in place of those below
    config.data = dict(name="digits", image_shape=(8, 8, 1), num_classes=10, flip=False, num_workers=0)
    config.process = dict(schedule=dict(name="cosine"), parameterization="v", times="uniform", weight="simple",
                          learned_variance=False)
    config.conditioners = {"class": {"drop": 0.1}}
    config.net = dict(
        name="unet",
        unet=dict(width=32, mults=(1, 2), num_res_blocks=1, attention=(4,), num_heads=4, dropout=0.1, norm_groups=8),
        dit=dict(patch=2, width=128, depth=6, num_heads=4, time_shift=1.0, dropout=0.1))
    config.optimizer = dict(name="adam", learning_rate=2e-3, warmup_steps=100, decay="cosine", clip_norm=1.0)
    config.train = dict(batch_size=64, steps=900, accumulate=1, ema_decay=0.995, log_every=50, save_every=300, keep=2,
                        keep_every=0, keep_best="", averages=dict(stds=(), every=1000), steps_per_dispatch=1)
    config.sampler = dict(name="ddim", steps=50, guidance=1.5, grid="uniform", batch_size=250,
                          ddim=dict(eta=0.0), ddpm=dict(variance="small"))
    config.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1, rules=())
    config.eval = dict(samples=1000, real=5000, seed=1)
    if variant == "smoke":
        config.optimizer.warmup_steps = 5
        config.train.update(steps=20, save_every=10)
        config.net.unet.update(width=8, num_res_blocks=1, num_heads=1, norm_groups=4)
        config.net.dit.update(width=16, depth=1, num_heads=1)
        config.sampler.steps = 4
        config.eval.samples = 50
    return config
