"""LoRA (Hu et al. 2022, "LoRA: low-rank adaptation of large language models", section 4.1): what training adds to a kernel W has
rank r at most,

    W' = W + scale A B,   scale = alpha / r

A starts as noise and B at zero, so that nothing is changed at first. Adapters of a net are a nested dict like its parameters that
has {"A": a, "B": b} in the place of each kernel that is adapted, and nothing in the place of what is not:

    kernel [in, out]             A [in, r],           B [r, out]
    kernel [kh, kw, in, out]     A [kh, kw, in, r],   B [r, out]       a convolution to r channels, then a pointwise one
    with a leading axis of layers, as a scan over blocks has it: A and B have it too.
"""
import math
import re
from typing import Any, Dict, Mapping, NamedTuple, Sequence

import jax
import jax.numpy as jnp

from ldm_jax.types import Array, PyTree, UserError

ATTENTION = (r"(^|/)(q|k|v|out)/kernel$",)  # targets: the matrices of every attention
PRODUCTS = {2: "ir,ro->io", 3: "lir,lro->lio", 4: "hwir,ro->hwio", 5: "lhwir,lro->lhwio"}  # by the axes of a kernel
STACKED = (3, 5)  # axes of a kernel with a leading one of layers


class Lora(NamedTuple):
    """The adapters of several nets.

    Attributes:
      adapters: name of the net's parameters -> its adapters.
      scale: alpha / r, a number for all, or name -> path of a kernel, "down_0/conv/kernel" -> a number or one for each layer [L].
    """
    adapters: Mapping[str, PyTree]
    scale: Any = 1.0


def kernels(params: PyTree, targets: Sequence[str] = ATTENTION) -> Dict[str, Any]:
    """path -> kernel, of those that the regular expressions `targets` find, in the order of the paths.

    Raises:
      UserError: for no targets at all, and for one that finds none or is no regular expression.
    """
    if not targets:
        raise UserError("LoRA needs at least one target, a regular expression over the paths of kernels")
    flat = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    all_of = {path: leaf for path, leaf in sorted(flat.items()) if path.endswith("kernel") and leaf.ndim in PRODUCTS}
    wanted = set()
    for target in targets:
        try:
            mine = {path for path in all_of if re.search(target, path)}
        except re.error as e:
            raise UserError(f"target {target!r} of LoRA is no regular expression: {e}") from None
        if not mine:
            raise UserError(f"target {target!r} of LoRA finds none of the net's {len(all_of)} kernels, such as "
                            f"{', '.join(list(all_of)[:3])}")
        wanted |= mine
    return {path: leaf for path, leaf in all_of.items() if path in wanted}


def init(key: Array, params: PyTree, targets: Sequence[str] = ATTENTION, rank: int = 4) -> PyTree:
    """Fresh adapters, float32: A ~ N(0, 1 / r^2), B = 0.

    Args:
      params: of the net, or their shapes.
      targets: regular expressions over paths such as "down_0_attention_0/block_0/cross_attention/q/kernel".

    Raises:
      UserError: for a rank below 1, and as `kernels` does.
    """
    if rank < 1:
        raise UserError(f"rank={rank} of LoRA must be at least 1")
    found = kernels(params, targets)
    sizes = [math.prod(kernel.shape[:-1]) * rank for kernel in found.values()]
    ends = [sum(sizes[:i + 1]) for i in range(len(sizes))]
    noise = jnp.split(jax.random.normal(key, (ends[-1],), jnp.float32) / rank, ends[:-1])  # one draw, see `init.initialise`
    tree = {}
    for (path, kernel), A in zip(found.items(), noise):
        lead = kernel.shape[:1] if kernel.ndim in STACKED else ()
        place = tree
        for name in path.split("/"):
            place = place.setdefault(name, {})
        place.update(A=A.reshape(*kernel.shape[:-1], rank), B=jnp.zeros((*lead, rank, kernel.shape[-1]), jnp.float32))
    return tree


def merge(params: PyTree, adapters: PyTree, scale: Any = 1.0) -> PyTree:
    """`params` with W + scale A B in the place of each adapted W, computed in float32 and given W's dtype.

    Args:
      scale: a number, or path -> a number or one for each layer [L].

    Raises:
      UserError: for adapters of another net.
    """
    return _merge(params, adapters, scale, "")


def merge_all(params: Mapping[str, PyTree], lora: Lora, strength: Any = 1.0) -> Mapping[str, PyTree]:
    """The parameters of several nets by name, each with its adapters' part times `strength` in it.

    Raises:
      UserError: for adapters of other nets.
    """
    missing = sorted(set(lora.adapters) - set(params))
    if missing:
        raise UserError(f"there are adapters of {missing[0]!r} and no net of that name; there are: {', '.join(sorted(params))}")
    changed = {}
    for name, adapters in lora.adapters.items():
        scale = lora.scale[name] if isinstance(lora.scale, Mapping) else lora.scale
        changed[name] = merge(params[name], adapters, jax.tree.map(lambda s: s * strength, scale))
    return {**params, **changed}


def _merge(params, adapters, scale, path):
    if not isinstance(params, Mapping):
        W, A, B = params, adapters["A"], adapters["B"]
        s = jnp.asarray(scale[path] if isinstance(scale, Mapping) else scale, jnp.float32)
        if W.shape != (*A.shape[:-1], B.shape[-1]) or A.shape[-1] != B.shape[-2] or B.ndim != 2 + (W.ndim in STACKED):
            raise UserError(f"{path!r} has the shape {W.shape}, which adapters A {A.shape} and B {B.shape} do not fit; they are "
                            f"of another net")
        product = jnp.einsum(PRODUCTS[W.ndim], A.astype(jnp.float32), B.astype(jnp.float32), precision="highest")
        return (W.astype(jnp.float32) + s.reshape(s.shape + (1,) * (W.ndim - s.ndim)) * product).astype(W.dtype)
    if set(adapters) - set(params):
        missing = min(set(adapters) - set(params))
        raise UserError(f"there is no {f'{path}/{missing}'.lstrip('/')!r} in this net; the adapters are of another one")
    return {name: _merge(child, adapters[name], scale, f"{path}/{name}" if path else name) if name in adapters else child
            for name, child in params.items()}
