"""Diffusion and flow models in JAX, trained from scratch or run from a checkpoint. `ldm_jax.load(path)` gives a Pipeline."""
__version__ = "0.1.0"


def __getattr__(name):
    """`load`, `Pipeline`, `load_net`, `save_net` and `process`, imported at first use so that `import ldm_jax` costs nothing."""
    import importlib
    if name in ("load", "Pipeline"):
        return getattr(importlib.import_module("ldm_jax.api"), name)
    if name in ("load_net", "save_net"):
        return getattr(importlib.import_module("ldm_jax.published"), name)
    if name == "process":
        return importlib.import_module("ldm_jax.process")
    raise AttributeError(f"module 'ldm_jax' has no attribute {name!r}")
