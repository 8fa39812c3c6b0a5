"""Several updates in one dispatch of the compiled program."""
import contextlib
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.data.base import Field, Source
from ldm_jax.data.pipeline import batches
from ldm_jax.parallel import cost
from ldm_jax.parallel.sharding import make_mesh, place, placer, replicated
from ldm_jax.parallel.signals import asking
from ldm_jax.training.checkpoint import Checkpoints
from ldm_jax.training.loop import Interrupted, compiled_step, dispatches, placed_state, several, single_steps, train, train_step
from ldm_jax.training.state import new_state
from ldm_jax.types import UserError, normal

WIDTH, SIZE, STDS, EXAMPLES = 4, 8, (0.05, 0.1), 96
RULES = (("w$", (None, "fsdp")),)


def loss_fn(params, batch, key):
    """A linear regression with noise on its inputs: the loss of an example depends on its key, and so on the step."""
    x = batch["x"] + 0.1 * normal(key, batch["x"].shape)
    error = x @ params["net"]["w"] - jnp.sin(batch["x"].sum(-1))[:, None]
    return jnp.mean(error**2, -1), {"mean_error": jnp.mean(error, -1), "t": batch["t"]}


def init(key):
    return {"net": {"w": jax.random.normal(key, (WIDTH, 8))}, "fixed": jnp.float32(1.0)}


def source(bad=None):
    """EXAMPLES, of which `bad`'s x is not finite."""
    x = np.random.default_rng(1).normal(size=(EXAMPLES, WIDTH)).astype(np.float32)
    if bad is not None:
        x[bad] = np.nan

    def read(ids):
        return {"image": np.zeros((len(ids), 1, 1, 1), np.uint8), "x": x[ids], "t": np.asarray(ids, np.float32) / EXAMPLES}

    return Source("vectors", (1, 1, 1), None, (), EXAMPLES, read, {"x": Field((WIDTH,)), "t": Field(())})


def run(workdir, steps, per_dispatch, bad=None, mesh=None, **options):
    os.makedirs(workdir, exist_ok=True)
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    return train(workdir=str(workdir), init=init, trained=("net",), loss_fn=loss_fn, tx=optax.adam(0.02), steps=steps, batch_size=SIZE,
                 batches=lambda start, state: batches(source(bad), batch_size=SIZE, seed=4, place=placer(mesh), start=start), seed=0,
                 mesh=mesh, warn=pytest.fail, **{"steps_per_dispatch": per_dispatch, "log_every": 4, "save_every": 10, **options})


def lines(workdir):
    """The log without what is of the clock."""
    made = [json.loads(line) for line in open(workdir / "metrics.jsonl")]
    return [{name: value for name, value in line.items() if name not in ("images_per_s", "save_s")} for line in made]


def near(a, b):
    """The same to rounding."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """26 updates, each a dispatch of its own: workdir, state, the parameters at each save."""
    workdir, seen = tmp_path_factory.mktemp("single"), {}
    state = run(workdir, 26, 1, averages=dict(stds=STDS, every=7), on_save=lambda step, state: seen.update({step: jax.device_get(state)}))
    return workdir, state, seen


@pytest.mark.parametrize("per_dispatch", [3, 8])
def test_a_run_is_the_same_however_many_updates_a_dispatch_makes(single, tmp_path, per_dispatch):
    """Neither 3 nor 8 divides the steps, the lines, the saves or the snapshots; 8 is more than lie between the snapshots."""
    workdir, expected, saved = single
    seen, marked = {}, []
    state = run(tmp_path, 26, per_dispatch, averages=dict(stds=STDS, every=7), mark=marked.append,
                on_save=lambda step, state: seen.update({step: jax.device_get(state)}))
    near(jax.device_get(state), jax.device_get(expected))
    assert int(state.step) == 26 and sorted(seen) == [10, 20] and len(marked) < 26 and marked[-1] < 26
    near(seen, saved)
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 10, 12, 16, 20, 24, 26]
    near(lines(tmp_path), lines(workdir))
    with Checkpoints(str(tmp_path / "averages"), read_only=True) as checkpoints:
        assert checkpoints.steps == [7, 14, 21, 26]


@pytest.mark.parametrize("most, every, expected", [
    (1, (4,), [1] * 11), (4, (100,), [4, 4, 1, 1, 1]), (3, (5,), [3, 1, 1, 3, 1, 1, 1]), (8, (4, 6), [4, 1, 1, 1, 1, 1, 1, 1]),
    (100, (100,), [11]), (3, (6, 4), [3, 1, 1, 1, 1, 1, 3])])
def test_dispatches_end_where_the_state_is_wanted(most, every, expected):
    lengths = list(dispatches(0, most, steps=11, every=every))
    assert lengths == expected
    for i in range(len(lengths)):  # whoever stops after one of them goes on with the next
        assert list(dispatches(sum(lengths[:i]), most, steps=11, every=every)) == lengths[i:]


class Died(Exception):
    pass


@pytest.fixture(scope="module")
def fours(tmp_path_factory):
    """26 updates, four to a dispatch."""
    workdir = tmp_path_factory.mktemp("fours")
    return workdir, run(workdir, 26, 4)


@pytest.mark.parametrize("dies_at, then", [(5, 4), (12, 4), (25, 4), (12, 1), (12, 7)])
def test_killed_and_resumed_it_is_the_run_that_was_never_killed(tmp_path, fours, dies_at, then):
    """Bit for bit; and with another number of updates to a dispatch, to rounding."""
    def mark(step):
        if step >= dies_at:
            raise Died

    with pytest.raises(Died):
        run(tmp_path, 26, 4, mark=mark)
    (same if then == 4 else near)(run(tmp_path, 26, then), fours[1])
    near(lines(tmp_path), lines(fours[0]))


def test_a_signal_stops_after_the_dispatch_under_way(tmp_path, fours):
    begun = []

    def mark(step):
        begun.append(step)
        if step == 14:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted) as stopped:
        run(tmp_path / "run", 26, 4, mark=mark)
    assert begun[-1] == 14 and stopped.value.step == 18 and lines(tmp_path / "run")[-1]["step"] == 18
    same(run(tmp_path / "run", 26, 4), fours[1])
    assert [line["step"] for line in lines(tmp_path / "run")] == [4, 8, 10, 12, 16, 18, 20, 24, 26]


@pytest.mark.parametrize("at", [0, 1, 3, 7])
def test_a_step_that_is_not_finite_amid_a_dispatch(tmp_path, at):
    """Step, examples and times are named, the steps before it are logged, and the state of before it is kept."""
    with contextlib.closing(batches(source(), batch_size=SIZE, seed=4)) as order:
        bad = next(int(i) for i in order.ids(at) if all(i not in order.ids(k) for k in range(at)))
    with pytest.raises(UserError) as error:
        run(tmp_path / "run", 26, 4, bad, log_every=100)
    assert str(error.value).startswith(
        f"not finite at step {at + 1}:\n  loss of 1 of {SIZE} examples: ids {bad} of the data; t {bad / EXAMPLES:.4f} to")
    good = run(tmp_path / "good", at, 1, bad) if at else None
    with Checkpoints(str(tmp_path / "run" / f"nonfinite_{at + 1:07d}" / "checkpoints"), read_only=True) as checkpoints:
        assert checkpoints.steps == [at]
        if at:
            found, state, position = checkpoints.restore(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), good),
                                                         warn=pytest.fail)
            assert found == at and position == {"next_index": at}
            near(state, good)
    assert [line["step"] for line in lines(tmp_path / "run")] == ([at] if at else [])


def test_several_updates_on_a_mesh(tmp_path, single):
    """Parameters and batches split; no update sends more than in a program of its own."""
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    state = run(tmp_path, 26, 5, mesh=mesh, rules=RULES, averages=dict(stds=STDS, every=7))
    near(jax.device_get(state), jax.device_get(single[1]))
    one, three = (cost.collectives(program(n, mesh).as_text(), 4) for n in (1, 3))
    assert set(three) == set(one) and all(three[kind][0] <= 3 * one[kind][0] for kind in one)


def program(count, mesh):
    """The compiled program of so many updates."""
    tx, update = optax.adam(0.02), train_step(loss_fn, optax.adam(0.02), ema_decay=0.9)
    abstract = placed_state(lambda: new_state(init(jax.random.key(0)), ("net",), tx, STDS), mesh, RULES)
    with contextlib.closing(batches(source(), batch_size=SIZE, seed=4, place=placer(mesh))) as data:
        batch = next(data)
    key, good = (place(a, replicated(mesh)) for a in (jax.random.key(0), jnp.bool_(True)))
    arguments = (several(update), abstract, (batch,) * count) if count > 1 else (update, abstract, batch)
    return compiled_step(*arguments, key, good, asking(mesh)(0))


@pytest.mark.parametrize("count", [1, 3])
def test_the_memory_of_the_state_is_used_again(count):
    """All of it: what the program returns lies where its argument lay."""
    tx = optax.adam(0.02)
    state = jax.eval_shape(lambda: new_state(init(jax.random.key(0)), ("net",), tx, STDS))
    held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    memory = program(count, make_mesh(devices=jax.devices()[:1])).memory_analysis()
    assert memory.alias_size_in_bytes == held


def test_the_loop_is_two_dispatches_ahead(tmp_path, monkeypatch):
    """Of a dispatch nothing is fetched before two more are started, unless the state is wanted; then of all."""
    from ldm_jax.training import loop
    begun, read = [], []
    fetch = jax.device_get

    def watched(values):
        if values and isinstance(values, list) and isinstance(values[0], tuple):
            read.append((begun[-1], values[-1][0]))
        return fetch(values)

    monkeypatch.setattr(loop.jax, "device_get", watched)
    run(tmp_path, 10, 1, mark=begun.append, log_every=2)
    assert read == [(3, 2), (5, 4), (7, 6), (9, 8), (9, 10)]  # `mark` names the step before


def test_metrics_of_single_steps():
    rows = single_steps({"finite": True, "asked": 0, "steps": {"finite": np.ones(2, bool), "loss": np.array([1.0, 2.0])}})
    assert rows == [{"finite": True, "loss": 1.0}, {"finite": True, "loss": 2.0}] and single_steps({"loss": 3.0}) == [{"loss": 3.0}]


def test_a_dispatch_makes_an_update_at_least(tmp_path):
    with pytest.raises(UserError, match="train.steps_per_dispatch=0 must be at least 1"):
        run(tmp_path, 4, 0)
