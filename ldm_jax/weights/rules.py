"""Rules between published arrays and parameters of ours, each used in both directions.

A rule says which published array is which parameter and how its axes lie:

    published   the names in a file, "conv_in.weight"; convolutions are [out, in, H, W], matrices [out, in] as torch has them
    ours        the path in a nested dict, "conv_in/kernel"; convolutions are [H, W, in, out], matrices [in, out]

A layout is a list of rules that names every array and every parameter exactly once. `load` and `save` follow it; whatever it
does not name, or names and does not find, is an error: nothing is loaded by guess.
"""
import dataclasses
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import jax
import ml_dtypes
import numpy as np

from ldm_jax.types import PyTree, UserError

SHOWN = 6  # names of a kind that an error lists before it counts the rest
FLOATS = tuple(np.dtype(d) for d in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))


class Transform(NamedTuple):
    """How a published array becomes ours and the reverse; both are views where numpy can make them."""
    into: Callable[[np.ndarray], np.ndarray]
    out_of: Callable[[np.ndarray], np.ndarray]


def _matrix(a: np.ndarray) -> np.ndarray:
    """[out, in], also where it was published as the 1x1 convolution [out, in, 1, 1], to [in, out]."""
    if a.ndim == 4 and a.shape[2:] == (1, 1):
        a = a[:, :, 0, 0]
    if a.ndim != 2:
        raise ValueError("not a matrix")
    return a.T


def patches(p: int) -> Transform:
    """The convolution [out, in, p, p] that steps by p, as a matrix [p p in, out] of patches whose channels lie last."""
    return Transform(lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),
                     lambda a: a.reshape(p, p, -1, a.shape[1]).transpose(3, 2, 0, 1))


SAME = Transform(lambda a: a, lambda a: a)
LINEAR = Transform(_matrix, lambda a: a.T)
POINTWISE = Transform(_matrix, lambda a: a.T[:, :, None, None])
CONV = Transform(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))


@dataclasses.dataclass(frozen=True)
class Rule:
    """One published array, or a numbered series of them, and the parameter that it is.

    Attributes:
      published: the name; with `layers` or `copies` it holds "{}" in the place of the number.
      ours: the path; several paths where one published array is several parameters one after the other along its first axis.
      transform: of each.
      layers: the published arrays 0..layers-1 are the slices of one parameter along a leading axis, as a scan over blocks has it.
      copies: the published arrays 0..copies-1 are equal, and one parameter.
      parts: (array -> its parts, parts -> array) where `ours` has several paths that do not lie one after the other.
    """
    published: str
    ours: Union[str, Tuple[str, ...]]
    transform: Transform = SAME
    layers: int = 0
    copies: int = 0
    parts: Optional[Transform] = None

    @property
    def names(self) -> List[str]:
        number = self.layers or self.copies
        return [self.published.format(i) for i in range(number)] if number else [self.published]

    @property
    def paths(self) -> Tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else tuple(self.ours)

    def split(self, array: np.ndarray) -> List[np.ndarray]:
        """One published array as parameters, a leading axis of layers aside."""
        n = len(self.paths)
        if self.parts:
            array = self.parts.into(array)
        elif n > 1:
            array = np.split(array, n)
        return [self.transform.into(a) for a in array] if n > 1 else [self.transform.into(array)]

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of `split`."""
        arrays = [self.transform.out_of(a) for a in arrays]
        if self.parts:
            return self.parts.out_of(arrays)
        return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]


def linear(published: str, ours: str, bias: bool = True, **options: Any) -> List[Rule]:
    """The rules of a matrix and its bias."""
    return _layer(published, ours, LINEAR, bias, **options)


def pointwise(published: str, ours: str, bias: bool = True, **options: Any) -> List[Rule]:
    """The rules of a matrix that is published as a 1x1 convolution."""
    return _layer(published, ours, POINTWISE, bias, **options)


def conv(published: str, ours: str, bias: bool = True, **options: Any) -> List[Rule]:
    """The rules of a convolution and its bias."""
    return _layer(published, ours, CONV, bias, **options)


def norm(published: str, ours: str, **options: Any) -> List[Rule]:
    """The rules of a norm's scale and bias."""
    return [Rule(f"{published}.weight", f"{ours}/scale", **options), Rule(f"{published}.bias", f"{ours}/bias", **options)]


def table(published: str, ours: str, **options: Any) -> List[Rule]:
    """The rule of a table of embeddings."""
    return [Rule(f"{published}.weight", f"{ours}/embedding", **options)]


def _layer(published, ours, transform, bias, **options):
    rules = [Rule(f"{published}.weight", f"{ours}/kernel", transform, **options)]
    return rules + [Rule(f"{published}.bias", f"{ours}/bias", **options)] if bias else rules


def flatten(tree: PyTree, prefix: str = "") -> Dict[str, Any]:
    """A nested dict as {"a/b": leaf}."""
    flat = {}
    for name, child in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        flat.update(flatten(child, path) if isinstance(child, Mapping) else {path: child})
    return flat


def unflatten(flat: Mapping[str, Any]) -> PyTree:
    """The inverse of `flatten`."""
    tree = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        place = tree
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = leaf
    return tree


def blank(shape: Sequence[int]) -> np.ndarray:
    """An array of that shape that takes no memory, for finding out what a transform does to a shape."""
    return np.broadcast_to(np.zeros((), np.bool_), tuple(shape))


def load(rules: Iterable[Rule], arrays: Mapping[str, Any], shapes: PyTree, *, dtype: Any = np.float32,
         place: Optional[Callable[[str, Tuple[int, ...], Any], Any]] = None, what: str = "these weights") -> PyTree:
    """Published arrays as parameters. Everything is checked before anything is read; then one array is read at a time.

    Args:
      rules: of the layout.
      arrays: name -> array, or anything with `shape` and `dtype` that numpy.asarray reads.
      shapes: the parameters' tree of shapes, as jax.eval_shape(net.init, key) gives it.
      dtype: of the parameters.
      place: (path, shape, dtype) -> a Sharding: each array goes straight to its devices, piece by piece.
      what: the name of the weights in errors.

    Raises:
      UserError: for names that are missing or left over, shapes that differ, and arrays that do not hold floating-point numbers;
        one error lists them all, the first few of each kind by name.
    """
    rules, want, dtype = list(rules), flatten(shapes), np.dtype(dtype)
    check(rules, arrays, want, what)
    flat = {}
    for rule in rules:
        read_here = not any(isinstance(arrays[name], np.ndarray) for name in rule.names)  # so that nobody else can change them
        for path, value in zip(rule.paths, _read(rule, arrays, want, dtype, what)):
            if place is None:
                flat[path] = jax.device_put(value, may_alias=read_here)
            else:
                sharding = place(path, value.shape, dtype)
                flat[path] = jax.make_array_from_callback(value.shape, sharding, lambda index, value=value: value[index])
    return unflatten({path: flat[path] for path in want})


def _read(rule: Rule, arrays, want, dtype, what) -> List[np.ndarray]:
    """The parameters of a rule, contiguous and of the dtype asked for."""
    if rule.layers:
        stacks = [np.empty(want[path].shape, dtype) for path in rule.paths]
        for i, name in enumerate(rule.names):
            for stack, part in zip(stacks, rule.split(np.asarray(arrays[name]))):
                stack[i] = part
        return stacks
    first = np.asarray(arrays[rule.names[0]])
    for name in rule.names[1:]:
        if not np.array_equal(first, np.asarray(arrays[name]), equal_nan=True):
            raise UserError(f"{what} have a {name!r} that differs from {rule.names[0]!r}; this net has one for both, so it "
                            f"cannot hold them")
    return [np.ascontiguousarray(part, dtype) for part in rule.split(first)]


def check(rules: List[Rule], arrays: Mapping[str, Any], want: Mapping[str, Any], what: str = "these weights") -> None:
    """Raises UserError unless the rules name every array and every parameter once, and all of them fit; nothing is read.

    want: path -> anything with a shape, as `flatten` gives it.
    """
    names = [name for rule in rules for name in rule.names]
    missing = [name for name in names if name not in arrays]
    left = sorted(set(arrays) - set(names))
    unruled = sorted(set(want) ^ {path for rule in rules for path in rule.paths})
    shapes, dtypes = [], []
    for rule in rules:
        if not all(path in want for path in rule.paths):
            continue
        ours = [want[path].shape[1:] if rule.layers else want[path].shape for path in rule.paths]
        for name in rule.names:
            if name not in arrays:
                continue
            array = arrays[name]
            try:
                fits = [part.shape for part in rule.split(blank(array.shape))] == [tuple(shape) for shape in ours]
            except ValueError:
                fits = False
            if not fits:
                expected = rule.join([blank(shape) for shape in ours]).shape
                shapes.append(f"{name} {tuple(array.shape)} instead of {expected}")
            if np.dtype(array.dtype) not in FLOATS:
                dtypes.append(f"{name} {array.dtype}")
    problems = [f"{listed(found)} {words}" for found, words in (
        (missing, "missing"), (left, "left over"), (shapes, "of another shape"), (dtypes, "not of floating-point numbers"),
        (unruled, "of ours without a rule")) if found]
    if problems:
        raise UserError(f"{what} do not fit their config: {'; '.join(problems)}. Give the config and the weights of one model")


def listed(names: Sequence[str]) -> str:
    """How many names there are, and the first few of them, for errors."""
    rest = len(names) - SHOWN
    return f"{len(names)} ({', '.join(names[:SHOWN])}{f', and {rest} more' if rest > 0 else ''})"


def save(rules: Iterable[Rule], params: PyTree) -> Dict[str, np.ndarray]:
    """Parameters as published arrays, in their own dtype; views of the parameters where numpy can make them.

    Raises:
      UserError: for a parameter without a rule or a rule without its parameter.
    """
    rules, flat = list(rules), flatten(params)
    paths = {path for rule in rules for path in rule.paths}
    if paths != set(flat):
        raise UserError(f"these parameters do not fit the layout: {listed(sorted(paths ^ set(flat)))} in only one of them")
    arrays = {}
    for rule in rules:
        values = [np.asarray(flat[path]) for path in rule.paths]
        for i, name in enumerate(rule.names):
            arrays[name] = rule.join([value[i] if rule.layers else value for value in values])
    return arrays
