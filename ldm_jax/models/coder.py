"""The two halves of a first stage: convolutional encoder and decoder (Esser et al. 2021; Rombach et al. 2022).

Encoder: convolution, levels of residual blocks with a stride-2 convolution (padded right and below) between them, a middle with
attention, norm, silu, convolution. Decoder: the same backwards with one block more per level and nearest-neighbour upsampling.
"""
from typing import Any, Optional, Tuple

import flax.linen as nn

from ldm_jax.models.attention import AttentionBlock
from ldm_jax.models.layers import GroupNorm, ResBlock, conv
from ldm_jax.models.resampling import upsample
from ldm_jax.types import Array


class Coder(nn.Module):
    """What encoder and decoder share: how a block, an attention and the end of the net are made."""
    out_channels: int
    channels: Tuple[int, ...]  # per level
    num_res_blocks: int
    attend: Tuple[bool, ...]  # per level, then the middle
    dropout: float
    groups: Optional[int]
    attention_impl: str
    act: str
    dtype: Any

    def res(self, h: Array, channels: int, name: str, train: bool) -> Array:
        return ResBlock(channels, self.dropout, eps=1e-6, groups=self.groups, act=self.act, dtype=self.dtype,
                        name=name)(h, None, train)

    def attention(self, h: Array, name: str) -> Array:
        return AttentionBlock(1, 1e-6, self.groups, self.attention_impl, dtype=self.dtype, name=name)(h)

    def middle(self, h: Array, train: bool) -> Array:
        h = self.res(h, self.channels[-1], "mid_block_0", train)
        if self.attend[-1]:
            h = self.attention(h, "mid_attention")
        return self.res(h, self.channels[-1], "mid_block_1", train)

    def end(self, h: Array) -> Array:
        h = nn.silu(GroupNorm(1e-6, self.groups, self.dtype, name="norm_out")(h))
        return conv(self.out_channels, "conv_out", self.dtype)(h)


class Encoder(Coder):
    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        h = conv(self.channels[0], "conv_in", self.dtype)(x.astype(self.dtype))
        for i, channels in enumerate(self.channels):
            for j in range(self.num_res_blocks):
                h = self.res(h, channels, f"down_{i}_block_{j}", train)
                if self.attend[i]:
                    h = self.attention(h, f"down_{i}_attention_{j}")
            if i != len(self.channels) - 1:
                h = conv(h.shape[-1], f"down_{i}_resample", self.dtype, stride=2)(h)
        return self.end(self.middle(h, train))


class Decoder(Coder):
    @nn.compact
    def __call__(self, z: Array, train: bool = False) -> Array:
        h = self.middle(conv(self.channels[-1], "conv_in", self.dtype)(z.astype(self.dtype)), train)
        for i, channels in reversed(list(enumerate(self.channels))):
            for j in range(self.num_res_blocks + 1):
                h = self.res(h, channels, f"up_{i}_block_{j}", train)
                if self.attend[i]:
                    h = self.attention(h, f"up_{i}_attention_{j}")
            if i != 0:
                h = conv(h.shape[-1], f"up_{i}_resample", self.dtype)(upsample(h))
        return self.end(h)
