"""The update: accumulation, averaging, steps that are not finite, and equality over meshes."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.parallel.sharding import batch_sharding, make_mesh, replicated, shardings
from ldm_jax.training.loop import ema_rate, train_step
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
    assert state.others["gain"] == 0.5 and int(state.step) == 1


def test_the_average_forgets_quickly_at_first():
    assert [float(ema_rate(0.999, s)) for s in (0, 8)] == [pytest.approx(0.1), pytest.approx(0.5)]
    assert float(ema_rate(0.999, 10**6)) == pytest.approx(0.999)


def test_a_step_that_is_not_finite_changes_nothing():
    params, batch = problem()
    tx = optax.adam(0.1)
    state = new_state(params, ("net",), tx)
    batch = {**batch, "y": batch["y"].at[3].set(jnp.nan)}
    after, metrics = jax.jit(train_step(loss_fn, tx, ema_decay=0.9))(state, batch, jax.random.key(7))
    assert not metrics["finite"] and int(after.step) == 0
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


def test_refresh_changes_what_no_gradient_does():
    """After the optimiser, before the average; with accumulation from the last part's notes; not at all in a step that is not finite."""
    def noted(params, batch, key):
        loss, metrics = loss_fn(params, batch, key)
        return loss, {**metrics, "notes": {"last": batch["y"][-1]}}

    def refresh(params, notes):
        return {"net": {"w": params["net"]["w"].at[0].set(notes["last"])}, "gain": params["gain"] + 1.0}

    for accumulate in (1, 4):
        params, batch = problem()
        tx = optax.sgd(0.1)
        step = jax.jit(train_step(noted, tx, ema_decay=0.9, accumulate=accumulate, refresh=refresh))
        before = new_state(params, ("net",), tx)
        state, metrics = step(before, batch, jax.random.key(7))
        assert "notes" not in metrics and state.others["gain"] == 1.5
        np.testing.assert_array_equal(state.params["net"]["w"][0], jnp.full(8, batch["y"][-1]))
        np.testing.assert_allclose(state.ema["net"]["w"][0], 0.1 * params["net"]["w"][0] + 0.9 * batch["y"][-1], rtol=1e-5)
        assert np.all(state.params["net"]["w"][1:] != params["net"]["w"][1:])
        state, _ = step(before, {**batch, "x": batch["x"] * jnp.inf}, jax.random.key(7))
        assert state.others["gain"] == 0.5 and np.all(state.params["net"]["w"] == params["net"]["w"])


def test_optimisers_by_name():
    """Each net moves at its own optimiser's rate, and is clipped by its own gradient alone."""
    from ldm_jax.training.state import by_name
    tx = by_name(optimizer("sgd", lambda _: 0.1, clip_norm=1.0), {"b": optimizer("sgd", lambda _: 1.0, clip_norm=1.0)})
    params = {"a": {"w": jnp.zeros(2)}, "b": {"w": jnp.zeros(2)}}
    updates, _ = tx.update({"a": {"w": jnp.array([30.0, 40.0])}, "b": {"w": jnp.array([0.3, 0.4])}}, tx.init(params), params)
    np.testing.assert_allclose(updates["a"]["w"], [-0.06, -0.08], rtol=1e-5)
    np.testing.assert_allclose(updates["b"]["w"], [-0.3, -0.4], rtol=1e-5)


def test_muon_turns_each_kernels_gradient_into_a_rotation():
    """From rest the first update of a kernel, as a matrix from inputs to outputs, is lr U V^T to the Newton-Schulz iteration's accuracy
    (singular values 0.7 to 1.2); a scanned kernel is one matrix per block; a bias moves by Adam's first step."""
    shapes = {"conv": (3, 3, 4, 8), "dense": (12, 6), "blocks": (5, 6, 9)}
    keys = dict(zip(shapes, jax.random.split(jax.random.key(0), 3)))
    bias = jnp.array([2.0, -3.0])
    grads = {"net": {name: {"kernel": jax.random.normal(keys[name], shape), "bias": bias} for name, shape in shapes.items()}}
    tx = optimizer("muon", lambda step: 0.5, adam_ratio=0.1)
    params = jax.tree.map(jnp.zeros_like, grads)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    for name, tree in updates["net"].items():
        first = 0.05 * (0.9 * 0.1 / (1 - 0.9**2) + 1)  # Adam's first step with Nesterov's momentum
        np.testing.assert_allclose(tree["bias"], [-first, first], rtol=1e-4)
        matrices = (lambda a: a if name == "blocks" else a.reshape(1, -1, a.shape[-1]))
        for update, grad in zip(matrices(tree["kernel"]), matrices(grads["net"][name]["kernel"])):
            u, _, v = np.linalg.svd(np.asarray(grad, np.float64), full_matrices=False)
            scale = max(1.0, update.shape[1] / update.shape[0]) ** 0.5  # optax's factor for wide matrices
            got = u.T @ np.asarray(update) @ v.T / (-0.5 * scale)  # of U V^T it is the identity
            assert np.all((np.diag(got) > 0.6) & (np.diag(got) < 1.3)) and np.abs(got - np.diag(np.diag(got))).max() < 0.02, name
