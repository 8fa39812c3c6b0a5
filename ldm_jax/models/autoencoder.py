"""First stages: autoencoders between images and latents (Rombach et al. 2022; the convolutional net of Esser et al. 2021).

Of two kinds. KL: the encoder gives the mean and log variance of each latent. VQ: the latents are quantised by a codebook, as the
decoder's first layer (Rombach et al. 2022, section 3.2), so that what is encoded and diffused is continuous. 1x1 convolutions
stand on both sides of the latent.
"""
import dataclasses
import functools
from typing import Any, Mapping, Optional, Sequence, Tuple, Union

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.models import layers, quantizer
from ldm_jax.models.attention import ATTENTION
from ldm_jax.models.coder import Decoder, Encoder
from ldm_jax.models.init import fan_avg, initialise, unit
from ldm_jax.models.placing import applied
from ldm_jax.types import Array, PyTree, UserError, lookup, normal

LOGVAR_RANGE = (-30.0, 20.0)
NO_SPREAD = -1e4  # a log variance whose standard deviation, exp(-5000), is exactly 0
LAST_LAYER = ("decoder", "conv_out", "kernel")  # the path of the decoder's last kernel in the parameters


class Codebook(nn.Module):
    """K codes of c channels, at first uniform with variance 1: the spread of the latents that a fresh encoder gives."""
    codes: int
    channels: int

    @nn.compact
    def __call__(self) -> Array:
        return self.param("embedding", unit, (self.codes, self.channels))


class FirstStage(nn.Module):
    """Encoder and decoder with the 1x1 convolutions around the latent, which `quant` may leave out, and perhaps a codebook.

    `encoded_channels` are the encoder's, `inner_channels` the decoder's.
    """
    coder: Tuple[Tuple[str, Any], ...]
    attend: Tuple[Tuple[bool, ...], Tuple[bool, ...]]
    image_channels: int
    encoded_channels: int
    latent_channels: int
    inner_channels: int
    codes: Optional[int]
    quant: Tuple[bool, bool]
    dtype: Any

    def setup(self):
        options = dict(self.coder)
        self.encoder = Encoder(self.encoded_channels, attend=self.attend[0], **options)
        self.decoder = Decoder(self.image_channels, attend=self.attend[1], **options)
        if self.quant[0]:
            self.quant_in = nn.Dense(self.latent_channels if self.codes else self.encoded_channels, dtype=self.dtype,
                                     kernel_init=fan_avg)
        if self.quant[1]:
            self.quant_out = nn.Dense(self.inner_channels, dtype=self.dtype, kernel_init=fan_avg)
        if self.codes:
            self.codebook = Codebook(self.codes, self.latent_channels)

    def encode(self, x: Array, train: bool = False) -> Array:
        h = self.encoder(x, train)
        return self.quant_in(h) if self.quant[0] else h

    def decode(self, z: Array, train: bool = False) -> Array:
        if self.codes:
            z, _ = quantizer.quantize(self.codebook(), z.astype(jnp.float32))
        z = z.astype(self.dtype)
        return self.decoder(self.quant_out(z) if self.quant[1] else z, train)

    def __call__(self, x: Array) -> Array:
        return self.decode(self.encode(x)[..., :self.latent_channels])


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A first stage as pure functions over a plain nested dict of parameters.

    Attributes:
      image_shape: (H, W, C) it was built for; it is convolutional, so any size divisible by `factor` may be given.
      latent_shape: (h, w, c) of that image's latent.
      factor: pixels per latent position along a side.
      codes: None for KL; K for VQ, whose codebook [K, c] is params["codebook"]["embedding"].
      scale, shift: published with it, numbers or one for each channel: (z - shift) scale is what the model of its latents
        diffuses. `encode` and `decode` know nothing of them.
    """
    module: Any
    image_shape: Tuple[int, int, int]
    latent_shape: Tuple[int, int, int]
    factor: int
    dropout: bool = False
    codes: Optional[int] = None
    scale: Any = 1.0
    shift: Any = 0.0

    def init(self, key: Array) -> PyTree:
        """Fresh parameters: a plain nested dict of float32 arrays."""
        return _init(self, key)

    def encode(self, params: PyTree, x: Array, train: bool = False, rngs: Optional[Mapping[str, Array]] = None) -> Any:
        """Images [B, H, W, C] in [-1, 1] -> latents, float32 [B, h, w, c].

        KL: (mean, log variance) of q(z | x), the log variance clipped to [-30, 20] as Rombach et al. have it. VQ: z alone, before
        quantisation.

        Raises:
          UserError: for a size that is not divisible by `factor`.
        """
        check_divisible(*x.shape[1:3], self.factor)
        out = self._apply(params, x, train, rngs, "encode")
        if self.codes:
            return out
        mean, logvar = jnp.split(out, 2, -1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def posterior(self, params: PyTree, x: Array) -> Tuple[Array, Array]:
        """Images -> mean and log variance of the latents, each [B, h, w, c]; for VQ one whose standard deviation is exactly 0."""
        out = self.encode(params, x)
        return (out, jnp.full_like(out, NO_SPREAD)) if self.codes else out

    def draw(self, mean: Array, logvar: Array, key: Array) -> Array:
        """z = mean + std eps, eps ~ N(0, I) [B, h, w, c]; one key, or one for each example."""
        return mean + jnp.exp(0.5 * logvar) * normal(key, mean.shape)

    def decode(self, params: PyTree, z: Array, train: bool = False, rngs: Optional[Mapping[str, Array]] = None) -> Array:
        """Latents [B, h, w, c] -> images, float32 [B, H, W, C], about [-1, 1].

        VQ quantises z first, straight-through: images are those of the nearest codes, and the gradient passes to z as it is.
        """
        return self._apply(params, z, train, rngs, "decode")

    def _apply(self, params, x, train, rngs, method):
        if train and self.dropout and "dropout" not in (rngs or {}):
            raise UserError('train=True on a network with dropout needs rngs={"dropout": key}')
        return applied(self.module, params, x, train, rngs=rngs, method=method).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _init(autoencoder: Autoencoder, key: Array) -> PyTree:
    x = jax.ShapeDtypeStruct((1, *autoencoder.image_shape), jnp.float32)
    return initialise(autoencoder.module, key, x)


def check_divisible(H: int, W: int, factor: int) -> None:
    if H % factor or W % factor:
        raise UserError(f"image size {H}x{W} is not divisible by factor={factor} of the autoencoder; crop or resize the images")


def kl(image_shape: Sequence[int], factor: int = 4, latent_channels: int = 4, **options: Any) -> Autoencoder:
    """The KL autoencoder of Rombach et al. 2022. `kl((256, 256, 3), 8, mults=(1, 2, 4, 4))` is the one of Stable Diffusion.

    Arguments and errors are those of `first_stage`.
    """
    return first_stage(image_shape, factor, latent_channels, codes=None, **options)


def vq(image_shape: Sequence[int], factor: int = 4, latent_channels: int = 3, *, codes: int = 8192,
       **options: Any) -> Autoencoder:
    """The VQ autoencoder of Rombach et al. 2022. `vq((256, 256, 3), mults=(1, 2, 4))` is their vq-f4.

    Arguments and errors are those of `first_stage`.
    """
    if not isinstance(codes, int) or codes < 1:
        raise UserError(f"codes={codes!r} of the autoencoder is not a number of codes; give a whole number, as 8192")
    return first_stage(image_shape, factor, latent_channels, codes=codes, **options)


def first_stage(image_shape: Sequence[int], factor: int, latent_channels: int, *, codes: Optional[int], width: int = 128,
                mults: Optional[Sequence[int]] = None, channels: Optional[Sequence[int]] = None, num_res_blocks: int = 2,
                attention: Sequence[int] = (), up_attention: Optional[Sequence[int]] = None, mid_attention: bool = True,
                quant: Union[bool, Sequence[bool]] = True, inner_channels: Optional[int] = None,
                out_channels: Optional[int] = None, act: str = "silu", dropout: float = 0.0, norm_groups: Optional[int] = None,
                scale: Any = 1.0, shift: Any = 0.0,
                attention_impl: str = "auto", dtype: str = "float32") -> Autoencoder:
    """A first stage of either kind.

    Args:
      image_shape: (H, W, C); H and W divisible by `factor`.
      factor: pixels per latent position along a side, a power of two.
      latent_channels: channels of the latent.
      codes: K of the codebook; None for KL.
      width, mults: level i has width * mults[i] channels; by default 1, 2, 4, 4, ... up to the level that `factor` needs.
      channels: of each level, in place of the two.
      attention: the resolutions (heights) with attention after each block. mid_attention: attention in the middle.
      up_attention: those of the decoder, by default the encoder's.
      quant: 1x1 convolutions on both sides of the latent, or (in front of it, behind it).
      inner_channels: what the encoder of a VQ, and the decoder, have where the 1x1 convolutions change the number of channels.
      out_channels: of the decoded image, by default C.
      act: a row of `layers.ACTIVATIONS`, in the residual blocks.
      scale, shift: see `Autoencoder`.
      dtype: "float32" or "bfloat16", of the computation; parameters, and the search for the nearest code, are float32.

    Raises:
      UserError: for sizes that do not fit together.
    """
    H, W, C = image_shape = tuple(int(n) for n in image_shape)
    if factor < 1 or factor & (factor - 1):
        raise UserError(f"factor={factor} of the autoencoder is not a power of two; use 1, 2, 4, 8, 16 or 32")
    check_divisible(H, W, factor)
    levels = factor.bit_length()
    mults = (1, 2, 4, 4, 4, 4, 4, 4)[:levels] if mults is None else tuple(mults)
    if len(mults if channels is None else channels) != levels:
        name, value = ("mults", mults) if channels is None else ("channels", tuple(channels))
        raise UserError(f"{name}={value} of the autoencoder must have {levels} entries for factor={factor}")
    channels = tuple(width * mult for mult in mults) if channels is None else tuple(channels)
    for n in channels:
        layers.check_groups(n, norm_groups)
    heights, attend = [H >> i for i in range(levels)], []
    for name, wanted in (("attention", attention), ("up_attention", attention if up_attention is None else up_attention)):
        if not set(wanted) <= set(heights):
            raise UserError(f"{name}={tuple(wanted)} names a resolution that the autoencoder has not; "
                            f"its levels have {tuple(heights)}")
        attend.append(tuple(h in set(wanted) for h in heights) + (bool(mid_attention),))
    lookup(ATTENTION, attention_impl, "attention_impl")
    lookup(layers.ACTIVATIONS, act, "activation")
    compute = layers.compute_dtype(dtype)
    coder = dict(channels=channels, num_res_blocks=num_res_blocks, dropout=dropout, groups=norm_groups,
                 attention_impl=attention_impl, act=act, dtype=compute)
    quant = (quant, quant) if isinstance(quant, bool) else tuple(quant)
    inner = inner_channels or latent_channels
    if inner != latent_channels and not (codes and all(quant)):
        raise UserError(f"inner_channels={inner} beside latent_channels={latent_channels} needs a VQ with both 1x1 convolutions")
    encoded = inner if codes else 2 * latent_channels
    module = FirstStage(tuple(coder.items()), tuple(attend), out_channels or C, encoded, latent_channels, inner, codes, quant,
                        compute)
    return Autoencoder(module, image_shape, (H // factor, W // factor, latent_channels), factor, dropout > 0, codes, scale, shift)


AUTOENCODERS = {"kl": kl, "vq": vq}
