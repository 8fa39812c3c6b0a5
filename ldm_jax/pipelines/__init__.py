"""Published checkpoints as Pipelines: directories, by the class that model_index.json names, and files in their authors' layouts."""
from ldm_jax.pipelines.directory import PIPELINES, is_published, load_pipeline, published_of, sampler_settings
from ldm_jax.pipelines.originals import load_original
from ldm_jax.weights.originals import ORIGINALS

__all__ = ["ORIGINALS", "PIPELINES", "is_published", "load_original", "load_pipeline", "published_of", "sampler_settings"]
