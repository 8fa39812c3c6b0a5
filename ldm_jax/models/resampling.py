"""Images twice as large and half as large: nearest neighbour and mean, or smoothed by a short filter."""
import jax.numpy as jnp

from ldm_jax.types import Array


def upsample(x: Array) -> Array:
    """Nearest neighbour by two: a broadcast, not a gather."""
    B, H, W, C = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (B, H, 2, W, 2, C)).reshape(B, 2 * H, 2 * W, C)


def downsample(x: Array) -> Array:
    """The mean of each 2x2 square."""
    B, H, W, C = x.shape
    return jnp.mean(x.reshape(B, H // 2, 2, W // 2, 2, C), (2, 4))


def fir_downsample(x: Array) -> Array:
    """Every second pixel of the image smoothed by (1, 3, 3, 1) / 8 along both sides, zero outside (Karras et al. 2020)."""
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (1, 1)
        a = jnp.moveaxis(jnp.pad(x, pad), axis, 0)
        n = x.shape[axis] // 2
        taps = [a[k:k + 2 * n - 1:2] for k in range(4)]
        x = jnp.moveaxis((taps[0] + 3 * taps[1] + 3 * taps[2] + taps[3]) / 8, 0, axis)
    return x


def fir_upsample(x: Array) -> Array:
    """The image with zeros between its pixels smoothed by (1, 3, 3, 1) / 4 along both sides; see `fir_downsample`."""
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (1, 1)
        a, n = jnp.moveaxis(jnp.pad(x, pad), axis, 0), x.shape[axis]
        before, here, after = a[:n], a[1:n + 1], a[2:]
        pairs = jnp.stack([(before + 3 * here) / 4, (3 * here + after) / 4], 1)
        x = jnp.moveaxis(pairs.reshape(2 * n, *pairs.shape[2:]), 0, axis)
    return x


RESAMPLE = {None: lambda a: a, "up": upsample, "down": downsample, "fir_up": fir_upsample, "fir_down": fir_downsample}
