"""Adversarial training as functions of a discriminator D's logits: large where it takes a picture for a real one.

Logits are [B, ...], one or many per picture (PatchGAN gives a map of them); every loss is the mean over all axes but the first,
per example: D minimises `discriminator(D(x), D(x'))`, the generator of x' minimises `generator(D(x'))`.
"""
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax.types import Array, PyTree

FLOOR = 1e-4  # what keeps `adaptive_weight` finite; the paper writes 1e-6, which the clipping makes no difference to


class Adversarial(NamedTuple):
    """The two players' losses: discriminator(real [B, ...], fake [B, ...]) -> [B] and generator(fake [B, ...]) -> [B]."""
    discriminator: Callable[[Array, Array], Array]
    generator: Callable[[Array], Array]


def _mean(logits: Array) -> Array:
    return jnp.mean(logits.astype(jnp.float32), axis=tuple(range(1, logits.ndim)))


# max(0, 1 - real) + max(0, 1 + fake) and -fake (Lim & Ye 2017)
hinge = Adversarial(lambda real, fake: _mean(jax.nn.relu(1.0 - real)) + _mean(jax.nn.relu(1.0 + fake)), lambda fake: -_mean(fake))

# -log s(real) - log(1 - s(fake)) and -log s(fake), s the sigmoid, -log s(a) = softplus(-a) (Goodfellow et al. 2014)
non_saturating = Adversarial(lambda real, fake: _mean(jax.nn.softplus(-real)) + _mean(jax.nn.softplus(fake)),
                             lambda fake: _mean(jax.nn.softplus(-fake)))

# (real - 1)^2 / 2 + fake^2 / 2 and (fake - 1)^2 / 2 (Mao et al. 2017)
least_squares = Adversarial(lambda real, fake: 0.5 * (_mean((real - 1.0) ** 2) + _mean(fake**2)),
                            lambda fake: 0.5 * _mean((fake - 1.0) ** 2))

ADVERSARIAL = {"hinge": hinge, "non_saturating": non_saturating, "least_squares": least_squares}


def r1(logits_of: Callable[[Array], Array], image: Array) -> Array:
    """|grad_x sum_p D_p(x)|^2, [B], p over the logits of one example (Mescheder et al. 2018; their penalty is gamma / 2 of it).

    The gradient is that of the sum over the batch, which is each example's own where D looks at examples one by one: not with
    the statistics of a batch in D.

    Args:
      logits_of: images [B, H, W, C] -> logits [B, ...].
      image: real images [B, H, W, C].
    """
    gradient = jax.grad(lambda x: jnp.sum(logits_of(x).astype(jnp.float32)))(image.astype(jnp.float32))
    return jnp.sum(gradient**2, axis=tuple(range(1, gradient.ndim)))


def adaptive_weight(reconstruction_gradient: PyTree, adversarial_gradient: PyTree, *, maximum: float = 1e4) -> Array:
    """|g_rec| / (|g_adv| + 1e-4), at most `maximum`: the factor on the generator's adversarial loss, a scalar without gradient.

    With g the gradients in the decoder's last layer, both losses then pull at it equally hard (Esser et al. 2021, eq. 7).

    Args:
      reconstruction_gradient, adversarial_gradient: arrays or trees of them, of one structure.
    """
    ratio = _norm(reconstruction_gradient) / (_norm(adversarial_gradient) + FLOOR)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, maximum))


def _norm(tree: PyTree) -> Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(a.astype(jnp.float32))) for a in jax.tree.leaves(tree)))
