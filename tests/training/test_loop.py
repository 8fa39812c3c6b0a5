"""The update: accumulation, averaging, steps that are not finite, and equality over meshes."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.training.loop import ema_rate, train_step
from ldm_jax.training.sharding import batch_sharding, make_mesh, replicated, shardings
from ldm_jax.training.state import learning_rate, new_state, optimizer
from ldm_jax.types import UserError, normal


def loss_fn(params, batch, key):
    """A linear regression with noise on its inputs: the loss of an example depends on that example's key."""
    x = batch["x"] + 0.1 * normal(key, batch["x"].shape)
    error = x @ params["net"]["w"] * params["gain"] - batch["y"][:, None]
    return jnp.mean(error**2, -1), {"mean_error": jnp.mean(error, -1)}


def problem(width=4):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"net": {"w": jax.random.normal(keys[0], (width, 8))}, "gain": jnp.float32(0.5)}
    batch = {"x": jax.random.normal(keys[1], (16, width)), "y": jax.random.normal(keys[2], (16,))}
    return params, batch


def run(tx, steps=3, accumulate=1, place=lambda tree: tree, **options):
    params, batch = problem(**options)
    state = place(new_state(params, ("net",), tx))
    step = jax.jit(train_step(loss_fn, tx, ema_decay=0.9, accumulate=accumulate))
    for _ in range(steps):
        state, metrics = step(state, batch, jax.random.key(7))
    return state, metrics


def test_accumulation_is_the_whole_batch():
    whole, parts = run(optax.adam(0.1))[0], run(optax.adam(0.1), accumulate=4)[0]
    np.testing.assert_allclose(whole.params["net"]["w"], parts.params["net"]["w"], rtol=2e-5)


def test_one_step_of_sgd_and_the_average_against_numpy():
    params, batch = problem()
    state, metrics = run(optax.sgd(0.1), steps=1)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(jax.random.key(7), 0), jnp.arange(16))
    x = np.asarray(batch["x"] + 0.1 * normal(keys, batch["x"].shape), np.float64)
    w = np.asarray(params["net"]["w"], np.float64)
    error = 0.5 * x @ w - np.asarray(batch["y"], np.float64)[:, None]
    gradient = 0.5 * x.T @ (2 * error / error.size)
    np.testing.assert_allclose(state.params["net"]["w"], w - 0.1 * gradient, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], np.mean(error**2), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(state.ema["net"]["w"], 0.1 * w + 0.9 * (w - 0.1 * gradient), rtol=1e-5, atol=1e-6)
    assert state.fixed["gain"] == 0.5 and int(state.step) == 1


def test_the_average_forgets_quickly_at_first():
    assert [float(ema_rate(0.999, s)) for s in (0, 8)] == [pytest.approx(0.1), pytest.approx(0.5)]
    assert float(ema_rate(0.999, 10**6)) == pytest.approx(0.999)


def test_a_step_that_is_not_finite_changes_nothing():
    params, batch = problem()
    tx = optax.adam(0.1)
    state = new_state(params, ("net",), tx)
    batch = {**batch, "y": batch["y"].at[3].set(jnp.nan)}
    after, metrics = jax.jit(train_step(loss_fn, tx, ema_decay=0.9))(state, batch, jax.random.key(7))
    assert not metrics["finite"] and int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.ema, after.opt_state), (state.params, state.ema, state.opt_state))


@pytest.mark.parametrize("data, fsdp", [(8, 1), (1, 8), (2, 4)])
def test_every_mesh_gives_the_same_numbers(data, fsdp):
    tx, width = optax.adam(0.1), 4096
    alone, _ = run(tx, width=width)
    mesh = make_mesh(data, fsdp)
    placed = []

    def place(state):
        placed.append(shardings(state, mesh))
        return jax.device_put(state, placed[0])

    params, batch = problem(width)
    state = place(new_state(params, ("net",), tx))
    step = jax.jit(train_step(loss_fn, tx, ema_decay=0.9), in_shardings=(placed[0], batch_sharding(mesh), replicated(mesh)),
                   out_shardings=(placed[0], replicated(mesh)))
    for _ in range(3):
        state, _ = step(state, jax.device_put(batch, batch_sharding(mesh)), jax.random.key(7))
    w = state.params["net"]["w"]
    assert w.addressable_shards[0].data.size == w.size // fsdp
    assert state.opt_state[0].mu["net"]["w"].addressable_shards[0].data.size == w.size // fsdp
    np.testing.assert_allclose(alone.params["net"]["w"], w, rtol=1e-4, atol=1e-5)


def test_rules_name_the_axes():
    mesh = make_mesh(1, 8)
    tree = {"net": {"q": {"kernel": jnp.zeros((64, 512))}, "out": {"kernel": jnp.zeros((64, 512))}}}
    specs = shardings(tree, mesh, [("net/q/kernel", ("fsdp", None))])
    assert specs["net"]["q"]["kernel"].spec == jax.sharding.PartitionSpec("fsdp", None)
    assert specs["net"]["out"]["kernel"].spec == jax.sharding.PartitionSpec(None, "fsdp")


def test_learning_rate_warms_up_and_decays():
    rate = learning_rate(2.0, steps=110, warmup_steps=10, decay="cosine")
    for step, value in ((0, 0.0), (5, 1.0), (10, 2.0), (60, 1.0), (110, 0.0)):
        assert float(rate(step)) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("make", [
    lambda: learning_rate(1.0, steps=10, warmup_steps=10),
    lambda: learning_rate(1.0, steps=10, decay="stairs"),
    lambda: optimizer("adamm", learning_rate(1.0, steps=10)),
    lambda: make_mesh(3, 2),
])
def test_mistakes_are_named(make):
    with pytest.raises(UserError):
        make()
