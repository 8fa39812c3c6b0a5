"""Conditional diffusion of drawn shapes, 16x16: each variant shows one kind of condition, and `all` several together.

    python -m ldm_jax.main --config=configs/shapes.py:map --workdir=runs/shapes_map

Variants: the default takes class and vector (everything that a picture is drawn from); `class`, `vector`, `sequence`, `map`,
`low_resolution` (enlarges 4x4), `masked` (fills a rectangle in) and `all`; `classifier` trains a classifier of noisy images, to be
given as --config.sampler.classifier_dir to an unconditional run, `unconditional`. NAME_smoke, and `smoke`, are small. Data is drawn,
nothing is downloaded. Rows of samples/grid.png are conditions and, below them, results.
"""
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

CONDITIONERS = {
    "class": dict(drop=0.1),
    "vector": dict(drop=0.1),
    "sequence": dict(mask_field="sequence_mask", drop=0.1),
    "semantic_map": dict(classes=11, drop=0.1),
    "low_resolution": dict(factor=4, max_noise=0.3, drop=0.0),
    "masked_image": dict(smallest=0.25, largest=0.75, drop=0.0),
}
FIELDS = {"vector": dict(vector=(9,)), "sequence": dict(sequence=(3, 13), sequence_mask=(3,)), "semantic_map": dict(map=(16, 16))}
VARIANTS = {
    "": ("class", "vector"), "class": ("class",), "vector": ("vector",), "sequence": ("sequence",), "map": ("semantic_map",),
    "low_resolution": ("low_resolution",), "masked": ("masked_image",), "all": tuple(CONDITIONERS), "unconditional": (), "classifier": (),
}


def get_config(variant: str = "") -> ConfigDict:
    name, smoke = variant.removesuffix("smoke").removesuffix("_"), variant.endswith("smoke")
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of configs/shapes.py; there are {', '.join(filter(None, VARIANTS))}, "
                         f"'smoke' and each with '_smoke'")
    config = ConfigDict()
    config.system = "classifier" if name == "classifier" else "pixel"
    config.seed = 0
    config.init_dir = ""  # the workdir of a run whose parameters are started from
    config.init_part = ""  # of that run: "" its averages, "params" what was averaged, or a path such as "ema/net"
    config.init_from = ""  # a published checkpoint's directory, whose nets are then trained on in place of those below
    fields = {field: shape for kind in VARIANTS[name] for field, shape in FIELDS.get(kind, {}).items()}
    config.data = dict(name="shapes", shapes=dict(size=16, count=20_000), image_shape=(16, 16, 3), num_classes=10, fields=fields,
                       flip=False, num_workers=0)
    config.process = dict(schedule=dict(name="cosine"), parameterization="v", times="uniform", weight="simple", learned_variance=False)
    config.conditioners = {kind: CONDITIONERS[kind] for kind in VARIANTS[name]}
    config.net = dict(
        name="unet",
        unet=dict(width=32, mults=(1, 2), num_res_blocks=1, attention=(8,), num_heads=4, dropout=0.0, norm_groups=placeholder(int),
                  transformer_depth=int("sequence" in VARIANTS[name])),
        dit=dict(patch=2, width=128, depth=4, num_heads=4, time_shift=1.0))
    config.classifier = dict(name="adm", adm=dict(width=32, mults=(1, 2), num_res_blocks=1, attention=(8,), head_width=16))
    config.optimizer = dict(name="adam", learning_rate=1e-3, warmup_steps=100, decay="cosine", clip_norm=1.0)
    config.train = dict(batch_size=32, steps=1200, accumulate=1, ema_decay=0.995, log_every=50, save_every=600, keep=2,
                        keep_every=0, keep_best="", averages=dict(stds=(), every=1000))
    config.sampler = dict(name="ddim", steps=50, guidance=1.5, grid="uniform", batch_size=250, classifier_dir="", classifier_scale=1.0,
                          ddim=dict(eta=0.0), ddpm=dict(variance="small"))
    config.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1, rules=())
    config.eval = dict(samples=1000, real=5000, seed=1)
    if smoke:
        config.data.shapes.count = 200
        config.optimizer.warmup_steps = 2
        config.train.update(batch_size=8, steps=4, save_every=4, log_every=2)
        config.net.unet.update(width=8, num_heads=1)
        config.net.dit.update(width=16, depth=1, num_heads=1)
        config.classifier.adm.update(width=8, head_width=8)
        config.sampler.steps = 2
        config.eval.update(samples=50, real=100)
    return config
