"""A system with adapters: the system itself at first, the chain rule's gradients, and nothing else that changes in training."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax import process
from ldm_jax.models import lora
from ldm_jax.models.dit import dit
from ldm_jax.models.lora import Lora
from ldm_jax.systems.adapting import adapted
from ldm_jax.systems.base import diffusion
from ldm_jax.training.loop import train_step
from ldm_jax.training.state import new_state
from ldm_jax.types import UserError
from tests.models.tiny import random_params

SHAPE = (4, 4, 1)


@dataclasses.dataclass(frozen=True)
class SmallNet:
    """A convolution, two layers one above the other in one kernel, and a matrix: every kind of kernel, compiled quickly."""
    image_shape = SHAPE

    def init(self, key):
        return {"conv": {"kernel": jnp.zeros((3, 3, 1, 5)), "bias": jnp.zeros(5)},
                "blocks": {"q": {"kernel": jnp.zeros((2, 5, 5))}}, "out": {"kernel": jnp.zeros((5, 1))}}

    def apply(self, params, x_t, t, cond=None, train=False, rngs=None):
        h = jax.lax.conv_general_dilated(x_t, params["conv"]["kernel"], (1, 1), "SAME",
                                         dimension_numbers=("NHWC", "HWIO", "NHWC"))
        h = jnp.tanh(h + (params["conv"]["bias"][None] + t[:, None])[:, None, None])
        for layer in params["blocks"]["q"]["kernel"]:
            h = jnp.tanh(h @ layer)
        return h @ params["out"]["kernel"]


def flow(net):
    return diffusion(net, image_shape=SHAPE, schedule=process.SCHEDULES["rectified_flow"](), parameterization="flow")


RANK, ALPHA = 3, 1.5
SCALE = ALPHA / RANK
TARGETS = (*lora.ATTENTION, "^conv/kernel$")
NET, BASE = SmallNet(), flow(SmallNet())
SYSTEM = adapted(BASE, rank=RANK, alpha=ALPHA, targets=TARGETS)
BATCH = {"image": np.random.default_rng(0).integers(0, 256, (4, *SHAPE), np.uint8)}
KEY = jax.random.key(3)


@functools.cache
def parameters():
    """Fresh adapters, those that are nowhere zero, and the net's own parameters."""
    fresh = {**SYSTEM.init(jax.random.key(0)), "net": jax.tree.map(jnp.asarray, random_params(NET))}
    rng = np.random.default_rng(1)
    return fresh, {**fresh, "lora": jax.tree.map(lambda a: jnp.float32(0.5 * rng.standard_normal(a.shape)), fresh["lora"])}


def loss_and_gradient(system, params):
    return jax.jit(jax.value_and_grad(lambda params: jnp.mean(system.loss_fn(params, BATCH, KEY)[0])))(params)


def draw(system, params, **options):
    x = jax.random.normal(KEY, (2, *SHAPE))
    run = functools.partial(system.sample, sampler=process.SAMPLERS["euler"](), steps=3, capacity=4)
    return jax.jit(lambda params, options: run(params, x, jax.random.split(KEY, 2), None, **options))(params, options)


def merged(params, strength=1.0):
    return {"net": lora.merge(params["net"], params["lora"]["net"], SCALE * strength)}


@pytest.mark.parametrize("net", [NET, dit(SHAPE, patch=2, width=8, depth=2, num_heads=2, scan_layers=True)], ids=["small", "dit"])
def test_at_first_it_is_the_system(net):
    base = flow(net)
    system = adapted(base, rank=RANK, alpha=ALPHA)
    params = random_params(net)
    fresh = {"net": params, "lora": {"net": lora.init(KEY, params, rank=RANK)}}
    assert jax.tree.structure(jax.eval_shape(system.init, KEY)) == jax.tree.structure(fresh)
    losses = [jax.jit(s.loss_fn)(p, BATCH, KEY)[0] for s, p in ((system, fresh), (base, {"net": params}))]
    np.testing.assert_array_equal(*losses)
    np.testing.assert_array_equal(draw(system, fresh), draw(base, {"net": params}))


def test_gradients_by_the_chain_rule():
    """dL/dA = s dL/dW B^T and dL/dB = s A^T dL/dW, dL/dW that of the system at the merged parameters; none for W itself."""
    _, params = parameters()
    loss, grads = loss_and_gradient(SYSTEM, params)
    want, of_net = loss_and_gradient(BASE, merged(params))
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert not any(np.any(g) for g in jax.tree.leaves(grads["net"]))
    found = lora.kernels(of_net["net"], TARGETS)
    assert set(found) == {"blocks/q/kernel", "conv/kernel", "out/kernel"}
    for path, of_kernel in found.items():
        A, B, dA, dB = (functools.reduce(lambda tree, name: tree[name], [*path.split("/"), x], tree["lora"]["net"])
                        for tree in (params, grads) for x in "AB")
        of_kernel, A, B = (np.float64(a) for a in (of_kernel, A, B))
        taps = (0, 1) if of_kernel.ndim == 4 else ()  # B serves every tap of a convolution
        pairs = (dA, of_kernel @ np.swapaxes(B, -1, -2)), (dB, (np.swapaxes(A, -1, -2) @ of_kernel).sum(taps))
        for got, expected in ((got, SCALE * of) for got, of in pairs):
            assert np.abs(expected).max() > 1e-5, path
            np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max(), err_msg=path)


def test_training_changes_the_adapters_alone():
    fresh, _ = parameters()
    tx = optax.adamw(1e-2)
    state = new_state(fresh, SYSTEM.trained, tx)
    assert set(state.params) == {"lora"} and set(state.others) == {"net"}
    step = jax.jit(train_step(SYSTEM.loss_fn, tx, ema_decay=0.9))
    for _ in range(2):
        state, metrics = step(state, BATCH, KEY)
    assert metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, state.others, {"net": fresh["net"]})
    for old, new in zip(jax.tree.leaves(fresh["lora"]), jax.tree.leaves(state.params["lora"])):
        assert np.any(old != new)


def test_sampling_at_any_strength():
    _, params = parameters()
    base = draw(BASE, {"net": params["net"]})
    for strength in (1.0, 0.5, 0.0):
        want = draw(BASE, merged(params, strength))
        got = draw(SYSTEM, params, lora_scale=strength) if strength != 1.0 else draw(SYSTEM, params)
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert np.abs(want - base).max() > 0.05 or not strength


def test_going_on_from_adapters():
    _, params = parameters()
    scale = {path: np.full(2, SCALE) if "blocks" in path else SCALE for path in lora.kernels(params["net"], TARGETS)}
    start = Lora({"net": jax.tree.map(np.asarray, params["lora"]["net"])}, {"net": scale})
    again = adapted(BASE, start=start)
    jax.tree.map(np.testing.assert_array_equal, again.init(KEY)["lora"], params["lora"])
    np.testing.assert_allclose(loss_and_gradient(again, params)[0], loss_and_gradient(SYSTEM, params)[0], rtol=1e-6)


@pytest.mark.parametrize("options, words", [
    (dict(nets=("text_encoder",)), "unknown net to adapt 'text_encoder'; choose from: net"),
    (dict(nets=()), "names no net"),
    (dict(rank=0), "rank=0"),
])
def test_what_does_not_fit(options, words):
    with pytest.raises(UserError, match=words):
        adapted(BASE, **options)


def test_twice():
    with pytest.raises(UserError, match="has adapters already"):
        adapted(SYSTEM)
