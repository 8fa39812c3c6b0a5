"""Published checkpoints as Pipelines: one row of PIPELINES for each class that a model_index.json names."""
from ldm_jax.pipelines.directory import PIPELINES, is_published, load_pipeline, published_of, sampler_settings

__all__ = ["PIPELINES", "is_published", "load_pipeline", "published_of", "sampler_settings"]
