"""Encoding and decoding of large pictures piece by piece, in the memory of one piece.

The pieces are overlapping tiles of one size, the last of each row and column flush with the border; f at a position is the mean
sum w f / sum w over the tiles that cover it, w falling linearly towards a tile's edges. Norms and attention see one tile at a
time, so the result is close to that of the whole picture, and equal to it for what is local.
"""
import dataclasses
import functools
from typing import Tuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.models.autoencoder import Autoencoder
from ldm_jax.types import UserError


def tiled(autoencoder: Autoencoder, tile: int = 64, overlap: int = 16) -> "Tiled":
    """`autoencoder` with encode and decode in tiles for images whose latent has more than `tile` positions along a side.

    Smaller images go through unchanged. The parameters and all else are those of `autoencoder`.

    Args:
      tile: latent positions along a tile's side.
      overlap: positions that neighbouring tiles share, at least.

    Raises:
      UserError: when the overlap does not lie in 0..tile - 1.
    """
    if not 0 <= overlap < tile:
        raise UserError(f"overlap={overlap} of tiles of {tile} latent positions; give one from 0 to {tile - 1}")
    parts = {field.name: getattr(autoencoder, field.name) for field in dataclasses.fields(Autoencoder)}
    return Tiled(**parts, tile=tile, overlap=overlap)


@dataclasses.dataclass(frozen=True)
class Tiled(Autoencoder):
    """What `tiled` gives: an autoencoder with `tile` and `overlap`, in latent positions."""
    tile: int = 64
    overlap: int = 16

    def _apply(self, params, x, train, rngs, method):
        whole = functools.partial(super()._apply, method=method)
        into, out_of = (self.factor, 1) if method == "encode" else (1, self.factor)  # x and result, per latent position
        h, w = (n // into for n in x.shape[1:3])
        if max(h, w) <= self.tile:
            return whole(params, x, train, rngs)
        (tops, down), (lefts, across) = (tiles(n, self.tile, self.overlap, out_of) for n in (h, w))
        size = [min(n, self.tile) * into for n in (h, w)]

        def piece(i, top, left):
            part = jax.lax.dynamic_slice(x, (0, top * into, left * into, 0), (len(x), *size, x.shape[-1]))
            keys = {name: jax.random.fold_in(key, i) for name, key in (rngs or {}).items()}
            return whole(params, part, train, keys)

        def add(canvas, place):
            i, top, left, weight_down, weight_across = place
            start = (0, top * out_of, left * out_of, 0)
            weighted = piece(i, top, left) * weight_down[None, :, None, None] * weight_across[None, None, :, None]
            sum_here = jax.lax.dynamic_slice(canvas, start, weighted.shape) + weighted
            return jax.lax.dynamic_update_slice(canvas, sum_here, start), None

        rows, columns = (a.reshape(-1) for a in np.indices((len(tops), len(lefts)), np.int32))
        places = np.arange(len(rows), dtype=np.int32), tops[rows], lefts[columns], down[rows], across[columns]
        channels = jax.eval_shape(piece, 0, 0, 0).shape[-1]
        canvas = jnp.zeros((len(x), h * out_of, w * out_of, channels), jnp.float32)
        return jax.lax.scan(add, canvas, places)[0]


def tiles(n: int, tile: int, overlap: int, scale: int = 1) -> Tuple[np.ndarray, np.ndarray]:
    """Where tiles along a side of n positions start, int32 [m], and their weights, float32 [m, scale * min(n, tile)].

    The weights are those of the scale n values along the side: ramps over scale * overlap values at both ends of a tile, divided
    by their sum, so that at each value the weights of the tiles that cover it sum to one.
    """
    tile = min(n, tile)
    m = 1 - (tile - n) // (tile - overlap) if n > tile else 1
    starts = np.minimum(np.arange(m) * (tile - overlap), n - tile)
    p = np.arange(scale * tile) + 0.5
    ramp = np.minimum(1.0, np.minimum(p, p[::-1]) / max(scale * overlap, 1))
    index = scale * starts[:, None] + np.arange(scale * tile)
    total = np.bincount(index.reshape(-1), np.tile(ramp, m))
    return starts.astype(np.int32), (ramp / total[index]).astype(np.float32)
