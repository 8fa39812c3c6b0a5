"""3x3 convolutions in a quarter of the multiplications: Winograd's F(4x4, 3x3) (Lavin & Gray 2016, arXiv:1509.09308, section 4).

Four outputs of a correlation with three numbers, y_k = sum_i d_{k+i} g_i, are y = A^T [(G g) * (B^T d)], six products in place of
twelve. It evaluates two polynomials at six points, multiplies there, and interpolates; in two dimensions the transforms go down the
columns and along the rows. The points are 0, +-a, +-b and infinity. Those here are exact in binary, and keep the error in float32 to a
few times that of the sum itself: with the usual +-1 and +-2 it is four times as large.
"""
import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from ldm_jax.types import Array

a, b = 0.75, 1.5
POINTS = (0.0, a, -a, b, -b)
_G = [[p**j / math.prod(p - q for q in POINTS if q != p) for j in range(3)] for p in POINTS] + [[0.0, 0.0, 1.0]]
_once = lax.optimization_barrier  # otherwise the compiler computes a transform anew in every place that reads it


def winograd(x: Array, kernel: Array) -> Array:
    """x [B, H, W, I] * kernel [3, 3, I, O] -> [B, H, W, O], zero outside of the image; H and W are multiples of 4."""
    B, H, W, I = x.shape
    x = jnp.pad(x, ((0, 0), (1, 3), (1, 3), (0, 0)))
    along = _once(jnp.stack(_into(_tiles(x, 2))))  # [6, B, H + 4, W / 4, I]
    d = jnp.stack(_into(_tiles(along, 2))).reshape(36, -1, I)
    g = jnp.tensordot(jnp.asarray(np.kron(_G, _G), x.dtype), kernel.reshape(9, I, -1), 1)
    m = _once(jnp.einsum("ptc,pco->pto", _once(d), _once(g))).reshape(6, 6, B, H // 4, W // 4, -1)
    y = jnp.stack([jnp.stack(_out_of(row), 3) for row in _out_of(m)], 2)  # [B, H / 4, 4, W / 4, 4, O]
    return y.reshape(B, H, W, -1)


def _tiles(x, axis):
    """The numbers d_0 ... d_5 of all tiles along an axis of 4 n + 4: six arrays with n of them."""
    n = x.shape[axis] // 4 - 1
    x = x.reshape(*x.shape[:axis], n + 1, 4, *x.shape[axis + 1:])
    every = [lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in range(4)]
    return [lax.slice_in_dim(every[i % 4], i // 4, i // 4 + n, axis=axis) for i in range(6)]


def _into(d):
    """B^T d: the coefficients of prod (x - q) over the other points q, p = 0, a, -a, b, -b, and over all of them."""
    e, f = d[4] - b * b * d[2], a * (d[3] - b * b * d[1])
    g, h = d[4] - a * a * d[2], b * (d[3] - a * a * d[1])
    ends = [a * a * b * b * d[i] - (a * a + b * b) * d[i + 2] + d[i + 4] for i in (0, 1)]
    return [ends[0], e + f, e - f, g + h, g - h, ends[1]]


def _out_of(m):
    """A^T m: sums of p^k m_p over the points, k = 0 ... 3."""
    even, odd = (m[1] + m[2], m[3] + m[4]), (m[1] - m[2], m[3] - m[4])
    return [m[0] + even[0] + even[1], a * odd[0] + b * odd[1], a**2 * even[0] + b**2 * even[1], a**3 * odd[0] + b**3 * odd[1] + m[5]]
