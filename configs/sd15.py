"""Stable Diffusion 1.x, from a published checkpoint's directory (model_index.json): pictures of prompts, and training on from there.

    python -m ldm_jax.main --config=configs/sd15.py --mode=sample --workdir=runs/sd15 --weights=DIR --prompt="a red fox in the snow"
    python -m ldm_jax.main --config=configs/sd15.py --workdir=runs/mine --config.init_from=DIR --config.data.folder.path=PICTURES

PICTURES is a directory of images with their captions: metadata.jsonl with lines {"file_name": ..., "text": ...}, or a .txt beside
each. All weights of the U-Net are trained; `:lora` trains adapters of rank 8 in its transformers and nothing else. The process is the
checkpoint's own unless process.schedule names another. Stable Diffusion 2 and inpainting checkpoints work alike. Time and result of a
training run: not yet measured.
"""
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "lora"):
        raise ValueError(f"unknown variant {variant!r} of configs/sd15.py; there is 'lora'")
    config = ConfigDict()
    config.system = "published"
    config.seed = 0
    config.init_dir = ""  # the workdir of a run whose parameters are started from
    config.init_part = ""  # of that run: "" its averages, "params" what was averaged, or a path such as "ema/net"
    config.init_from = ""  # the directory of the checkpoint that training starts from
    config.size = placeholder(tuple)  # (height, width) of the pictures that --weights makes, where they are not to have its own size
    config.dtype = "float32"  # of the computation; "bfloat16" on a GPU or TPU
    config.data = dict(name="folder", folder=dict(path="", image_size=512), image_shape=(512, 512, 3), num_classes=None,
                       fields=dict(text=(1024,)), flip=False, num_workers=0)
    config.process = dict(schedule=dict(name="published"), parameterization="eps", times="uniform", weight="simple",
                          learned_variance=False)
    config.conditioners = dict(prompt=dict(drop=0.1))
    config.lora = dict(rank=0, alpha=8.0, targets=("attention/(q|k|v|out)/kernel$",), nets=("net",))  # rank 0 trains all weights instead
    config.latents = dict(cache=False, dir="")
    config.optimizer = dict(name="adamw", learning_rate=1e-5, warmup_steps=500, decay="constant", clip_norm=1.0,
                            adamw=dict(weight_decay=0.01))
    config.train = dict(batch_size=16, steps=10_000, accumulate=1, ema_decay=0.9999, log_every=50, save_every=1000, keep=2,
                        keep_every=0, keep_best="", averages=dict(stds=(), every=1000))
    config.sampler = dict(name="", steps=50, guidance=7.5, grid="", batch_size=4)  # "" is what the checkpoint's scheduler says
    config.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1, rules=())
    config.eval = dict(samples=1000, real=5000, seed=1)
    if variant == "lora":
        config.lora.rank = 8
        config.optimizer.learning_rate = 1e-4
    return config
