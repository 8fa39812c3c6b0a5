"""The training loop, the one for every system: a loss function, an optimiser and batches in, a trained state out."""
import contextlib
import dataclasses
import functools
import os
import signal
import time
from typing import Any, Callable, Iterator, List, Mapping, Optional, Sequence, Tuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ldm_jax.machine import compiler_options
from ldm_jax.parallel.sharding import Rules, batch_parts, check_rules, check_sequence, in_parts, place, replicated, shardings
from ldm_jax.parallel.signals import asking, watch_signals
from ldm_jax.training import health, nonfinite
from ldm_jax.training.averages import Snapshots, updated
from ldm_jax.training.checkpoint import Checkpoints
from ldm_jax.training.logs import Logs, drop_after, progress
from ldm_jax.training.state import TrainState, new_state
from ldm_jax.types import Array, LossFn, PyTree, UserError, example_keys, fold_in, writes_files

IN_FLIGHT = 2  # dispatches that are not waited for before the next: the devices are never idle, and signals and memory stay in hand


class Interrupted(Exception):
    """The run was asked to stop; its state is saved at `step`, which took so many seconds. `signum` is the signal."""

    def __init__(self, signum: int, step: int, seconds: float):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}, saved in {seconds:.1f} s")
        self.signum, self.step = signum, step


def ema_rate(decay: float, step: Array) -> Array:
    """min(decay, (1 + step) / (10 + step)): a young average forgets its initialisation quickly."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def train_step(loss_fn: LossFn, tx: optax.GradientTransformation, *, ema_decay: float, accumulate: int = 1,
               refresh: Optional[Callable] = None) -> Callable:
    """(state, batch, key, good) -> (state, metrics): one update.

    The gradient is that of the mean of the per-example losses, taken in `accumulate` parts whose noise is the same as in one
    part. A step whose loss or gradient is not finite leaves the state as it was, its `step` too, and says so in metrics["finite"]. So
    does every step after it that is given that flag: the fourth argument, `good`, is the one of the step before, true at first.
    The loop may then learn of the first bad step when others have been started, and the state is still that of before it.

    refresh: (all parameters, notes) -> those of them that change without a gradient, after the optimiser; notes is what loss_fn
      left in metrics["notes"], of the last part where there are several.
    """
    def mean_loss(params, others, batch, keys):
        metrics, notes = health.split_metrics(*loss_fn({**others, **params}, batch, keys))
        return metrics["loss"], (metrics, notes)

    def gradient(params, others, batch, keys):
        (_, (metrics, notes)), grads = jax.value_and_grad(mean_loss, has_aux=True)(params, others, batch, keys)
        return (grads, metrics), notes

    def step(state: TrainState, batch: PyTree, key: Array, good: Any = True):
        n = jax.tree.leaves(batch)[0].shape[0]
        keys = example_keys(fold_in(key, state.step), n)
        if accumulate == 1:
            (grads, metrics), notes = gradient(state.params, state.others, batch, keys)
        else:
            parts = in_parts((batch, keys), accumulate)
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(
                gradient, state.params, state.others, *jax.tree.map(lambda a: a[0], parts)))

            def add(sums, part):
                sums, (terms, notes) = sums[0], gradient(state.params, state.others, *part)
                return (jax.tree.map(jnp.add, sums, terms), notes), None

            (total, notes), _ = jax.lax.scan(add, zeros, parts)
            grads, metrics = jax.tree.map(lambda a: a / accumulate, total)
        squares = health.block_squares(grads)
        norm = jnp.sqrt(jnp.sum(squares))
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm) & good
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        changed = dict(refresh({**state.others, **params}, notes)) if refresh else {}
        params, others = ({name: changed.get(name, tree) for name, tree in trees.items()} for trees in (params, state.others))
        rate = ema_rate(ema_decay, state.step)
        ema = jax.tree.map(lambda average, p: average + (1 - rate).astype(p.dtype) * (p - average), state.ema, params)
        new = TrainState(step=state.step + 1, params=params, ema=ema, opt_state=opt_state, others=others,
                         powers=updated(state.powers, params, state.step))
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        return new, {**metrics, "grad_norm": norm, "block_norms": jnp.sqrt(squares), "finite": finite}

    return step


def several(step: Callable) -> Callable:
    """`step`, see `train_step`, for a tuple of batches: an update with each, one after the other, in one program.

    Its metrics are {"finite": of the last update, so that it is the next dispatch's `good`; "steps": those of each update, stacked}.
    """
    def steps(state: TrainState, batches: Sequence[PyTree], key: Array, good: Any = True):
        def one(carry, batch):
            state, metrics = step(carry[0], batch, key, carry[1])
            return (state, metrics["finite"]), metrics

        (state, good), metrics = jax.lax.scan(one, (state, jnp.asarray(good)), jax.tree.map(lambda *rows: jnp.stack(rows), *batches))
        return state, {"finite": good, "steps": metrics}

    return steps


def single_steps(metrics: Mapping[str, Any]) -> List[Mapping[str, Any]]:
    """The metrics of each update of a dispatch, fetched already, whether it made one update or `several`."""
    if "steps" not in metrics:
        return [metrics]
    return [jax.tree.map(lambda rows: rows[i], metrics["steps"]) for i in range(len(metrics["steps"]["finite"]))]


def dispatches(step: int, most: int, *, steps: int, every: Sequence[int]) -> Iterator[int]:
    """How many updates each dispatch makes, from `step` to `steps`: `most`, or 1 where the state is wanted before those are done, as it
    is at the multiples of the numbers in `every`. Where it is always wanted sooner, `most` is what lies between.

    A run that stops after any of them goes on with those that would have followed; and two programs are all that is compiled.
    """
    most = min(most, steps, *every)
    while step < steps:
        n = most if most <= min(steps - step, *(due - step % due for due in every)) else 1
        yield n
        step += n


def _placed(trees: Mapping[str, PyTree], abstract: Mapping[str, PyTree], values: Mapping[str, PyTree]) -> Mapping[str, PyTree]:
    """`trees` with those that `values` has a value for in its place, sharded as `abstract` says. `values` may be a part of it."""
    def put(spec, value):
        if isinstance(spec, Mapping):
            return {name: put(spec[name], value[name]) for name in spec if name in value}
        return jax.tree.map(lambda s, v: place(v if v.dtype == s.dtype else v.astype(s.dtype), s.sharding), spec, value)

    def merge(tree, value):
        return {name: merge(a, value[name]) if name in value else a for name, a in tree.items()} if isinstance(tree, Mapping) else value

    given = put(abstract, values)
    # What is donated must be the state's own, and device_put may return an array that shares another's memory.
    return merge(trees, jax.jit(lambda given: jax.tree.map(jnp.copy, given))(given))


def placed_state(start: Callable[[], TrainState], mesh: Mesh, rules: Rules) -> TrainState:
    """What `start` makes as ShapeDtypeStructs, sharded by the rules.

    Raises:
      UserError: see `parallel.sharding`; a sequence axis where convolutions are trained.
    """
    abstract = jax.eval_shape(start)
    check_sequence(abstract.params, mesh)
    check_rules(rules, abstract)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings(abstract, mesh, rules))


def compiled_step(step: Callable, state: Any, batch: PyTree, key: Array, good: Array, asked: Array) -> Any:
    """`step` compiled for a mesh: (state, batch, key, good, asked) -> (state, metrics), the state's memory being used again.

    state, batch: arrays, or ShapeDtypeStructs with shardings. asked: see `parallel.signals.asking`; metrics["asked"] is its largest.
    """
    def run(state, batch, key, good, asked):
        state, metrics = step(state, batch, key, good)
        return state, {**metrics, "asked": jnp.max(asked)}

    of = lambda tree: jax.tree.map(lambda a: a.sharding, tree)
    arguments = (state, batch, key, good, asked)
    mesh = asked.sharding.mesh
    with jax.set_mesh(mesh):
        return jax.jit(run, donate_argnums=0, compiler_options=compiler_options(), in_shardings=tuple(map(of, arguments)),
                       out_shardings=(of(state), replicated(mesh))).lower(*arguments).compile()


def train(*, workdir: str, init: Callable[[Array], Mapping[str, PyTree]], trained: Sequence[str], loss_fn: LossFn,
          tx: optax.GradientTransformation, batches: Callable[[int, TrainState], Any], batch_size: int, steps: int, seed: int, mesh: Mesh,
          given: Optional[Callable[[], Mapping[str, PyTree]]] = None, refresh: Optional[Callable] = None, rules: Rules = (),
          ema_decay: float = 0.9999, accumulate: int = 1, steps_per_dispatch: int = 1, log_every: int = 100, save_every: int = 1000,
          keep: int = 2, keep_every: int = 0, keep_best: str = "", averages: Mapping[str, Any] = {},
          on_save: Optional[Callable[[int, TrainState], None]] = None, config: Optional[Mapping[str, Any]] = None, name: str = "train",
          warn: Callable[[str], None] = print, mark: Callable[[int], None] = lambda step: None) -> TrainState:
    """Train from the newest good checkpoint in `workdir`, or from `init`, up to `steps` updates.

    Killed at any moment and called again with the same arguments, it ends with the same parameters, bit for bit, as a run that
    was never killed: the state, the position in the data and the keys are functions of the step.

    Args:
      init: key -> parameters by name, of which those in `trained` are trained by gradient.
      given: called at the start of a new run for the values of some parameters, by name, in place of what `init` makes of them.
      refresh: see `train_step`.
      batches: (position, state) -> iterator of batches placed by `placer(mesh)`, see `data.pipeline.Batches`.
      steps_per_dispatch: how many updates one call of the compiled program makes, of one batch each; fewer where a checkpoint or a
        snapshot is due, see `dispatches`. The mathematics is the same, numbers may differ by rounding; a signal is heeded later.
      keep, keep_every, keep_best: see `Checkpoints`; the metrics are those of the last line logged, the one that ends at the save.
      averages: {"stds": relative lengths of the power-function averages to carry, "every": steps between their snapshots}, which go to
        WORKDIR/averages; none by default.
      on_save: called with (step, state) after every checkpoint, for pictures.
      warn: is told of checkpoints that are passed over. mark: is told of every dispatch that begins, see `parallel.rollcall`.

    Raises:
      UserError: a step that is not finite, see `nonfinite.stopped`; a checkpoint that cannot be written or read.
      Interrupted: on SIGINT or SIGTERM, in any of the processes, after saving.
    """
    parts = batch_parts(mesh)
    if batch_size % accumulate or (batch_size // accumulate) % parts:
        raise UserError(f"batch_size={batch_size} does not divide into accumulate={accumulate} parts over the {parts} of the mesh's "
                        f"data x fsdp")
    if steps_per_dispatch < 1:
        raise UserError(f"train.steps_per_dispatch={steps_per_dispatch} must be at least 1")
    key = jax.random.key(seed)
    key_init, key_train = jax.random.split(key)
    key_train = place(key_train, replicated(mesh))

    def start() -> TrainState:
        return new_state(init(key_init), trained, tx, averages.get("stds", ()))

    abstract = placed_state(start, mesh, rules)
    placed = jax.tree.map(lambda a: a.sharding, abstract)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(os.path.join(workdir, "checkpoints"), keep=keep, keep_every=keep_every,
                                                      keep_best=keep_best, config=config))
        snapshots = stack.enter_context(Snapshots(os.path.join(workdir, "averages"), averages.get("stds", ()),
                                                  every=averages.get("every", 1000), last=steps))
        found = checkpoints.restore(abstract, warn=warn)
        if found:
            _, state, position = found
        else:
            state, position = jax.jit(start, out_shardings=placed)(), {"next_index": 0}
            values = dict(given()) if given is not None else {}
            state = dataclasses.replace(state, **{part: _placed(getattr(state, part), getattr(abstract, part), values)
                                                  for part in ("params", "ema", "others")})
        step = int(state.step)
        snapshots.begin(step, state.powers)
        if step >= steps:
            return state
        if writes_files():
            drop_after(os.path.join(workdir, "metrics.jsonl"), step)
        logs = stack.enter_context(Logs(workdir if writes_files() else None))
        data = batches(position["next_index"], state)
        stack.callback(data.close)
        every = (save_every, averages.get("every", 1000)) if averages.get("stds") else (save_every,)
        lengths = functools.partial(dispatches, step, steps_per_dispatch, steps=steps, every=every)
        to_come = lengths()

        def upcoming() -> Tuple[int, PyTree]:
            """How many updates the next dispatch makes, and of what: a batch, or a tuple of several."""
            batches = tuple(next(data) for _ in range(next(to_come)))
            return len(batches), batches if len(batches) > 1 else batches[0]

        n, batch = upcoming()
        ask, good = asking(mesh), jax.jit(lambda: jnp.bool_(True), out_shardings=replicated(mesh))()
        update = train_step(loss_fn, tx, ema_decay=ema_decay, accumulate=accumulate, refresh=refresh)
        one, counts = batch[0] if n > 1 else batch, set(lengths()) if steps_per_dispatch > 1 else {1}
        programs = {count: compiled_step(*((several(update), state, (one,) * count) if count > 1 else (update, state, one)),
                                         key_train, good, ask(0)) for count in counts}  # before the clock and the bar start
        names = jax.tree.unflatten(programs[n].out_tree, range(programs[n].out_tree.num_leaves))[1]
        known = sorted({*names.get("steps", names)} - set(health.NO_NUMBERS))
        if keep_best and keep_best.removeprefix("+") not in known:
            raise UserError(f"train.keep_best={keep_best!r} is no metric of this run; choose from: {', '.join(known)}")
        bar = stack.enter_context(progress(steps, step, name))
        seen = stack.enter_context(watch_signals())
        unread, window, logged = [], [], step  # (last step, metrics) of dispatches; metrics of the steps after `logged` that are read
        since, last_logged, stalled, blocks = time.perf_counter(), {}, 0.0, health.block_names(state.params)
        ahead = position["next_index"] - step  # of the steps in the data, should a run have begun elsewhere than at its beginning

        def read(count: int, rest: bool = False) -> None:
            """Fetch the metrics of the `count` oldest dispatches that are unread. Log a line at each multiple of log_every; where `rest`
            also of what is left, as before a step that is not finite, at which it stops."""
            nonlocal since
            values = [row for _, metrics in jax.device_get(unread[:count]) for row in single_steps(metrics)]
            del unread[:count]
            now = time.perf_counter()
            rate, since = len(values) * batch_size / (now - since), now
            finite = [row for row in values if row["finite"]]
            for row in finite:
                window.append(row)
                if (logged + len(window)) % log_every == 0:
                    log(rate)
            if window and (rest or len(finite) < len(values)):
                log(rate)
            if len(finite) < len(values):
                give_up()

        def log(rate: float) -> None:
            """A line for the steps of the window."""
            nonlocal logged, last_logged, stalled
            logged += len(window)
            mean = {**health.summary(window, blocks), "images_per_s": rate, **({"save_s": stalled} if stalled else {})}
            logs.scalars(logged, mean)
            last_logged = {name: value for name, value in mean.items() if isinstance(value, float)}
            bar.set_postfix_str(f"loss {mean['loss']:.4f}, {mean['images_per_s']:.0f} images/s")
            window.clear()
            stalled = 0.0

        def give_up() -> None:
            """Say what is wrong with the step after `state`, and keep that."""
            checkpoints.wait()
            where = {"next_index": ahead + int(state.step)}
            data.set_state(where)
            raise UserError(nonfinite.stopped(
                workdir, loss_fn, state, next(data), data.ids(where["next_index"]), key_train, position=where, replicated=replicated(mesh),
                accumulate=accumulate, config=config, checkpoints=checkpoints.steps))

        def save() -> None:
            nonlocal stalled
            read(len(unread), rest=True)
            began = time.perf_counter()
            logs.flush()
            snapshots.wait()
            checkpoints.save(step, state, data.get_state(), metrics=last_logged)
            stalled = time.perf_counter() - began

        while step < steps:
            mark(step)
            state, metrics = programs[n](state, batch, key_train, good, ask(seen[0] if seen else 0))
            good = metrics["finite"]
            step += n
            bar.update(n)
            unread.append((step, metrics))
            landed, done = unread[-1 - IN_FLIGHT] if len(unread) > IN_FLIGHT else (logged, {"finite": True, "asked": 0})
            if not done["finite"] or landed // log_every > logged // log_every:  # waits for that dispatch
                read(len(unread) - IN_FLIGHT)
            stop = int(done["asked"]) if jax.process_count() > 1 else seen and seen[0]  # all processes at the same step
            if stop:
                began = time.perf_counter()
                save()
                checkpoints.wait()
                raise Interrupted(stop, step, time.perf_counter() - began)
            if step % save_every == 0 or step == steps:
                save()
                if on_save and step < steps:
                    on_save(step, state)
                    since = time.perf_counter()
            snapshots.offer(step, state.powers)
            if step < steps:
                n, batch = upcoming()
        checkpoints.wait()
        snapshots.wait()
        return state
