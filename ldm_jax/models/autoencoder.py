"""First stages: autoencoders between images and latents (Rombach et al. 2022; the convolutional net of Esser et al. 2021).

Encoder: convolution, levels of residual blocks with a stride-2 convolution (padded right and below) between them, a middle with
attention, norm, silu, convolution. Decoder: the same backwards with one block more per level and nearest-neighbour upsampling.
1x1 convolutions stand on both sides of the latent.
"""
import dataclasses
import functools
from typing import Any, Mapping, Optional, Sequence, Tuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.models import layers
from ldm_jax.models.init import fan_avg, initialise
from ldm_jax.models.layers import AttentionBlock, GroupNorm, ResBlock, conv
from ldm_jax.types import Array, PyTree, UserError, lookup

LOGVAR_RANGE = (-30.0, 20.0)


class Coder(nn.Module):
    """What encoder and decoder share: how a block, an attention and the end of the net are made."""
    out_channels: int
    width: int
    mults: Tuple[int, ...]
    num_res_blocks: int
    attend: Tuple[bool, ...]  # per level, then the middle
    dropout: float
    groups: Optional[int]
    attention_impl: str
    dtype: Any

    def res(self, h: Array, mult: int, name: str, train: bool) -> Array:
        return ResBlock(self.width * mult, self.dropout, eps=1e-6, groups=self.groups, zero_out=False, dtype=self.dtype,
                        name=name)(h, None, train)

    def attention(self, h: Array, name: str) -> Array:
        return AttentionBlock(1, 1e-6, self.groups, self.attention_impl, zero_out=False, dtype=self.dtype, name=name)(h)

    def middle(self, h: Array, train: bool) -> Array:
        h = self.res(h, self.mults[-1], "mid_block_0", train)
        if self.attend[-1]:
            h = self.attention(h, "mid_attention")
        return self.res(h, self.mults[-1], "mid_block_1", train)

    def end(self, h: Array) -> Array:
        h = nn.silu(GroupNorm(1e-6, self.groups, self.dtype, name="norm_out")(h))
        return conv(self.out_channels, "conv_out", self.dtype)(h)


class Encoder(Coder):
    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        h = conv(self.width, "conv_in", self.dtype)(x.astype(self.dtype))
        for i, mult in enumerate(self.mults):
            for j in range(self.num_res_blocks):
                h = self.res(h, mult, f"down_{i}_block_{j}", train)
                if self.attend[i]:
                    h = self.attention(h, f"down_{i}_attention_{j}")
            if i != len(self.mults) - 1:
                h = conv(h.shape[-1], f"down_{i}_resample", self.dtype, stride=2)(h)
        return self.end(self.middle(h, train))


class Decoder(Coder):
    @nn.compact
    def __call__(self, z: Array, train: bool = False) -> Array:
        h = self.middle(conv(self.width * self.mults[-1], "conv_in", self.dtype)(z.astype(self.dtype)), train)
        for i, mult in reversed(list(enumerate(self.mults))):
            for j in range(self.num_res_blocks + 1):
                h = self.res(h, mult, f"up_{i}_block_{j}", train)
                if self.attend[i]:
                    h = self.attention(h, f"up_{i}_attention_{j}")
            if i != 0:
                h = conv(h.shape[-1], f"up_{i}_resample", self.dtype)(layers.upsample(h))
        return self.end(h)


class KL(nn.Module):
    """Encoder and decoder with the 1x1 convolutions around the latent; `quant` False leaves those out."""
    coder: Tuple[Tuple[str, Any], ...]
    image_channels: int
    latent_channels: int
    quant: bool
    dtype: Any

    def setup(self):
        options = dict(self.coder)
        self.encoder = Encoder(2 * self.latent_channels, **options)
        self.decoder = Decoder(self.image_channels, **options)
        if self.quant:
            self.quant_in = nn.Dense(2 * self.latent_channels, dtype=self.dtype, kernel_init=fan_avg)
            self.quant_out = nn.Dense(self.latent_channels, dtype=self.dtype, kernel_init=fan_avg)

    def encode(self, x: Array, train: bool = False) -> Array:
        h = self.encoder(x, train)
        return self.quant_in(h) if self.quant else h

    def decode(self, z: Array, train: bool = False) -> Array:
        z = z.astype(self.dtype)
        return self.decoder(self.quant_out(z) if self.quant else z, train)

    def __call__(self, x: Array) -> Array:
        return self.decode(jnp.split(self.encode(x), 2, -1)[0])


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A first stage as pure functions over a plain nested dict of parameters.

    Attributes:
      image_shape: (H, W, C) it was built for; it is convolutional, so any size divisible by `factor` may be given.
      latent_shape: (h, w, c) of that image's latent.
      factor: pixels per latent position along a side.
    """
    module: Any
    image_shape: Tuple[int, int, int]
    latent_shape: Tuple[int, int, int]
    factor: int
    dropout: bool = False

    def init(self, key: Array) -> PyTree:
        """Fresh parameters: a plain nested dict of float32 arrays."""
        return _init(self, key)

    def encode(self, params: PyTree, x: Array, train: bool = False,
               rngs: Optional[Mapping[str, Array]] = None) -> Tuple[Array, Array]:
        """Images [B, H, W, C] in [-1, 1] -> mean and log variance of q(z | x), float32 [B, h, w, c].

        The log variance is clipped to [-30, 20], as Rombach et al. have it.

        Raises:
          UserError: for a size that is not divisible by `factor`.
        """
        check_divisible(*x.shape[1:3], self.factor)
        out = self._apply(params, x, train, rngs, "encode")
        mean, logvar = jnp.split(out, 2, -1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, params: PyTree, z: Array, train: bool = False, rngs: Optional[Mapping[str, Array]] = None) -> Array:
        """Latents [B, h, w, c] -> images, float32 [B, H, W, C], about [-1, 1]."""
        return self._apply(params, z, train, rngs, "decode")

    def _apply(self, params, x, train, rngs, method):
        if train and self.dropout and "dropout" not in (rngs or {}):
            raise UserError('train=True on a network with dropout needs rngs={"dropout": key}')
        return self.module.apply({"params": params}, x, train, rngs=rngs, method=method).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _init(autoencoder: Autoencoder, key: Array) -> PyTree:
    x = jax.ShapeDtypeStruct((1, *autoencoder.image_shape), jnp.float32)
    return initialise(autoencoder.module, key, x)


def check_divisible(H: int, W: int, factor: int) -> None:
    if H % factor or W % factor:
        raise UserError(f"image size {H}x{W} is not divisible by factor={factor} of the autoencoder; crop or resize the images")


def kl(image_shape: Sequence[int], factor: int = 4, latent_channels: int = 4, *, width: int = 128,
       mults: Optional[Sequence[int]] = None, num_res_blocks: int = 2, attention: Sequence[int] = (), mid_attention: bool = True,
       quant: bool = True, dropout: float = 0.0, norm_groups: Optional[int] = None, attention_impl: str = "einsum",
       dtype: str = "float32") -> Autoencoder:
    """The KL autoencoder of Rombach et al. 2022. `kl((256, 256, 3), 8, mults=(1, 2, 4, 4))` is the one of Stable Diffusion.

    Args:
      image_shape: (H, W, C); H and W divisible by `factor`.
      factor: pixels per latent position along a side, a power of two.
      latent_channels: channels of the latent.
      width, mults: level i has width * mults[i] channels; by default 1, 2, 4, 4, ... up to the level that `factor` needs.
      attention: the resolutions (heights) with attention after each block. mid_attention: attention in the middle.
      quant: 1x1 convolutions on both sides of the latent.
      dtype: "float32" or "bfloat16", of the computation; parameters are float32.

    Raises:
      UserError: for sizes that do not fit together.
    """
    H, W, C = image_shape = tuple(int(n) for n in image_shape)
    if factor < 1 or factor & (factor - 1):
        raise UserError(f"factor={factor} of the autoencoder is not a power of two; use 1, 2, 4, 8, 16 or 32")
    check_divisible(H, W, factor)
    levels = factor.bit_length()
    mults = (1, 2, 4, 4, 4, 4, 4, 4)[:levels] if mults is None else tuple(mults)
    if len(mults) != levels:
        raise UserError(f"mults={mults} of the autoencoder must have {levels} entries for factor={factor}")
    layers.check_groups(width, norm_groups)
    heights = [H >> i for i in range(levels)]
    if not set(attention) <= set(heights):
        raise UserError(f"attention={tuple(attention)} names a resolution that the autoencoder has not; "
                        f"its levels have {tuple(heights)}")
    lookup(layers.ATTENTION, attention_impl, "attention_impl")
    compute = layers.compute_dtype(dtype)
    attend = tuple(h in set(attention) for h in heights) + (bool(mid_attention),)
    coder = dict(width=width, mults=mults, num_res_blocks=num_res_blocks, attend=attend, dropout=dropout, groups=norm_groups,
                 attention_impl=attention_impl, dtype=compute)
    module = KL(tuple(coder.items()), C, latent_channels, quant, compute)
    return Autoencoder(module, image_shape, (H // factor, W // factor, latent_channels), factor, dropout > 0)


AUTOENCODERS = {"kl": kl}
