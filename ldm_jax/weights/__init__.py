"""Published weights: their files as numpy arrays, without the libraries that wrote them."""
from ldm_jax.weights.files import open_arrays, read_arrays

__all__ = ["open_arrays", "read_arrays"]
