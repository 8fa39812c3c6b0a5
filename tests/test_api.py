"""The Pipeline, on a run made once for the whole file."""
import json
import os

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax import api
from ldm_jax.parallel.sharding import make_mesh
from ldm_jax.types import UserError
from tests.conftest import ROOT
from tests.runs import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("digits"))
    result = main("--config=configs/digits.py:smoke", "--config.net.name=dit", f"--workdir={path}")  # the least to trace
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture(scope="module")
def pipeline(workdir):
    return ldm_jax.load(workdir)


LABELS = np.arange(16) % 10


def test_the_call_of_the_readme(pipeline):
    images = pipeline.sample(jax.random.key(0), num=16, cond=LABELS, steps=5, sampler="ddim", guidance=2.0)
    assert images.shape == (16, 8, 8, 1) and images.dtype == np.float32
    assert images.min() >= 0.0 and images.max() <= 1.0 and images.std() > 0.05


def test_pictures_depend_on_the_seed_and_not_on_number_or_batch(pipeline):
    whole = pipeline.sample(0, num=16, cond=LABELS, eta=1.0)
    np.testing.assert_allclose(pipeline.sample(0, num=5, cond=LABELS[:5], eta=1.0), whole[:5], atol=1e-5)
    np.testing.assert_allclose(pipeline.sample(jax.random.key(0), cond=LABELS, batch_size=6, eta=1.0), whole, atol=1e-5)
    np.testing.assert_allclose(pipeline.sample(jax.random.PRNGKey(0), cond=LABELS, eta=1.0), whole, atol=1e-5)
    assert np.abs(pipeline.sample(1, num=16, cond=LABELS) - whole).max() > 0.1
    assert np.abs(whole[0] - whole[10]).max() > 0.1  # the same class twice


def test_settings_do_not_compile_again(pipeline):
    pipeline.sample(0, num=4, cond=LABELS[:4], steps=3, guidance=1.5, eta=0.2)
    before = pipeline._sample._cache_size()
    for steps, guidance, eta in ((4, 2.0, 0.0), (9, 3.5, 1.0), (50, [1.0, 2.0, 3.0, 4.0], 0.5)):
        pipeline.sample(3, num=4, cond=LABELS[:4], steps=steps, guidance=guidance, eta=eta)
    assert pipeline._sample._cache_size() == before


def test_starting_noise_and_trajectory(pipeline):
    noise = np.random.default_rng(0).normal(size=(3, 8, 8, 1))
    a = pipeline.sample(0, x_init=noise, cond=[1, 2, 3])
    np.testing.assert_allclose(pipeline.sample(9, x_init=noise, cond=[1, 2, 3]), a, atol=1e-6)  # ddim has no other randomness
    end, path = pipeline.sample(0, x_init=noise, cond=[1, 2, 3], steps=4, trajectory=True)
    assert path.shape == (5, 3, 8, 8, 1)
    np.testing.assert_allclose(path[0], np.clip(noise * 0.5 + 0.5, 0, 1), atol=1e-5)
    np.testing.assert_allclose(path[-1], end, atol=1e-6)


def test_nets_are_raw(pipeline):
    net, params = pipeline.nets["net"]
    x = np.zeros((2, 8, 8, 1), np.float32)
    out = net.apply(params, x, np.array([0.3, 0.9], np.float32), {"class": np.array([1, 2])})
    assert out.shape == x.shape and np.isfinite(out).all()


def test_methods_of_each_kind_make_pictures(pipeline):
    for name in ("ddpm", "euler", "dpmpp_2m", "edm", "ode"):
        assert np.isfinite(pipeline.sample(0, num=2, cond=[0, 1], sampler=name, steps=3)).all()


def test_every_picture_may_have_its_own_settings(pipeline):
    together = pipeline.sample(0, cond=[1, 2, 3], eta=[0.0, 0.5, 1.0], guidance=[1.5, 2.0, 3.0], batch_size=2)
    alone = pipeline.sample(0, cond=[1, 2, 3], eta=0.5, guidance=2.0)
    np.testing.assert_allclose(together[1], alone[1], atol=1e-5)
    assert np.abs(together[2] - alone[2]).max() > 1e-3


def test_overrides(workdir):
    pipeline = ldm_jax.load(workdir, steps=2, guidance=1.0)
    np.testing.assert_array_equal(pipeline.sample(0, cond=[1]), pipeline.sample(0, cond=[1], steps=2, guidance=1.0))


@pytest.mark.parametrize("mistake, says", [
    (dict(cond=[10]), "class id 10 is out of range; this model knows 0 to 9"),
    (dict(cond=[-1]), "class id -1"),
    (dict(cond=["a seven"]), "takes class ids"),
    (dict(cond="a seven"), "takes class ids"),
    (dict(cond=[0.5]), "takes class ids"),
    (dict(cond=[1, 2], num=3), "num=3"),
    (dict(cond=[1], sampler="dimm"), "unknown sampler 'dimm'; choose from"),
    (dict(cond=[1], grid="dense"), "unknown grid"),
    (dict(cond=[1], steps=0), "steps=0"), (dict(cond=[1], steps="ten"), "steps=.ten. is not a positive whole number"),
    (dict(cond=[1], steps=2.5), "steps=2.5"),
    (dict(cond=[1, 2], guidance=[1.0, 2.0, 3.0]), "guidance has shape"),
    (dict(cond=[1], x_init=np.zeros((1, 4, 4, 1))), "x_init has shape"),
    (dict(cond=[1], churn=1.0), "has no option churn; it takes: eta"),
])
def test_mistakes_are_named(pipeline, mistake, says):
    with pytest.raises(UserError, match=says.replace("(", "\\(")):
        pipeline.sample(0, **mistake)


def test_a_workdir_without_a_run(tmp_path, workdir):
    with pytest.raises(UserError, match="holds no run"):
        ldm_jax.load(str(tmp_path))
    with pytest.raises(UserError, match="unknown override 'stepz'"):
        ldm_jax.load(workdir, stepz=3)
    with pytest.raises(UserError, match="holds no run"):
        api.read_config(str(tmp_path / "nowhere"))


def test_the_notebook(workdir, monkeypatch):
    """Every code cell of launch/colab.ipynb, in order, on a finished run."""
    monkeypatch.setenv("WORKDIR", workdir)
    cells = [c for c in json.load(open(os.path.join(ROOT, "launch", "colab.ipynb")))["cells"] if c["cell_type"] == "code"]
    names = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert names["images"].shape == (16, 8, 8, 1) and names["raw"].shape == (1, 8, 8, 1)


def test_a_mesh_gives_the_same_pictures(pipeline, workdir):
    """Parameters and batch split over four devices; 13 pictures do not divide, and are padded."""
    split = ldm_jax.load(workdir, mesh=make_mesh(data=2, tensor=2, devices=jax.devices()[:4]))
    labels = np.arange(13) % 10
    np.testing.assert_allclose(split.sample(0, cond=labels, eta=1.0), pipeline.sample(0, cond=labels, eta=1.0), atol=1e-4)
    kernel = split.params["net"]["block_0"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 2
