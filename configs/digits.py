"""Class-conditional diffusion on scikit-learn's 1,797 handwritten digits, 8x8, from nothing to pictures.

    python -m ldm_jax.main --config=configs/digits.py --workdir=runs/digits
"""
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(f"unknown variant {variant!r} of configs/digits.py; there is 'smoke'")
    config = ConfigDict()
    config.system = "pixel"
    config.seed = 0
    config.data = ConfigDict(dict(name="digits", digits=dict(), image_shape=(8, 8, 1), num_classes=10, flip=False))
    config.process = ConfigDict(dict(schedule=dict(name="cosine", linear=dict(), cosine=dict(), rectified_flow=dict()),
                                     parameterization="v", times="uniform", weight="simple", class_dropout=0.1))
    config.net = ConfigDict(dict(name="unet",
                                 unet=dict(width=64, mults=(1, 2), num_res_blocks=2, attention=(4,), num_heads=4, dropout=0.1),
                                 dit=dict(patch=1, width=128, depth=6, num_heads=4)))
    config.optimizer = ConfigDict(dict(name="adam", learning_rate=1e-3, warmup_steps=100, decay="cosine", clip_norm=1.0, adam=dict()))
    config.train = ConfigDict(dict(batch_size=128, steps=2000, ema_decay=0.995, accumulate=1, log_every=50, save_every=500, keep=2))
    config.sampler = ConfigDict(dict(name="ddim", steps=50, guidance=1.5, grid="uniform", batch_size=250, ddim=dict(eta=0.0), ddpm=dict(variance="small")))
    config.mesh = ConfigDict(dict(data=-1, fsdp=1))
    config.eval = ConfigDict(dict(samples=1000, real=5000, seed=1))
    if variant == "smoke":
        config.train.update(steps=20, save_every=10)
        config.optimizer.warmup_steps = 5
        config.sampler.steps = 4
        config.eval.samples = 50
    return config
