"""A step that is not finite: what is planted is named, and the state of before it is kept, bit for bit."""
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax import process
from ldm_jax.data import Source, batches
from ldm_jax.data.base import Field
from ldm_jax.models import NETS
from ldm_jax.parallel.sharding import batch_sharding, make_mesh, placer, replicated
from ldm_jax.systems import diffusion
from ldm_jax.training.checkpoint import Checkpoints
from ldm_jax.training.loop import train, train_step
from ldm_jax.training.nonfinite import diagnose, findings, stopped
from ldm_jax.training.state import new_state
from ldm_jax.types import UserError

IDS = np.arange(100, 116)


def loss_fn(params, batch, key):
    """Two named layers; the first takes the root of a parameter, whose slope is inf at 0."""
    with jax.named_scope("Net"):
        with jax.named_scope("first"):
            h = batch["x"] * params["net"]["first"]["w"] + jnp.sqrt(params["net"]["first"]["root"])
        with jax.named_scope("last"):
            out = h * params["net"]["last"]["w"]
    mse = jnp.mean((out - 1.0) ** 2, -1)
    return mse, {"mse": mse, "t": batch["t"]}


def problem():
    rng = np.random.default_rng(0)
    params = {"net": {"first": {"w": jnp.ones((1, 4)), "root": jnp.float32(1.0)}, "last": {"w": jnp.ones((1, 4))}}}
    return params, {"x": jnp.asarray(rng.normal(size=(16, 4)), jnp.float32), "t": jnp.linspace(0.0, 1.0, 16)}


def found(params, batch, mesh=None, loss=loss_fn, **options):
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    state = jax.device_put(new_state(params, tuple(params), optax.sgd(0.1)), replicated(mesh))
    found = diagnose(loss, state, jax.device_put(batch, batch_sharding(mesh)), jax.random.key(3), replicated=replicated(mesh), **options)
    return found, findings(found, IDS)


@pytest.mark.parametrize("accumulate, devices", [(1, 1), (2, 1), (2, 4)])
def test_examples_are_named_by_their_ids_and_times(accumulate, devices):
    params, batch = problem()
    batch["x"] = batch["x"].at[jnp.array([3, 10]), 1].set(jnp.nan)
    result, lines = found(params, batch, make_mesh(devices=jax.devices()[:devices]), accumulate=accumulate)
    assert np.flatnonzero(~np.isfinite(result["loss"])).tolist() == [3, 10]
    clean = loss_fn(params, problem()[1], None)[0]
    np.testing.assert_allclose(np.delete(result["loss"], [3, 10]), np.delete(clean, [3, 10]), rtol=1e-6)
    np.testing.assert_array_equal(result["t"], batch["t"])
    assert lines == ["loss of 2 of 16 examples: ids 103, 110 of the data; t 0.2000 to 0.6667",
                     "in the data itself: 'x' of ids 103, 110", "first: the output of Net/first"]


def test_a_gradient_that_is_not_finite_though_the_loss_is():
    params, batch = problem()
    params["net"]["first"]["root"] = jnp.float32(0.0)
    result, lines = found(params, batch)
    assert lines == ["first: the gradient in Net/first", "the losses are finite, the gradient is not: net/first"]


def test_a_gradient_whose_square_overflows():
    params, batch = problem()
    def slope(last, first):  # the gradient by one weight of each layer
        return lambda p, b, k: (jnp.full(16, p["net"]["last"]["w"][0, 0] * last + p["net"]["first"]["w"][0, 0] * first), {})

    for last, first in ((1e30, 1.0), (1.4e19, 1.3e19)):  # by itself, and only in the sum over blocks
        result, lines = found(params, batch, loss=slope(last, first))
        assert result["t"] is None
        assert lines == ["the losses are finite, the gradient's norm, which is too large for float32, is not: net/last"]


def test_a_fault_that_does_not_come_again(tmp_path):
    params, batch = problem()
    mesh = make_mesh(devices=jax.devices()[:1])
    state = jax.device_put(new_state(params, ("net",), optax.sgd(0.1)), replicated(mesh))
    said = stopped(str(tmp_path), loss_fn, state, batch, IDS, jax.random.key(0), position={"next_index": 0}, replicated=replicated(mesh))
    assert "run again, the step is finite" in said and "the same command goes on" in said and "loss of" not in said


def test_all_steps_after_a_bad_one_leave_the_state_as_it_was():
    params, batch = problem()
    tx = optax.adam(0.1)
    step = jax.jit(train_step(loss_fn, tx, ema_decay=0.9))
    first, metrics = step(new_state(params, ("net",), tx), batch, jax.random.key(0), True)
    bad, metrics = step(first, {**batch, "x": batch["x"] * jnp.inf}, jax.random.key(0), metrics["finite"])
    after, later = step(bad, batch, jax.random.key(0), metrics["finite"])
    assert not metrics["finite"] and not later["finite"] and np.isfinite(later["loss"])
    for state in (bad, after):
        jax.tree.map(np.testing.assert_array_equal, state, first)
    assert int(first.step) == 1


TINY = {  # net and options, the parameter that is made infinite, what is said of it
    "dit": ("dit", dict(width=8, depth=2, num_heads=1), "block_1/mlp_in/kernel", "DiT/block_1/mlp_in"),
    "dit_scanned": ("dit", dict(width=8, depth=3, num_heads=1, scan_layers=True, remat="full"), "blocks/v/kernel", "DiT/blocks/02/v"),
    "unet": ("unet", dict(width=4, mults=(1,), num_res_blocks=1, attention=(), norm_groups=2, remat="full"), "mid_block_1/conv_2/kernel",
             "UNet/mid_block_1/conv_2"),
}


@pytest.mark.parametrize("name", TINY)
def test_the_first_bad_layer_of_a_net(name):
    kind, options, path, says = TINY[name]
    net = NETS[kind]((4, 4, 1), None, 1, **options)
    system = diffusion(net, image_shape=(4, 4, 1), schedule=process.SCHEDULES["cosine"](), parameterization="v")
    params = jax.tree.map(lambda a: a + 0.01, system.init(jax.random.key(0)))  # no layer is closed by a zero
    *modules, leaf = path.split("/")
    place = params["net"]
    for module in modules:
        place = place[module]
    place[leaf] = place[leaf].at[2].set(jnp.inf) if "blocks" in modules else jnp.full_like(place[leaf], jnp.inf)
    _, lines = found(params, {"image": np.random.default_rng(0).integers(0, 256, (16, 4, 4, 1), np.uint8)}, loss=system.loss_fn)
    assert lines[0].startswith("loss of 16 of 16 examples: ids 100, 101, 102, 103, 104 and 11 more of the data; t 0.")
    assert lines[1:] == [f"in the parameters before the step: net/{path}", f"first: the output of {says}"]


def run(workdir, steps, bad=None, **options):
    """Train on 24 examples, of which `bad`'s x is not finite; (state, batch in which it comes first, its place there)."""
    x = np.random.default_rng(1).normal(size=(24, 4)).astype(np.float32)
    if bad is not None:
        x[bad] = np.nan

    def read(ids):
        return {"image": np.zeros((len(ids), 1, 1, 1), np.uint8), "x": x[ids], "t": np.asarray(ids, np.float32) / 24}

    source = Source("vectors", (1, 1, 1), None, (), 24, read, {"x": Field((4,)), "t": Field(())})
    mesh = make_mesh(devices=jax.devices()[:4])
    return train(workdir=str(workdir), init=lambda key: problem()[0], trained=("net",), loss_fn=loss_fn, tx=optax.adam(0.01), steps=steps,
                 batches=lambda start, state: batches(source, batch_size=8, seed=4, place=placer(mesh), start=start),
                 batch_size=8, seed=0, mesh=mesh, config={"of": "this run"}, warn=pytest.fail, **options)


def test_a_run_stops_and_keeps_the_state_of_before(tmp_path):
    """And does so once more when it is started again."""
    order = np.concatenate([batches(Source("n", (1, 1, 1), None, (), 24, None), batch_size=8, seed=4).ids(k) for k in range(3)])
    bad = int(order[8 + 5])  # in the second batch of the first epoch
    options = dict(log_every=1, save_every=1, keep=1)
    for _ in range(2):
        with pytest.raises(UserError) as error:
            run(tmp_path / "run", 30, bad, **options)
        said = str(error.value).splitlines()
        kept = tmp_path / "run" / "nonfinite_0000002"
        assert said[0] == "not finite at step 2:"
        assert said[1] == f"  loss of 1 of 8 examples: ids {bad} of the data; t {bad / 24:.4f} to {bad / 24:.4f}"
        assert f"'x' of ids {bad}" in said[2] and "Net/first" in said[3]
        assert f"  kept: {kept} " in said[4] and said[4].endswith("checkpoints of the run: 1") and f"init_dir={kept}" in said[5]
        assert "mend or leave out these examples" in said[5]
        assert [json.loads(line)["step"] for line in open(tmp_path / "run" / "metrics.jsonl")] == [1]
    report = json.load(open(kept / "report.json"))
    assert report["step"] == 2 and report["ids"] == order[8:16].tolist() and report["where"] == "the output of Net/first"
    assert [i for i, loss in enumerate(report["loss"]) if loss == "nan"] == [5] and report["data"]["x"] == [i != 5 for i in range(8)]
    assert json.load(open(kept / "config.json")) == {"of": "this run"}
    good = run(tmp_path / "good", 1, bad)
    for directory in (kept, tmp_path / "run"):
        same_as(good, directory, 1)


def same_as(good, directory, step):
    """The newest checkpoint is this state, of that step."""
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), good)
    with Checkpoints(os.path.join(directory, "checkpoints"), read_only=True) as checkpoints:
        found, state, position = checkpoints.restore(abstract, warn=pytest.fail)
    assert found == step and position == {"next_index": step}
    jax.tree.map(np.testing.assert_array_equal, state, good)


def test_a_bad_step_is_noticed_before_the_next_line_is_due(tmp_path):
    """Two steps later at most, and what came before it is logged."""
    order = [batches(Source("n", (1, 1, 1), None, (), 24, None), batch_size=8, seed=4).ids(k) for k in range(3)]
    with pytest.raises(UserError, match="not finite at step 3:"):
        run(tmp_path / "run", 1000, int(order[2][0]), log_every=100, save_every=100)
    lines = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [line["step"] for line in lines] == [2] and np.isfinite(lines[0]["loss"])
    same_as(run(tmp_path / "good", 2), tmp_path / "run" / "nonfinite_0000003", 2)
    assert not os.path.exists(tmp_path / "run" / "checkpoints" / "2")
