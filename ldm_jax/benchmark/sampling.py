"""--suite=sample: pictures by `Pipeline.sample`, with as many network calls as the peer's sampler makes."""
from typing import List

import jax

from ldm_jax.benchmark import nets, timing
from ldm_jax.benchmark.report import Row
from ldm_jax.benchmark.settings import Settings
from ldm_jax.benchmark.training import fastest
from ldm_jax.sampling import Pipeline

DEFAULTS = {"name": "ddim", "steps": 10, "guidance": 1.0, "grid": "uniform"}
GUIDANCE = 4.0


def run(name: str, case: nets.Case, settings: Settings) -> List[Row]:
    size = settings.batch or (case.batch if settings.cpu else case.accelerator)[1]
    system = nets.system_of(case, settings.dtype)
    params = jax.jit(system.init)(jax.random.key(0))
    pipeline = Pipeline(system, params, DEFAULTS)
    rows = []
    for count in sorted({1, size}):
        for guidance in (1.0, GUIDANCE) if case.condition else (1.0,):
            cond = nets.condition_of(case, count)

            def ours():
                pipeline.sample(0, num=count, cond=cond, steps=settings.steps, guidance=guidance)

            calls = {"ldm_jax": ours}
            if settings.peer:
                calls.update(settings.peer.sampling(name, count, guidance, settings.steps, settings.peer_labels))
            times = timing.alternate(calls, settings.rounds, warm=2)
            taken, low, high = timing.spread(times["ldm_jax"])
            best, ratio = fastest(times)
            what = f"{settings.steps} DDIM steps, {count} picture{'s' if count > 1 else ''}" + (", guided" if guidance != 1 else "")
            rows.append(Row("sample", name, what, count / taken, "images/s", count / high, count / low,
                            best and (best, count / timing.spread(times[best])[0]), ratio,
                            {"pictures": count, "steps": settings.steps, "guidance": guidance, "dtype": settings.dtype,
                             "seconds_per_picture": taken / count, "seconds": times}))
    return rows
