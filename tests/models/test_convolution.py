"""The networks' convolution: lax's numbers in every derivative, and in the one order of axes that is fast in a loop on CPU."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ldm_jax.models import layers
from ldm_jax.models.convolution import IMAGES, convolve

CASES = [((1, 1), "SAME", 3), ((1, 1), "VALID", 2), ((2, 2), "SAME", 3), ((2, 2), [(1, 1), (1, 1)], 4), ((2, 2), ((0, 1), (0, 1)), 3)]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("strides, padding, size", CASES)
def test_every_derivative_is_that_of_lax(strides, padding, size):
    x, kernel = normal(0, 2, 7, 8, 3), normal(1, size, size, 3, 5)
    ours = lambda *a: convolve(*a, strides, padding)
    theirs = lambda *a: lax.conv_general_dilated(*a, strides, padding, dimension_numbers=IMAGES)
    tangents = normal(2, *x.shape), normal(3, *kernel.shape)
    penalty = lambda f: jax.grad(lambda x, kernel: jnp.sum(jax.grad(lambda k: jnp.sum(jnp.sin(f(x, k))))(kernel)**2), (0, 1))
    derivatives = {
        "value": lambda f: f(x, kernel),
        "jvp": lambda f: jax.jvp(f, (x, kernel), tangents),
        "jvp of the image": lambda f: jax.jvp(lambda x: f(x, kernel), (x,), tangents[:1]),
        "vjp": lambda f: jax.vjp(f, x, kernel)[1](jnp.cos(f(x, kernel))),
        "second": lambda f: penalty(f)(x, kernel),
        "vmap": lambda f: jax.vmap(jax.grad(lambda x: jnp.sum(f(x[None], kernel)**2)))(x),
    }
    for name, derivative in derivatives.items():
        for a, b in zip(jax.tree.leaves(derivative(ours)), jax.tree.leaves(derivative(theirs)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()), err_msg=name)


def test_gradient_of_the_kernel_against_numpy():
    x, g = np.random.default_rng(0).standard_normal((2, 2, 5, 6, 3))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    want = np.stack([[np.einsum("bhwi,bhwo->io", padded[:, i:i + 5, j:j + 6], g) for j in range(3)] for i in range(3)])
    kernel = jnp.zeros((3, 3, 3, 3))
    got, = jax.vjp(lambda k: convolve(jnp.asarray(x, jnp.float32), k, (1, 1), "SAME"), kernel)[1](jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def orders_in_a_loop(loss, params):
    """The orders of axes of the convolutions in three steps of gradient descent in one compiled loop."""
    step = lambda params, _: (jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params)), None)
    program = jax.jit(lambda params: lax.scan(step, params, None, length=3)[0]).lower(params).compile().as_text()
    return set(re.findall(r"dim_labels=([^,\s]+)", program))


def test_a_loop_over_updates_has_convolutions_in_the_fast_order_alone():
    x = normal(0, 2, 8, 8, 4)
    down = layers.conv(6, "down", jnp.float32, stride=2)
    block = layers.ResBlock(8)
    params = {"down": down.init(jax.random.key(0), x), "block": block.init(jax.random.key(1), normal(1, 2, 4, 4, 6)), "image": x}
    loss = lambda p: jnp.sum(block.apply(p["block"], down.apply(p["down"], jnp.sin(p["image"])))**2)
    assert orders_in_a_loop(loss, params) == {"b01f_01io->b01f"}
