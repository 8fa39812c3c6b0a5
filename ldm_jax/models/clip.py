"""The text tower of CLIP (Radford et al. 2021, "Learning transferable visual models from natural language supervision").

Token and position embeddings, then blocks that read from left to right, each

    x = x + attention(norm(x)),   x = x + mlp(norm(x))

then a last norm. OpenAI's towers have x sigmoid(1.702 x) in the mlp, OpenCLIP's the exact gelu (Hendrycks & Gimpel 2016). As the
end of a text has seen all of it, its state stands for the whole: the pooled output, and through a linear map the point that
images are compared with.
"""
import dataclasses
import functools
from typing import Any, Mapping, NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.models import layers
from ldm_jax.models.attention import ATTENTION, attention, heads_of
from ldm_jax.models.init import initialise, spread
from ldm_jax.models.layers import LayerNorm, dense, written
from ldm_jax.models.placing import applied
from ldm_jax.types import Array, PyTree, UserError, lookup

ACTIVATIONS = {"quick_gelu": lambda x: x * nn.sigmoid(1.702 * x), "gelu": functools.partial(nn.gelu, approximate=False),
               "gelu_tanh": functools.partial(nn.gelu, approximate=True), "relu": nn.relu, "silu": nn.silu}

_token, _position = spread(lambda shape: 0.02), spread(lambda shape: 0.01)
_inward = spread(lambda shape: shape[0] ** -0.5)  # as Radford et al. publish it: by the width alone


class TextOutputs(NamedTuple):
    """What a text tower says, all float32.

    Attributes:
      last: [B, S, D], the last block's states after the last norm.
      pooled: [B, D], `last` at the end of the text; None in a tower that pools nothing.
      projected: [B, P], the pooled output through the projection; None in a tower without one.
      hidden: [depth + 1, B, S, D] where asked for, otherwise None: the embeddings, then what each block gives, none of it normed.
        hidden[-2] is the penultimate layer's.
    """
    last: Array
    pooled: Optional[Array]
    projected: Optional[Array]
    hidden: Optional[Array]


class Block(nn.Module):
    """One block, as a scan's body. x: [B, S, D], mask: bool [B or 1, 1, S or 1, S], true where a token may look; None for all.

    Returns (x, x) with `keep`, otherwise (x, None).
    """
    num_heads: int
    mlp_width: int
    activation: str
    depth: int
    eps: float
    impl: str
    dtype: Any
    head_width: Optional[int] = None  # D / num_heads where None
    qkv_bias: bool = True

    @nn.compact
    def __call__(self, x: Array, mask: Optional[Array], keep: bool):
        B, S, D = x.shape
        outward = spread(lambda shape: (2 * self.depth * D) ** -0.5)
        h = LayerNorm(self.eps, dtype=self.dtype, name="norm_1")(x)
        inner = self.num_heads * (self.head_width or D // self.num_heads)
        q, k, v = (dense(inner, n, self.dtype, self.qkv_bias, _inward)(h).reshape(B, S, self.num_heads, -1) for n in "qkv")
        h = attention(q, k, v, mask, self.impl).reshape(B, S, inner)
        x = written(x + dense(D, "out", self.dtype, init=outward)(h))
        h = LayerNorm(self.eps, dtype=self.dtype, name="norm_2")(x)
        h = dense(self.mlp_width, "mlp_in", self.dtype, init=spread(lambda shape: (2 * D) ** -0.5))(h)
        x = written(x + dense(D, "mlp_out", self.dtype, init=outward)(ACTIVATIONS[self.activation](h)))
        return x, x if keep else None


class ClipText(nn.Module):
    """See `clip_text`; the parameters of the blocks are stacked under "blocks", so depth costs no compile time."""
    vocab_size: int
    width: int
    depth: int
    max_length: int
    eos_id: Optional[int]
    projection_dim: Optional[int]
    eps: float
    block: Any
    dtype: Any

    @nn.compact
    def __call__(self, ids: Array, mask: Optional[Array] = None, hidden: bool = False) -> TextOutputs:
        S = ids.shape[1]
        x = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, embedding_init=_token, name="token")(ids)
        x = x + self.param("position", _position, (self.max_length, self.width)).astype(self.dtype)[None, :S]
        sees = jnp.tril(jnp.ones((S, S), bool))[None, None]
        if mask is not None:
            sees = sees & mask.astype(bool)[:, None, None, :]
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=self.depth)
        embedded = x
        x, states = stack(**dict(self.block), name="blocks")(x, sees, hidden)
        last = LayerNorm(self.eps, dtype=self.dtype, name="norm_out")(x)
        end = jnp.argmax(ids if self.eos_id is None else ids == self.eos_id, axis=1)
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        projected = None
        if self.projection_dim:
            projected = dense(self.projection_dim, "projection", self.dtype, use_bias=False, init=_inward)(pooled)
        states = jnp.concatenate([embedded[None], states]) if hidden else None
        return TextOutputs(*(None if a is None else a.astype(jnp.float32) for a in (last, pooled, projected, states)))


@dataclasses.dataclass(frozen=True)
class TextTower:
    """A text tower as pure functions over a plain nested dict of parameters.

    Attributes:
      vocab_size: ids are 0..vocab_size-1; others give NaN.
      width: D. max_length: the largest S.
      projection_dim: P, None without a projection.
    """
    module: Any
    vocab_size: int
    width: int
    max_length: int
    projection_dim: Optional[int] = None

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What `clip_text` made it from, but for the dtype and attention_impl."""
        module, block = self.module, dict(self.module.block)
        own = ("vocab_size", "width", "depth", "max_length", "eos_id", "projection_dim", "eps")
        inner = ("num_heads", "mlp_width", "activation")
        return {name: getattr(module, name) for name in own} | {name: block[name] for name in inner}

    def init(self, key: Array) -> PyTree:
        """Fresh parameters: a plain nested dict of float32 arrays."""
        return _init(self, key)

    def apply(self, params: PyTree, ids: Array, mask: Optional[Array] = None, hidden: bool = False) -> TextOutputs:
        """The outputs for texts of S tokens.

        Args:
          ids: int [B, S], S at most max_length.
          mask: [B, S], true or 1 at tokens that are seen; None for all of them.
          hidden: return the states between the blocks too.

        Raises:
          UserError: for ids that are not [B, S], texts that are too long, and a mask of another shape.
        """
        if ids.ndim != 2 or ids.shape[1] > self.max_length:
            raise UserError(f"ids of shape {ids.shape}; this text tower takes [texts, tokens], at most {self.max_length} tokens")
        if mask is not None and mask.shape != ids.shape:
            raise UserError(f"a mask of shape {mask.shape} for ids of shape {ids.shape}; make them equal")
        return applied(self.module, params, ids, mask, hidden)

    def final_norm(self, params: PyTree, x: Array) -> Array:
        """The last norm, of other states: [..., D] -> float32 [..., D]. `final_norm(params, out.hidden[-1])` is `out.last`."""
        norm = LayerNorm(self.module.eps, dtype=self.module.dtype)
        return norm.apply({"params": params["norm_out"]}, x).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _init(tower: TextTower, key: Array) -> PyTree:
    return initialise(tower.module, key, jax.ShapeDtypeStruct((1, tower.max_length), jnp.int32))


def clip_text(*, vocab_size: int = 49408, width: int = 768, depth: int = 12, num_heads: int = 12,
              mlp_width: Optional[int] = None, max_length: int = 77, activation: str = "quick_gelu", eps: float = 1e-5,
              eos_id: Optional[int] = None, projection_dim: Optional[int] = None, attention_impl: str = "auto",
              dtype: str = "float32") -> TextTower:
    """A text tower. The defaults are OpenAI's ViT-L/14; `TEXT_TOWERS` has others.

    Args:
      mlp_width: hidden width of the mlp, by default 4 width.
      max_length: of a text, in tokens.
      activation: a row of ACTIVATIONS, of the mlp.
      eps: of the norms.
      eos_id: the token that ends a text: its first place is pooled (the first token where it is missing). None pools at the first
        place of the highest id, which in CLIP's own vocabulary is the same.
      projection_dim: project the pooled output to that many numbers.
      attention_impl: a row of `attention.ATTENTION`.
      dtype: "float32" or "bfloat16", of the computation; parameters are float32.

    Raises:
      UserError: for unknown names and for sizes that do not fit together.
    """
    lookup(ACTIVATIONS, activation, "activation of the text tower")
    lookup(ATTENTION, attention_impl, "attention_impl")
    for name, size in dict(vocab_size=vocab_size, width=width, depth=depth, max_length=max_length).items():
        if size < 1:
            raise UserError(f"{name}={size} of the text tower must be at least 1")
    compute = layers.compute_dtype(dtype)
    block = dict(num_heads=heads_of(width, num_heads, None), mlp_width=mlp_width or 4 * width, activation=activation, depth=depth,
                 eps=eps, impl=attention_impl, dtype=compute)
    module = ClipText(vocab_size=vocab_size, width=width, depth=depth, max_length=max_length, eos_id=eos_id,
                      projection_dim=projection_dim, eps=eps, block=tuple(block.items()), dtype=compute)
    return TextTower(module, vocab_size, width, max_length, projection_dim)


TEXT_TOWERS = {  # the arguments of `clip_text`
    "clip_vit_l": dict(),  # Stable Diffusion 1, and the first of XL's two
    "openclip_vit_h": dict(width=1024, depth=23, num_heads=16, activation="gelu"),  # Stable Diffusion 2: without the last block
    "openclip_vit_bigg": dict(width=1280, depth=32, num_heads=20, activation="gelu", projection_dim=1280),  # the second of XL's
}
