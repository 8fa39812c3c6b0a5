"""Discriminators: networks that tell pictures of the data from reconstructions, for the adversarial training of a first stage."""
import dataclasses
import functools
from typing import Any, Sequence, Tuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.models.convolution import convolve
from ldm_jax.models.init import initialise, ones, small, zeros
from ldm_jax.models.layers import GroupNorm, compute_dtype
from ldm_jax.models.placing import applied
from ldm_jax.types import Array, PyTree, UserError, lookup


class BatchNorm(nn.Module):
    """Normalisation of each channel by its mean and variance over the batch at hand, with a scale and a bias, in float32.

    As batch norm in training (Ioffe & Szegedy 2015): nothing is averaged over batches, so an answer depends on its batch.
    """
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, H, W, C]
        h = x.astype(jnp.float32)
        h = h - jnp.mean(h, (0, 1, 2), keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), (0, 1, 2), keepdims=True) + self.eps)
        scale, bias = self.param("scale", ones, x.shape[-1:]), self.param("bias", zeros, x.shape[-1:])
        return (h * scale.reshape(1, 1, 1, -1) + bias.reshape(1, 1, 1, -1)).astype(self.dtype)


NORMS = {
    "group": lambda dtype, name: GroupNorm(dtype=dtype, name=name),
    "batch": lambda dtype, name: BatchNorm(dtype=dtype, name=name),
    "none": lambda dtype, name: lambda h: h,
}


class PatchGAN(nn.Module):
    width: int
    layers: int
    norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = x.astype(self.dtype)
        for i in range(self.layers + 1):
            normed = i > 0 and self.norm != "none"
            bias = not (normed and self.norm == "batch")  # the norm would take it away again
            h = self.conv(self.width * min(2**i, 8), f"conv_{i}", stride=2 if i < self.layers else 1, use_bias=bias)(h)
            h = NORMS[self.norm](self.dtype, f"norm_{i}")(h) if normed else h
            h = nn.leaky_relu(h, 0.2)
        return self.conv(1, "conv_out")(h)

    def conv(self, features: int, name: str, stride: int = 1, use_bias: bool = True) -> nn.Conv:
        return nn.Conv(features, (4, 4), (stride, stride), 1, use_bias=use_bias, dtype=self.dtype, kernel_init=small, name=name,
                       conv_general_dilated=convolve)


@dataclasses.dataclass(frozen=True)
class Discriminator:
    """A discriminator as pure functions over a plain nested dict of parameters.

    Attributes:
      image_shape: (H, W, C) it was built for; it is convolutional, so other sizes that are not too small may be given.
    """
    module: Any
    image_shape: Tuple[int, int, int]

    def init(self, key: Array) -> PyTree:
        """Fresh parameters: a plain nested dict of float32 arrays."""
        return _init(self, key)

    def apply(self, params: PyTree, image: Array) -> Array:
        """Images [B, H, W, C] in [-1, 1] -> logits, float32 [B, h, w, 1], large for real ones."""
        return applied(self.module, params, image).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _init(discriminator: Discriminator, key: Array) -> PyTree:
    return initialise(discriminator.module, key, jax.ShapeDtypeStruct((1, *discriminator.image_shape), jnp.float32))


def patchgan(image_shape: Sequence[int], *, width: int = 64, layers: int = 3, norm: str = "group",
             dtype: str = "float32") -> Discriminator:
    """PatchGAN (Isola et al. 2017): a map of logits, each of which sees a patch of the image, 70 x 70 with three layers.

    4x4 convolutions padded by one on every side: `layers` of stride 2, one of stride 1, and one of stride 1 to the logits;
    leaky relu (0.2) after each but the last, the norm before it after each but the first and the last. The i-th, from 0, has
    min(2^i, 8) width channels. H x W pixels give (H // 2^layers - 2) x (W // 2^layers - 2) logits. Kernels start with standard
    deviation 0.02.

    Args:
      image_shape: (H, W, C).
      norm: "group"; "batch", by the statistics of the batch at hand, as the original; "none".
      dtype: "float32" or "bfloat16", of the computation; parameters are float32.

    Raises:
      UserError: for an unknown norm or dtype, and for images too small for as much as one logit.
    """
    H, W, C = image_shape = tuple(int(n) for n in image_shape)
    lookup(NORMS, norm, "norm")
    compute = compute_dtype(dtype)
    if width < 1 or layers < 1:
        raise UserError(f"patchgan needs width >= 1 and layers >= 1, got width {width}, layers {layers}")
    if min(H, W) >> layers < 3:
        raise UserError(f"images of {H}x{W} are too small for patchgan with layers={layers}, which needs {3 << layers} pixels on "
                        f"each side; give fewer layers (layers=1 needs 6 pixels)")
    return Discriminator(PatchGAN(width, layers, norm, compute), image_shape)


DISCRIMINATORS = {"patchgan": patchgan}
