"""What a user says to `Pipeline.sample`, checked and turned into arrays and into words that are compiled in."""
import inspect
from numbers import Real
from typing import Any, Dict, Mapping, Optional, Tuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import process
from ldm_jax.systems import System
from ldm_jax.systems.conditioners import class_label, read_masks, read_pictures
from ldm_jax.systems.conditions import Space
from ldm_jax.types import Array, PyTree, UserError, lookup


def pictures(system: System, image: Any, mask: Any, strength: Optional[float], usual: float,
             window: Tuple[float, float]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """(conditions among the pictures, by name; how the start and the steps are changed). usual: the strength where none is said."""
    known, shape, (begin, end) = system.conditioners, system.image_shape, window
    if not 0 <= begin < end <= 1:
        raise UserError(f"window={window} must be two numbers, 0 <= begin < end <= 1")
    edit = {"image": None, "known": None, "strength": np.float32(1.0), "begun": begin > 0, "decoded": end == 1,
            "window": None if (begin, end) == (0, 1) else (np.float32(begin), np.float32(end))}
    if image is None:
        if mask is not None or strength is not None:
            raise UserError("mask and strength say what becomes of a picture; give it as image=...")
        return {}, edit
    if "low_resolution" in known:
        if mask is not None or strength is not None:
            raise UserError("this model enlarges pictures, all of each; leave mask and strength out")
        return {"low_resolution": image}, edit
    if begin > 0:
        raise UserError(f"window={window} begins with x_init, beside which there is no place for image; leave one of them out")
    if strength is None:
        strength = usual if mask is None else 1.0
    if not 0 < strength <= 1:
        raise UserError(f"strength={strength} must be in (0, 1]: the part of the steps that is made")
    read = read_pictures(image, shape) * 2.0 - 1.0
    edit["strength"] = np.float32(strength)
    if mask is None or strength < 1:
        edit["image"] = read
    if mask is not None and "masked_image" in known:
        return {"masked_image": {"image": image, "mask": mask}}, edit
    if mask is not None:
        edit["known"] = (read, 1.0 - read_masks(mask, shape[:2]))
    return {}, edit


def conditions(system: System, cond: Any, given: Mapping[str, Any],
               classifier: Optional[System]) -> Tuple[Dict[str, PyTree], Optional[Array]]:
    """(conditioner's name -> value, class ids for the classifier or None), each array of one picture or of all.

    given: those that are named already.
    """
    known = system.conditioners
    names, rest = ", ".join(known), [name for name in known if name not in given]
    by_name = isinstance(cond, Mapping) and (len(rest) != 1 or set(cond) <= {*known, "class"})
    if by_name:
        given = {**given, **{name: value for name, value in cond.items() if value is not None}}
    elif cond is not None and len(rest) > 1:
        raise UserError(f"this model takes several conditions, {names}; give cond as a mapping from those names")
    elif cond is not None:
        given = {**given, rest[0] if rest else "class": cond}
    label = next((name for name, c in known.items() if "num_classes" in c.needs), None)
    of_classifier = classifier is not None and label is None and "class" in given
    extra = sorted(set(given) - set(known) - ({"class"} if of_classifier else set()))
    if extra:
        raise UserError(f"this model has no condition {extra[0]!r}; it takes: {names}" if known else
                        "this model takes no condition; leave cond out")
    missing = [name for name, c in known.items() if not c.drop and name not in given]
    if missing:
        raise UserError(f"this model needs the condition {missing[0]!r}, which its training never dropped (drop=0); give it in cond")
    values = {name: known[name].read(value) for name, value in given.items() if name in known}
    if classifier is None:
        return values, None
    _check_classifier(system, classifier)
    if of_classifier:
        space = Space(system.image_shape, system.sample_shape, classifier.num_classes)
        return values, class_label(space).read(given["class"])
    return values, values.get(label)


def _check_classifier(system: System, other: System) -> None:
    if other.classify is None:
        raise UserError("the run given as classifier is none; train one with config.system='classifier'")
    ours, theirs = system.sample_shape, tuple(other.sample_shape or other.image_shape)
    if ours != theirs:
        raise UserError(f"the classifier sees x_t of shape {theirs}, this model diffuses {ours}; train a classifier in that space")
    if system.num_classes not in (None, other.num_classes):
        raise UserError(f"the classifier knows {other.num_classes} classes, this model {system.num_classes}; train one on "
                        f"the same data")


def guidance_scales(system: System, guidance: Any, usual: float, cond: Mapping[str, Any], num: int) -> Optional[np.ndarray]:
    """float32 [num], `usual` where guidance is None.

    None where no condition that training has dropped is given, so that there is nothing to guide with.
    """
    droppable = [name for name, c in system.conditioners.items() if c.drop]
    scale = scales("guidance", usual if guidance is None else guidance, num)
    if guidance is not None and cond and not droppable and np.any(scale != 1.0):
        raise UserError(f"guidance={guidance} needs a condition that training has dropped; this model's have drop=0: "
                        f"{', '.join(cond)}")
    return scale if set(droppable) & set(cond) else None


def split_options(sampler: str, options: Mapping[str, Any], num: int) -> Tuple[dict, dict]:
    """(static, numbers) of a sampler, numbers that are not given included, so that to give them later is no other program."""
    known = inspect.signature(lookup(process.SAMPLERS, sampler, "sampler")).parameters
    usual = {name: p.default for name, p in known.items() if isinstance(p.default, float) and p.annotation is p.empty}
    static, numbers = process.samplers.split_options(sampler, {**usual, **options})
    numbers = {name: np.asarray(value) for name, value in numbers.items()}
    for name, value in numbers.items():
        if value.shape not in ((), (num,)):
            raise UserError(f"{name} has shape {value.shape} for num={num} pictures; give one number, or one each")
    return static, numbers


def interval_of(interval: Any) -> Optional[Tuple[np.float32, np.float32]]:
    """(low, high) of sigma / alpha, or None."""
    if interval is None:
        return None
    if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
        raise UserError(f"guidance_interval={interval} must be two numbers of sigma / alpha, 0 <= low < high")
    low, high = interval
    return np.float32(low), np.float32(high)


def start_of(x_init: Any, shape: Tuple[int, ...]) -> Optional[np.ndarray]:
    """float32 `shape`, or None."""
    if x_init is None:
        return None
    x_init = np.asarray(x_init, np.float32)
    if x_init.shape != shape:
        raise UserError(f"x_init has shape {x_init.shape}; this model starts from {shape}")
    return x_init


def scales(name: str, value: Any, num: int) -> np.ndarray:
    """float32 [num] from one number, or one for each picture."""
    scale = np.asarray(value, np.float32)
    if scale.shape not in ((), (1,), (num,)):
        raise UserError(f"{name} has shape {scale.shape} for num={num} pictures; give one number, or one each")
    return np.broadcast_to(scale, (num,))


def for_each(values: Any, num: int) -> Any:
    """Arrays of one example or of `num`, as those of `num`."""
    def broadcast(a):
        if len(a) not in (1, num):
            raise UserError(f"cond has shape {a.shape} for num={num} pictures; give one for each, or one for all")
        return np.broadcast_to(np.asarray(a), (num, *a.shape[1:]))

    return jax.tree.map(broadcast, values)


def positive(name: str, value: Any) -> int:
    """The value, a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or int(value) != value or value < 1:
        raise UserError(f"{name}={value!r} is not a positive whole number")
    return int(value)


def length(cond: Any, x_init: Any) -> int:
    """How many pictures the conditions, or else x_init, are of; 16 where they are of any number."""
    lengths = [len(a) for a in jax.tree.leaves(cond)]
    if max(lengths, default=1) == 1 and x_init is not None and np.ndim(x_init):
        return len(x_init)
    return max(lengths, default=16)


def typed_key(key: Any) -> Array:
    """A typed key from a typed key, an int seed, or the older uint32 [2] form."""
    if isinstance(key, (int, np.integer)):
        return jax.random.key(int(key))
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)
