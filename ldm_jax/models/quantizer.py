"""Vector quantisation (van den Oord et al. 2017): the nearest code of a codebook [K, c], what trains it and keeps it in use."""
from typing import Tuple

import jax
import jax.numpy as jnp

from ldm_jax.types import Array

CHUNK = 1024  # codes compared at once: the distances held are [positions, CHUNK]


def nearest(codebook: Array, z: Array) -> Array:
    """argmin_k |z - e_k|^2: ids, int32 [...], of the codes nearest to z [..., c]; of equal ones the first.

    |z|^2 is the same for all codes, so |e|^2 - 2 z.e is compared; in float32, and exactly so where matrix units round by default.
    """
    e, z = (jax.lax.stop_gradient(a).astype(jnp.float32) for a in (codebook, z))
    K, c = e.shape
    flat, chunk = z.reshape(-1, c), min(K, CHUNK)
    rest = -K % chunk
    norms = jnp.pad(jnp.sum(e**2, 1), (0, rest), constant_values=jnp.inf).reshape(-1, chunk)

    def best(part):
        codes, norm = part
        distance = norm[None] - 2.0 * jnp.matmul(flat, codes.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.min(distance, -1), jnp.argmin(distance, -1)

    distance, ids = jax.lax.map(best, (jnp.pad(e, ((0, rest), (0, 0))).reshape(-1, chunk, c), norms))
    first = jnp.argmin(distance, 0)
    return (first * chunk + jnp.take_along_axis(ids, first[None], 0)[0]).astype(jnp.int32).reshape(z.shape[:-1])


def quantize(codebook: Array, z: Array) -> Tuple[Array, Array]:
    """The nearest code of each z [..., c], and its id. Straight-through: z + sg[e - z], so the gradient passes to z whole."""
    ids = nearest(codebook, z)
    return z + jax.lax.stop_gradient(jnp.take(codebook, ids, 0) - z), ids


def vq_losses(codebook: Array, z: Array, ids: Array) -> Tuple[Array, Array]:
    """||sg[z] - e||^2, which moves the codes, and ||z - sg[e]||^2, which commits the encoder to them.

    The second and third term of van den Oord et al. 2017, eq. 3; z [B, h, w, c], ids [B, h, w] of `nearest`, each term
    [B], the mean per value.
    """
    e = jnp.take(codebook, ids, 0)
    mean = lambda a: jnp.mean(a, tuple(range(1, a.ndim)))
    return mean((jax.lax.stop_gradient(z) - e) ** 2), mean((z - jax.lax.stop_gradient(e)) ** 2)


def count(ids: Array, K: int) -> Array:
    """How often each of the K codes occurs in ids, int32 [K]."""
    return jnp.zeros(K, jnp.int32).at[ids.reshape(-1)].add(1)


def perplexity(counts: Array) -> Array:
    """exp(-sum p log p) of the shares p of counts [K]: K when all codes are used alike, 1 when one code is used."""
    return jnp.exp(jnp.sum(jax.scipy.special.entr(_shares(counts))))


def refresh(codebook: Array, usage: Array, counts: Array, candidates: Array, *, decay: float,
            below: float) -> Tuple[Array, Array]:
    """Dead codes put to use again (Dhariwal et al. 2020, Jukebox, appendix): the codebook [K, c] and the usage [K] after a batch.

    usage is the moving average of K times a code's share of the batch, so that 1 is its share were all used alike. A code whose
    usage falls below `below` becomes its candidate, and its usage 1.

    Args:
      counts: of the batch, [K].
      candidates: an encoder output drawn at random from the batch for each code, [K, c].
      decay: of the moving average, in [0, 1).
    """
    usage = decay * usage + (1.0 - decay) * len(counts) * _shares(counts)
    dead = usage < below
    return jnp.where(dead[:, None], candidates, codebook), jnp.where(dead, 1.0, usage)


def _shares(counts: Array) -> Array:
    counts = counts.astype(jnp.float32)
    return counts / jnp.maximum(jnp.sum(counts), 1.0)
