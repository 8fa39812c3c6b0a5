"""Attention, by the kernel that suits the machine, and the blocks that attend: to the image itself, and to a context."""
from typing import Any, Callable, Optional, Tuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.models.init import fan_avg, zeros
from ldm_jax.models.kept import CONDITION, kept
from ldm_jax.models.layers import GroupNorm, dense, divided, written
from ldm_jax.types import Array, UserError


def _einsum_attention(q, k, v, mask):
    q, k, v = (written(a.swapaxes(1, 2)) for a in (q * q.shape[-1] ** -0.5, k, v))  # heads first, once, not in each product
    logits = written(jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32))
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    if jax.default_backend() != "cpu":
        return jnp.einsum("bhts,bhsd->bhtd", jax.nn.softmax(logits, -1).astype(v.dtype), v).swapaxes(1, 2)
    # on CPU divided last: there are fewer outputs than weights, and the gradient of the sum is that of the outputs
    largest = jnp.max(_folded(jnp.maximum, jax.lax.stop_gradient(logits)), -1, keepdims=True)
    weights = _written_forward(jnp.exp(logits - largest))
    out = written(jnp.einsum("bhts,bhsd->bhtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32))
    return written((out / _row_sums(weights)).astype(v.dtype)).swapaxes(1, 2)


def _folded(op: Callable, a: Array) -> Array:
    """op of the last axis' halves, and of their halves, down to 16: on CPU this is faster than a reduction."""
    while a.shape[-1] > 16 and a.shape[-1] % 2 == 0:
        a = op(*jnp.split(a, 2, -1))
    return a


@jax.custom_jvp
def _row_sums(a: Array) -> Array:
    """jnp.sum(a, -1, keepdims=True), whose gradient is spread at once and not half by half."""
    return jnp.sum(_folded(jnp.add, a), -1, keepdims=True)


@jax.custom_jvp
def _written_forward(a: Array) -> Array:
    """`written`, but its gradient is not: that is added up and multiplied in one go."""
    return written(a)


_row_sums.defjvp(lambda primals, tangents: (_row_sums(*primals), jnp.sum(*tangents, -1, keepdims=True)))
_written_forward.defjvp(lambda primals, tangents: (_written_forward(*primals), *tangents))


def choose_attention(backend: str, dtype: Any, head_width: int, masked: Optional[Tuple[int, int]] = None) -> str:
    """The fastest row of ATTENTION that can do it: "cudnn" on "cuda" where the kernel allows it, "xla" on "tpu", else "einsum".

    The fused kernel of cuDNN takes 16-bit numbers and a head width that is a multiple of 8 and at most 128. With a mask it has a
    gradient for even lengths only; `masked` is (T, S) of an attention with a mask, None of one without. It never has a
    forward-mode derivative: what takes one through the network (jax.jvp, jax.linearize) needs attention_impl="einsum" there.
    """
    if backend == "tpu":
        return "xla"
    fits = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_width % 8 == 0 and head_width <= 128
    even = masked is None or not any(length % 2 for length in masked)
    return "cudnn" if backend == "cuda" and fits and even else "einsum"


def attention_backend() -> str:
    """JAX's name of the default backend, but "cuda" for a GPU that has the fused kernel: NVIDIA, compute capability 8 or more."""
    device, backend = jax.local_devices()[0], jax.default_backend()
    cuda = backend == "gpu" and "cuda" in device.client.platform_version and float(device.compute_capability) >= 8
    return "cuda" if cuda else backend


def _auto_attention(q, k, v, mask):
    masked = None if mask is None else (q.shape[1], k.shape[1])
    return ATTENTION[choose_attention(attention_backend(), q.dtype, q.shape[-1], masked)](q, k, v, mask)


# the same numbers to rounding; "auto" looks at the backend when the network is traced
ATTENTION = {
    "auto": _auto_attention,
    "einsum": _einsum_attention,
    "xla": lambda q, k, v, mask: jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla"),
    "cudnn": lambda q, k, v, mask: jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn"),
}


def attention(q: Array, k: Array, v: Array, mask: Optional[Array] = None, impl: str = "auto") -> Array:
    """softmax(q k^T / sqrt(D)) v, softmax in float32. q [B, T, H, D], k and v [B, S, H, D] -> [B, T, H, D].

    mask: bool, four axes that broadcast to [B, H, T, S]; keys where it is False are not seen, and a query that sees none gets 0.
    impl: a row of ATTENTION.
    """
    if mask is None:
        return ATTENTION[impl](q, k, v, None)
    seen = jnp.any(mask, -1, keepdims=True).swapaxes(1, 2)
    mask = jnp.broadcast_to(mask, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    return jnp.where(seen, ATTENTION[impl](q, k, v, mask), 0)


def heads_of(channels: int, num_heads: int, head_width: Optional[int]) -> int:
    """The number of heads for `channels`: channels / head_width where that is set, else `num_heads`.

    Raises:
      UserError: when the heads do not divide the channels.
    """
    heads = channels // head_width if head_width else num_heads
    if not heads or channels % heads or (head_width and channels % head_width):
        what = f"head_width={head_width}" if head_width else f"num_heads={num_heads}"
        raise UserError(f"{what} does not divide a layer of {channels} channels; choose a divisor, or another width")
    return heads


class AttentionBlock(nn.Module):
    """x + out(attention(q, k, v)) of the normalised image over all its positions (Ho et al. 2020), in one or more heads.

    groups 0 is no norm; `inner` is the width of all heads together, by default that of x; `scale` divides the sum.
    """
    num_heads: int = 1
    eps: float = 1e-5
    groups: Optional[int] = None
    impl: str = "auto"
    zero_out: bool = True
    dtype: Any = jnp.float32
    inner: Optional[int] = None
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        B, H, W, C = x.shape
        h = x if self.groups == 0 else GroupNorm(self.eps, self.groups, self.dtype, name="norm")(x)
        h, inner = h.reshape(B, H * W, C), self.inner or C
        q, k, v = (dense(inner, n, self.dtype)(h).reshape(B, H * W, self.num_heads, -1) for n in ("q", "k", "v"))
        h = attention(q, k, v, impl=self.impl).reshape(B, H, W, inner)
        return written(divided(x + dense(C, "out", self.dtype, init=zeros if self.zero_out else fan_avg)(h), self.scale))


class CrossAttention(nn.Module):
    """out(attention(q(x), k(context), v(context))): x [B, T, C], context [B, S, D], which is x itself where it is None.

    `use_bias` is that of q, k and v; `zero_out` starts the output at zero; `upcast` attends in float32. mask: see `attention`.
    """
    num_heads: int
    impl: str = "auto"
    use_bias: bool = False
    zero_out: bool = False
    dtype: Any = jnp.float32
    upcast: bool = False

    @nn.compact
    def __call__(self, x: Array, context: Optional[Array] = None, mask: Optional[Array] = None) -> Array:
        C = x.shape[-1]
        heads = lambda name, a: dense(C, name, self.dtype, self.use_bias)(a.astype(x.dtype)).reshape(*a.shape[:2], self.num_heads, -1)
        q = heads("q", x)
        if context is None:
            k, v = heads("k", x), heads("v", x)
        else:
            k, v = (kept(self, CONDITION, f"{name}_of_context", lambda: heads(name, context)) for name in "kv")
        if self.upcast:
            q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
        h = attention(q, k, v, mask, self.impl).astype(self.dtype)
        return dense(C, "out", self.dtype, init=zeros if self.zero_out else fan_avg)(h.reshape(x.shape))
