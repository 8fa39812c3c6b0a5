"""What is computed before the steps of sampling, and not in them."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import process
from ldm_jax.models.dit import dit
from ldm_jax.models.unet import unet
from ldm_jax.parallel import cost
from ldm_jax.systems import base, diffusion
from ldm_jax.systems.conditioners import class_label, sequence
from ldm_jax.systems.conditions import Space, needs

SHAPE, SPACE = (8, 8, 2), Space((8, 8, 2), (8, 8, 2), 5, {"words": (3, 6)})
CONDITIONERS = {"class": class_label(SPACE), "words": sequence(SPACE, field="words")}
NETS = {
    "dit": lambda **sizes: dit(SHAPE, width=16, depth=3, num_heads=2, **sizes),
    "scanned dit": lambda **sizes: dit(SHAPE, width=16, depth=3, num_heads=2, scan_layers=True, **sizes),
    "unet": lambda **sizes: unet(SHAPE, width=8, mults=(1, 2), num_res_blocks=1, attention=(8,), transformer_depth=1, scale_shift=True,
                                 num_heads=2, **sizes),
}


@functools.lru_cache(None)
def made(name):
    """(net, parameters with no zeros among them)."""
    net = NETS[name](**needs(CONDITIONERS))
    init = lambda key: jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), net.init(key))
    return net, jax.jit(init)(jax.random.key(0))


def cond_of(n):
    return {"class": jnp.arange(n) % 5, "context": jax.random.normal(jax.random.key(1), (n, 3, 6))}


@pytest.mark.parametrize("name", NETS)
def test_the_same_output_from_less_work(name):
    net, params = made(name)
    x, times, i = jax.random.normal(jax.random.key(2), (4, *SHAPE)), jnp.linspace(0.1, 0.9, 5), 3
    t, cond = jnp.full(4, times[i]), cond_of(4)
    of_condition, of_times = jax.jit(lambda params, x: (net.of_condition(params, x, cond), net.of_times(params, x, times, cond)))(params, x)
    kept, other = ({**of_condition, **jax.tree.map(lambda a: a[j], of_times)} for j in (i, 0))
    plain = lambda params, x: net.apply(params, x, t, cond)
    less = lambda params, x, kept: net.apply(params, x, t, cond, kept=kept)
    got, of_another_time, want = *map(functools.partial(jax.jit(less), params, x), (kept, other)), jax.jit(plain)(params, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert jnp.max(jnp.abs(of_another_time - want)) > 1e-3  # what is kept must be what is used
    # without the texts' keys and values, and without the modulations
    D, B = 16, 4
    saved = {"dit": 3 * (2 * 2 * 3 * B * D * D + 2 * B * D * 6 * D) + 2 * B * D * 2 * D}.get(name.removeprefix("scanned "))
    if saved:
        assert cost.flops(plain, params, x) - cost.flops(less, params, x, kept) == saved


@pytest.mark.parametrize("sampler", [name for name in process.SAMPLERS if process.SAMPLERS[name]().on_grid])
def test_a_sampler_on_the_grid_asks_for_times_of_it_only(sampler):
    schedule, seen, n = process.SCHEDULES["linear"](), [], 5

    def denoise(x, t):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t)
        return x * (schedule.alpha(t) / (schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2))[:, None]

    times = jnp.clip(process.samplers.grid_times("uniform", schedule, n, 8), 0, 1)
    run = jax.jit(lambda x, steps: process.sample(denoise, schedule, x, jax.random.key(1), sampler=sampler, steps=steps, grid=times,
                                                  capacity=8))
    run(jnp.ones((2, 3)), n).block_until_ready()
    jax.effects_barrier()
    assert len(seen) >= n and set(np.concatenate(seen).tolist()) <= set(np.asarray(times[:n + 1]).tolist())


def pictures(name, monkeypatch, table, sampler="ddim", guidance=2.0, **options):
    monkeypatch.setattr(base, "_TABLE", table)
    net, params = made(name)
    system = diffusion(net, image_shape=SHAPE, schedule=process.SCHEDULES["linear"](), parameterization="eps", conditioners=CONDITIONERS)
    words = jax.random.normal(jax.random.key(1), (3, 3, 6))
    run = jax.jit(lambda steps, guidance: system.sample(
        {"net": params}, jax.random.normal(jax.random.key(0), (3, *SHAPE)), jax.random.split(jax.random.key(3), 3),
        {"class": jnp.arange(3), "words": CONDITIONERS["words"].read(np.asarray(words))},
        sampler=process.samplers.make_sampler(sampler), steps=steps, capacity=64,
        guidance=guidance, **options))
    return np.asarray(run(jnp.int32(19), None if guidance is None else jnp.full(3, guidance)))


def same(a, b):
    """To 1e-5 of the largest value."""
    assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()


@pytest.mark.parametrize("name", ["dit", "scanned dit", pytest.param("unet", marks=pytest.mark.long)])
def test_pictures_are_the_same_with_a_table_and_without(name, monkeypatch):
    same(pictures(name, monkeypatch, 2**28), pictures(name, monkeypatch, -1))


@pytest.mark.parametrize("sampler", ["dpmpp_2s", *(pytest.param(s, marks=pytest.mark.long) for s in ("heun", "dpmpp_2m"))])
def test_pictures_of_several_samplers(sampler, monkeypatch):
    """Two calls in a step, a memory, and times off the grid."""
    same(pictures("dit", monkeypatch, 2**28, sampler), pictures("dit", monkeypatch, -1, sampler))


def test_guidance_of_one_is_none_and_an_interval_limits_it(monkeypatch):
    none, one, two = (pictures("dit", monkeypatch, 2**28, guidance=g) for g in (None, 1.0, 2.0))
    same(one, none)
    assert np.abs(two - none).max() > 1e-2
    same(pictures("dit", monkeypatch, 2**28, guidance_interval=(0.0, 1e9)), two)
    same(pictures("dit", monkeypatch, 2**28, guidance_interval=(1e8, 1e9)), none)
    some = pictures("dit", monkeypatch, 2**28, guidance_interval=(0.3, 3.0))
    assert np.abs(some - none).max() > 1e-3 and np.abs(some - two).max() > 1e-3
