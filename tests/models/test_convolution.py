"""The networks' convolution: lax's numbers in every derivative, in the order of axes that is fast in a loop on CPU, and Winograd's."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ldm_jax.models import convolution, layers, unet
from ldm_jax.models.convolution import IMAGES, convolve, saves
from ldm_jax.models.winograd import winograd
from tests.models.tiny import random_params

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
        "vmap of both": lambda f: jax.vmap(f, (0, None))(x[None], kernel) + jax.vmap(f, (None, 0))(x, kernel[None]),
        "vmap": lambda f: jax.vmap(jax.grad(lambda x: jnp.sum(f(x[None], kernel)**2)))(x),
    }
    for name, derivative in derivatives.items():
        for a, b in zip(jax.tree.leaves(derivative(ours)), jax.tree.leaves(derivative(theirs)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()), err_msg=name)


def test_a_grouped_or_dilated_convolution_is_not_taken_for_a_plain_one():
    x = normal(0, 2, 7, 8, 4)
    for how, inputs in (({"feature_group_count": 2}, 2), ({"rhs_dilation": (2, 2)}, 4), ({"lhs_dilation": (2, 1)}, 4)):
        kernel = normal(1, 3, 3, inputs, 6)
        want = lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=IMAGES, **how)
        np.testing.assert_array_equal(convolve(x, kernel, (1, 1), ((1, 1), (1, 1)), **how), want)


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
    params = {"down": jax.jit(down.init)(jax.random.key(0), x), "block": jax.jit(block.init)(jax.random.key(1), normal(1, 2, 4, 4, 6)),
              "image": x}
    loss = lambda p: jnp.sum(block.apply(p["block"], down.apply(p["down"], jnp.sin(p["image"])))**2)
    assert orders_in_a_loop(loss, params) == {"b01f_01io->b01f"}


@pytest.mark.parametrize("shape, features", [((2, 8, 12, 5), 3), ((1, 4, 4, 1), 1), ((2, 16, 16, 96), 64)])
def test_winograd_against_numpy(shape, features):
    """In float32, and as an identity of polynomials in float64; the image is offset, as activations are."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal(shape) + 1.0, rng.standard_normal((3, 3, shape[-1], features))
    (_, H, W, _), padded = shape, np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    want = sum(np.einsum("bhwi,io->bhwo", padded[:, i:i + H, j:j + W], kernel[i, j]) for i in range(3) for j in range(3))
    got = winograd(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
    assert np.abs(got - want).max() < 6e-6 * np.abs(want).max()
    with jax.enable_x64(True):
        np.testing.assert_allclose(winograd(jnp.asarray(x), jnp.asarray(kernel)), want, atol=1e-12 * np.abs(want).max())


def test_where_winograd_is_used():
    at = lambda shape, features, size=3, stride=1, padding=((1, 1), (1, 1)), dtype=jnp.float32: saves(
        jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((size, size, shape[-1], features), dtype), (stride, stride), padding)
    assert at((8, 32, 32, 128), 128) and at((1, 32, 32, 64), 256) and at((2, 64, 20, 320), 320)
    assert not any((at((1, 16, 16, 128), 128), at((8, 16, 16, 640), 640), at((8, 32, 32, 3), 128), at((8, 32, 32, 128), 3),
                    at((8, 30, 32, 128), 128), at((8, 32, 34, 128), 128), at((8, 32, 32, 128), 128, size=1),
                    at((8, 32, 32, 128), 128, stride=2), at((8, 32, 32, 128), 128, padding=((0, 0), (0, 0))),
                    at((8, 32, 32, 128), 128, dtype=jnp.bfloat16)))


def test_derivatives_where_winograd_is_used(monkeypatch):
    """Of the image, and of a gradient's norm, with other widths on the way back than on the way there."""
    x, kernel, used = normal(0, 4, 16, 16, 64), 0.05 * normal(1, 3, 3, 64, 96), []
    monkeypatch.setattr(convolution, "winograd", lambda *a: used.append(a[0].shape) or winograd(*a))
    ours = lambda x, k: convolve(x, k, (1, 1), "SAME")
    plain = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=IMAGES)
    first = lambda f: jax.grad(lambda x, k: jnp.sum(jnp.sin(f(x, k))), (0, 1))
    second = lambda f: jax.grad(lambda x, k: jnp.sum(first(f)(x, k)[0] ** 2), (0, 1))
    for derivative in (first, second):
        for got, want in zip(*(jax.jit(derivative(f))(x, kernel) for f in (ours, plain)), strict=True):
            assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    assert {shape[-1] for shape in used} == {64, 96}


def test_a_network_is_the_same_with_winograd_and_without(monkeypatch):
    """Outputs and gradients, to 1e-5 of the largest."""
    net = unet((32, 32, 3), width=64, mults=(1,), num_res_blocks=1, attention=())
    params, x, t = random_params(net), normal(0, 2, 32, 32, 3), jnp.array([0.3, 0.8])

    def measured():
        used = []
        monkeypatch.setattr(convolution, "winograd", lambda *a: used.append(a) or winograd(*a))
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(net.apply(p, x, t)))))(params), len(used)

    on, used = measured()
    monkeypatch.setattr(convolution, "saves", lambda *a: False)
    off, unused = measured()
    assert used > 1 and unused == 0  # once for each shape
    on, off = jax.tree.map(np.asarray, (on, off))
    largest = max(np.abs(g).max() for g in jax.tree.leaves(off[1]))
    for a, b in zip(jax.tree.leaves(on), jax.tree.leaves(off), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * largest)
