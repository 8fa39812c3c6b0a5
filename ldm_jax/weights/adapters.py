"""LoRA adapters of published modules (`lora` reads and writes them) and of parameters of ours, through a net's own rules.

    published   X.weight [out, in(, kh, kw)] + scale up down               up [out, r], down [r, in(, kh, kw)]
    ours        kernel [(layers,) (kh, kw,) in, out] + scale A B           A as the kernel, but r for out; B [(layers,) r, out]
"""
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np

from ldm_jax.types import PyTree, UserError
from ldm_jax.weights.lora import Pair
from ldm_jax.weights.rules import SAME, Rule, blank, flatten, listed, unflatten


class Module(NamedTuple):
    """A published module with a matrix or a convolution: its weight's rule, its number among that rule's, its weight's shape."""
    rule: Rule
    number: int
    shape: Tuple[int, ...]


def modules_of(rules: Iterable[Rule], params: PyTree) -> Dict[str, Module]:
    """name -> Module, of all modules that can have adapters."""
    want, found = flatten(params), {}
    for rule in rules:
        if rule.transform is SAME or not rule.published.endswith(".weight"):
            continue
        shapes = [want[path].shape[1:] if rule.layers else want[path].shape for path in rule.paths]
        shape = rule.join([blank(s) for s in shapes]).shape
        for i, name in enumerate(rule.names):
            found[name.removesuffix(".weight")] = Module(rule, i, tuple(shape))
    return found


def add(params: PyTree, pairs: Mapping[str, Pair], modules: Mapping[str, Module], strength: float = 1.0) -> PyTree:
    """`params` with strength scale up down added to each module of `pairs`, in float32; in their own dtypes and where they were.

    Raises:
      UserError: where one parameter of ours is several modules, which are not all changed alike.
    """
    flat = flatten(params)
    for rule, members in _by_rule(pairs, modules):
        if rule.copies:
            _check_copies(rule, members)
            members = members[:1]
        change = {path: np.zeros(flat[path].shape, np.float32) for path in rule.paths}
        for module, pair in members:
            up, down = (np.asarray(a, np.float32) for a in (pair.up, pair.down))
            delta = strength * pair.scale * (up.reshape(up.shape[:2]) @ down.reshape(len(down), -1))
            for path, part in zip(rule.paths, rule.split(delta.reshape(module.shape))):
                change[path][module.number if rule.layers else ...] = part
        for path in rule.paths:
            flat[path] = (flat[path].astype(np.float32) + change[path]).astype(flat[path].dtype)
    return unflatten(flat)


def _by_rule(pairs: Mapping[str, Pair], modules: Mapping[str, Module]) -> List[Tuple[Rule, List[Tuple[Module, Pair]]]]:
    """(rule, its modules with their pairs in their order)."""
    found = {}
    for name, pair in pairs.items():
        found.setdefault(modules[name].rule, []).append((modules[name], pair))
    return [(rule, sorted(members, key=lambda member: member[0].number)) for rule, members in found.items()]


def _check_copies(rule: Rule, members: Sequence[Tuple[Module, Pair]]) -> None:
    first = members[0][1]
    same = all(pair.scale == first.scale and np.array_equal(pair.up, first.up) and np.array_equal(pair.down, first.down)
               for _, pair in members)
    if len(members) != rule.copies or not same:
        raise UserError(f"the adapters change the {rule.copies} modules {rule.names[0].removesuffix('.weight')} and so on "
                        f"differently, and this net has one for all; build it with one for each (embedders='each')")


def to_ours(pairs: Mapping[str, Pair], modules: Mapping[str, Module]) -> Tuple[PyTree, Dict[str, Any]]:
    """(adapters, path -> scale) in the form of `ldm_jax.models.lora`, float32.

    Layers of different ranks are filled up with zeros, which training leaves alone, as it does layers without adapters; the scale
    of stacked layers is an array.

    Raises:
      UserError: for modules that are not one parameter of ours, or one layer of it.
    """
    flat, scales, wrong = {}, {}, []
    for rule, members in _by_rule(pairs, modules):
        if rule.copies or len(rule.paths) > 1:
            wrong += [name for name in pairs if modules[name].rule == rule]
            continue
        path, rank = rule.paths[0], max(pair.down.shape[0] for _, pair in members)
        As, Bs = [], []
        for module, pair in members:
            down, up = (np.asarray(a, np.float32) for a in (pair.down, pair.up))
            As.append(rule.transform.into(down.reshape(len(down), *module.shape[1:])))
            Bs.append(up.reshape(up.shape[:2]).T)
        if rule.layers:
            A, B = (np.zeros((rule.layers, *shape), np.float32) for shape in ((*As[0].shape[:-1], rank), (rank, Bs[0].shape[1])))
            scale = np.zeros(rule.layers)
            for (module, pair), a, b in zip(members, As, Bs):
                i, r = module.number, len(b)
                A[i, ..., :r], B[i, :r], scale[i] = a, b, pair.scale
        else:
            (A,), (B,), scale = As, Bs, members[0][1].scale
        flat[f"{path}/A"], flat[f"{path}/B"], scales[path] = np.ascontiguousarray(A), np.ascontiguousarray(B), scale
    if wrong:
        raise UserError(f"{listed(sorted(wrong))} of the adapted modules share a parameter with others here, so that their "
                        f"adapters cannot be kept apart from it; add them to the parameters instead")
    return unflatten(flat), scales


def to_published(adapters: PyTree, scale: Any, modules: Mapping[str, Module]) -> Dict[str, Pair]:
    """The inverse of `to_ours`. A layer's last components that are zero in both A and B are left out, and layers without any.

    Raises:
      UserError: for adapters of parameters that no published module has for itself.
    """
    flat, places = flatten(adapters), {}
    for name, module in modules.items():
        if len(module.rule.paths) == 1 and not module.rule.copies:
            places.setdefault(module.rule.paths[0], []).append((name, module))
    paths = sorted({path.rpartition("/")[0] for path in flat})
    wrong = [path for path in paths if path not in places]
    if wrong:
        raise UserError(f"{listed(wrong)} of the adapted parameters are no module of their own in published nets; adapt others "
                        f"(targets)")
    pairs = {}
    for path in paths:
        A, B = (np.asarray(flat[f"{path}/{x}"]) for x in "AB")
        s = scale[path] if isinstance(scale, Mapping) else scale
        for name, module in places[path]:
            if module.rule.layers:
                a, b, s_i = A[module.number], B[module.number], float(np.broadcast_to(s, module.rule.layers)[module.number])
                r = len(np.trim_zeros(np.abs(a).reshape(-1, a.shape[-1]).max(0) + np.abs(b).max(1), "b"))
                if not r:
                    continue
                a, b = a[..., :r], b[:r]
            else:
                a, b, s_i = A, B, float(s)
            down = module.rule.transform.out_of(a)
            pairs[name] = Pair(down, b.T.reshape(*b.T.shape, *(1,) * (down.ndim - 2)), s_i)
    return pairs
