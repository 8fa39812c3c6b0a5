"""Power-function averages: profiles against integrals, reconstruction against averages computed directly, snapshots through kills."""
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.parallel.sharding import make_mesh
from ldm_jax.training import averages
from ldm_jax.training.averages import gamma_of, inner, reconstruct, updated, weights
from ldm_jax.training.checkpoint import Checkpoints, fingerprints
from ldm_jax.training.loop import train
from ldm_jax.types import UserError
from tests.training.test_loop import loss_fn, problem

STDS = (0.05, 0.1)


def shares(std, t):
    """The weight of theta_i, i = 1..t, in the average of length std at t: the integral of the profile over (i - 1, i]."""
    ends = (np.arange(t + 1) / t) ** (gamma_of(std) + 1)
    return np.diff(ends)


@pytest.mark.parametrize("std, gamma", [(0.05, 16.97), (0.10, 6.94)])
def test_the_papers_exponents(std, gamma):
    assert gamma_of(std) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_a_profile_has_its_length_and_products_are_integrals(std):
    tau = (np.arange(400_000) + 0.5) / 400_000
    p = lambda gamma, t: np.where(tau < t, (gamma + 1) * (tau / t) ** gamma / t, 0.0)
    mine, other = p(gamma_of(std), 0.7), p(gamma_of(0.06), 0.9)
    mean = np.mean(tau * mine)
    assert np.sqrt(np.mean((tau - mean) ** 2 * mine)) / 0.7 == pytest.approx(std, rel=1e-3)
    assert inner(gamma_of(std), 0.7, gamma_of(0.06), 0.9) == pytest.approx(np.mean(mine * other), rel=1e-3)
    assert inner(gamma_of(0.06), 0.9, gamma_of(std), 0.7) == pytest.approx(np.mean(mine * other), rel=1e-3)


def test_updates_give_each_step_its_share_of_the_profile():
    walk = np.cumsum(np.random.default_rng(0).standard_normal((60, 3)), axis=0).astype(np.float32)
    powers, advance = averages.new_powers({"w": jnp.zeros(3, jnp.bfloat16)}, STDS), jax.jit(updated)
    for step, theta in enumerate(walk):
        powers = advance(powers, {"w": jnp.asarray(theta)}, jnp.int32(step))
    for std in STDS:
        assert powers[repr(std)]["w"].dtype == jnp.float32
        np.testing.assert_allclose(powers[repr(std)]["w"], shares(std, 60) @ walk.astype(np.float64), rtol=1e-5, atol=1e-5)


def test_late_steps_have_their_weight_in_float32():
    t = 3_000_000
    moved = jax.jit(updated)({"0.05": {"w": jnp.zeros(())}}, {"w": jnp.ones(())}, jnp.int32(t - 1))["0.05"]["w"]
    assert float(moved) == pytest.approx(-np.expm1((gamma_of(0.05) + 1) * np.log1p(-1 / t)), rel=1e-5)


def snapshots(count, t):
    return np.repeat(np.linspace(t / count, t, count).round(), 2), np.tile(STDS, count)


@pytest.mark.parametrize("power", [0, 1, 3])
@pytest.mark.parametrize("std", [0.03, 0.08, 0.15])
def test_reconstruction_of_powers_of_time(std, power):
    """Of theta(tau) = tau^k the average at t is (gamma + 1) / (gamma + k + 1) t^k; the error shrinks with more snapshots."""
    average = lambda std, t: (gamma_of(std) + 1) / (gamma_of(std) + power + 1) * t**power
    errors = []
    for count in (8, 24, 72):
        steps, stds = snapshots(count, 1152.0)
        w, _ = weights(stds, steps, std, 1152)
        values = np.array([average(s, t) for s, t in zip(stds, steps)])
        errors.append(abs(w @ values / average(std, 1152.0) - 1))
    assert errors[-1] < 1e-4 and (power == 0 or errors[0] > errors[-1])
    assert power or max(errors) < 1e-12  # what does not move is exact


@pytest.mark.parametrize("std", [0.03, 0.08, 0.15])
def test_reconstruction_of_a_random_walk(std):
    """The average is that of a run that had carried this length, to the stated error of the profile and better with more snapshots."""
    t = 2304
    walk = np.cumsum(np.random.default_rng(1).standard_normal((t, 50)), axis=0)
    direct, spread, errors = shares(std, t) @ walk, np.sqrt(np.mean((walk[-1] - shares(0.1, t) @ walk) ** 2)), []
    for count in (8, 24, 72):
        steps, stds = snapshots(count, t)
        w, said = weights(stds, steps, std, t)
        values = np.stack([shares(s, int(n)) @ walk[:int(n)] for s, n in zip(stds, steps)])
        errors.append(np.sqrt(np.mean((w @ values - direct) ** 2)) / spread)
        assert errors[-1] < said
    assert errors[0] > 5 * errors[1] > 20 * errors[2] and errors[2] < 3e-4


def test_a_length_that_was_carried_is_its_own_snapshot():
    steps, stds = snapshots(20, 100.0)
    w, error = weights(stds, steps, 0.1, 100)
    np.testing.assert_allclose(w, (steps == 100) & (stds == 0.1), atol=1e-6)
    assert error < 1e-6


class Batches:
    """The same batch again and again; dies after `last`, as a killed process does."""

    def __init__(self, start, last=None):
        self.next_index, self.last, self.batch = start, last, problem()[1]

    def __next__(self):
        if self.next_index == self.last:
            raise InterruptedError
        self.next_index += 1
        return self.batch

    def get_state(self):
        return {"next_index": self.next_index}

    def close(self):
        pass


def run(workdir, steps=24, last=None, **options):
    os.makedirs(workdir, exist_ok=True)
    return train(workdir=str(workdir), init=lambda key: problem()[0], trained=("net",), loss_fn=loss_fn,
                 tx=optax.sgd(0.3, momentum=0.9), batches=lambda start, state: Batches(start, last), batch_size=16, steps=steps, seed=0,
                 mesh=make_mesh(devices=jax.devices()[:1]), warn=pytest.fail,
                 **{"averages": dict(stds=STDS, every=4), "save_every": 5, "log_every": 5, **options})


def on_disk(workdir):
    """Step -> fingerprints of a snapshot, all of which can be read."""
    like = averages.new_powers(jax.eval_shape(lambda: {"net": problem()[0]["net"]}), STDS)
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), like)
    with Checkpoints(str(workdir / "averages"), read_only=True) as checkpoints:
        return {step: fingerprints(checkpoints.load(step, like)[0]) for step in checkpoints.steps}


LIKE = {"net": {"w": jax.ShapeDtypeStruct((4, 8), jnp.float32)}}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of 26 steps, and the parameters after each of them."""
    workdir, seen = tmp_path_factory.mktemp("runs") / "unbroken", {}
    note = lambda step, state: seen.update({step: np.asarray(state.params["net"]["w"], np.float64)})
    state = run(workdir, steps=26, save_every=1, on_save=note)
    note(26, state)
    return workdir, np.stack([seen[i + 1] for i in range(26)])


def test_a_run_reconstructs_what_it_did_not_carry(unbroken):
    workdir, path = unbroken
    assert sorted(on_disk(workdir)) == [4, 8, 12, 16, 20, 24, 26]
    for std, step in ((0.08, None), (0.12, None), (0.06, 16)):
        average, at, said = reconstruct(str(workdir / "averages"), LIKE, stds=STDS, std=std, step=step, warn=pytest.fail)
        direct = np.tensordot(shares(std, at), path[:at], 1)
        wrong = np.linalg.norm(average["net"]["w"] - direct) / np.linalg.norm(path[:at] - path[at - 1])
        assert at == (step or 26) and wrong < said < 0.1


@pytest.mark.parametrize("dies_at", [11, 20, 21])
def test_killed_and_resumed_the_snapshots_are_those_of_an_unbroken_run(unbroken, tmp_path, dies_at):
    with pytest.raises(InterruptedError):
        run(tmp_path, steps=26, last=dies_at)
    run(tmp_path, steps=26)
    assert on_disk(tmp_path) == on_disk(unbroken[0])


def test_snapshots_of_another_future_go_and_a_missing_one_is_written_again(unbroken, tmp_path):
    run(tmp_path, steps=12, save_every=10, keep=1)
    assert sorted(on_disk(tmp_path)) == [4, 8, 12]
    shutil.rmtree(tmp_path / "averages" / "12")  # killed between the checkpoint and the snapshot
    run(tmp_path, steps=12)
    assert sorted(on_disk(tmp_path)) == [4, 8, 12]
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(InterruptedError):  # begins again, with another loss from step 1 on
        run(tmp_path, steps=26, last=6, ema_decay=0.5)
    assert max(on_disk(tmp_path)) == 4


def test_a_damaged_snapshot_is_left_out(unbroken, tmp_path):
    shutil.copytree(unbroken[0] / "averages", tmp_path / "averages")
    shutil.rmtree(tmp_path / "averages" / "20" / "state")
    said = []
    average, _, error = reconstruct(str(tmp_path / "averages"), LIKE, stds=STDS, std=0.08, warn=said.append)
    whole, _, better = reconstruct(str(unbroken[0] / "averages"), LIKE, stds=STDS, std=0.08, warn=pytest.fail)
    assert len(said) == 1 and "snapshot 20" in said[0] and better < error < 0.1
    np.testing.assert_allclose(average["net"]["w"], whole["net"]["w"], atol=0.02)


@pytest.mark.parametrize("options, says", [
    (dict(std=0.5), "length 0.5 does not exist"), (dict(std=0.01), "off by"), (dict(std=0.08, step=13), "no snapshot of step 13")])
def test_lengths_and_steps_that_cannot_be_given(unbroken, options, says):
    with pytest.raises(UserError, match=says):
        reconstruct(str(unbroken[0] / "averages"), LIKE, stds=STDS, warn=pytest.fail, **options)


@pytest.mark.parametrize("options, says", [(dict(stds=(0.4,)), "0.4 does not exist"), (dict(stds=(0.1, 0.1)), "twice"),
                                           (dict(stds=STDS, every=0), "every=0")])
def test_mistakes_are_named_before_training(tmp_path, options, says):
    with pytest.raises(UserError, match=says):
        run(tmp_path, averages=options)


def test_a_metric_that_does_not_exist_is_named_before_training(tmp_path):
    with pytest.raises(UserError, match="keep_best='[+]lss' is no metric of this run; choose from: grad_norm, loss, mean_error"):
        run(tmp_path, averages={}, keep_best="+lss")
    assert not [n for n in os.listdir(tmp_path / "checkpoints") if n.isdigit()]


def test_without_averages_nothing_is_carried_or_written(tmp_path):
    state = run(tmp_path, steps=2, averages={})
    assert state.powers == {} and not (tmp_path / "averages").exists()
