"""Class-conditional rectified flow on Fashion-MNIST, 28x28, sized for one GPU; `:smoke` shows the path on a small machine.

    python -m ldm_jax.main --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist

Time and result on a GPU: not yet measured. The first use downloads the four official archives and prepares them.
"""
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(f"unknown variant {variant!r} of configs/fashion_mnist.py; there is 'smoke'")
    config = ConfigDict()
    config.system = "pixel"
    config.seed = 0
    config.init_dir = ""  # the workdir of a run whose parameters are started from
    config.init_part = ""  # of that run: "" its averages, "params" what was averaged, or a path such as "ema/net"
    config.init_from = ""  # a published checkpoint's directory, whose nets are then trained on in place of those below
    config.data = dict(name="tfds", tfds=dict(name="fashion_mnist", data_dir=placeholder(str)), image_shape=(28, 28, 1), num_classes=10,
                       flip=True, num_workers=0)
    config.process = dict(schedule=dict(name="rectified_flow"), parameterization="flow", times="logit_normal", weight="simple",
                          learned_variance=False)
    config.conditioners = {"class": {"drop": 0.1}}
    config.net = dict(
        name="unet",
        unet=dict(width=64, mults=(1, 2, 2), num_res_blocks=2, attention=(14,), num_heads=4, dropout=0.1, norm_groups=placeholder(int)),
        dit=dict(size="S", patch=2, time_shift=1.0))
    config.optimizer = dict(name="adamw", learning_rate=3e-4, warmup_steps=1000, decay="cosine", clip_norm=1.0,
                            adamw=dict(weight_decay=1e-4))
    config.train = dict(batch_size=256, steps=40_000, accumulate=1, ema_decay=0.9995, log_every=100, save_every=5_000, keep=2,
                        keep_every=0, keep_best="", averages=dict(stds=(), every=1000))
    config.sampler = dict(name="euler", steps=50, guidance=1.5, grid="uniform", batch_size=250,
                          ddim=dict(eta=0.0))
    config.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1, rules=())
    config.eval = dict(samples=1000, real=5000, seed=1)
    if variant == "smoke":
        config.data = dict(name="shapes", shapes=dict(size=32), image_shape=(32, 32, 3), num_classes=10, flip=True, num_workers=0)
        config.optimizer.warmup_steps = 5
        config.train.update(batch_size=32, steps=20, save_every=10, log_every=5)
        config.net.unet.update(width=8, num_res_blocks=1, attention=(), num_heads=1)
        config.net.dit.update(patch=4, width=32, depth=2, num_heads=2)
        config.sampler.steps = 4
        config.eval.update(samples=50, real=500)
    return config
