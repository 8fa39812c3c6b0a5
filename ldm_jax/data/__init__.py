"""Data: sources of images by name, and the pipeline that turns one into batches."""
from ldm_jax.data.base import Source, cached
from ldm_jax.data.pipeline import Batches, batches
from ldm_jax.data.sources import SOURCES

__all__ = ["SOURCES", "Batches", "Source", "batches", "cached"]
