"""Speed, measured side by side: `python -m ldm_jax.benchmark`, see `__main__`."""
