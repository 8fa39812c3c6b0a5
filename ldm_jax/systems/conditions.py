"""What a condition is, how training drops it, and how any number of them together become what a net is given.

A conditioner's value is what a user gives and what a training example has: a label, a low-resolution picture and its noise level.
Encoded, it fills places of the net's `cond`. Where several fill one place they are joined: vectors and images ("vector",
"concat") along their channels, sequences ("context", "context_mask") along S. "class" has room for one.

A value is dropped in training with the rate `drop`, independently per example and per conditioner, and the net learns without it
(Ho & Salimans 2022). Guidance steers away from the net that has lost every conditioner with drop > 0 and kept the others.
"""
import dataclasses
from typing import Any, Callable, Mapping, Optional, Sequence, Tuple

import jax.numpy as jnp

from ldm_jax.types import Array, Cond, PyTree, UserError, expand, fold_in, uniform

_NEEDED = ("num_classes", "context_dim", "vector_dim", "concat_channels")  # how a net says which places it has
_AXIS = {"context": 1, "context_mask": 1, "vector": -1, "concat": -1}


@dataclasses.dataclass(frozen=True)
class Space:
    """What a conditioner is built for.

    Attributes:
      image_shape: (H, W, C) of the pictures.
      shape: (h, w, c) of x_t: of the latents in a latent system, otherwise the pictures'.
      num_classes: of the data, None where it has no classes.
      fields: name -> shape, what the data has beside image and class.
    """
    image_shape: Tuple[int, int, int]
    shape: Tuple[int, int, int]
    num_classes: Optional[int] = None
    fields: Mapping[str, Tuple[int, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Conditioner:
    """One condition. A value is an array with a leading axis of examples, or a dict of such arrays.

    Attributes:
      needs: what the net must be built with for it, such as {"vector_dim": 5}.
      fields: the names that `draw` takes out of a batch.
      draw: (batch, keys) -> the values of real examples.
      encode: (params, value, keys, codec) -> place -> array [B, ...] for the net.
      null: (n) -> the same for n examples without the condition; its S may be smaller, see `replace`.
      read: a user's value -> value, its leading axis 1 where it was given once for all pictures.
      drop: the rate at which training drops it.
      show: value -> pictures [B, H, W, C] in [0, 1] for people, where it can be looked at.
      tokens: texts -> the arrays of `fields`, where they are drawn from texts that the data has.
      opposite: like `encode`, what guidance steers away from, where a value says that itself; otherwise it is null.
    """
    needs: Mapping[str, int]
    fields: Tuple[str, ...]
    draw: Callable[[Mapping[str, Array], Array], PyTree]
    encode: Callable[[PyTree, PyTree, Array, Any], Mapping[str, Array]]
    null: Callable[[int], Mapping[str, Array]]
    read: Callable[[Any], PyTree]
    drop: float
    show: Optional[Callable[[PyTree], Array]] = None
    opposite: Optional[Callable[[PyTree, PyTree, Array, Any], Mapping[str, Array]]] = None
    tokens: Optional[Callable[[Sequence[str]], Mapping[str, Any]]] = None

    def __post_init__(self):
        if not 0.0 <= self.drop <= 1.0:
            raise UserError(f"drop={self.drop} of a conditioner must be a rate in 0..1")


def needs(conditioners: Mapping[str, Conditioner]) -> Mapping[str, int]:
    """What the net must be built with for all of them together.

    Raises:
      UserError: for two classes, or sequences of different widths.
    """
    total = {}
    for name, conditioner in conditioners.items():
        for key, size in conditioner.needs.items():
            if key == "num_classes" and key in total:
                raise UserError(f"conditioner {name!r} is a second class; a net has room for one")
            if key == "context_dim" and total.get(key, size) != size:
                raise UserError(f"conditioner {name!r} gives tokens of {size} numbers beside others of {total[key]}; make "
                                f"them equal")
            total[key] = size + (0 if key == "context_dim" else total.get(key, 0))
    return total


def check_net(net: Any, conditioners: Mapping[str, Conditioner]) -> None:
    """Raises UserError unless `net` was built for these conditioners and no others."""
    wanted = needs(conditioners)
    for key in _NEEDED:
        has, wants = getattr(net, key, None) or None, wanted.get(key)
        if has != wants:
            raise UserError(f"the net was built with {key}={has}; the conditioners {sorted(conditioners)} need {key}={wants}")


def replace(keep: Array, given: Mapping[str, Array], null: Mapping[str, Array]) -> Mapping[str, Array]:
    """`given` where `keep` [B] is true and `null` for the other examples; null's sequences are filled up with masked tokens."""
    def choose(a, b):
        b = jnp.pad(b, [(0, n - m) for n, m in zip(a.shape, b.shape)])
        return jnp.where(expand(keep, a), a, b)

    return {place: choose(a, null[place]) for place, a in given.items()}


def join(parts: Sequence[Mapping[str, Array]]) -> Cond:
    """What several conditioners say, as the one mapping that the net takes."""
    arrays = {}
    for part in parts:
        for place, a in part.items():
            arrays.setdefault(place, []).append(a)
    return {place: found[0] if len(found) == 1 else jnp.concatenate(found, _AXIS[place]) for place, found in arrays.items()}


def of_batch(conditioners: Mapping[str, Conditioner], params: PyTree, batch: Mapping[str, Array], keys: Array,
             codec: Any) -> Cond:
    """The net's conditions in training: drawn from the batch, encoded, dropped at their rates. keys: [B].

    Raises:
      UserError: for a conditioner that is drawn from what the batch lacks.
    """
    parts = []
    for i, (name, conditioner) in enumerate(conditioners.items()):
        missing = sorted(set(conditioner.fields) - set(batch))
        if missing:
            raise UserError(f"conditioner {name!r} is drawn from {missing[0]!r}, which the data lacks; it has {sorted(batch)}")
        own = fold_in(keys, i)
        given = conditioner.encode(params, conditioner.draw(batch, fold_in(own, 0)), fold_in(own, 1), codec)
        if conditioner.drop:
            given = replace(uniform(fold_in(own, 2), len(keys)) > conditioner.drop, given, conditioner.null(len(keys)))
        parts.append(given)
    return join(parts)


def of_values(conditioners: Mapping[str, Conditioner], params: PyTree, values: Mapping[str, PyTree], keys: Array,
              codec: Any) -> Tuple[Cond, Cond]:
    """(conditions, conditions without what guidance drops); a conditioner that has no value by its name is null. keys: [B]."""
    parts, without = [], []
    for i, (name, conditioner) in enumerate(conditioners.items()):
        null = conditioner.null(len(keys))
        given = conditioner.encode(params, values[name], fold_in(keys, i), codec) if name in values else null
        parts.append(given)
        if name in values and conditioner.opposite is not None:
            without.append(conditioner.opposite(params, values[name], fold_in(keys, i), codec))
        else:
            without.append(replace(jnp.zeros(len(keys), bool), given, null) if conditioner.drop else given)
    return join(parts), join(without)
