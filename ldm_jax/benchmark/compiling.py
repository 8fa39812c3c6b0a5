"""--suite=compile: what tracing and compiling cost, how often a session of sampling compiles, and what a second start still pays."""
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict, Iterator, List

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from ldm_jax import process
from ldm_jax.benchmark import nets, timing
from ldm_jax.benchmark.report import Row
from ldm_jax.benchmark.sampling import DEFAULTS, GUIDANCE
from ldm_jax.benchmark.settings import Settings
from ldm_jax.compilations import watching
from ldm_jax.machine import compiler_options, use_compilation_cache
from ldm_jax.parallel.sharding import batch_sharding, make_mesh, replicated
from ldm_jax.parallel.signals import asking
from ldm_jax.sampling import Pipeline
from ldm_jax.systems import System
from ldm_jax.training.loop import compiled_step, placed_state, train_step
from ldm_jax.training.state import learning_rate, new_state, optimizer

SCANNED = dict(scan_layers=True, remat="dots")  # of the DiTs whose update is compiled
ROUNDS = 3  # at most: compiling takes long
FEW, MANY = 10, 1000  # steps that a sampler has room for
# A session: (steps, guidance, eta, seed, pictures, of which 2 are made at a time)
SESSION = ((2, 1.0, 0.0, 0, 2), (3, GUIDANCE, 0.0, 1, 2), (2, 1.5, 0.5, 2, 1), (3, 1.0, 1.0, 3, 3), (1, 7.5, 0.2, 4, 4))


def run(name: str, case: nets.Case, settings: Settings) -> List[Row]:
    if settings.cpu and not case.train_on_cpu and settings.asked is None:
        return []
    rows = []
    with uncached():
        rows += _updates(name, settings)
        rows += _samplers(name, case, settings)
        rows += _session(name, case, settings)
    return rows + ([] if jax.default_backend() == "tpu" else _starts(name, settings))  # a TPU serves one process


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """The compiler at work inside the block, whatever is on disk."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def afresh(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call after all that JAX remembers is dropped, which takes a moment itself."""
    def again():
        jax.clear_caches()
        call()

    return again


def _row(name: str, what: str, times: List[float], **detail: Any) -> Row:
    return Row("compile", name, what, *_of(timing.spread(times)), detail={"seconds": times, **detail})


def _of(spread):
    median, low, high = spread
    return median, "s", low, high


def _times(name: str, what: str, of: str, ours: List[float], base: List[float]) -> Row:
    median, low, high = timing.ratios(base, ours)
    return Row("compile", name, what, median, f"times {of}", low, high)


def update(case: nets.Case, size: int, dtype: str, **options: Any) -> Callable[[], Any]:
    """Traces and compiles the update of the training loop for a batch of `size`, of arrays that are nowhere: it takes no memory."""
    system = nets.system_of(case, dtype, **options)
    mesh, tx = make_mesh(), optimizer("adamw", learning_rate(1e-4, steps=1))
    of = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    state = placed_state(lambda: new_state(system.init(jax.random.key(0)), system.trained, tx), mesh, ())
    batch = {field: of(a, batch_sharding(mesh, a.shape)) for field, a in nets.batch_of(case, size).items()}
    key, good = (of(jax.eval_shape(make), replicated(mesh)) for make in (lambda: jax.random.key(0), lambda: jnp.bool_(True)))
    step = train_step(system.loss_fn, tx, ema_decay=0.9999)
    return lambda: compiled_step(step, state, batch, key, good, asking(mesh)(0))


def _updates(name: str, settings: Settings) -> List[Row]:
    scanned = name.startswith("dit_")
    other = None if not scanned else "dit_xl2" if name == "dit_s2" else "dit_s2"
    options = {n: SCANNED if scanned else nets.CASES[n].options for n in (name, other) if n}
    size = settings.batch or max(8, min((nets.CASES[n].batch if settings.cpu else nets.CASES[n].accelerator)[0] for n in options))
    calls = {n: afresh(update(nets.CASES[n], size, settings.dtype, **options[n])) for n in options}
    times = timing.alternate(calls, min(settings.rounds, ROUNDS), warm=1)
    rows = [_row(name, "update" + (", layers scanned" if scanned else ""), times[name], batch=size, **options[name])]
    if other:
        large, small = (other, name) if name == "dit_s2" else (name, other)
        rows.append(_times(large, "update, layers scanned", f"{small}'s", times[large], times[small]))
    return rows


def sampler(case: nets.Case, system: System, params: Any, capacity: int, size: int) -> Callable[[], Any]:
    """Traces and compiles the sampler with room for so many steps, guided where there are conditions."""
    value = nets.condition_of(case, size)
    value = value if isinstance(value, dict) else {} if value is None else {"class": value}
    cond = {name: system.conditioners[name].read(a) for name, a in value.items()}
    x, scale = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((size, *system.sample_shape), (size,)))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
    steps = jax.ShapeDtypeStruct((), jnp.int32)

    def sample(params, x, keys, cond, scale, steps):
        return system.sample(params, x, keys, cond, sampler=process.samplers.make_sampler("ddim"), steps=steps, capacity=capacity,
                             guidance=scale if cond else None)

    return lambda: jax.jit(sample, compiler_options=compiler_options()).lower(params, x, keys, cond, scale, steps).compile()


def _samplers(name: str, case: nets.Case, settings: Settings) -> List[Row]:
    system = nets.system_of(case, settings.dtype)
    params = jax.eval_shape(system.init, jax.random.key(0))
    size = settings.batch or (case.batch if settings.cpu else case.accelerator)[1]
    calls = {n: afresh(sampler(case, system, params, n, size)) for n in (FEW, MANY)}
    times = timing.alternate(calls, min(settings.rounds, ROUNDS), warm=1)
    return [_row(name, f"sampler, room for {n} steps", times[n], pictures=size) for n in (FEW, MANY)] + [
        _times(name, f"sampler, room for {MANY} steps", f"that for {FEW}", times[MANY], times[FEW])]


def _zeros(system: System) -> Any:
    """Parameters as they come from a checkpoint: with nothing compiled to make them."""
    return jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype)), jax.eval_shape(system.init, jax.random.key(0)))


def session(case: nets.Case, pipeline: Pipeline) -> Dict[str, int]:
    """What the calls of SESSION compile: how often the network, how many programs in all, and how many of them after the first call."""
    compiled = []
    with watching() as seen:
        for steps, guidance, eta, seed, num in SESSION:
            pipeline.sample(seed, num=num, cond=nets.condition_of(case, num), steps=steps, guidance=guidance, eta=eta, batch_size=2)
            compiled.append(len(seen.programs))
    return {"of the network": seen.count("_sample"), "in all": compiled[-1], "after the first call": compiled[-1] - compiled[0]}


def _session(name: str, case: nets.Case, settings: Settings) -> List[Row]:
    system = nets.system_of(case, settings.dtype)
    counts = session(case, Pipeline(system, _zeros(system), DEFAULTS))
    return [Row("compile", name, f"{len(SESSION)} calls of Pipeline.sample, other steps, guidance, eta, seed and num",
                counts["of the network"], "compilations of the network", detail=counts)]


def first_image(name: str, steps: int, dtype: str) -> None:
    """In a process of its own, begun for it: makes one picture, and prints what the time went to as JSON."""
    began = time.perf_counter()
    use_compilation_cache()
    with watching() as seen:
        case = nets.CASES[name]
        system = nets.system_of(case, dtype)
        Pipeline(system, _zeros(system), DEFAULTS).sample(0, num=1, cond=nets.condition_of(case, 1), steps=steps, guidance=GUIDANCE)
    print(json.dumps({"since imports": time.perf_counter() - began, "traced and compiled": seen.seconds,
                      "compiled": seen.compiling, "programs": len(seen.programs), "found": seen.hits}))


def start(name: str, settings: Settings, directory: str) -> Dict[str, float]:
    """The figures of `first_image` in a new process whose cache is `directory`, and its "whole" seconds."""
    call = f"from ldm_jax.benchmark import compiling; compiling.first_image({name!r}, {settings.steps}, {settings.dtype!r})"
    environ = {**os.environ, "JAX_COMPILATION_CACHE_DIR": directory, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", call], env=environ, stdout=subprocess.PIPE, text=True, check=True)
    return {"whole": time.perf_counter() - began, **json.loads(done.stdout.splitlines()[-1])}


def _starts(name: str, settings: Settings) -> List[Row]:
    with tempfile.TemporaryDirectory() as directory:
        first, second = (start(name, settings, directory) for _ in range(2))
    rows = []
    for what in ("whole", "since imports", "traced and compiled", "compiled"):
        rows += [Row("compile", name, f"first picture of a process, {what}", first[what], "s", detail=first),
                 Row("compile", name, f"the same, {what}, at the second start", second[what], "s",
                     detail={**second, "of the first": second[what] / first[what]})]
    return rows + [Row("compile", name, "second start, compiling", second["compiled"] / first["compiled"], "of the first")]
