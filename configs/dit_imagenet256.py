"""DiT-XL/2 on ImageNet at 256 x 256, from a published checkpoint's directory: pictures of classes, and training on from there.

    python -m ldm_jax.main --config=configs/dit_imagenet256.py --mode=sample --workdir=runs/dit --weights=DIR --class_id=207,360,387

Training goes on from --config.init_from=DIR with ImageNet from TFDS, which must be prepared; any directory of one folder per class
does as well (--config.data.name=folder). Time and result: not yet measured.
"""
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(variant: str = "") -> ConfigDict:
    if variant:
        raise ValueError(f"unknown variant {variant!r} of configs/dit_imagenet256.py; there is none")
    config = ConfigDict()
    config.system = "published"
    config.seed = 0
    config.init_dir = ""  # the workdir of a run whose parameters are started from
    config.init_part = ""  # of that run: "" its averages, "params" what was averaged, or a path such as "ema/net"
    config.init_from = ""  # the directory of the checkpoint that training starts from
    config.size = placeholder(tuple)  # (height, width) of the pictures that --weights makes, where they are not to have its own size
    config.dtype = "float32"  # of the computation; "bfloat16" on a GPU or TPU
    config.data = dict(name="tfds", tfds=dict(name="imagenet2012", data_dir=None), folder=dict(path="", image_size=256),
                       image_shape=(256, 256, 3), num_classes=1000, flip=True, num_workers=0)
    config.process = dict(schedule=dict(name="published"), parameterization="eps", times="uniform", weight="simple",
                          learned_variance=True)
    config.conditioners = {"class": {"drop": 0.1}}
    config.lora = dict(rank=0, alpha=8.0, targets=("(^|/)(q|k|v|qkv|out)/kernel$",), nets=("net",))  # rank 0 trains all weights instead
    config.latents = dict(cache=False, dir="")
    config.optimizer = dict(name="adamw", learning_rate=1e-4, warmup_steps=0, decay="constant", clip_norm=1.0,
                            adamw=dict(weight_decay=0.0))
    config.train = dict(batch_size=256, steps=400_000, accumulate=1, ema_decay=0.9999, log_every=100, save_every=10_000, keep=2,
                        keep_every=0, keep_best="", averages=dict(stds=(), every=1000))
    config.sampler = dict(name="", steps=250, guidance=4.0, grid="", batch_size=16)  # "" is what the checkpoint's scheduler says
    config.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1, rules=())
    config.eval = dict(samples=1000, real=5000, seed=1)
    return config
