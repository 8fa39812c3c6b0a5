"""The convolution of all networks: lax's, but on CPU, where XLA is slow in two ways that can be helped.

It hands a convolution to a fast routine if its axes are in one order: images [B, H, W, C], kernels [H, W, I, O]. Outside of loops and
branches it brings the others into that order; inside it does not, and there the gradients of `lax.conv_general_dilated`, whose axes
change places, are computed element by element, a hundred times slower. And it knows no way to save multiplications, see `winograd`.
"""
import functools
from typing import Any, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ldm_jax.models.winograd import winograd
from ldm_jax.types import Array

IMAGES = ("NHWC", "HWIO", "NHWC")


def convolve(x: Array, kernel: Array, strides: Sequence[int], padding: Any, **how: Any) -> Array:
    """x [B, H, W, I] * kernel [h, w, I, O] -> [B, H', W', O]: `lax.conv_general_dilated`, and so is every derivative.

    how: its further arguments, as flax.linen.Conv gives them; a convolution that is grouped or dilated is left to lax altogether.
    """
    usual = how.get("feature_group_count", 1) == 1 and all(set(how.get(name) or (1,)) == {1} for name in ("lhs_dilation", "rhs_dilation"))
    if jax.default_backend() != "cpu" or not usual:
        return lax.conv_general_dilated(x, kernel, strides, padding, **{"dimension_numbers": IMAGES, **how})
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    return convolution_p.bind(x, kernel, strides=tuple(strides), padding=tuple(map(tuple, padding)))


def saves(x: Any, kernel: Any, strides: Sequence[int], padding: Any) -> bool:
    """Whether `winograd` can do a convolution, and pays: with channels, and enough tiles for what the kernel's transform costs.

    The image's gradient is such a convolution again; for the kernel's it did not pay.
    """
    B, H, W, I = x.shape
    channels, tiles = min(I, kernel.shape[-1]), B * H * W / 16
    fits = kernel.shape[:2] == (3, 3) and strides == (1, 1) and padding == ((1, 1), (1, 1)) and H % 4 == W % 4 == 0
    return fits and x.dtype == jnp.float32 and channels >= 64 and tiles >= max(64, channels / 4)


def _plain(x, kernel, *, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=IMAGES)


def _on_cpu(x, kernel, *, strides, padding):
    return winograd(x, kernel) if saves(x, kernel, strides, padding) else _plain(x, kernel, strides=strides, padding=padding)


def _gradient_of_x(g, x, kernel, *, strides, padding):
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    if saves(g, turned, strides, padding):  # which has stride 1 and as many rows and columns as x: the gradient is a correlation, too
        return convolution_p.bind(g, turned, strides=strides, padding=padding)
    # the same convolution as _plain's, with the kernel's axes where their order is the fast one once it is transposed
    same = lambda x: lax.conv_general_dilated(x, kernel.swapaxes(2, 3), strides, padding, dimension_numbers=("NHWC", "HWOI", "NHWC"))
    return jax.linear_transpose(same, x.aval)(g)[0]


def _gradient_of_kernel(g, x, kernel, *, strides, padding):
    same = lambda turned: lax.conv_general_dilated(x.transpose(3, 1, 2, 0), turned, strides, padding,
                                                   dimension_numbers=("CHWN", "IHWO", "HWNC"))
    h, w, I, O = kernel.aval.shape
    return jax.linear_transpose(same, jax.ShapeDtypeStruct((I, h, w, O), x.dtype))(g.transpose(1, 2, 0, 3))[0].transpose(1, 2, 0, 3)


def _batched(args, axes, **how):
    (x, kernel), (of_x, of_kernel) = args, axes
    if of_kernel is not None:
        return jax.vmap(functools.partial(_plain, **how), axes)(x, kernel), 0
    x = jnp.moveaxis(x, of_x, 0)
    y = convolution_p.bind(x.reshape(-1, *x.shape[2:]), kernel, **how)
    return y.reshape(*x.shape[:2], *y.shape[1:]), 0


# linear in each argument: what that says of derivatives of any order and either direction is JAX's part
convolution_p = Primitive("convolution")
convolution_p.def_impl(jax.jit(_on_cpu, static_argnames=("strides", "padding")))
convolution_p.def_abstract_eval(lambda x, kernel, **how: jax.core.ShapedArray(
    jax.eval_shape(functools.partial(_plain, **how), x, kernel).shape, x.dtype))
mlir.register_lowering(convolution_p, mlir.lower_fun(_on_cpu, multiple_results=False))
ad.defbilinear(convolution_p, _gradient_of_x, _gradient_of_kernel)
batching.primitive_batchers[convolution_p] = _batched
