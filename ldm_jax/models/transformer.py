"""Spatial transformers (Rombach et al. 2022): an image read as a sequence, with attention to itself and to a context."""
from typing import Any, Optional

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.models.attention import CrossAttention
from ldm_jax.models.init import zeros
from ldm_jax.models.layers import GroupNorm, LayerNorm, dense, written
from ldm_jax.types import Array


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, and a feed-forward with GEGLU (Shazeer 2020), each on a residual branch.

    `only_cross`: the first attention reads the context too, all of it: published nets mask the second alone.
    """
    num_heads: int
    impl: str = "auto"
    dtype: Any = jnp.float32
    only_cross: bool = False
    upcast: bool = False

    @nn.compact
    def __call__(self, x: Array, context: Optional[Array] = None, mask: Optional[Array] = None) -> Array:
        norm = lambda name: LayerNorm(1e-5, dtype=self.dtype, name=name)
        attend = lambda name: CrossAttention(self.num_heads, self.impl, dtype=self.dtype, upcast=self.upcast, name=name)
        x = written(x + attend("self_attention")(norm("norm_1")(x), context if self.only_cross else None))
        x = written(x + attend("cross_attention")(norm("norm_2")(x), context, mask))
        value, gate = jnp.split(dense(8 * x.shape[-1], "ff_in", self.dtype)(norm("norm_3")(x)), 2, -1)
        return written(x + dense(x.shape[-1], "ff_out", self.dtype)(value * nn.gelu(gate, approximate=False)))


class SpatialTransformer(nn.Module):
    """x + project_out(blocks(project_in(norm(x)))), the image read as a sequence (Rombach et al. 2022, appendix E.2.1)."""
    depth: int
    num_heads: int
    groups: Optional[int] = None
    impl: str = "auto"
    dtype: Any = jnp.float32
    inner: Optional[int] = None
    only_cross: bool = False
    upcast: bool = False

    @nn.compact
    def __call__(self, x: Array, context: Optional[Array] = None, mask: Optional[Array] = None) -> Array:
        B, H, W, C = x.shape
        h = GroupNorm(1e-6, self.groups, self.dtype, name="norm")(x).reshape(B, H * W, C)
        h = dense(self.inner or C, "project_in", self.dtype)(h)
        for i in range(self.depth):
            h = TransformerBlock(self.num_heads, self.impl, self.dtype, self.only_cross, self.upcast,
                                 name=f"block_{i}")(h, context, mask)
        return written(x + dense(C, "project_out", self.dtype, init=zeros)(h).reshape(x.shape))
