"""Pieces that several networks share: norms, time embedding, the residual block, rematerialisation.

Activations are [B, H, W, C] or [B, S, C] in the network's compute dtype; parameters are float32; norms and softmax are computed
in float32. Submodules carry explicit names, which are the names of the parameter tree.
"""
import math
from typing import Any, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.models.convolution import convolve
from ldm_jax.models.init import fan_avg, ones, zeros
from ldm_jax.models.kept import TIME, kept
from ldm_jax.models.resampling import RESAMPLE
from ldm_jax.types import Array, UserError, lookup

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def compute_dtype(name: str) -> Any:
    """The dtype that a network computes in, by name."""
    return lookup(DTYPES, name, "dtype")


# by the names that published configs use; gelu is the exact one
ACTIVATIONS = {"silu": nn.silu, "swish": nn.silu, "mish": jax.nn.mish, "gelu": lambda x: nn.gelu(x, approximate=False),
               "relu": nn.relu}


def timestep_embedding(time: Array, dim: int, order: str = "cos_sin", max_period: float = 10000.0,
                       shift: Optional[float] = None) -> Array:
    """[B] -> float32 [B, dim]: sines and cosines of time * max_period^(-i / n), i = 0..dim/2 - 1, n = dim/2 - shift.

    order: "cos_sin" puts the cosines first and has shift 0 (ADM, LDM, DiT); "sin_cos" puts the sines first and has shift 1 (Ho et
    al. 2020, after Vaswani et al. 2017); `shift` is another. An odd `dim` has a zero at its end. `time` is in the network's unit,
    usually 0..1000.
    """
    half = dim // 2
    n = half - ((0 if order == "cos_sin" else 1) if shift is None else shift)
    freqs = jnp.exp(-math.log(max_period) / n * jnp.arange(half, dtype=jnp.float32))
    angles = time.astype(jnp.float32)[:, None] * freqs[None]
    parts = [jnp.cos(angles), jnp.sin(angles)]
    odd = [jnp.zeros((len(time), 1))] * (dim % 2)
    return jnp.concatenate((parts if order == "cos_sin" else parts[::-1]) + odd, -1)


def num_groups(channels: int, groups: Optional[int] = None) -> int:
    """How many groups to normalise `channels` in: `groups`, or by default 32 as the papers have it, fewer for narrow layers.

    The default is the largest divisor of `channels` that is at most 32 and leaves at least four channels in a group.
    """
    if groups:
        return groups
    return max(g for g in range(1, max(1, min(32, channels // 4)) + 1) if channels % g == 0)


def check_groups(channels: int, groups: Optional[int]) -> None:
    """Raises UserError when `groups` are asked for and do not divide `channels`."""
    if groups and channels % groups:
        raise UserError(f"norm_groups={groups} does not divide a layer of {channels} channels; choose a divisor, or None")


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) over space and the channels of a group, then scale and bias per channel.

    With `scale_shift` = (scale, shift), each [B, C], the result is multiplied by 1 + scale and moved by shift (Dhariwal & Nichol
    2021, AdaGN). Both are folded into one affine map per example and channel, so the image is read twice and written once.
    """
    eps: float = 1e-5
    groups: Optional[int] = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, scale_shift=None) -> Array:  # [B, ..., C]
        C = x.shape[-1]
        G = num_groups(C, self.groups)
        scale = self.param("scale", ones, (C,))[None]
        bias = self.param("bias", zeros, (C,))[None]
        h = x.reshape(x.shape[0], -1, G, C // G).astype(jnp.float32)
        mean = _group_means(h)
        rstd = jax.lax.rsqrt(_group_means(jnp.square(h - mean)) + self.eps)
        if scale_shift is not None:
            gain = 1.0 + scale_shift[0].astype(jnp.float32)
            scale, bias = scale * gain, bias * gain + scale_shift[1].astype(jnp.float32)
        a = rstd * scale.reshape(-1, 1, G, C // G)
        y = (h - mean) * a + bias.reshape(-1, 1, G, C // G)
        return y.astype(self.dtype).reshape(x.shape)


def _group_means(a: Array) -> Array:
    """[B, S, G, C] -> [B, 1, G, 1]; on CPU over S first, at most 16 at a time: of longer sums XLA's compiler makes slow windows."""
    if jax.default_backend() != "cpu":
        return jnp.mean(a, (1, 3), keepdims=True)
    B, S, G, C = a.shape
    sums = a.reshape(B, S, G * C)
    while sums.shape[1] > 16:
        some = math.gcd(sums.shape[1], 16)
        if some == 1:
            break
        sums = written(jnp.sum(sums.reshape(B, -1, some, G * C), 2))
    return jnp.sum(jnp.sum(sums, 1).reshape(B, 1, G, C), 3, keepdims=True) / (S * C)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, in float32; `affine` adds a scale and a bias."""
    eps: float = 1e-6
    affine: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = x.astype(jnp.float32)
        h = h - jnp.mean(h, -1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + self.eps)
        if self.affine:
            shape = (1,) * (x.ndim - 1) + (-1,)
            h = h * self.param("scale", ones, x.shape[-1:]).reshape(shape)
            h = h + self.param("bias", zeros, x.shape[-1:]).reshape(shape)
        return h.astype(self.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32; `affine` adds a scale (Zhang & Sennrich 2019)."""
    eps: float = 1e-6
    affine: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + self.eps)
        if self.affine:
            h = h * self.param("scale", ones, x.shape[-1:]).reshape((1,) * (x.ndim - 1) + (-1,))
        return h.astype(self.dtype)


def written(x: Array) -> Array:
    """x, computed once and put into memory, and so is its gradient.

    For the sums of residual branches, and between the products of attention. XLA's CPU compiler computes a sum anew in each place that
    reads it, and thereby the whole chain of sums before it, in every block of a network. Compilers of accelerators are left alone.
    """
    return jax.lax.optimization_barrier(x) if jax.default_backend() == "cpu" else x


def _products(prim, *args, **params) -> bool:
    convolution = prim.name in ("conv_general_dilated", "convolution")
    return convolution or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(prim, *args, **params)


# what of a block's inside is kept for the backward pass: all of it, nothing, or what the matrix products and convolutions give
REMAT = {"none": None, "full": jax.checkpoint_policies.nothing_saveable, "dots": _products}


def rematerialised(block: Any, remat: str, train: Optional[int] = None, prevent_cse: bool = True) -> Any:
    """The class of modules `block`, each call of which keeps what REMAT[remat] says and recomputes the rest in the backward pass.

    train: the position of the flag `train` among the arguments of the call, counted from 1. prevent_cse: False inside a scan.
    """
    if remat == "none":
        return block
    return nn.remat(block, policy=REMAT[remat], static_argnums=() if train is None else (train,), prevent_cse=prevent_cse)


def conv(features: int, name: str, dtype, kernel: int = 3, stride: int = 1, padding="SAME", init=fan_avg) -> nn.Conv:
    """A square convolution; padding SAME at stride 2 and even size pads on the right and below only."""
    return nn.Conv(features, (kernel, kernel), (stride, stride), padding, dtype=dtype, kernel_init=init, name=name,
                   conv_general_dilated=convolve)


def dense(features: int, name: str, dtype, use_bias: bool = True, init=fan_avg) -> nn.Dense:
    """A linear map of the last axis; on images it is the 1x1 convolution."""
    return nn.Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=init, name=name)


class ResBlock(nn.Module):
    """norm, silu, conv, (embedding), norm, silu, dropout, conv (zero at first), plus the input, through 1x1 where widths differ.

    The embedding, silu(emb) [B, E], is added after the first convolution (Ho et al. 2020) or, with `scale_shift`, scales and
    shifts the second norm (Dhariwal & Nichol 2021). `resample`, a row of RESAMPLE, changes both branches' size before the first
    convolution, as BigGAN's blocks do. emb None is a block without embedding (autoencoders). `act` replaces silu, `groups_out`
    are the second norm's, `scale` divides the sum, and `project` puts the 1x1 also where widths are equal (Song et al. 2021).
    """
    features: int
    dropout: float = 0.0
    scale_shift: bool = False
    resample: Optional[str] = None
    eps: float = 1e-5
    groups: Optional[int] = None
    zero_out: bool = True
    dtype: Any = jnp.float32
    act: str = "silu"
    groups_out: Optional[int] = None
    scale: float = 1.0
    project: bool = False

    @nn.compact
    def __call__(self, x: Array, emb: Optional[Array] = None, train: bool = False) -> Array:
        norm = lambda name, groups: GroupNorm(self.eps, groups, self.dtype, name=name)
        resize, act = RESAMPLE[self.resample], ACTIVATIONS[self.act]
        h = resize(act(norm("norm_1", self.groups)(x)))
        h = conv(self.features, "conv_1", self.dtype)(h)
        modulation = None
        if emb is not None:
            e = kept(self, TIME, "of_emb", lambda: dense(self.features * (2 if self.scale_shift else 1), "emb", self.dtype)(emb))
            if self.scale_shift:
                modulation = jnp.split(e, 2, -1)
            else:
                h = h + e[:, None, None]
        h = act(norm("norm_2", self.groups_out or self.groups)(h, modulation))
        h = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(h)
        h = conv(self.features, "conv_2", self.dtype, init=zeros if self.zero_out else fan_avg)(h)
        x = resize(x)
        if x.shape[-1] != self.features or self.project:
            x = dense(self.features, "skip", self.dtype)(x)
        return written(divided(x + h, self.scale))


def divided(x: Array, scale: float) -> Array:
    """x / scale."""
    return x if scale == 1 else x / scale
