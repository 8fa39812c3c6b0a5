"""What a run starts from: a whole run, its averages, what was averaged, or one subtree, on any mesh."""
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.parallel.sharding import make_mesh, shardings
from ldm_jax.stages import given
from ldm_jax.systems.base import System
from ldm_jax.training.checkpoint import Checkpoints
from ldm_jax.training.loop import _placed
from ldm_jax.training.state import new_state
from ldm_jax.types import UserError


def params(seed, width=64):
    """Two trained blocks of one net, and a fixed one."""
    keys = jax.random.split(jax.random.key(seed), 3)
    block = lambda key: {"kernel": jax.random.normal(key, (width, 256)), "bias": jnp.full(256, float(seed), jnp.bfloat16)}
    return {"net": {"a": block(keys[0]), "b": block(keys[1])}, "fixed": {"scale": jax.random.normal(keys[2], (4,))}}


SYSTEM = System(nets={}, trained=("net",), init=lambda key: params(0), loss_fn=None, image_shape=(1, 1, 1))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A run on a mesh of its own whose averages are not its parameters."""
    workdir = tmp_path_factory.mktemp("runs")
    (workdir / "config.json").write_text(json.dumps({}))
    state = new_state(params(1), ("net",), optax.adam(1e-3))
    state = type(state)(**{**vars(state), "ema": {"net": params(2)["net"]}})
    state = jax.device_put(state, shardings(state, make_mesh(2, 4)))
    with Checkpoints(str(workdir / "checkpoints")) as checkpoints:
        checkpoints.save(7, state, {})
        checkpoints.wait()
    return str(workdir)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def start(other, part, system=SYSTEM, **config):
    return given({"init_dir": other, "init_part": part, **config}, "", None, system)


@pytest.mark.parametrize("part, expected", [
    ("params", lambda: params(1)), ("ema", lambda: {"net": params(2)["net"], "fixed": params(1)["fixed"]}),
    ("ema/net/b", lambda: {"net": {"b": params(2)["net"]["b"]}}),
    ("params/net/a/kernel/", lambda: {"net": {"a": {"kernel": params(1)["net"]["a"]["kernel"]}}}),
    ("others/fixed", lambda: {"fixed": params(1)["fixed"]}), ("others", lambda: {"fixed": params(1)["fixed"]})])
def test_parts(other, part, expected):
    equal(start(other, part), expected())


def test_a_part_joins_what_is_read_besides(other):
    read = lambda: {"fixed": {"scale": jnp.zeros(4)}, "net": {"a": params(5)["net"]["a"]}}
    system = System(**{**vars(SYSTEM), "read": read})
    equal(start(other, "params/net/b", system), {**read(), "net": {"a": params(5)["net"]["a"], "b": params(1)["net"]["b"]}})


@pytest.mark.parametrize("mesh", [(8, 1), (1, 8)])
def test_the_rest_is_as_it_was_and_everything_lies_where_the_run_wants_it(other, mesh):
    state = new_state(params(0), ("net",), optax.adam(1e-3))
    wanted = shardings(state, make_mesh(*mesh))
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, wanted)
    got = _placed(jax.device_put(state, wanted).params, abstract.params, start(other, "ema/net/b"))
    equal(got, {"net": {"a": params(0)["net"]["a"], "b": params(2)["net"]["b"]}})
    assert got["net"]["b"]["kernel"].sharding == wanted.params["net"]["b"]["kernel"]


@pytest.mark.parametrize("part, says", [
    ("nets", "does not begin with one of params, ema, others"), ("ema/nett", "no 'nett' in ema; there is: net"),
    ("ema/net/a/kernal", "no 'kernal' in ema/net/a; there is: bias, kernel"), ("ema/net/a/bias/b", "no 'b' in ema/net/a/bias")])
def test_names_that_are_not_there(other, part, says):
    with pytest.raises(UserError, match=says):
        start(other, part)


def test_shapes_that_differ_and_what_does_not_belong(other, tmp_path):
    wide = System(**{**vars(SYSTEM), "init": lambda key: params(0, width=32)})
    with pytest.raises(UserError, match=r"net/b/kernel has shape \(64, 256\) there and \(32, 256\) here"):
        start(other, "ema/net/b", wide)
    with pytest.raises(UserError, match="give its run as first_stage_dir, or a part of net"):
        start(other, "others/fixed", first_stage={})
    with pytest.raises(UserError, match="init_dir, which is empty"):
        start("", "ema")
    with pytest.raises(UserError, match="holds no run"):
        start(str(tmp_path), "ema/net")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no checkpoint that can be read"):
        start(str(tmp_path), "ema/net")
    assert os.listdir(tmp_path) == ["config.json"]
