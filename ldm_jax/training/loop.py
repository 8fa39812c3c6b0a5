"""The training loop, the one for every system: a loss function, an optimiser and batches in, a trained state out."""
import contextlib
import dataclasses
import os
import signal
import time
from typing import Any, Callable, Mapping, Optional, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ldm_jax.parallel.sharding import Rules, batch_parts, check_rules, place, replicated, shardings
from ldm_jax.parallel.signals import asking, watch_signals
from ldm_jax.training.checkpoint import Checkpoints
from ldm_jax.training.logs import Logs, drop_after, progress
from ldm_jax.training.state import TrainState, new_state
from ldm_jax.types import Array, LossFn, PyTree, UserError, example_keys, fold_in, writes_files


class Interrupted(Exception):
    """The run was asked to stop; its state is saved at `step`. `signum` is the signal."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}, which is saved")
        self.signum, self.step = signum, step


def ema_rate(decay: float, step: Array) -> Array:
    """min(decay, (1 + step) / (10 + step)): a young average forgets its initialisation quickly."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def train_step(loss_fn: LossFn, tx: optax.GradientTransformation, *, ema_decay: float, accumulate: int = 1,
               refresh: Optional[Callable] = None) -> Callable:
    """(state, batch, key) -> (state, metrics): one update.

    The gradient is that of the mean of the per-example losses, taken in `accumulate` parts whose noise is the same as in one
    part. A step whose loss or gradient is not finite leaves the state as it was, and says so in metrics["finite"].

    refresh: (all parameters, notes) -> those of them that change without a gradient, after the optimiser; notes is what loss_fn
      left in metrics["notes"], of the last part where there are several.
    """
    def mean_loss(params, others, batch, keys):
        loss, metrics = loss_fn({**others, **params}, batch, keys)
        metrics = dict(metrics)
        notes = metrics.pop("notes", ())
        return jnp.mean(loss), (jax.tree.map(jnp.mean, metrics), notes)

    def gradient(params, others, batch, keys):
        (loss, (metrics, notes)), grads = jax.value_and_grad(mean_loss, has_aux=True)(params, others, batch, keys)
        return (grads, {**metrics, "loss": loss}), notes

    def step(state: TrainState, batch: PyTree, key: Array):
        n = jax.tree.leaves(batch)[0].shape[0]
        keys = example_keys(fold_in(key, state.step), n)
        if accumulate == 1:
            (grads, metrics), notes = gradient(state.params, state.others, batch, keys)
        else:
            parts = jax.tree.map(lambda a: jnp.moveaxis(a.reshape((n // accumulate, accumulate) + a.shape[1:]), 1, 0), (batch, keys))
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(
                gradient, state.params, state.others, *jax.tree.map(lambda a: a[0], parts)))

            def add(sums, part):
                sums, (terms, notes) = sums[0], gradient(state.params, state.others, *part)
                return (jax.tree.map(jnp.add, sums, terms), notes), None

            (total, notes), _ = jax.lax.scan(add, zeros, parts)
            grads, metrics = jax.tree.map(lambda a: a / accumulate, total)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        changed = dict(refresh({**state.others, **params}, notes)) if refresh else {}
        params, others = ({name: changed.get(name, tree) for name, tree in trees.items()} for trees in (params, state.others))
        rate = ema_rate(ema_decay, state.step)
        ema = jax.tree.map(lambda average, p: average + (1 - rate).astype(p.dtype) * (p - average), state.ema, params)
        new = TrainState(step=state.step, params=params, ema=ema, opt_state=opt_state, others=others)
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        return dataclasses.replace(new, step=state.step + 1), {**metrics, "grad_norm": norm, "finite": finite}

    return step


def _placed(trees: Mapping[str, PyTree], abstract: Mapping[str, PyTree], values: Mapping[str, PyTree]) -> Mapping[str, PyTree]:
    """`trees` with those that `values` has a value for in its place, sharded as `abstract` says."""
    put = lambda spec, value: place(value, spec.sharding)
    given = {name: jax.tree.map(put, abstract[name], values[name]) for name in trees if name in values}
    # What is donated must be the state's own, and device_put may return an array that shares another's memory.
    return {**trees, **jax.jit(lambda given: jax.tree.map(jnp.copy, given))(given)}


def compiled_step(step: Callable, state: Any, batch: PyTree, key: Array, asked: Array) -> Any:
    """`step` compiled for a mesh: (state, batch, key, asked) -> (state, metrics), the state's memory being used again.

    state, batch: arrays, or ShapeDtypeStructs with shardings. asked: see `parallel.signals.asking`; metrics["asked"] is its largest.
    """
    def run(state, batch, key, asked):
        state, metrics = step(state, batch, key)
        return state, {**metrics, "asked": jnp.max(asked)}

    of = lambda tree: jax.tree.map(lambda a: a.sharding, tree)
    arguments = (state, batch, key, asked)
    return jax.jit(run, donate_argnums=0, in_shardings=tuple(map(of, arguments)),
                   out_shardings=(of(state), replicated(asked.sharding.mesh))).lower(*arguments).compile()


def train(*, workdir: str, init: Callable[[Array], Mapping[str, PyTree]], trained: Sequence[str], loss_fn: LossFn,
          tx: optax.GradientTransformation, batches: Callable[[int, TrainState], Any], batch_size: int, steps: int, seed: int, mesh: Mesh,
          given: Optional[Callable[[], Mapping[str, PyTree]]] = None, refresh: Optional[Callable] = None, rules: Rules = (),
          ema_decay: float = 0.9999, accumulate: int = 1, log_every: int = 100, save_every: int = 1000, keep: int = 2,
          on_save: Optional[Callable[[int, TrainState], None]] = None, config: Optional[Mapping[str, Any]] = None, name: str = "train",
          warn: Callable[[str], None] = print, mark: Callable[[int], None] = lambda step: None) -> TrainState:
    """Train from the newest good checkpoint in `workdir`, or from `init`, up to `steps` updates.

    Killed at any moment and called again with the same arguments, it ends with the same parameters, bit for bit, as a run that
    was never killed: the state, the position in the data and the keys are functions of the step.

    Args:
      init: key -> parameters by name, of which those in `trained` are trained by gradient.
      given: called at the start of a new run for the values of some parameters, by name, in place of what `init` makes of them.
      refresh: see `train_step`.
      batches: (position, state) -> iterator of batches placed by `placer(mesh)`, with get_state() and close().
      on_save: called with (step, state) after every checkpoint, for pictures.
      warn: is told of checkpoints that are passed over. mark: is told of every step that begins, see `parallel.rollcall`.

    Raises:
      UserError: a loss that is not finite, a checkpoint that cannot be written or read.
      Interrupted: on SIGINT or SIGTERM, in any of the processes, after saving.
    """
    parts = batch_parts(mesh)
    if batch_size % accumulate or (batch_size // accumulate) % parts:
        raise UserError(f"batch_size={batch_size} does not divide into accumulate={accumulate} parts over the {parts} of the mesh's "
                        f"data x fsdp")
    key = jax.random.key(seed)
    key_init, key_train = jax.random.split(key)
    key_train = place(key_train, replicated(mesh))

    def start() -> TrainState:
        return new_state(init(key_init), trained, tx)

    abstract = jax.eval_shape(start)
    check_rules(rules, abstract)
    placed = shardings(abstract, mesh, rules)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, placed)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(os.path.join(workdir, "checkpoints"), keep=keep, config=config))
        found = checkpoints.restore(abstract, warn=warn)
        if found:
            _, state, position = found
        else:
            state, position = jax.jit(start, out_shardings=placed)(), {"next_index": 0}
            values = dict(given()) if given is not None else {}
            state = dataclasses.replace(state, **{part: _placed(getattr(state, part), getattr(abstract, part), values)
                                                  for part in ("params", "ema", "others")})
        step = int(state.step)
        if step >= steps:
            return state
        if writes_files():
            drop_after(os.path.join(workdir, "metrics.jsonl"), step)
        logs = stack.enter_context(Logs(workdir if writes_files() else None))
        data = batches(position["next_index"], state)
        stack.callback(data.close)
        batch = next(data)
        ask = asking(mesh)
        update = compiled_step(train_step(loss_fn, tx, ema_decay=ema_decay, accumulate=accumulate, refresh=refresh), state, batch, key_train,
                               ask(0))  # before the clock and the bar start
        bar = stack.enter_context(progress(steps, step, name))
        seen = stack.enter_context(watch_signals())
        window, since = [], time.perf_counter()

        def read_window() -> None:
            """Fetch and log the metrics of the steps since the last time; stop at the first that is not finite."""
            nonlocal window, since
            if not window:
                return
            values = jax.device_get(window)
            bad = [i for i, v in enumerate(values) if not v["finite"]]
            if bad:
                start = step - len(values) + 1
                raise UserError(f"the loss is not finite at step {start + bad[0]}, the first of {len(bad)} in steps {start} to {step}; "
                                f"last good checkpoint: {checkpoints.steps[-1:] or 'none'}. Lower the learning rate or clip_norm, "
                                f"then run again in a new --workdir")
            mean = {k: float(np.mean([v[k] for v in values])) for k in values[0] if k not in ("finite", "asked")}
            mean["images_per_s"] = len(values) * batch_size / (time.perf_counter() - since)
            logs.scalars(step, mean)
            bar.set_postfix_str(f"loss {mean['loss']:.4f}, {mean['images_per_s']:.0f} images/s")
            window, since = [], time.perf_counter()

        def save() -> None:
            read_window()
            logs.flush()
            checkpoints.save(step, state, data.get_state())

        while step < steps:
            mark(step)
            state, metrics = update(state, batch, key_train, ask(seen[0] if seen else 0))
            step += 1
            bar.update()
            window.append(metrics)
            done = jax.block_until_ready(window[-min(3, len(window))])  # at most two steps in flight: signals and memory stay in hand
            if step % log_every == 0:
                read_window()
            stop = int(done["asked"]) if jax.process_count() > 1 else seen and seen[0]  # all processes at the same step
            if stop:
                save()
                checkpoints.wait()
                raise Interrupted(stop, step)
            if step % save_every == 0 or step == steps:
                save()
                if on_save and step < steps:
                    on_save(step, state)
                    since = time.perf_counter()
            if step < steps:
                batch = next(data)
        checkpoints.wait()
        return state
