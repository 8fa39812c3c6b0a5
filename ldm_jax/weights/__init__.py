"""Published weights: their files as numpy arrays, without the libraries that wrote them."""
from ldm_jax.weights.files import read_arrays

__all__ = ["read_arrays"]
