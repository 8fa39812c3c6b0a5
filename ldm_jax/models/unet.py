"""The U-Net of diffusion, one network for three papers.

    Ho et al. 2020 (DDPM)                residual blocks with the time added, self-attention at some resolutions
    Dhariwal & Nichol 2021 (ADM)         resampling inside residual blocks, scale and shift from the time, several heads
    Rombach et al. 2022 (LDM)            spatial transformers with cross-attention to a sequence

Going down, level i has `num_res_blocks` blocks of width * mults[i] channels at 1/2^i of the size; every output is kept. Going
up, each level has one block more and each block takes the output kept last, so that all of them are used.
"""
import dataclasses
import math
from typing import Any, Mapping, Optional, Sequence, Tuple, Union

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.models import layers, resampling
from ldm_jax.models.attention import ATTENTION, AttentionBlock, heads_of
from ldm_jax.models.init import unit, zeros
from ldm_jax.models.layers import GroupNorm, ResBlock, conv, dense
from ldm_jax.models.levels import RESAMPLES, Inputs, Level, Time, check_ways
from ldm_jax.models.net import Net
from ldm_jax.models.transformer import SpatialTransformer
from ldm_jax.types import Array, Cond, UserError, lookup


class Descent(nn.Module):
    """The way down and the middle, which the U-Net shares with the classifier on noisy images, and how their blocks are made.

    `down` and `middle` are the levels; num_heads and head_width are those asked for, for what stands behind the middle.
    """
    width: int
    down: Tuple[Level, ...]
    middle: Optional[Level]
    time: Time
    num_heads: int
    head_width: Optional[int]
    dropout: float
    scale_shift: bool
    act: str
    kernels: Tuple[int, int]  # of the first and the last convolution
    eps: float
    groups: Optional[int]
    upcast: bool
    attention_impl: str
    remat: str
    dtype: Any

    def features(self, time: Array) -> Array:
        """What `Time.kind` says of the time, or of another number, [B, width]."""
        spec = self.time
        if spec.kind == "sinusoids":
            return layers.timestep_embedding(time, spec.width, spec.order, shift=spec.shift).astype(self.dtype)
        if spec.kind == "table":
            rows = nn.Embed(spec.table, spec.width, dtype=self.dtype, embedding_init=unit, name="time_table")
            return rows(time.astype(jnp.int32))
        w = jax.lax.stop_gradient(self.param("time_frequencies", unit, (spec.width // 2,)))
        time = time.astype(jnp.float32)
        angles = 2.0 * math.pi * w[None] * (jnp.log(time) if spec.kind == "log_fourier" else time)[:, None]
        parts = [jnp.cos(angles), jnp.sin(angles)]
        return jnp.concatenate(parts if spec.order == "cos_sin" else parts[::-1], -1).astype(self.dtype)

    def two_layers(self, x: Array, name: str, act: str = "silu") -> Array:
        h = layers.ACTIVATIONS[act](dense(self.time.hidden, f"{name}_1", self.dtype)(x.astype(self.dtype)))
        return dense(self.time.hidden, f"{name}_2", self.dtype)(h)

    def time_embedding(self, time: Array, cond: Optional[Array] = None) -> Array:
        """What the time says, [B, hidden], before the last activation."""
        features = self.features(time)
        if cond is not None:
            features = features + dense(self.time.width, "time_cond", self.dtype, use_bias=False)(cond.astype(self.dtype))
        emb = self.two_layers(features, "time", self.time.act)
        return layers.ACTIVATIONS[self.time.post_act](emb) if self.time.post_act else emb

    def res(self, h: Array, level: Level, emb: Tuple[Array, Array], train: bool, name: str, resample: Optional[str] = None,
            groups: Optional[int] = None) -> Array:
        """A residual block; emb is (with, without) the activation in front of the blocks."""
        if level.skip:
            groups, groups_out = groups or min(h.shape[-1] // 4, 32), min(level.channels // 4, 32)
        else:
            groups = groups_out = level.groups or self.groups
        Block = layers.rematerialised(ResBlock, self.remat, train=3)
        return Block(level.channels, self.dropout, self.scale_shift, resample, self.eps, groups, dtype=self.dtype, act=self.act,
                     groups_out=groups_out, scale=level.scale, project=level.skip and resample is not None,
                     name=name)(h, emb[level.raw_time], train)

    def attention(self, h: Array, level: Level, j: int, context: Optional[Array], mask: Optional[Array], name: str) -> Array:
        if level.attention == "cross":
            Transformer = layers.rematerialised(SpatialTransformer, self.remat)
            return Transformer(level.depths[j], level.heads, self.groups, self.attention_impl, self.dtype, level.inner,
                               level.only_cross, self.upcast, name=name)(h, context, mask)
        groups = self.groups if level.attention_groups is None else level.attention_groups
        Attention = layers.rematerialised(AttentionBlock, self.remat)
        return Attention(level.heads, self.eps, groups, self.attention_impl, dtype=self.dtype, inner=level.inner,
                         scale=level.scale, name=name)(h)

    def descend(self, x: Array, emb: Any, context: Optional[Array], mask: Optional[Array], train: bool):
        """(the middle's output, the outputs kept on the way down, the first one first). emb: [B, E], or as `res` takes it."""
        emb = emb if isinstance(emb, tuple) else (emb, emb)
        k, image = self.kernels[0], x
        h = conv(self.width, "conv_in", self.dtype, k, padding=(k - 1) // 2)(x.astype(self.dtype))
        kept = [h]
        for i, level in enumerate(self.down):
            for j in range(level.blocks):
                h = self.res(h, level, emb, train, f"down_{i}_block_{j}")
                if level.attention:
                    h = self.attention(h, level, j, context, mask, f"down_{i}_attention_{j}")
                kept.append(h)
            if level.resample:
                name = f"down_{i}_resample"
                if level.resample == "skip":
                    image = resampling.fir_downsample(image)
                    h = self.res(h, level, emb, train, name, "fir_down")
                    h = h + dense(level.channels, f"down_{i}_image", self.dtype)(image)
                elif level.resample == "block":
                    h = self.res(h, level, emb, train, name, "down")
                else:
                    h = conv(h.shape[-1], name, self.dtype, stride=2, padding="SAME" if level.resample == "conv" else 1)(h)
                kept.append(h)
        if self.middle:
            h = self.res(h, self.middle, emb, train, "mid_block_0")
            if self.middle.attention:
                h = self.attention(h, self.middle, 0, context, mask, "mid_attention")
            if self.middle.blocks > 1:
                h = self.res(h, self.middle, emb, train, "mid_block_1")
        return h, kept

    def end(self, h: Array, act: str = "silu") -> Array:
        return layers.ACTIVATIONS[act](GroupNorm(self.eps, self.groups, self.dtype, name="norm_out")(h))


class UNet(Descent):
    """See `unet` and `unet_of_levels`. `up` is listed from the largest image to the smallest, as `down` is."""
    up: Tuple[Level, ...]
    out_channels: int
    inputs: Inputs
    end_act: str

    def embedding(self, time: Array, cond: Cond) -> Tuple[Array, Array]:
        """The sum of what time, class and vector say, [B, E], with and without the activation in front of the blocks."""
        spec, emb = self.inputs, self.time_embedding(time, cond.get("time_cond"))
        join = lambda a: emb + a if spec.join == "add" else jnp.concatenate([emb, a], -1)
        if spec.class_kind == "table":
            rows = nn.Embed(spec.classes, self.time.hidden, dtype=self.dtype, embedding_init=unit, name="class")
            emb = join(rows(cond["class"]))
        elif spec.class_kind == "number":
            emb = join(self.two_layers(self.features(cond["class"]), "class", spec.act))
        if spec.vector:
            vector = cond["vector"].astype(self.dtype)
            if "time_ids" in cond:
                ids = cond["time_ids"]
                ids = layers.timestep_embedding(ids.reshape(-1), spec.time_ids_dim, self.time.order, shift=self.time.shift)
                vector = jnp.concatenate([vector, ids.reshape(len(vector), -1).astype(self.dtype)], -1)
            if spec.vector == "mlp":
                vector = self.two_layers(vector, "vector")
            elif spec.vector == "linear":
                vector = dense(self.time.hidden, "vector_1", self.dtype)(vector)
            emb = join(vector)
        emb = layers.ACTIVATIONS[spec.emb_act](emb) if spec.emb_act else emb
        return layers.ACTIVATIONS[self.act](emb), emb

    @nn.compact
    def __call__(self, x: Array, time: Array, cond: Cond, train: bool = False) -> Array:
        context, mask = cond.get("context"), cond.get("context_mask")
        mask = None if mask is None else mask[:, None, None, :]
        emb = self.embedding(time, cond)
        if "concat" in cond:
            x = jnp.concatenate([x, cond["concat"]], -1)
        if self.inputs.centre:
            x = 2.0 * x - 1.0
        if self.inputs.context_dim and context is not None:
            context = dense(self.inputs.context_dim, "context_in", self.dtype)(context.astype(self.dtype))
        h, kept = self.descend(x, emb, context, mask, train)
        image = None
        for i, level in reversed(list(enumerate(self.up))):
            for j in range(level.blocks):
                skip, groups = kept.pop(), None
                if level.skip and level.late:  # the published nets of this kind divide one of the two widths only
                    groups = min(h.shape[-1] + skip.shape[-1] // 4, 32)
                h = self.res(jnp.concatenate([h, skip], -1), level, emb, train, f"up_{i}_block_{j}", groups=groups)
                if level.attention and (not level.late or j == level.blocks - 1):
                    h = self.attention(h, level, j, context, mask, f"up_{i}_attention_{0 if level.late else j}")
            if level.skip:
                image = None if image is None else resampling.fir_upsample(image)
            if level.resample:
                image, h = self.ascend(h, image, level, i, emb, train, kept[-1].shape[1:3])
        k = self.kernels[1]
        out = conv(self.out_channels, "conv_out", self.dtype, k, padding=(k - 1) // 2, init=zeros)(self.end(h, self.end_act))
        out = out if image is None else out + image
        return out / time.reshape(-1, 1, 1, 1) if self.time.divide else out

    def ascend(self, h: Array, image: Optional[Array], level: Level, i: int, emb: Any, train: bool, size: Tuple[int, int]):
        """To twice the size, or one less where the way down met an odd one; (the image that skip blocks sum, h)."""
        name = f"up_{i}_resample"
        if level.resample == "skip":
            e = nn.silu(GroupNorm(self.eps, min(h.shape[-1] // 4, 32), self.dtype, name=f"up_{i}_image_norm")(h))
            e = conv(3, f"up_{i}_image", self.dtype)(e)
            return e if image is None else image + e, self.res(h, level, emb, train, name, "fir_up")
        if level.resample == "block":
            return image, self.res(h, level, emb, train, name, "up")
        return image, conv(h.shape[-1], name, self.dtype)(resampling.upsample(h)[:, :size[0], :size[1]])


def descent(H: int, W: int, *, width: int, mults: Sequence[int], num_res_blocks: int, attention: Sequence[int],
            mid_attention: bool, num_heads: int, head_width: Optional[int], transformer_depth: Union[int, Sequence[int]],
            resample: str, time_order: str, norm_eps: float, norm_groups: Optional[int], attention_impl: str, remat: str,
            dtype: str, time_width: Optional[int] = None, **fields) -> dict:
    """The fields of `Descent` from the arguments of `unet`, for images of H x W; `fields` go as they are.

    Raises:
      UserError: for sizes that do not fit together and for unknown names.
    """
    mults = tuple(mults)
    factor = 2 ** (len(mults) - 1)
    if not mults or H % factor or W % factor:
        raise UserError(f"image size {H}x{W} is not divisible by {factor}, which {len(mults)} levels of mults={mults} need; "
                        f"use fewer levels, or crop or resize the images")
    if width % 2 or width < 4:
        raise UserError(f"width={width} of the U-Net must be even and at least 4")
    layers.check_groups(width, norm_groups)
    heights = [H >> i for i in range(len(mults))]
    if not set(attention) <= set(heights):
        raise UserError(f"attention={tuple(attention)} names a resolution that the U-Net has not; "
                        f"its levels have {tuple(heights)}")
    depths = (transformer_depth,) * len(mults) if isinstance(transformer_depth, int) else tuple(transformer_depth)
    if len(depths) != len(mults):
        raise UserError(f"transformer_depth={depths} must be one number or one for each of the {len(mults)} levels")
    attend = tuple(h in set(attention) for h in heights) + (bool(mid_attention),)
    for name, value, table in (("resample", resample, ("block", "conv", "conv_centred")),
                               ("time_order", time_order, ("cos_sin", "sin_cos"))):
        if value not in table:
            raise UserError(f"unknown {name} {value!r} of the U-Net; choose from: {', '.join(table)}")
    lookup(ATTENTION, attention_impl, "attention_impl")
    lookup(layers.REMAT, remat, "remat")

    def level(i: int, blocks: int, resample: Optional[str]) -> Level:
        channels, depth = width * (mults + mults[-1:])[i], (depths + depths[-1:])[i]
        if not attend[i]:
            return Level(channels, blocks, resample=resample)
        heads = heads_of(channels, num_heads, head_width)
        return Level(channels, blocks, "cross" if depth else "self", (depth,) * (blocks + 1), heads, resample=resample)

    last, features = len(mults) - 1, time_width or width
    down = tuple(level(i, num_res_blocks, resample if i != last else None) for i in range(len(mults)))
    return dict(fields, width=width, down=down, middle=level(last + 1, 2, None), num_heads=num_heads, head_width=head_width,
                time=Time(features, 4 * features, order=time_order), act="silu", kernels=(3, 3), eps=norm_eps, groups=norm_groups,
                upcast=False, attention_impl=attention_impl, remat=remat, dtype=layers.compute_dtype(dtype))


def unet(image_shape: Sequence[int], num_classes: Optional[int] = None, out_channels: Optional[int] = None, *, width: int = 128,
         mults: Sequence[int] = (1, 2, 2, 2), num_res_blocks: int = 2, attention: Optional[Sequence[int]] = None,
         mid_attention: bool = True, num_heads: int = 1, head_width: Optional[int] = None,
         transformer_depth: Union[int, Sequence[int]] = 0, context_dim: Optional[int] = None, vector_dim: Optional[int] = None,
         concat_channels: Optional[int] = None, dropout: float = 0.0, resample: str = "conv", scale_shift: bool = False,
         time_order: str = "sin_cos", norm_eps: float = 1e-5, norm_groups: Optional[int] = None, time_scale: float = 1000.0,
         timesteps: Optional[int] = None, attention_impl: str = "auto", remat: str = "none", dtype: str = "float32") -> Net:
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
      attention_impl: a row of `attention.ATTENTION`; "auto" is the fastest for the machine, the dtype and the width of the heads.
      remat: "full" recomputes each block in the backward pass, "dots" keeps its matrix products and convolutions.
      dtype: "float32" or "bfloat16", of the computation; parameters are float32.

    Raises:
      UserError: for sizes that do not fit together and for unknown names.
    """
    H, W, C = image_shape = tuple(int(n) for n in image_shape)
    if attention is None:
        attention = [16] if 16 in [H >> i for i in range(len(mults))] else []
    fields = descent(
        H, W, width=width, mults=mults, num_res_blocks=num_res_blocks, attention=attention, mid_attention=mid_attention,
        num_heads=num_heads, head_width=head_width, transformer_depth=transformer_depth, dropout=dropout, resample=resample,
        scale_shift=scale_shift, time_order=time_order, norm_eps=norm_eps, norm_groups=norm_groups,
        attention_impl=attention_impl, remat=remat, dtype=dtype)
    down = fields["down"]
    if context_dim and not any(level.attention == "cross" for level in (*down, fields["middle"])):
        raise UserError(f"context_dim={context_dim} needs transformer_depth of at least 1 at a level with attention")
    back = "block" if resample == "block" else "conv"
    up = tuple(dataclasses.replace(level, blocks=level.blocks + 1, resample=back if i else None)
               for i, level in enumerate(down))
    inputs = Inputs(num_classes and num_classes + 1, "table" if num_classes else None, "mlp" if vector_dim else None)
    module = UNet(up=up, out_channels=out_channels or C, inputs=inputs, end_act="silu", **fields)
    return Net(module, image_shape, out_channels or C, time_scale, timesteps, num_classes, context_dim, vector_dim,
               concat_channels, dropout > 0)


def unet_of_levels(image_shape: Sequence[int], out_channels: int, *, width: int, down: Sequence[Mapping[str, Any]],
                   middle: Optional[Mapping[str, Any]], up: Sequence[Mapping[str, Any]], time: Mapping[str, Any],
                   inputs: Mapping[str, Any], class_kind: str = "null", num_classes: Optional[int] = None,
                   context_dim: Optional[int] = None, vector_dim: Optional[int] = None, concat_channels: Optional[int] = None,
                   dropout: float = 0.0, scale_shift: bool = False, act: str = "silu", end_act: str = "silu",
                   kernels: Tuple[int, int] = (3, 3), norm_eps: float = 1e-5, norm_groups: Optional[int] = None,
                   upcast: bool = False, time_scale: float = 1000.0, timesteps: Optional[int] = None,
                   attention_impl: str = "auto", remat: str = "none", dtype: str = "float32") -> Net:
    """A U-Net from its levels, each with blocks of its own kind: what the configs of published networks can say.

    Args:
      width: channels of the first convolution.
      down, middle, up: the fields of each `Level`, the levels from the largest image to the smallest.
      time, inputs: the fields of `Time` and `Inputs`.
      class_kind, num_classes, context_dim, vector_dim, concat_channels, time_scale, timesteps: see `Net`.
      act: in the residual blocks; end_act: in front of the last convolution. kernels: sizes of the first and last convolution.
      upcast: transformers attend in float32.
      others: see `unet`.

    Raises:
      UserError: for levels that do not fit together and for unknown names.
    """
    image_shape = tuple(int(n) for n in image_shape)
    down, up = (tuple(Level(**level) for level in way) for way in (down, up))
    middle, time, inputs = middle and Level(**middle), Time(**time), Inputs(**inputs)
    check_ways(down, middle, up)
    for level in (*down, *up):
        if level.resample not in (None, *RESAMPLES):
            raise UserError(f"unknown resample {level.resample!r} of a level; choose from: {', '.join(RESAMPLES)}")
    for name, table, kind in ((act, layers.ACTIVATIONS, "activation"), (end_act, layers.ACTIVATIONS, "activation"),
                              (attention_impl, ATTENTION, "attention_impl"), (remat, layers.REMAT, "remat")):
        lookup(table, name, kind)
    module = UNet(width=width, down=down, middle=middle, up=up, time=time, num_heads=1, head_width=None, dropout=dropout,
                  scale_shift=scale_shift, act=act, kernels=tuple(kernels), eps=norm_eps, groups=norm_groups, upcast=upcast,
                  attention_impl=attention_impl, remat=remat, dtype=layers.compute_dtype(dtype), out_channels=out_channels,
                  inputs=inputs, end_act=end_act)
    return Net(module, image_shape, out_channels, time_scale, timesteps, num_classes, context_dim, vector_dim, concat_channels,
               dropout > 0, class_kind, inputs.time_ids_dim, time.cond_dim)


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
