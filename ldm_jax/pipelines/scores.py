"""Published pipelines of nets that give the score of noisy pictures and are told their noise level."""
from ldm_jax.pipelines.source import Source
from ldm_jax.pipelines.wiring import wired
from ldm_jax.sampling import Pipeline
from ldm_jax.systems.base import Codec
from ldm_jax.types import to_signed


def score_sde_ve(source: Source) -> Pipeline:
    """ScoreSdeVePipeline: a U-Net on pixels in [0, 1], see `weights.schedulers.score_sde_ve`."""
    net, params = source.net("unet")
    unit = Codec(lambda params, batch, key: to_signed(batch["image"]) * 0.5 + 0.5, lambda params, x0: 2.0 * x0 - 1.0)
    return wired(source.sampling(), net, params, None, lambda space: {}, steps=2000, size=source.size, codec=unit)
