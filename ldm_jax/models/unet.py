"""The U-Net of diffusion, one network for three papers.

    Ho et al. 2020 (DDPM)                residual blocks with the time added, self-attention at some resolutions
    Dhariwal & Nichol 2021 (ADM)         resampling inside residual blocks, scale and shift from the time, several heads
    Rombach et al. 2022 (LDM)            spatial transformers with cross-attention to a sequence

Going down, level i has `num_res_blocks` blocks of width * mults[i] channels at 1/2^i of the size; every output is kept. Going
up, each level has one block more and each block takes the output kept last, so that all of them are used.
"""
from typing import Any, Optional, Sequence, Tuple, Union

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.models import layers
from ldm_jax.models.init import unit, zeros
from ldm_jax.models.layers import AttentionBlock, GroupNorm, LayerNorm, ResBlock, attention, conv, dense, heads_of
from ldm_jax.models.net import Net
from ldm_jax.types import Array, Cond, UserError, lookup


class CrossAttention(nn.Module):
    """out(attention(q(x), k(context), v(context))): x [B, T, C], context [B, S, D], which is x itself where it is None."""
    num_heads: int
    impl: str = "einsum"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Optional[Array] = None, mask: Optional[Array] = None) -> Array:
        C = x.shape[-1]
        context = x if context is None else context.astype(x.dtype)
        heads = lambda name, a: dense(C, name, self.dtype, use_bias=False)(a).reshape(*a.shape[:2], self.num_heads, -1)
        h = attention(heads("q", x), heads("k", context), heads("v", context), mask, self.impl)
        return dense(C, "out", self.dtype)(h.reshape(x.shape))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, and a feed-forward with GEGLU (Shazeer 2020), each on a residual branch."""
    num_heads: int
    impl: str = "einsum"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Optional[Array] = None, mask: Optional[Array] = None) -> Array:
        norm = lambda name: LayerNorm(1e-5, dtype=self.dtype, name=name)
        x = x + CrossAttention(self.num_heads, self.impl, self.dtype, name="self_attention")(norm("norm_1")(x))
        cross = CrossAttention(self.num_heads, self.impl, self.dtype, name="cross_attention")
        x = x + cross(norm("norm_2")(x), context, mask)
        value, gate = jnp.split(dense(8 * x.shape[-1], "ff_in", self.dtype)(norm("norm_3")(x)), 2, -1)
        return x + dense(x.shape[-1], "ff_out", self.dtype)(value * nn.gelu(gate, approximate=False))


class SpatialTransformer(nn.Module):
    """x + project_out(blocks(project_in(norm(x)))), the image read as a sequence (Rombach et al. 2022, appendix E.2.1)."""
    depth: int
    num_heads: int
    groups: Optional[int] = None
    impl: str = "einsum"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Optional[Array] = None, mask: Optional[Array] = None) -> Array:
        B, H, W, C = x.shape
        h = GroupNorm(1e-6, self.groups, self.dtype, name="norm")(x).reshape(B, H * W, C)
        h = dense(C, "project_in", self.dtype)(h)
        for i in range(self.depth):
            h = TransformerBlock(self.num_heads, self.impl, self.dtype, name=f"block_{i}")(h, context, mask)
        return x + dense(C, "project_out", self.dtype, init=zeros)(h).reshape(x.shape)


class UNet(nn.Module):
    """See `unet`; `attend[i]` says whether level i has attention, `depths[i]` its transformer depth; last comes the middle."""
    out_channels: int
    width: int
    mults: Tuple[int, ...]
    num_res_blocks: int
    attend: Tuple[bool, ...]
    depths: Tuple[int, ...]
    num_heads: int
    head_width: Optional[int]
    num_classes: Optional[int]
    vector: bool
    dropout: float
    resample: str
    scale_shift: bool
    time_order: str
    eps: float
    groups: Optional[int]
    attention_impl: str
    remat: bool
    dtype: Any

    def embedding(self, time: Array, cond: Cond) -> Array:
        """silu of the sum of what time, class and vector say, [B, 4 width]."""
        E = 4 * self.width
        emb = layers.timestep_embedding(time, self.width, self.time_order).astype(self.dtype)
        emb = dense(E, "time_2", self.dtype)(nn.silu(dense(E, "time_1", self.dtype)(emb)))
        if self.num_classes:
            emb = emb + nn.Embed(self.num_classes + 1, E, dtype=self.dtype, name="class",
                                 embedding_init=unit)(cond["class"])
        if self.vector:
            vector = dense(E, "vector_1", self.dtype)(cond["vector"].astype(self.dtype))
            emb = emb + dense(E, "vector_2", self.dtype)(nn.silu(vector))
        return nn.silu(emb)

    @nn.compact
    def __call__(self, x: Array, time: Array, cond: Cond, train: bool = False) -> Array:
        context, mask = cond.get("context"), cond.get("context_mask")
        mask = None if mask is None else mask[:, None, None, :]
        emb = self.embedding(time, cond)
        Block = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
        Transformer = nn.remat(SpatialTransformer) if self.remat else SpatialTransformer

        def res(h, features, name, resample=None):
            return Block(features, self.dropout, self.scale_shift, resample, self.eps, self.groups, dtype=self.dtype,
                         name=name)(h, emb, train)

        def attend(h, depth, name):
            heads = heads_of(h.shape[-1], self.num_heads, self.head_width)
            if depth:
                return Transformer(depth, heads, self.groups, self.attention_impl, self.dtype, name=name)(h, context, mask)
            return AttentionBlock(heads, self.eps, self.groups, self.attention_impl, dtype=self.dtype, name=name)(h)

        if "concat" in cond:
            x = jnp.concatenate([x, cond["concat"]], -1)
        h = conv(self.width, "conv_in", self.dtype)(x.astype(self.dtype))
        kept, last = [h], len(self.mults) - 1
        for i, mult in enumerate(self.mults):
            for j in range(self.num_res_blocks):
                h = res(h, self.width * mult, f"down_{i}_block_{j}")
                if self.attend[i]:
                    h = attend(h, self.depths[i], f"down_{i}_attention_{j}")
                kept.append(h)
            if i != last:
                if self.resample == "block":
                    h = res(h, h.shape[-1], f"down_{i}_resample", "down")
                else:
                    padding = "SAME" if self.resample == "conv" else 1
                    h = conv(h.shape[-1], f"down_{i}_resample", self.dtype, stride=2, padding=padding)(h)
                kept.append(h)
        h = res(h, h.shape[-1], "mid_block_0")
        if self.attend[-1]:
            h = attend(h, self.depths[-1], "mid_attention")
        h = res(h, h.shape[-1], "mid_block_1")
        for i in reversed(range(len(self.mults))):
            for j in range(self.num_res_blocks + 1):
                h = res(jnp.concatenate([h, kept.pop()], -1), self.width * self.mults[i], f"up_{i}_block_{j}")
                if self.attend[i]:
                    h = attend(h, self.depths[i], f"up_{i}_attention_{j}")
            if i != 0:
                if self.resample == "block":
                    h = res(h, h.shape[-1], f"up_{i}_resample", "up")
                else:
                    h = conv(h.shape[-1], f"up_{i}_resample", self.dtype)(layers.upsample(h))
        h = nn.silu(GroupNorm(self.eps, self.groups, self.dtype, name="norm_out")(h))
        return conv(self.out_channels, "conv_out", self.dtype, init=zeros)(h)


def unet(image_shape: Sequence[int], num_classes: Optional[int] = None, out_channels: Optional[int] = None, *, width: int = 128,
         mults: Sequence[int] = (1, 2, 2, 2), num_res_blocks: int = 2, attention: Optional[Sequence[int]] = None,
         mid_attention: bool = True, num_heads: int = 1, head_width: Optional[int] = None,
         transformer_depth: Union[int, Sequence[int]] = 0, context_dim: Optional[int] = None, vector_dim: Optional[int] = None,
         concat_channels: Optional[int] = None, dropout: float = 0.0, resample: str = "conv", scale_shift: bool = False,
         time_order: str = "sin_cos", norm_eps: float = 1e-5, norm_groups: Optional[int] = None, time_scale: float = 1000.0,
         timesteps: Optional[int] = None, attention_impl: str = "einsum", remat: bool = False, dtype: str = "float32") -> Net:
    """A U-Net. The defaults, with dropout=0.1, are the CIFAR-10 network of Ho et al. 2020; `UNETS` has the other papers'.

    Args:
      image_shape: (H, W, C) of x_t; H and W divisible by 2^(levels - 1).
      num_classes: class-conditional, with one class more that is the null class.
      out_channels: of the raw output, by default C; 2 C for a learned variance.
      width, mults: level i has width * mults[i] channels.
      attention: the resolutions (heights) that have attention, by default 16 where there is such a level.
      mid_attention: attention in the middle.
      num_heads, head_width: heads by number or, where head_width is set, by channels per head.
      transformer_depth: 0 is plain self-attention; otherwise the depth of spatial transformers, one number or one per level, the
        last of them also the middle's. They attend to cond["context"] of `context_dim` channels.
      vector_dim: takes a vector, added to the time embedding through two layers.
      concat_channels: takes an image of that many channels, concatenated to x_t.
      resample: "conv" convolutions, stride 2 padded on the right and below (DDPM); "conv_centred" the same padded on all sides
        (LDM); "block" inside residual blocks (ADM).
      scale_shift: the time scales and shifts the second norm of each block instead of being added (ADM).
      time_order, norm_eps, norm_groups: see `layers.timestep_embedding`, `layers.GroupNorm`, `layers.num_groups`.
      time_scale, timesteps: the unit of time, see `Net`.
      attention_impl: a row of `layers.ATTENTION`.
      remat: recompute each block in the backward pass instead of keeping its inside.
      dtype: "float32" or "bfloat16", of the computation; parameters are float32.

    Raises:
      UserError: for sizes that do not fit together.
    """
    H, W, C = image_shape = tuple(int(n) for n in image_shape)
    mults = tuple(mults)
    factor = 2 ** (len(mults) - 1)
    if not mults or H % factor or W % factor:
        raise UserError(f"image size {H}x{W} is not divisible by {factor}, which {len(mults)} levels of mults={mults} need; "
                        f"use fewer levels, or crop or resize the images")
    if width % 2 or width < 4:
        raise UserError(f"width={width} of the U-Net must be even and at least 4")
    layers.check_groups(width, norm_groups)
    heights = [H >> i for i in range(len(mults))]
    if attention is None:
        attention = [16] if 16 in heights else []
    if not set(attention) <= set(heights):
        raise UserError(f"attention={tuple(attention)} names a resolution that the U-Net has not; "
                        f"its levels have {tuple(heights)}")
    depths = (transformer_depth,) * len(mults) if isinstance(transformer_depth, int) else tuple(transformer_depth)
    if len(depths) != len(mults):
        raise UserError(f"transformer_depth={depths} must be one number or one for each of the {len(mults)} levels")
    attend = tuple(h in set(attention) for h in heights)
    if context_dim and not any(d for d, a in zip(depths + depths[-1:], attend + (mid_attention,)) if a):
        raise UserError(f"context_dim={context_dim} needs transformer_depth of at least 1 at a level with attention")
    for i, a in enumerate(attend + (mid_attention,)):
        if a:
            heads_of(width * (mults + mults[-1:])[i], num_heads, head_width)
    for name, value, table in (("resample", resample, ("block", "conv", "conv_centred")),
                               ("time_order", time_order, ("cos_sin", "sin_cos"))):
        if value not in table:
            raise UserError(f"unknown {name} {value!r} of the U-Net; choose from: {', '.join(table)}")
    lookup(layers.ATTENTION, attention_impl, "attention_impl")
    module = UNet(
        out_channels=out_channels or C, width=width, mults=mults, num_res_blocks=num_res_blocks,
        attend=attend + (bool(mid_attention),), depths=depths + depths[-1:], num_heads=num_heads, head_width=head_width,
        num_classes=num_classes, vector=bool(vector_dim), dropout=dropout, resample=resample, scale_shift=scale_shift,
        time_order=time_order, eps=norm_eps, groups=norm_groups, attention_impl=attention_impl, remat=remat,
        dtype=layers.compute_dtype(dtype))
    return Net(module, image_shape, out_channels or C, time_scale, timesteps, num_classes, context_dim, vector_dim,
               concat_channels, dropout > 0)


# Published networks as arguments of `unet`: all but ADM's class table, which has no null class there.
_ADM = dict(head_width=64, resample="block", scale_shift=True, time_order="cos_sin", out_channels=6, num_classes=1000,
            timesteps=1000)
_SD = dict(image_shape=(64, 64, 4), width=320, num_heads=8, resample="conv_centred", time_order="cos_sin", timesteps=1000)
UNETS = {
    "ddpm_cifar": dict(image_shape=(32, 32, 3), dropout=0.1, timesteps=1000, norm_eps=1e-6),
    "adm_64": dict(_ADM, image_shape=(64, 64, 3), width=192, mults=(1, 2, 3, 4), num_res_blocks=3, attention=(32, 16, 8),
                   dropout=0.1),
    "adm_128": dict(_ADM, image_shape=(128, 128, 3), width=256, mults=(1, 1, 2, 3, 4), attention=(32, 16, 8), num_heads=4,
                    head_width=None),
    "adm_256": dict(_ADM, image_shape=(256, 256, 3), width=256, mults=(1, 1, 2, 2, 4, 4), attention=(32, 16, 8)),
    "sd_1": dict(_SD, mults=(1, 2, 4, 4), attention=(64, 32, 16), transformer_depth=1, context_dim=768),
    "sd_2": dict(_SD, mults=(1, 2, 4, 4), attention=(64, 32, 16), transformer_depth=1, context_dim=1024, head_width=64),
    "sdxl": dict(_SD, image_shape=(128, 128, 4), mults=(1, 2, 4), attention=(64, 32), transformer_depth=(0, 2, 10),
                 context_dim=2048, head_width=64, vector_dim=2816),
}
