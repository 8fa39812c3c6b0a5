"""A first stage of latent diffusion alone, on CIFAR-10: reconstruction, perceptual, adversarial and KL (or codebook) terms.

    python -m ldm_jax.main --config=configs/autoencoder_cifar.py --workdir=runs/autoencoder [--config.autoencoder.name=vq]

It is the first stage of configs/ldm_cifar.py and configs/ldm_cifar_vq.py, which train it themselves; given to them as
--config.first_stage_dir it is used in its place. Sized for one GPU; time and result there: not yet measured. `:laptop`, 700 updates of 8
pictures on two CPU cores, takes about 3 minutes of CPU time: 25.0 dB with 256 numbers (KL), 23.6 dB with 64 codes (VQ).
"""
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ldm_jax.recipe import cifar10_or_shapes


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "laptop", "smoke"):
        raise ValueError(f"unknown variant {variant!r} of configs/autoencoder_cifar.py; there are 'laptop' and 'smoke'")
    source = cifar10_or_shapes() if variant else dict(name="tfds", tfds=dict(name="cifar10", data_dir=placeholder(str)))
    config = ConfigDict()
    config.system = "autoencoder"
    config.seed = 0
    config.init_dir = ""  # the workdir of a run whose parameters are started from
    config.init_part = ""  # of that run: "" its averages, "params" what was averaged, or a path such as "ema/net"
    config.data = dict(**source, image_shape=(32, 32, 3), num_classes=10, flip=True, num_workers=0, limit=placeholder(int))
    coder = dict(factor=2, width=128, mults=(1, 2), num_res_blocks=2, mid_attention=True, norm_groups=placeholder(int))
    config.autoencoder = dict(name="kl", kl=dict(**coder, latent_channels=4), vq=dict(**coder, latent_channels=4, codes=4096))
    config.perceptual = dict(name="laplacian", lpips=dict(vgg="", linear=""))  # lpips: the files of VGG16 and of its linear weights
    config.discriminator = dict(name="patchgan", patchgan=dict(width=64, layers=2))
    config.loss = dict(kl_weight=1e-4, codebook_weight=1.0, commitment=0.25, usage_decay=0.99, restart_below=0.02, perceptual_weight=1.0,
                       adversarial="hinge", adversarial_weight=0.5, adversarial_start=25_000, adaptive=True, r1_weight=0.0)
    config.optimizer = dict(name="adam", learning_rate=2e-4, warmup_steps=500, decay="cosine", clip_norm=1.0,
                            muon=dict(adam_ratio=0.05))
    config.optimizers = dict(discriminator=dict(name="adam", learning_rate=2e-4, warmup_steps=0, decay="constant", clip_norm=1.0,
                                                adam=dict(b1=0.5, b2=0.9)))
    config.train = dict(batch_size=128, steps=50_000, accumulate=1, ema_decay=0.999, log_every=100, save_every=5_000, keep=1,
                        keep_every=0, keep_best="", averages=dict(stds=(), every=1000))
    config.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1, rules=())
    config.eval = dict(real=1000)
    if variant:
        coder = dict(factor=4, latent_channels=4, width=16, mults=(1, 2, 4), num_res_blocks=1, mid_attention=False)
        config.autoencoder.kl.update(coder)
        config.autoencoder.vq.update(coder, codes=512)
        config.discriminator.patchgan.update(width=16, layers=2)
        config.optimizer.update(name="muon", learning_rate=0.02, warmup_steps=20)
        config.loss.update(usage_decay=0.95, adversarial_start=500)
        config.train.update(batch_size=8, steps=700, ema_decay=0.99, log_every=50, save_every=700)
    if variant == "smoke":
        config.data.limit = 2048
        config.loss.adversarial_start = 30
        config.train.update(steps=60, log_every=10, save_every=60)
        config.eval.real = 200
    return config
