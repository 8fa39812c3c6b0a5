"""The numbers of a run's health against numpy: sums by noise level, norms by block, over parts, meshes and windows of steps."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.parallel.sharding import batch_sharding, make_mesh, replicated, shardings
from ldm_jax.training import health
from ldm_jax.training.logs import Logs
from ldm_jax.training.loop import train_step
from ldm_jax.training.state import new_state

EDGES = np.arange(11) / 10


def binned(t, error):
    """Sums and counts by numpy's histogram, whose last part is closed as well."""
    return np.histogram(t, EDGES, weights=np.asarray(error, np.float64))[0], np.histogram(t, EDGES)[0]


def test_sums_by_level_against_numpy():
    rng = np.random.default_rng(0)
    t = np.concatenate([[0.0, 1.0, 0.099, 0.101], rng.uniform(size=60) ** 3]).astype(np.float32)
    error = rng.exponential(size=64).astype(np.float32)
    np.testing.assert_allclose(health.by_level(t, error), np.stack(binned(t, error)), rtol=1e-6)


def test_an_error_that_is_not_finite_stays_in_its_level():
    sums, counts = health.by_level(jnp.array([0.05, 0.55, 0.95]), jnp.array([1.0, jnp.nan, 2.0]))
    assert np.flatnonzero(~np.isfinite(sums)).tolist() == [5] and sums[0] == 1 and sums[9] == 2 and counts.sum() == 3


def gradients():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {"net": {"patch_in": {"kernel": draw(4, 8), "bias": draw(8)}, "blocks": {"q": {"kernel": draw(3, 8, 8)}, "scale": draw(3, 8)},
                    "down_0_attention_0": {"block_0": {"k": draw(5)}}},
            "discriminator": {"conv": {"kernel": draw(3, 3, 1, 4)}}, "gain": draw(),
            "lora": {"net": {"blocks": {"q": {"kernel": {"A": draw(3, 8, 2)}}}, "out": {"kernel": {"B": draw(2, 4)}}}}}


def test_norms_of_blocks_against_numpy():
    tree = gradients()
    norm = lambda *arrays: np.sqrt(sum(np.sum(np.asarray(a, np.float64) ** 2) for a in arrays))
    net, adapters = tree["net"], tree["lora"]["net"]
    want = {"net/patch_in": norm(*net["patch_in"].values()), "net/down_0_attention_0": norm(net["down_0_attention_0"]["block_0"]["k"]),
            "discriminator/conv": norm(tree["discriminator"]["conv"]["kernel"]), "gain": norm(tree["gain"]),
            "lora/net/out": norm(adapters["out"]["kernel"]["B"]),
            **{f"net/blocks/{i:02d}": norm(net["blocks"]["q"]["kernel"][i], net["blocks"]["scale"][i]) for i in range(3)},
            **{f"lora/net/blocks/{i:02d}": norm(adapters["blocks"]["q"]["kernel"]["A"][i]) for i in range(3)}}
    got = dict(zip(health.block_names(tree), np.sqrt(jax.jit(health.block_squares)(tree)), strict=True))
    assert got.keys() == want.keys()
    for name in want:
        assert got[name] == pytest.approx(want[name], rel=1e-6), name


def loss_fn(params, batch, key):
    """A linear layer for each of two blocks; an example's t and error depend on its data alone."""
    error = batch["x"] @ params["net"]["first"]["w"] @ params["net"]["second"]["w"] - batch["y"]
    mse = jnp.mean(error**2, -1)
    return (1 + batch["t"]) * mse, {"mse": mse, "t": batch["t"]}


def problem():
    rng = np.random.default_rng(2)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {"net": {"first": {"w": draw(4, 6)}, "second": {"w": draw(6, 8)}}}
    return params, {"x": draw(16, 4), "y": draw(16, 8), "t": rng.uniform(size=16).astype(np.float32) ** 2}


def by_numpy(params, batch):
    """The metrics of a step at the loss's own gradient, in float64."""
    w1, w2 = (np.asarray(params["net"][name]["w"], np.float64) for name in ("first", "second"))
    x, y, t = (np.asarray(batch[name], np.float64) for name in ("x", "y", "t"))
    error = x @ w1 @ w2 - y
    outer = 2 * error * (1 + t[:, None]) / error.size
    norms = [np.linalg.norm(x.T @ outer @ w2.T), np.linalg.norm((x @ w1).T @ outer)]
    mse = np.mean(error**2, -1)
    return {"mse": mse.mean(), "loss": np.mean((1 + t) * mse), "grad_norms": dict(zip(("net/first", "net/second"), norms)),
            "grad_norm": np.hypot(*norms)}, binned(t, mse)


@pytest.mark.parametrize("accumulate, mesh", [(1, None), (2, None), (1, (2, 4)), (2, (8, 1))])
def test_a_window_of_two_steps(accumulate, mesh):
    """Levels are divided after both steps' sums are added, whatever the parts of a step and the mesh; empty ones are left out."""
    params, batch = problem()
    tx = optax.sgd(0.0)
    second = {**batch, "y": 3 * batch["y"], "t": batch["t"] ** 4}
    state, place = new_state(jax.tree.map(jnp.asarray, params), ("net",), tx), {}
    if mesh:
        mesh = make_mesh(*mesh)
        place = dict(in_shardings=(shardings(state, mesh), batch_sharding(mesh), replicated(mesh)),
                     out_shardings=(shardings(state, mesh), replicated(mesh)))
    step, steps = jax.jit(train_step(loss_fn, tx, ema_decay=0.9, accumulate=accumulate), **place), []
    for part in (batch, second):
        state, metrics = step(state, part, jax.random.key(0))
        steps.append(jax.device_get(metrics))
    line = health.summary(steps, health.block_names(state.params))
    (one, (sums_1, counts_1)), (two, (sums_2, counts_2)) = by_numpy(params, batch), by_numpy(params, second)
    sums, counts = sums_1 + sums_2, counts_1 + counts_2
    assert np.any(counts == 0) and np.any(counts_1 != counts_2)
    want = {f"mse_t{EDGES[i]:.1f}-{EDGES[i + 1]:.1f}": sums[i] / counts[i] for i in range(10) if counts[i]}
    assert {name for name in line if "_t" in name} == set(want)
    for name, value in want.items():
        assert line[name] == pytest.approx(value, rel=1e-5), name
    for name in ("mse", "loss", "grad_norm"):
        assert line[name] == pytest.approx((one[name] + two[name]) / 2, rel=1e-5), name
    for name in ("net/first", "net/second"):
        assert line["grad_norms"][name] == pytest.approx((one["grad_norms"][name] + two["grad_norms"][name]) / 2, rel=1e-5), name


def test_a_system_without_times_or_without_mse():
    loss = jnp.array([1.0, 3.0])
    means, notes = health.split_metrics(loss, {"kl": loss, "notes": "kept"})
    assert (float(means["kl"]), float(means["loss"]), notes) == (2.0, 2.0, "kept") and "by_level" not in means
    means, _ = health.split_metrics(loss, {"t": jnp.array([0.1, 0.95])})
    assert means["by_level"]["loss"][0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 3] and "t" not in means


def test_groups_of_numbers_are_one_key_of_a_line_and_many_events(tmp_path):
    line, seen = {"loss": 1.0, "grad_norms": {"net/a": 2.0, "net/b": 3.0}}, []
    with Logs(str(tmp_path)) as logs:
        logs._events.write_event = lambda event: seen.extend((value.tag, value.simple_value, event.step) for value in event.summary.value)
        logs.scalars(7, line)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 7, **line}
    assert seen == [("loss", 1.0, 7), ("grad_norms/net/a", 2.0, 7), ("grad_norms/net/b", 3.0, 7)]
