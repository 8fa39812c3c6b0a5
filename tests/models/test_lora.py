"""The algebra of LoRA: W + s A B for every kind of kernel, what is adapted by default, and what is refused."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import lora
from ldm_jax.models.clip import clip_text
from ldm_jax.models.dit import dit
from ldm_jax.models.lora import Lora
from ldm_jax.models.unet import unet
from ldm_jax.types import UserError
from tests.models.tiny import random_params

SMALL = dict(width=8, mults=(1, 2), num_res_blocks=1, norm_groups=4, num_heads=2)
NETS = {  # net -> the paths that hold its attentions' q, k, v, out
    "ldm": (unet((4, 4, 2), **SMALL, attention=(2,), transformer_depth=2, context_dim=6),
            [f"{place}/block_{k}/{kind}_attention" for k in (0, 1) for kind in ("self", "cross")
             for place in ("down_1_attention_0", "mid_attention", "up_1_attention_0", "up_1_attention_1")]),
    "ddpm": (unet((4, 4, 2), **SMALL, attention=(2,)),
             ["down_1_attention_0", "mid_attention", "up_1_attention_0", "up_1_attention_1"]),
    "dit": (dit((4, 4, 2), 3, patch=2, width=8, depth=2, num_heads=2), ["block_0", "block_1"]),
    "stacked dit": (dit((4, 4, 2), 3, patch=2, width=8, depth=2, num_heads=2, scan_layers=True), ["blocks"]),
    "clip": (clip_text(vocab_size=11, width=8, depth=3, num_heads=2, max_length=5), ["blocks"]),
}
SHAPES = {"dense": ((5, 4), ()), "layers": ((3, 5, 4), (3,)), "conv": ((3, 2, 5, 4), ()), "conv layers": ((2, 3, 2, 5, 4), (2,))}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def product(A, B):
    """sum over r of A[..., i, r] B[..., r, o], B with A's axis of layers where it has one; one layer and tap at a time."""
    if B.ndim == 3:
        return np.stack([product(a, b) for a, b in zip(A, B)])
    return np.stack([product(a, B) for a in A]) if A.ndim > 2 else A @ B


@pytest.mark.parametrize("kind", SHAPES)
def test_merged_kernel(kind):
    shape, lead = SHAPES[kind]
    W, A, B = normal(*shape), normal(*shape[:-1], 2, seed=1), normal(*lead, 2, 4, seed=2)
    params = {"a": {"kernel": jnp.float32(W), "bias": jnp.ones(4)}, "b": jnp.zeros(3)}
    adapters = {"a": {"kernel": {"A": jnp.float32(A), "B": jnp.float32(B)}}}
    layered = np.array([0.5, -2.0, 3.0][:lead[0]]) if lead else -2.0
    for scale, factor in ((0.7, 0.7), ({"a/kernel": layered}, np.reshape(layered, (*lead, *(1,) * len(shape[len(lead):]))))):
        got = jax.jit(lora.merge)(params, adapters, scale)
        np.testing.assert_allclose(got["a"]["kernel"], W + factor * product(A, B), rtol=2e-6, atol=2e-6)
        assert got["a"]["bias"] is not None and np.array_equal(got["b"], params["b"])
        np.testing.assert_array_equal(got["a"]["bias"], params["a"]["bias"])


def test_a_convolution_to_r_channels_and_a_pointwise_one():
    """What the adapter of a convolution means: its own small convolution beside the one that is held fixed."""
    x, W, A, B = normal(1, 6, 5, 3), normal(3, 3, 3, 4, seed=1), normal(3, 3, 3, 2, seed=2), normal(2, 4, seed=3)

    def conv(x, W):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return sum(padded[:, i:i + 6, j:j + 5] @ W[i, j] for i in range(3) for j in range(3))
    merged = lora.merge({"kernel": jnp.float32(W)}, {"kernel": {"A": jnp.float32(A), "B": jnp.float32(B)}}, 0.3)["kernel"]
    np.testing.assert_allclose(conv(x, np.float64(merged)), conv(x, W) + 0.3 * conv(x, A) @ B, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_fresh_adapters_are_of_the_attentions_and_change_nothing(name):
    net, places = NETS[name]
    params = random_params(net)
    want = {f"{place}/{x}/kernel" for place in places for x in ("q", "k", "v", "out")}
    assert set(lora.kernels(params)) == want
    adapters = lora.init(jax.random.key(1), jax.eval_shape(lambda: params), rank=3)
    again = lora.merge(params, adapters, 4.0)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert jax.tree.map(lambda a: a.dtype, again) == jax.tree.map(lambda a: a.dtype, params)
    leaves = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(adapters)}
    A = np.concatenate([np.ravel(leaf) for path, leaf in leaves.items() if path[-1] == "A"])
    assert abs(np.std(A) * 3 - 1) < 5 / np.sqrt(A.size) and abs(np.mean(A)) < 2 / np.sqrt(A.size)
    assert len(set(A.tolist())) > 0.99 * A.size
    assert all(leaf.dtype == jnp.float32 and (path[-1] == "A" or not leaf.any()) for path, leaf in leaves.items())


def test_dtypes_and_several_nets():
    params = {"net": {"kernel": jnp.ones((2, 2), jnp.bfloat16)}, "text": {"kernel": jnp.ones((2, 2))}, "other": jnp.ones(1)}
    ones = {"kernel": {"A": jnp.ones((2, 1)), "B": jnp.ones((1, 2))}}
    got = lora.merge_all(params, Lora({"net": ones, "text": ones}, {"net": 1.0, "text": {"kernel": 3.0}}), 0.5)
    assert got["net"]["kernel"].dtype == jnp.bfloat16 and np.all(got["net"]["kernel"] == 1.5)
    assert np.all(got["text"]["kernel"] == 2.5) and got["other"] is params["other"]


@pytest.mark.parametrize("call, words", [
    (lambda p: lora.init(jax.random.key(0), p, rank=0), "rank=0"),
    (lambda p: lora.init(jax.random.key(0), p, ["q/kernel$", "to_q"]), "'to_q' of LoRA finds none of the net's 1 kernels"),
    (lambda p: lora.init(jax.random.key(0), p, ["("]), "no regular expression"),
    (lambda p: lora.init(jax.random.key(0), p, []), "at least one target"),
    (lambda p: lora.merge(p, {"q": {"v": {}}}), "no 'q/v' in this net"),
    (lambda p: lora.merge(p, {"q": {"kernel": {"A": np.ones((3, 1)), "B": np.ones((1, 3))}}}), r"q/kernel' has .* \(2, 3\)"),
    (lambda p: lora.merge(p, {"q": {"kernel": {"A": np.ones((2, 1)), "B": np.ones((2, 3))}}}), "do not fit"),
    (lambda p: lora.merge_all({"net": p}, Lora({"text": {}})), "adapters of 'text' and no net of that name"),
])
def test_what_does_not_fit(call, words):
    with pytest.raises(UserError, match=words):
        call({"q": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
