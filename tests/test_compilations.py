"""How often networks are compiled, what their programs grow with, and that a second start finds them."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from ldm_jax import process, sampling
from ldm_jax.benchmark import compiling, nets
from ldm_jax.compilations import Compilations, watching
from ldm_jax.machine import use_compilation_cache
from ldm_jax.models.dit import dit
from ldm_jax.sampling import Pipeline, batch_size_for
from ldm_jax.systems import System, diffusion
from ldm_jax.systems.conditioners import class_label
from ldm_jax.systems.conditions import Space
from ldm_jax.types import example_keys

SHAPE = (4, 4, 1)
DEFAULTS = {"name": "ddim", "steps": 4, "guidance": 1.0, "grid": "uniform"}


@dataclasses.dataclass(frozen=True)
class Table:
    """A network that knows a number for each class."""
    num_classes: int = nets.CLASSES

    def init(self, key):
        return {"of_class": 0.1 * jax.random.normal(key, (self.num_classes + 1,))}

    def apply(self, params, x_t, t, cond=None, train=False, rngs=None):
        return jnp.tanh(x_t) * t.reshape(-1, 1, 1, 1) + params["of_class"][cond["class"]].reshape(-1, 1, 1, 1)


@functools.cache
def made() -> System:
    space = Space(SHAPE, SHAPE, nets.CLASSES)
    return diffusion(Table(), image_shape=SHAPE, schedule=process.SCHEDULES["linear"](), parameterization="eps",
                     conditioners={"class": class_label(space)})


def fresh(**defaults) -> Pipeline:
    return Pipeline(made(), made().init(jax.random.key(0)), {**DEFAULTS, **defaults})


@pytest.mark.parametrize("name, options", [("ddim", "eta"), ("ddpm", None), ("dpmpp_2m", "eta"), ("heun", None)])
def test_a_session_compiles_the_network_once(name, options):
    """Steps, guidance, eta, seed, classes and number; then other weights and other defaults."""
    pipeline = fresh(name=name)
    with watching() as seen:
        pipeline.sample(0, num=4, cond=3)
        first = len(seen.programs)
        for seed, (num, steps, guidance, eta) in enumerate([(16, 2, 4.0, 0.5), (1, 65, 1.0, 0.0), (7, 1000, 7.5, 1.0), (3, 1, 0.0, 0.3)]):
            pipeline.sample(seed, num=num, cond=np.arange(num), steps=steps, guidance=guidance, **({"eta": eta} if options else {}))
        pipeline.with_defaults(guidance=3.0).sample(jax.random.key(5), cond=[1, 2])
        pipeline.with_params(jax.tree.map(jnp.zeros_like, pipeline.params)).sample(0, cond=[1, 2], x_init=np.zeros((2, *SHAPE)))
    assert seen.count("_sample") == 1, seen.programs
    # what is left: keys of pictures without their starting noise, and the zeros made here
    assert set(seen.programs[first:]) <= {"jit(_draws)", "jit(broadcast_in_dim)", "jit(convert_element_type)"}, seen.programs[first:]


def test_each_sampler_is_a_program_and_so_is_what_the_docstring_says():
    pipeline = fresh()
    with watching() as seen:
        for n, settings in enumerate([{}, {"sampler": "heun"}, {"grid": "trailing"}, {"cond": None}, {"image": np.zeros(SHAPE)},
                                      {"window": (0.0, 0.5)}, {"eta": [0.0, 0.1, 0.2, 0.3]}, {"steps": 1025}], 1):
            pipeline.sample(0, **{"num": 4, "cond": 1, **settings})
            pipeline.sample(1, **{"num": 3, "cond": 2, **settings, **({"eta": [0.5] * 3} if "eta" in settings else {})})
            assert seen.count("_sample") == n, settings


def test_the_session_of_the_benchmark():
    case = nets.Case(None, SHAPE, "class", (1, 1), (1, 1))
    counts = compiling.session(case, fresh())
    assert counts["of the network"] == 1 and counts["after the first call"] == 0, counts


@pytest.mark.parametrize("num, most, compiled, parts, size", [
    (1, 256, (), 1, 1), (2, 256, (), 1, 2), (3, 256, (), 1, 4), (16, 256, (), 1, 16), (100, 256, (), 1, 128), (1000, 256, (), 1, 256),
    (7, 6, (), 1, 6), (5, 6, (), 1, 6), (3, 6, (), 1, 4), (1, 256, (), 4, 4), (9, 256, (), 4, 16), (6, 6, (), 4, 8),
    (4, 256, (16,), 1, 16), (3, 256, (16,), 1, 4), (128, 256, (16,), 1, 16), (129, 256, (16,), 1, 256), (17, 256, (16,), 1, 16),
    (10, 4, (16,), 1, 4), (8, 256, (1, 16), 1, 16), (8, 256, (1,), 1, 8), (2, 256, (1,), 1, 1),
    (60, 256, (8,), 1, 8), (16, 256, (2,), 1, 16), (16, 256, (4,), 1, 4),
    (1, 256, (1, 4), 1, 1), (1, 256, (2, 4), 1, 2), (1, 256, (256,), 1, 1)])
def test_batch_sizes(num, most, compiled, parts, size):
    assert batch_size_for(num, most, compiled, parts) == size


def test_batches_overlap_two_at_a_time_and_change_nothing(monkeypatch):
    pipeline, said = fresh(), []
    whole = pipeline.sample(0, num=7, cond=np.arange(7), eta=1.0, guidance=2.0)
    to_host, run = sampling.to_host, pipeline._sample
    monkeypatch.setattr(sampling, "to_host", lambda out: said.append("fetch") or to_host(out))
    object.__setattr__(pipeline, "_sample", lambda *a, **k: said.append("start") or run(*a, **k))
    parts = pipeline.sample(0, num=7, cond=np.arange(7), eta=1.0, guidance=2.0, batch_size=2)
    assert said == ["start", "start", "fetch", "start", "fetch", "start", "fetch", "fetch"]
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    one_by_one = np.concatenate([pipeline.sample(example_keys(jax.random.key(0), 7)[i:i + 2], cond=np.arange(7)[i:i + 2], eta=1.0,
                                                 guidance=2.0, batch_size=2) for i in range(0, 7, 2)])
    np.testing.assert_array_equal(parts, one_by_one)


@pytest.fixture(scope="module")
def texts():
    """(scanned?, depth) -> the update's program as text, before XLA sees it."""
    def text(scanned, depth):
        options = dict(scan_layers=True, remat="dots") if scanned else {}
        net = functools.partial(dit, (8, 8, 1), out_channels=1, width=16, num_heads=2, depth=depth, timesteps=1000)
        case = nets.Case(net, (8, 8, 1), "class", (2, 2), (2, 2))
        kept, lowered = [], jax.stages.Lowered.compile
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.stages.Lowered, "compile", lambda self, *a, **k: kept.append(self) or lowered(self, *a, **k))
            patch.setattr("ldm_jax.training.loop.compiler_options", dict)
            compiling.update(case, 8, "float32", **options)()
        return max((stage.as_text() for stage in kept), key=len)

    return functools.cache(text)


def test_a_scanned_update_does_not_grow_with_depth(texts):
    """Equal up to the digits of the shapes; layers that are not scanned show that there is something to see."""
    lines = {key: texts(*key).count("\n") for key in ((True, 2), (True, 12), (False, 2), (False, 4))}
    assert lines[True, 12] <= 1.02 * lines[True, 2], lines
    assert lines[False, 4] > 1.3 * lines[False, 2], lines


def test_a_sampler_does_not_grow_with_its_room():
    def lines(capacity):
        run = lambda params, x, keys, steps: made().sample(params, x, keys, {}, sampler=process.samplers.make_sampler("ddim"), steps=steps,
                                                           capacity=capacity)
        keys = jax.random.split(jax.random.key(0), 2)
        return jax.jit(run).lower(fresh().params, jnp.zeros((2, *SHAPE)), keys, jnp.int32(3)).as_text().count("\n")

    assert lines(1000) == lines(10)


@pytest.fixture
def cache(tmp_path):
    """A persistent cache of one's own, which keeps everything."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")
    before = {name: getattr(jax.config, name) for name in names}

    def use(path):
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()
        jax.clear_caches()

    use(tmp_path / "cache")
    yield use
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_second_start_finds_the_programs_and_another_option_does_not(cache):
    x = np.arange(3.0, dtype=np.float32)

    def started(**options) -> Compilations:
        """What a new process would do: nothing is remembered but what is on disk."""
        jax.clear_caches()
        with watching() as seen:
            np.testing.assert_allclose(jax.jit(lambda x: jnp.sin(x) + 1, compiler_options=options)(x), np.sin(x) + 1, rtol=1e-6)
        return seen

    assert [(len(seen.programs), seen.hits) for seen in (started(), started())] == [(1, 0), (1, 1)]
    other = {"xla_cpu_enable_fast_math": True}
    assert [started(**other).hits, started(**other).hits, started().hits] == [0, 1, 1]


def test_a_pipeline_of_a_second_start(cache):
    with watching() as first:
        a = fresh().sample(0, cond=[1, 2])
    jax.clear_caches()
    with watching() as second:
        b = fresh().sample(0, cond=[1, 2])
    np.testing.assert_array_equal(a, b)
    assert second.hits == len(second.programs) and first.programs == second.programs and "jit(_sample)" in second.programs


def test_a_cache_that_cannot_be_written_stops_nothing(cache, tmp_path):
    (tmp_path / "file").write_text("")
    cache(tmp_path / "file" / "cache")
    use_compilation_cache()
    with pytest.warns(UserWarning, match="persistent compilation cache"):
        assert jax.jit(lambda x: x * 3)(2) == 6


def test_overlapping_seconds_count_once():
    seen = Compilations(spans=[("a", 0.0, 2.0), ("b", 1.0, 3.0), ("a", 1.0, 1.5), ("b", 5.0, 6.0)])
    assert seen.seconds == pytest.approx(4.0)
