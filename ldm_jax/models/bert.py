"""The text tower of the first latent text-to-image model (Rombach et al. 2022, section 4.3.1): BERT's tokens, CLIP's blocks.

It was trained with the net and differs from BERT (Devlin et al. 2019): the norms stand before the attention and the mlp, heads
may have another width than D / heads, and their maps have no bias. Every token sees every other, also where a text is filled up.
"""
from typing import Any, Optional

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.models import layers
from ldm_jax.models.attention import ATTENTION
from ldm_jax.models.clip import ACTIVATIONS, Block, TextOutputs, TextTower
from ldm_jax.models.init import spread
from ldm_jax.models.layers import LayerNorm
from ldm_jax.types import Array, UserError, lookup

_embedding = spread(lambda shape: 0.02)
EPS = 1e-5


class BertText(nn.Module):
    """See `bert_text`; the parameters of the blocks are stacked under "blocks"."""
    vocab_size: int
    width: int
    depth: int
    max_length: int
    block: Any
    dtype: Any
    eps: float = EPS

    @nn.compact
    def __call__(self, ids: Array, mask: Optional[Array] = None, hidden: bool = False) -> TextOutputs:
        x = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, embedding_init=_embedding, name="token")(ids)
        position = self.param("position", _embedding, (self.max_length, self.width))
        embedded = x = x + position.astype(self.dtype)[None, :ids.shape[1]]
        sees = None if mask is None else mask.astype(bool)[:, None, None, :]
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=self.depth)
        x, states = stack(**dict(self.block), name="blocks")(x, sees, hidden)
        last = LayerNorm(self.eps, dtype=self.dtype, name="norm_out")(x).astype(jnp.float32)
        states = jnp.concatenate([embedded[None], states]).astype(jnp.float32) if hidden else None
        return TextOutputs(last, None, None, states)


def bert_text(*, vocab_size: int = 30522, width: int = 1280, depth: int = 32, num_heads: int = 8, head_width: int = 64,
              mlp_width: int = 5120, max_length: int = 77, activation: str = "gelu", attention_impl: str = "auto",
              dtype: str = "float32") -> TextTower:
    """A text tower, which pools and projects nothing. The defaults are those of the published model.

    Arguments are those of `ldm_jax.models.clip.clip_text`; num_heads head_width need not be the width.

    Raises:
      UserError: for unknown names and for sizes that are not positive.
    """
    lookup(ACTIVATIONS, activation, "activation of the text tower")
    lookup(ATTENTION, attention_impl, "attention_impl")
    sizes = dict(vocab_size=vocab_size, width=width, depth=depth, num_heads=num_heads, head_width=head_width, mlp_width=mlp_width,
                 max_length=max_length)
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name}={size} of the text tower must be at least 1")
    compute = layers.compute_dtype(dtype)
    block = dict(num_heads=num_heads, head_width=head_width, qkv_bias=False, mlp_width=mlp_width, activation=activation,
                 depth=depth, eps=EPS, impl=attention_impl, dtype=compute)
    return TextTower(BertText(vocab_size, width, depth, max_length, tuple(block.items()), compute), vocab_size, width, max_length)
