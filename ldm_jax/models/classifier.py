"""Classifiers of noisy images, log p(y | x_t), for classifier guidance (Dhariwal & Nichol 2021, section 4 and appendix).

The way down and the middle of the ADM U-Net, norm and silu, then a pooling of the last feature map to the logits.
"""
import dataclasses
from typing import Any, Mapping, Optional, Sequence, Tuple

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.models.attention import attention, heads_of
from ldm_jax.models.init import spread, zeros
from ldm_jax.models.layers import dense
from ldm_jax.models.net import Net
from ldm_jax.models.unet import Descent, descent
from ldm_jax.types import Array, Cond, PyTree, UserError

POOLINGS = ("attention", "mean")


class AttentionPool(nn.Module):
    """The answer of one token, the mean of the others, in one multi-head attention over all (Radford et al. 2021).

    x [B, H, W, C] -> [B, C]. Positions are learned, the mean token's first.
    """
    num_heads: int
    impl: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        B, H, W, C = x.shape
        x = x.reshape(B, H * W, C)
        mean = jnp.mean(x.astype(jnp.float32), 1, keepdims=True).astype(self.dtype)
        positions = self.param("positions", spread(lambda shape: shape[-1] ** -0.5), (H * W + 1, C)).astype(self.dtype)
        x = jnp.concatenate([mean, x], 1) + positions[None]
        heads = lambda name, a: dense(C, name, self.dtype)(a).reshape(B, a.shape[1], self.num_heads, -1)
        return attention(heads("q", x[:, :1]), heads("k", x), heads("v", x), impl=self.impl).reshape(B, C)


class NoisyClassifier(Descent):
    """See `noisy_classifier`; the logits are computed in float32 and zero at first."""
    num_classes: int
    pooling: str

    @nn.compact
    def __call__(self, x: Array, time: Array, cond: Cond, train: bool = False) -> Array:
        h, _ = self.descend(x, nn.silu(self.time_embedding(time)), None, None, train)
        h = self.end(h)
        if self.pooling == "attention":
            heads = heads_of(h.shape[-1], self.num_heads, self.head_width)
            h = AttentionPool(heads, self.attention_impl, self.dtype, name="pool")(h)
        else:
            h = jnp.mean(h.astype(jnp.float32), (1, 2))
        return dense(self.num_classes, "logits", jnp.float32, init=zeros)(h)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A classifier of noisy images as pure functions over a plain nested dict of parameters.

    Attributes:
      net: the same as a `Net` whose raw output is the logits.
      image_shape: (H, W, C) of x_t.
      num_classes: how many logits.
    """
    net: Net
    image_shape: Tuple[int, int, int]
    num_classes: int

    def init(self, key: Array) -> PyTree:
        """Fresh parameters: a plain nested dict of float32 arrays, for which every logit is zero."""
        return self.net.init(key)

    def apply(self, params: PyTree, x_t: Array, t: Array, train: bool = False,
              rngs: Optional[Mapping[str, Array]] = None) -> Array:
        """The logits of p(y | x_t), float32 [B, num_classes].

        Args:
          x_t: [B, H, W, C].
          t: [B] in [0, 1].
          train: dropout is active; then rngs must hold a "dropout" key where the network has dropout.

        Raises:
          UserError: for a missing dropout key.
        """
        return self.net.apply(params, x_t, t, None, train, rngs)


def noisy_classifier(image_shape: Sequence[int], num_classes: int, *, width: int = 128, mults: Sequence[int] = (1, 2, 3, 4),
                     num_res_blocks: int = 2, attention: Optional[Sequence[int]] = None, num_heads: int = 1,
                     head_width: Optional[int] = 64, pooling: str = "attention", dropout: float = 0.0, resample: str = "block",
                     scale_shift: bool = True, time_order: str = "cos_sin", time_width: Optional[int] = None,
                     norm_eps: float = 1e-5, norm_groups: Optional[int] = None, time_scale: float = 1000.0, timesteps: Optional[int] = None,
                     attention_impl: str = "auto", remat: str = "none", dtype: str = "float32") -> Classifier:
    """The classifier of ADM. `ADM_CLASSIFIERS` has the published ones; arguments that are not here are those of `unet`.

    Args:
      image_shape: (H, W, C) of x_t; H and W divisible by 2^(levels - 1).
      attention: the resolutions (heights) that have attention, by default those of 32, 16 and 8 that exist.
      head_width: channels per head, in the pooling too; None for `num_heads` heads.
      time_width: sinusoids of the time, by default `width`.
      pooling: "attention", one token's answer among learned positions (only for images of this size); "mean", over positions.

    Raises:
      UserError: for sizes that do not fit together and for unknown names.
    """
    H, W, C = image_shape = tuple(int(n) for n in image_shape)
    if num_classes < 2:
        raise UserError(f"num_classes={num_classes} of a classifier must be at least 2")
    if pooling not in POOLINGS:
        raise UserError(f"unknown pooling {pooling!r} of the classifier; choose from: {', '.join(POOLINGS)}")
    if attention is None:
        attention = [r for r in (32, 16, 8) if r in [H >> i for i in range(len(mults))]]
    fields = descent(
        H, W, width=width, mults=mults, num_res_blocks=num_res_blocks, attention=attention, mid_attention=True,
        num_heads=num_heads, head_width=head_width, transformer_depth=0, dropout=dropout, resample=resample,
        scale_shift=scale_shift, time_order=time_order, time_width=time_width, norm_eps=norm_eps, norm_groups=norm_groups,
        attention_impl=attention_impl, remat=remat, dtype=dtype)
    module = NoisyClassifier(num_classes=num_classes, pooling=pooling, **fields)
    net = Net(module, image_shape, num_classes, time_scale, timesteps, dropout=dropout > 0)
    return Classifier(net, image_shape, num_classes)


CLASSIFIERS = {"adm": noisy_classifier}

# The published classifiers of ImageNet (Dhariwal & Nichol 2021, appendix) as arguments of `noisy_classifier`.
_ADM = dict(num_classes=1000, timesteps=1000)
ADM_CLASSIFIERS = {
    "adm_64": dict(_ADM, image_shape=(64, 64, 3), mults=(1, 2, 3, 4), num_res_blocks=4),
    "adm_128": dict(_ADM, image_shape=(128, 128, 3), mults=(1, 1, 2, 3, 4)),
    "adm_256": dict(_ADM, image_shape=(256, 256, 3), mults=(1, 1, 2, 2, 4, 4)),
}
