"""The convolution of all networks: lax's, with gradients that are as fast inside a loop as outside of one.

XLA's CPU compiler hands a convolution to a fast routine if its axes are in one order: images [B, H, W, C], kernels [H, W, I, O]. Outside
of loops and branches it brings the others into that order; inside it does not, and there the gradients of `lax.conv_general_dilated`,
whose axes change places, are computed element by element, a hundred times slower.
"""
import functools
from typing import Any, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from ldm_jax.types import Array

IMAGES = ("NHWC", "HWIO", "NHWC")


def convolve(x: Array, kernel: Array, strides: Sequence[int], padding: Any, **other: Any) -> Array:
    """x [B, H, W, I] * kernel [h, w, I, O] -> [B, H', W', O]; arguments and numbers of `lax.conv_general_dilated`, of any derivative.

    other: what flax.linen.Conv says besides: two-dimensional, ungrouped, undilated images are all there are here.
    """
    padding = padding if isinstance(padding, str) else tuple(map(tuple, padding))
    return (_ordered if jax.default_backend() == "cpu" else _plain)(x, kernel, tuple(strides), padding)


def _plain(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=IMAGES)


_ordered = functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))(_plain)


@functools.partial(_ordered.defjvp, symbolic_zeros=True)
def _tangent(strides, padding, primals, tangents):
    # each term is the same convolution, with its axes where their order is the fast one once the term is transposed
    (x, kernel), (dx, d_kernel) = primals, tangents
    y, terms = _plain(x, kernel, strides, padding), []
    if not isinstance(dx, SymbolicZero):
        terms.append(lax.conv_general_dilated(dx, kernel.swapaxes(2, 3), strides, padding, dimension_numbers=("NHWC", "HWOI", "NHWC")))
    if not isinstance(d_kernel, SymbolicZero):
        term = lax.conv_general_dilated(x.transpose(3, 1, 2, 0), d_kernel.transpose(2, 0, 1, 3), strides, padding,
                                        dimension_numbers=("CHWN", "IHWO", "HWNC"))
        terms.append(term.transpose(2, 0, 1, 3))
    return y, sum(terms) if terms else jnp.zeros_like(y)
