"""Where in a computation values first cease to be finite, found in the computation itself, whatever nets it consists of.

JAX records with each operation the names of the modules that it belongs to. A function's operations are carried out again one
after the other, inside one compiled program, and every array that leaves the module that made it is tested: for the output of a
layer there is one flag, for that of a scanned layer one per turn. What a layer makes and uses by itself is not looked at, so
that a mask's -inf is nobody's fault. Of a gradient the backward pass comes in the order in which it runs. What lies inside a cond
or a while counts as one operation.
"""
import dataclasses
import re
from typing import Any, Callable, List, Optional, Sequence, Tuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.types import Array, PyTree

CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
REMAT = ("checkpoint", "remat2", "remat")
_WRAPPERS = re.compile(r"\b(?:transpose|jvp|vmap)\(|\)")


@dataclasses.dataclass(frozen=True)
class Place:
    """What is tested: outputs of the module `scope`, () where they are made outside of all; `reader`: one that takes them.

    backward: in the backward pass. loops: after how many names of `scope` each surrounding scan begins.
    """
    scope: Tuple[str, ...]
    reader: Tuple[str, ...]
    backward: bool
    loops: Tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Turns:
    """The places in the body of a scan; their flags have a leading axis."""
    reverse: bool
    places: Sequence[Any]


def watch(fn: Callable) -> Tuple[Callable, List[Any]]:
    """(watched, places): watched(*args) is (fn(*args), flags), flags true where values are finite, laid out like `places`, which
    is filled when `watched` is traced. See `first_bad`."""
    places = []

    def watched(*args: PyTree) -> Tuple[PyTree, List[Any]]:
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        out, flags, places[:] = _evaluate(closed, jax.tree.leaves(args), "", (), None)
        return jax.tree.unflatten(jax.tree.structure(shape), out), flags

    return watched, places


def first_bad(places: Sequence[Any], flags: Sequence[Any], turn: Tuple[int, ...] = ()) -> Optional[Tuple[Place, Tuple[int, ...]]]:
    """The first place, in the order of computation, whose flag is false, and the turn of each scan around it; None if all are true."""
    for place, flag in zip(places, flags):
        if isinstance(place, Place):
            if not np.asarray(flag)[turn]:
                return place, turn
            continue
        rows = jax.tree.leaves(flag)
        turns = range(rows[0].shape[len(turn)]) if rows else ()
        for i in reversed(turns) if place.reverse else turns:
            found = first_bad(place.places, flag, (*turn, i))
            if found:
                return found
    return None


def described(place: Place, turn: Tuple[int, ...]) -> str:
    """A place in words: "the output of DiT/blocks/07/mlp_out"."""
    def path(scope):
        names = list(scope)
        for i, start in sorted(zip(turn, place.loops), key=lambda pair: -pair[1]):
            if len(names) >= start:
                names.insert(min(start + 1, len(names)), f"{i:02d}")
        return "/".join(names)

    if place.backward:
        if place.scope:
            return f"the gradient in {path(place.scope)}"
        return f"the gradient that enters {path(place.reader)}" if place.reader else "the gradient outside of all layers"
    if place.scope:
        return f"the output of {path(place.scope)}"
    return f"the input of {path(place.reader)}" if place.reader else "the loss, after the last layer"


def _scope(raw: str) -> Tuple[str, ...]:
    """The modules' names in a recorded name, without those of JAX's own transformations and of the modules' methods (Module.method)."""
    names = []
    for part in raw.split("/"):
        name = _WRAPPERS.sub("", part)
        if name and name != part:
            names = []  # the outermost module, named again where the backward pass computes something again
        if name and name.split(".")[0] not in (names if "." in name else ()) and name not in ("rematted_computation", "checkpoint"):
            names.append(name)
    return tuple(names)


@dataclasses.dataclass(eq=False)
class _Value:
    """An array of a jaxpr whose calls are written out. source: what it is a copy of, itself where it is none; readers: scopes."""
    aval: Any
    source: Any = None
    readers: List[Optional[Tuple[str, ...]]] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.source = self if self.source is None else self.source.source


@dataclasses.dataclass(frozen=True)
class _Constant:
    value: Any


def _written_out(closed: Any, given: Sequence[Any], outer: str, operations: List[Any]) -> List[Any]:
    """Append the operations of a jaxpr to `operations`, (its equation or None for a barrier, name, inputs, outputs), those of functions
    that it calls in their place; returns its outputs. given: its inputs."""
    jaxpr = getattr(closed, "jaxpr", closed)
    known = {v: _Constant(value) for v, value in zip(jaxpr.constvars, getattr(closed, "consts", ()))}
    known.update(zip(jaxpr.invars, given, strict=True))
    read = lambda v: _Constant(v.val) if hasattr(v, "val") else known[v]
    for eqn in jaxpr.eqns:
        name, kind, ins = f"{outer}/{eqn.source_info.name_stack}", eqn.primitive.name, [read(v) for v in eqn.invars]
        called = next((eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params), None)
        if called is not None and kind in CALLS + REMAT:
            if kind in REMAT:  # what is computed again is not to be kept instead
                copies = [_Value(a.aval, a) if isinstance(a, _Value) else a for a in ins]
                operations.append((None, name, *([a for a in some if isinstance(a, _Value)] for some in (ins, copies))))
                ins = copies
            outs = _written_out(called, ins, name, operations)
        else:
            outs = [_Value(v.aval) for v in eqn.outvars]
            operations.append((eqn, name, ins, outs))
        known.update(zip(eqn.outvars, outs))
    return [read(v) for v in jaxpr.outvars]


def _evaluate(closed: Any, values: Sequence[Any], outer: str, loops: Tuple[int, ...], ends: Optional[int]):
    """(outputs, flags, places) of a jaxpr at `values`, inside a trace. ends: how many of its outputs are tested as such, None: all."""
    given, operations = [_Value(v.aval) for v in getattr(closed, "jaxpr", closed).invars], []
    results = _written_out(closed, given, outer, operations)
    known, last, flags, places = dict(zip(given, values)), {}, [], []
    for i, (eqn, name, ins, _) in enumerate(operations):
        for a in ins:
            if isinstance(a, _Value):
                last[a] = i
                if eqn is not None:
                    a.source.readers.append(_scope(name))
    for a in results[:ends]:
        if isinstance(a, _Value):
            a.source.readers.append(None)  # who takes it is not known
    kept = set(a for a in results if isinstance(a, _Value))
    read = lambda a: known[a] if isinstance(a, _Value) else a.value
    for i, (eqn, name, ins, outs) in enumerate(operations):
        scope, arguments = _scope(name), [read(a) for a in ins]
        if eqn is None:
            out = jax.lax.optimization_barrier(arguments)
        elif eqn.primitive.name == "scan":
            out, inner, turns = _scan(eqn, arguments, name, loops)
            flags.append(inner)
            places.append(turns)
        else:
            out = eqn.primitive.bind(*arguments, **eqn.primitive.get_bind_params(eqn.params))
            out = out if eqn.primitive.multiple_results else [out]
        for a, value in zip(outs, out):
            known[a] = value
            strangers = [reader for reader in a.readers if reader != scope]
            if strangers and jnp.issubdtype(a.aval.dtype, jnp.inexact):
                flags.append(jnp.all(jnp.isfinite(value)))
                places.append(Place(scope, strangers[0] or (), "transpose(" in name, loops))
        for a in ins:
            if isinstance(a, _Value) and last[a] == i and a not in kept:
                known.pop(a, None)
    return [read(a) for a in results], flags, places


def _scan(eqn: Any, values: List[Any], name: str, loops: Tuple[int, ...]):
    """(outputs, flags, places) of a scan."""
    body_of, length, reverse = (eqn.params[key] for key in ("jaxpr", "length", "reverse"))
    body, rank = getattr(body_of, "jaxpr", body_of), lambda variables: [v.aval.ndim for v in variables]
    # what is scanned over, and what is stacked, has an axis more outside of the body
    scanned, stacked = (sum(np.subtract(rank(outside), rank(inside))) for outside, inside in (
        (eqn.invars, body.invars), (eqn.outvars, body.outvars)))
    carried = len(body.outvars) - stacked
    first, second = len(values) - scanned - carried, len(values) - scanned
    consts, carry, xs, places = values[:first], values[first:second], values[second:], []
    ends = None if "transpose(" in name else carried  # what a turn keeps for the backward pass is its own affair

    def turn(carry, x):
        out, flags, places[:] = _evaluate(body_of, [*consts, *carry, *x], name, (*loops, len(_scope(name))), ends)
        return out[:carried], (out[carried:], flags)

    carry, (ys, flags) = jax.lax.scan(turn, list(carry), list(xs), length=length, reverse=reverse)
    return [*carry, *ys], flags, Turns(reverse, places)
