"""The gallery's own small mixture and distance, and that it draws."""
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.process import gallery
from ldm_jax.process.schedules import SCHEDULES
from tests.oracle import Mixture


@pytest.mark.parametrize("schedule", ["vp_sde", "rectified_flow"])
def test_mixture_is_the_oracles(schedule):
    made = SCHEDULES[schedule]()
    exact = Mixture(gallery.WEIGHTS, gallery.MEANS, np.stack([gallery.SCALE**2 * np.eye(2)] * 3)).denoiser(made)
    x, t = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)), jnp.float32), jnp.array([0.01, 0.2, 0.5, 0.7, 0.9, 1.0])
    np.testing.assert_allclose(gallery.denoiser_of_mixture(made)(x, t), exact(x, t), atol=2e-4)


def test_sliced_distance_of_a_shift():
    x = np.random.default_rng(0).normal(size=(500, 2))
    assert gallery.sliced_distance(x, x) == 0
    np.testing.assert_allclose(gallery.sliced_distance(x, x + [1.0, 0.0]), 2 / np.pi, rtol=1e-3)  # the mean of |cos|


def test_schedules_are_drawn():
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt
    figure = gallery.draw_schedules(plt)
    assert [len(axis.lines) for axis in figure.axes] == [len(SCHEDULES)] * 3
    plt.close(figure)


def test_without_matplotlib_the_error_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert gallery.main([f"--out={tmp_path}"]) == 2
    assert capsys.readouterr().err == "error: the gallery needs matplotlib: pip install matplotlib\n"
