"""Saving and restoring: exact, partial, over device counts, and through damage."""
import glob
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.parallel.sharding import make_mesh, shardings
from ldm_jax.training.checkpoint import Checkpoints, fingerprint, fingerprints
from ldm_jax.training.state import new_state
from ldm_jax.types import UserError


def some_state(seed=0):
    params = {"net": {"kernel": jax.random.normal(jax.random.key(seed), (64, 512)), "half": jnp.ones((3,), jnp.bfloat16)},
              "scale": jnp.arange(4.0)}
    return new_state(params, ("net",), optax.adam(1e-3))


def abstract(state, **options):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, **options), state)


def write(path, steps=(1, 2)):
    with Checkpoints(path) as checkpoints:
        for step in steps:
            checkpoints.save(step, some_state(step), {"next_index": 10 * step})
        checkpoints.wait()


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip(tmp_path):
    write(tmp_path / "c")
    with Checkpoints(str(tmp_path / "c")) as checkpoints:
        step, state, data = checkpoints.restore(abstract(some_state()), warn=pytest.fail)
    assert (step, data) == (2, {"next_index": 20})
    assert jax.tree.structure(state) == jax.tree.structure(some_state())
    equal(state, some_state(2))


def test_a_part_and_another_mesh(tmp_path):
    write(tmp_path / "c")
    sharded = shardings(some_state(), make_mesh(2, 4))
    with Checkpoints(str(tmp_path / "c"), read_only=True) as checkpoints:
        _, part, _ = checkpoints.restore({"ema": abstract(some_state().ema)}, warn=pytest.fail)
        target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract(some_state()), sharded)
        _, whole, _ = checkpoints.restore(target, warn=pytest.fail)
    equal(part["ema"], some_state(2).ema)
    equal(whole, some_state(2))
    assert whole.params["net"]["kernel"].sharding == sharded.params["net"]["kernel"]


def test_keeps_the_newest(tmp_path):
    write(tmp_path / "c", steps=(1, 2, 3))
    with Checkpoints(str(tmp_path / "c"), read_only=True) as checkpoints:
        assert checkpoints.steps == [2, 3]


LOSSES = {1: 0.5, 2: 0.9, 3: 0.2, 4: 0.6, 5: None, 6: 0.7, 7: 0.3, 8: float("nan")}


@pytest.mark.parametrize("options, kept", [
    (dict(keep=1), [8]), (dict(keep=None), list(LOSSES)), (dict(keep=2, keep_every=3), [3, 6, 7, 8]),
    (dict(keep=1, keep_best="loss"), [3, 8]), (dict(keep=1, keep_best="+loss"), [2, 8]),
    (dict(keep=1, keep_every=4, keep_best="loss"), [3, 4, 8]), (dict(keep=1, keep_best="accuracy"), [8])])
@pytest.mark.parametrize("reopened", [False, True])
def test_what_is_kept(tmp_path, options, kept, reopened):
    """The best by a metric is the best of all, steps without one are not kept for it, and one that was written before is remembered."""
    def save(some):
        with Checkpoints(str(tmp_path / "c"), **options) as checkpoints:
            for step, loss in some:
                checkpoints.save(step, {"w": jnp.full(3, step)}, {}, metrics=None if loss is None else {"loss": loss})
            checkpoints.wait()
            return checkpoints.steps

    losses = list(LOSSES.items())
    if reopened:
        save(losses[:5])
        losses = losses[5:]
    assert save(losses) == kept


def test_a_step_is_asked_for_and_later_ones_are_dropped(tmp_path):
    write(tmp_path / "c")
    with Checkpoints(str(tmp_path / "c")) as checkpoints:
        step, state, _ = checkpoints.restore(abstract(some_state()), warn=pytest.fail, step=1)
        equal(state, some_state(1))
        assert step == 1
        with pytest.raises(UserError, match=r"no checkpoint of step 7 .*there are: \[1, 2\]"):
            checkpoints.restore(abstract(some_state()), warn=pytest.fail, step=7)
        saved = checkpoints.saved()
        assert saved["params"]["net"]["half"] == jax.ShapeDtypeStruct((3,), jnp.bfloat16) and saved["others"]["scale"].shape == (4,)
        checkpoints.drop_after(1)
        assert checkpoints.steps == [1]


def test_what_is_saved_is_read_from_a_step_that_can_say_it(tmp_path):
    write(tmp_path / "c")
    cut(tmp_path / "c" / "2" / "state" / "_sharding")
    with Checkpoints(str(tmp_path / "c"), read_only=True) as checkpoints:
        saved = checkpoints.saved()
        assert saved["others"]["scale"].shape == (4,)
        equal(checkpoints.load(2, saved)[0]["params"], some_state(2).params)


@pytest.mark.parametrize("options", [dict(keep=0), dict(keep_every=-1)])
def test_numbers_of_steps_that_cannot_be(tmp_path, options):
    with pytest.raises(UserError, match="at least"):
        Checkpoints(str(tmp_path / "c"), **options)


def arrays_of(path, step):
    """The largest file of a step: where the arrays are."""
    return max(glob.glob(str(path / str(step) / "state" / "**"), recursive=True), key=lambda f: os.path.isfile(f) and os.path.getsize(f))


def flip(file, at=0.5):
    data = bytearray(open(file, "rb").read())
    data[int(len(data) * at)] ^= 4
    open(file, "wb").write(data)


def cut(file):
    os.truncate(file, os.path.getsize(file) // 2)


@pytest.mark.parametrize("damage", [flip, cut, os.remove])
def test_damage_is_found_and_passed_over(tmp_path, damage):
    write(tmp_path / "c")
    damage(arrays_of(tmp_path / "c", 2))
    said = []
    with Checkpoints(str(tmp_path / "c")) as checkpoints:
        step, state, _ = checkpoints.restore(abstract(some_state()), warn=said.append)
        assert step == 1 and len(said) == 1 and "checkpoint 2" in said[0]
        equal(state, some_state(1))
        checkpoints.save(2, some_state(5), {"next_index": 20})  # the run goes on and replaces the damaged one
        checkpoints.wait()
        assert checkpoints.restore(abstract(some_state()), warn=pytest.fail)[0] == 2


def test_damaged_metrics_do_not_cost_a_checkpoint(tmp_path):
    """They are only there to keep the best; a step whose metrics cannot be read is one that was saved without."""
    options = dict(keep=1, keep_best="loss")
    with Checkpoints(tmp_path / "c", **options) as checkpoints:
        for step, loss in [(1, 0.1), (2, 0.2), (3, 0.3)]:
            checkpoints.save(step, some_state(step), {"next_index": step}, metrics={"loss": loss})
    path = tmp_path / "c" / "3" / "metrics" / "metrics"
    path.write_bytes(b"\x8d{")
    with pytest.raises(UserError, match="3/metrics/metrics is damaged; remove it"):
        Checkpoints(tmp_path / "c", read_only=True)
    with Checkpoints(tmp_path / "c", **options) as checkpoints:
        step, state, _ = checkpoints.restore(abstract(some_state()), warn=pytest.fail)
        assert step == 3 and checkpoints.steps == [1, 3]
        equal(state, some_state(3))
        checkpoints.save(4, some_state(4), {"next_index": 4}, metrics={"loss": 0.4})
        checkpoints.wait()
        assert checkpoints.steps == [1, 4]  # the best is still known


def test_nothing_readable_is_an_error_and_nothing_there_is_none(tmp_path):
    with Checkpoints(str(tmp_path / "new")) as checkpoints:
        assert checkpoints.restore(abstract(some_state()), warn=pytest.fail) is None
    write(tmp_path / "c", steps=(1,))
    cut(arrays_of(tmp_path / "c", 1))
    with Checkpoints(str(tmp_path / "c")) as checkpoints, pytest.raises(UserError, match="none of the checkpoints"):
        checkpoints.restore(abstract(some_state()), warn=lambda line: None)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_])
def test_fingerprint_sees_every_bit_and_the_order(dtype):
    x = np.asarray(jax.random.bits(jax.random.key(0), (5, 7), jnp.uint32) % 2 if dtype == jnp.bool_
                   else jax.random.bits(jax.random.key(0), (5, 7), jnp.uint32) % 100).astype(dtype)
    value = int(fingerprint(jnp.asarray(x)))
    words = x.astype(np.uint32) if dtype == jnp.bool_ else x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.itemsize]).astype(np.uint32)
    by_hand = sum(int(w) * ((i * 2654435761) % 2**32 | 1) for i, w in enumerate(words.reshape(-1))) % 2**32
    assert value == by_hand
    if dtype != jnp.bool_:
        raw = bytearray(x.tobytes())
        for position in range(0, len(raw), 3):
            changed = bytearray(raw)
            changed[position] ^= 1 << position % 8
            assert int(fingerprint(jnp.asarray(np.frombuffer(bytes(changed), x.dtype).reshape(x.shape)))) != value
    assert int(fingerprint(jnp.asarray(x[::-1]))) != value


def compilations(call):
    """How many programs `call` compiles."""
    seen = []

    def note(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        call()
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    return len(seen)


def test_arrays_of_one_shape_share_a_program():
    some = {i: np.full((3, 70 + i % 2), i, np.float32) for i in range(40)}
    assert compilations(lambda: fingerprints(some)) == 2
    assert compilations(lambda: fingerprints(some)) == 0


@pytest.mark.parametrize("mesh", [dict(devices=jax.devices()[:1]), dict(data=2, fsdp=4)], ids=["one device", "sharded"])
def test_the_first_save_compiles_no_fingerprint(tmp_path, mesh):
    """A new run finds nothing to restore, and compiles then what saving needs, beside what else it begins with."""
    width = 1100 + 4 * len(mesh)  # of its own, so that no other test has compiled it
    like = jax.eval_shape(lambda: new_state({"net": {"a": jnp.zeros((16, width)), "b": jnp.zeros(width)}}, ("net",), optax.adam(1e-3)))
    state = jax.tree.map(lambda a, s: jax.device_put(np.zeros(a.shape, a.dtype), s), like, shardings(like, make_mesh(**mesh)))
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)

    def begin():
        assert checkpoints.restore(like, warn=pytest.fail) is None
        for thread in threading.enumerate():
            if thread.name == "fingerprints":
                thread.join()

    with Checkpoints(str(tmp_path / "c")) as checkpoints:
        assert compilations(begin) >= 2
        assert compilations(lambda: fingerprints(state)) == 0
        checkpoints.save(1, state, {})
        checkpoints.wait()
        equal(checkpoints.restore(like, warn=pytest.fail)[1], state)


def test_what_was_saved_compressed_is_restored(tmp_path):
    """As it was at first; now arrays are written as they are."""
    state, size = some_state(), 64 * 512 * 4
    with Checkpoints(str(tmp_path / "c"), keep=None) as checkpoints:
        zeros = jax.tree.map(jnp.zeros_like, state)
        notes = {"data": {"next_index": 7}, "fingerprints": fingerprints(zeros)}
        checkpoints._checkpointer.save_checkpointables_async(1, {"state": zeros}, force=True, metrics={}, custom_metadata=notes)
        checkpoints.save(2, zeros, {"next_index": 8})
        checkpoints.wait()
    assert os.path.getsize(arrays_of(tmp_path / "c", 1)) < size < os.path.getsize(arrays_of(tmp_path / "c", 2))
    for step, index in ((1, 7), (2, 8)):
        with Checkpoints(str(tmp_path / "c")) as checkpoints:
            _, found, data = checkpoints.restore(abstract(state), warn=pytest.fail, step=step)
        equal(found, zeros)
        assert data == {"next_index": index}


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Checkpoints(str(tmp_path / "file" / "checkpoints"))
