"""Attention against float64 numpy, and the choice of its kernel."""
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import attention
from ldm_jax.types import UserError

RNG = np.random.default_rng(0)
HERE = sorted(set(attention.ATTENTION) - {"cudnn"})
MASK = np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], bool)[:, None, None]


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("keys", [1, 16])
@pytest.mark.parametrize("impl", HERE)
def test_attention(impl, keys, mask, dtype, tolerance):
    """Against float64, for inputs that are the same in both: the values, and what the loss sum(w out) says of k and v."""
    draw = lambda *shape: np.float64(jnp.asarray(RNG.standard_normal(shape), dtype))
    S = 5 * keys
    mask = mask if mask is None else mask.repeat(keys, -1)
    (q, w), (k, v) = (draw(2, 3, 2, 4) for _ in range(2)), (draw(2, S, 2, 4) for _ in range(2))
    p = np.exp(np.einsum("bthd,bshd->bhts", q, k) / 2.0) * (1.0 if mask is None else mask)
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bthd,bshd->bhts", w, v)
    dlogits = p * (dp - (p * dp).sum(-1, keepdims=True))
    want = [np.einsum("bhts,bshd->bthd", p, v)] + [np.einsum("bhts,bthd->bshd", *pair) for pair in ((dlogits / 2.0, q), (p, w))]
    q, k, v, w = (jnp.asarray(a, dtype) for a in (q, k, v, w))
    out, pull = jax.vjp(lambda k, v: attention.attention(q, k, v, mask if mask is None else jnp.asarray(mask), impl), k, v)
    assert out.dtype == dtype
    for got, expected in zip((out, *pull(w)), want):
        np.testing.assert_allclose(np.float64(got), expected, atol=tolerance * np.abs(expected).max())
        if mask is not None and got.shape[1] == S:
            assert not np.any(np.float64(got)[~mask[:, 0, 0]])


@pytest.mark.parametrize("impl", HERE)
def test_large_logits_do_not_overflow(impl):
    """Up to some thousands, the largest of each row anywhere in it."""
    q, k, v = (np.float64(np.float32(s * RNG.standard_normal((2, n, 2, 4)))) for s, n in ((40, 80), (40, 80), (1, 80)))
    logits = np.einsum("bthd,bshd->bhts", q, k) / 2.0
    p = np.exp(logits - logits.max(-1, keepdims=True))
    want = np.einsum("bhts,bshd->bthd", p / p.sum(-1, keepdims=True), v)
    assert logits.max(-1).min() > 100 and len(np.unique(logits.argmax(-1))) > 30
    got = attention.attention(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), None, impl)
    np.testing.assert_allclose(got, want, atol=2e-3)


@pytest.mark.parametrize("impl", HERE)
def test_a_query_that_sees_no_key_gets_zero(impl):
    q, k, v = (jnp.asarray(RNG.standard_normal((2, 3, 2, 4)), jnp.float32) for _ in range(3))
    mask = jnp.asarray([[0, 0, 0], [1, 0, 1]], bool)[:, None, None]
    out, pull = jax.vjp(lambda *kv: attention.attention(q, *kv, mask, impl), k, v)
    assert not np.any(out[0]) and np.all(np.abs(out[1]) > 0)
    for gradient in pull(jnp.ones_like(out)):
        assert not np.any(gradient[0]) and np.any(gradient[1])


@pytest.mark.parametrize("backend, dtype, width, masked, want", [
    ("cuda", "bfloat16", 64, None, "cudnn"), ("cuda", "float16", 128, None, "cudnn"), ("cuda", "bfloat16", 8, (64, 78), "cudnn"),
    ("cuda", "float32", 64, None, "einsum"), ("cuda", "bfloat16", 136, None, "einsum"), ("cuda", "bfloat16", 36, None, "einsum"),
    ("cuda", "bfloat16", 64, (64, 77), "einsum"), ("cuda", "bfloat16", 64, (65, 78), "einsum"),
    ("gpu", "bfloat16", 64, None, "einsum"), ("rocm", "bfloat16", 64, None, "einsum"), ("cpu", "bfloat16", 64, None, "einsum"),
    ("tpu", "bfloat16", 64, (64, 77), "xla"), ("tpu", "float32", 36, None, "xla"),
])
def test_auto_chooses_what_the_machine_can_do(backend, dtype, width, masked, want):
    assert attention.choose_attention(backend, jnp.dtype(dtype), width, masked) == want


@pytest.mark.parametrize("platform, version, capability, want", [
    ("gpu", "PJRT C API\ncuda 12090", "9.0", "cuda"), ("gpu", "PJRT C API\ncuda 12090", "10.3", "cuda"),
    ("gpu", "cuda 12090", "7.5", "gpu"), ("gpu", "rocm 60300", "gfx942", "gpu"), ("tpu", "libtpu", None, "tpu"),
    ("cpu", "<unknown>", None, "cpu"),
])
def test_auto_looks_at_the_backend_and_its_capability(monkeypatch, platform, version, capability, want):
    device = types.SimpleNamespace(client=types.SimpleNamespace(platform_version=version), compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert attention.attention_backend() == want
    asked = []
    monkeypatch.setattr(attention, "choose_attention", lambda *args: asked.append(args) or "einsum")
    q, k = jnp.ones((1, 3, 2, 8), jnp.bfloat16), jnp.ones((1, 5, 2, 8), jnp.bfloat16)
    attention.attention(q, k, k)
    attention.attention(q, k, k, jnp.ones((1, 1, 1, 5), bool))
    assert asked == [(want, jnp.bfloat16, 8, None), (want, jnp.bfloat16, 8, (3, 5))]


def test_heads_by_number_and_by_width():
    assert attention.heads_of(96, 4, None) == 4 and attention.heads_of(96, 1, 32) == 3
    for heads, width in ((5, None), (1, 64), (1, 128)):
        with pytest.raises(UserError, match="96 channels"):
            attention.heads_of(96, heads, width)
