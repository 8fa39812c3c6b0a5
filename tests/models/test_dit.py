"""DiT: published sizes, positions, locality of the patches, scan and remat, and the options."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.dit import SIZES, dit, rotary_angles, rotate, sincos_positions
from ldm_jax.types import UserError
from tests.models.tiny import count, random_params

PUBLISHED = {"S": 33e6, "B": 130e6, "L": 458e6, "XL": 675e6}  # Peebles & Xie 2023, table 1, at patch 2
SMALL = dict(image_shape=(4, 6, 2), width=16, depth=2, num_heads=2)
OPTIONS = dict(norm="rms", mlp="swiglu", rotary=True, qk_norm=True, registers=2)


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", sorted(SIZES))
def test_published_sizes(size, patch):
    depth, D, _ = SIZES[size]
    net, spec = dit((32, 32, 4), 1000, 8, size=size, patch=patch, scan_layers=True), jax.ShapeDtypeStruct
    params = jax.eval_shape(net.init, jax.random.key(0))
    got = sum(a.size for a in jax.tree.leaves(params))
    ends = patch**2 * 4 * D + D + 2 * D * D + 2 * D + (D + 1) * patch**2 * 8
    assert got == depth * (18 * D * D + 15 * D) + 256 * D + D + D * D + D + 1001 * D + ends
    assert abs(got - PUBLISHED[size]) < 1.5e6
    if (size, patch) == ("XL", 2):
        assert got == 675129632 - 256 * D  # the released weights, which hold the fixed positions too
    out = jax.eval_shape(net.apply, params, spec((2, 32, 32, 4), jnp.float32), spec((2,), jnp.float32))
    assert out.shape == (2, 32, 32, 8) and out.dtype == jnp.float32


def test_cross_attention_starts_closed_and_its_parameters_are_counted():
    net, D, depth, width = dit(**SMALL, context_dim=5), 16, 2, 5
    assert count(net) - count(dit(**SMALL)) == depth * 4 * (D * D + D) + (width * D + D) + (D * D + D)
    params = net.init(jax.random.key(0))
    for i in range(depth):
        assert not np.any(params[f"block_{i}"]["cross"]["out"]["kernel"]) and np.any(params[f"block_{i}"]["cross"]["k"]["kernel"])


def test_positions():
    rows, cols, dim = 3, 5, 8
    got = sincos_positions(rows, cols, dim).reshape(rows, cols, 2, 2, dim // 4)
    freqs = 10000.0 ** (-np.arange(2) / 2)
    for r in range(rows):
        for c in range(cols):
            want = [[np.sin(c * freqs), np.cos(c * freqs)], [np.sin(r * freqs), np.cos(r * freqs)]]
            np.testing.assert_allclose(got[r, c], want, atol=1e-6)


def test_rotary_products_depend_on_the_distance_alone():
    rows, cols, D = 4, 5, 8
    angles = rotary_angles(rows, cols, D, registers=1)
    q, k = np.random.default_rng(0).standard_normal((2, D)).astype(np.float32)
    spread = lambda a: jnp.broadcast_to(a, (1, rows * cols + 1, 1, D))
    dots = np.asarray(rotate(spread(q), angles)[0, 1:, 0] @ rotate(spread(k), angles)[0, 1:, 0].T).reshape(rows, cols, rows, cols)
    np.testing.assert_allclose(dots[0, 0, 1, 2], dots[2, 2, 3, 4], atol=1e-5)
    assert abs(dots[0, 0, 1, 2] - dots[0, 0, 2, 1]) > 1e-3  # rows and columns are told apart
    np.testing.assert_allclose(np.asarray(rotate(spread(q), angles))[0, 0, 0], q, atol=1e-6)  # a register is not turned


def test_a_patch_answers_for_its_own_place():
    """With every gate closed the network is a map of each patch alone: a changed pixel changes its own patch, all of it."""
    net = dit(**SMALL)
    params = random_params(net)
    for i in range(2):
        params[f"block_{i}"]["modulation"] = jax.tree.map(np.zeros_like, params[f"block_{i}"]["modulation"])
    x, t, apply = jnp.zeros((1, 4, 6, 2)), jnp.array([0.5]), jax.jit(net.apply)
    base = apply(params, x, t)
    for r, c in ((0, 0), (3, 1), (1, 4)):
        changed = np.abs(apply(params, x.at[0, r, c, 0].set(1.0), t) - base)[0].max(-1) > 1e-6
        want = np.zeros((4, 6), bool)
        want[r // 2 * 2:r // 2 * 2 + 2, c // 2 * 2:c // 2 * 2 + 2] = True
        np.testing.assert_array_equal(changed, want)


def test_the_order_inside_a_patch_is_row_column_channel():
    net = dit(**SMALL)
    params, t, apply = random_params(net), jnp.array([0.5]), jax.jit(net.apply)
    closed = {**params, **{f"block_{i}": {**params[f"block_{i}"], "modulation": jax.tree.map(
        np.zeros_like, params[f"block_{i}"]["modulation"])} for i in range(2)}}
    row, col, channel = 1, 0, 1
    only = np.zeros_like(params["patch_in"]["kernel"])
    only[(row * 2 + col) * 2 + channel] = params["patch_in"]["kernel"][0]
    grad = jax.grad(lambda x: jnp.sum(apply({**closed, "patch_in": {**params["patch_in"], "kernel": only}}, x, t) ** 2))
    moved = np.argwhere(np.abs(grad(jnp.ones((1, 4, 6, 2))))[0] > 1e-6)
    np.testing.assert_array_equal(np.unique(moved % 2, axis=0), [[row, col, channel]])
    bias = np.arange(8, dtype=np.float32)
    end = {"kernel": np.zeros_like(params["patch_out"]["kernel"]), "bias": bias}
    out = apply({**closed, "patch_out": end}, jnp.ones((1, 4, 6, 2)), t)
    np.testing.assert_array_equal(out[0], np.tile(bias.reshape(2, 2, 2), (2, 3, 1)))


@pytest.mark.parametrize("options, variants", [
    ({}, [(True, "dots"), (False, "full")]), (OPTIONS, [(True, "none")]),
    (dict(context_dim=5), [(True, "full")])])
def test_scan_and_remat_change_no_number(options, variants):
    nets = {(scan, remat): dit(**SMALL, **options, scan_layers=scan, remat=remat) for scan, remat in [(False, "none")] + variants}
    params = random_params(nets[False, "none"])
    stacked = {name: value for name, value in params.items() if not name.startswith("block_")}
    stacked["blocks"] = jax.tree.map(lambda *a: np.stack(a), *(params[f"block_{i}"] for i in range(2)))
    x, t = jax.random.normal(jax.random.key(0), (2, 4, 6, 2)), jnp.array([0.3, 0.6])
    cond = {}
    if "context_dim" in options:
        cond = {"context": jax.random.normal(jax.random.key(1), (2, 3, 5)), "context_mask": jnp.array([[True, True, False]] * 2)}

    def run(net, params):
        out, pull = jax.vjp(lambda x: net.apply(params, x, t, cond), x)
        return out, pull(out)[0]
    want = jax.jit(run, static_argnums=0)(nets[False, "none"], params)
    assert np.std(want[0]) > 0.05 and np.std(want[1]) > 0.01
    for (scan, remat), net in nets.items():
        got = jax.jit(run, static_argnums=0)(net, stacked if scan else params)
        for a, b in zip(got, want):
            np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_scanned_layers_start_like_the_unrolled_ones_each_with_its_own_noise():
    kernel = dit(**SMALL, scan_layers=True).init(jax.random.key(0))["blocks"]["mlp_in"]["kernel"]
    assert kernel.shape == (2, 16, 64) and np.std(kernel) == pytest.approx((2 / 80) ** 0.5, rel=0.05)
    assert np.abs(np.corrcoef(np.asarray(kernel).reshape(2, -1))[0, 1]) < 0.15


def test_qk_norm_starts_at_one_when_scanned():
    params = dit(**SMALL, **OPTIONS, scan_layers=True).init(jax.random.key(0))
    assert np.all(params["blocks"]["q_norm"]["scale"] == 1)


def test_qk_norm_forgets_the_size_of_queries():
    net = dit(**SMALL, qk_norm=True)
    params, apply = random_params(net), jax.jit(net.apply)
    x, t = jax.random.normal(jax.random.key(0), (2, 4, 6, 2)), jnp.array([0.3, 0.6])
    base = apply(params, x, t)
    params["block_0"]["q"] = jax.tree.map(lambda a: 3.0 * a, params["block_0"]["q"])
    np.testing.assert_allclose(apply(params, x, t), base, atol=1e-4 * np.abs(base).max())


@pytest.mark.parametrize("kwargs, words", [
    (dict(image_shape=(9, 8, 1)), "9x8.*patch=2"),
    (dict(image_shape=(8, 8, 1), size="M"), "'M'.*B, L, S, XL"),
    (dict(image_shape=(8, 8, 1), width=30, num_heads=3), "width=30"),
    (dict(image_shape=(8, 8, 1), width=36, num_heads=6, rotary=True), "rotary"),
    (dict(image_shape=(8, 8, 1), norm="batch"), "layer, rms"),
    (dict(image_shape=(8, 8, 1), mlp="relu"), "gelu, .*swiglu"),
    (dict(image_shape=(8, 8, 1), remat="some"), "dots, full, none"),
])
def test_what_does_not_fit_is_refused_by_name(kwargs, words):
    with pytest.raises(UserError, match=words):
        dit(**kwargs)
