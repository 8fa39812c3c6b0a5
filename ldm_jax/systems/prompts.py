"""The conditioner of texts: prompts through text towers, whose parameters are the system's by the towers' names."""
import functools
import warnings
from typing import Any, Callable, Mapping, Optional, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.systems.conditions import Conditioner
from ldm_jax.types import Array, PyTree, UserError

DROP = 0.1  # of published text-to-image models


def prompt(towers: Mapping[str, Any], tokenizers: Mapping[str, Callable], params: Mapping[str, PyTree], *,
           needs: Mapping[str, int], penultimate: bool = False, time_ids: Optional[Sequence[float]] = None,
           negative_time_ids: Optional[Sequence[float]] = None, zero_null: bool = False) -> Conditioner:
    """Texts as context [B, S, D] for cross-attention, D of all towers together.

    A value is {"prompt": {tower: ids [B, S]}}, and "negative" likewise, the texts that guidance steers away from; a user gives a
    text, a list of texts, or {"prompt": texts, "negative": texts}, where tokens may stand for texts. Null, and the negative where
    none is given: the empty text.

    Args:
      towers: name -> tower, see `ldm_jax.models.clip.TextTower`. tokenizers: name -> (texts) -> (ids, mask, cut).
      params: name -> the parameters of that tower, with which the empty text is encoded.
      needs: what the net is built with for it.
      penultimate: the states before the last block are the context, otherwise those after the last norm.
      time_ids: numbers that go beside the last tower's projected output as the vector; None for no vector. negative_time_ids: those
        of null and of the negative, where they are others.
      zero_null: null is zeros instead.
    """
    def places(params, ids, numbers=time_ids):
        outputs = {name: tower.apply(params[name], ids[name], hidden=penultimate) for name, tower in towers.items()}
        found = {"context": jnp.concatenate([o.hidden[-2] if penultimate else o.last for o in outputs.values()], -1)}
        if numbers is not None:
            found["vector"] = list(outputs.values())[-1].projected
            found["time_ids"] = jnp.broadcast_to(jnp.asarray(numbers, jnp.float32), (len(found["vector"]), len(numbers)))
        return found

    against = functools.partial(places, numbers=negative_time_ids or time_ids)

    def tokens(texts: Any, warn: bool = True) -> Mapping[str, np.ndarray]:
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"cond={str(texts)[:60]!r}: this model takes prompts, a str or a list of them")
        ids = {}
        for name, tokenize in tokenizers.items():
            found = tokenize(list(texts))
            for text, cut in zip(texts, found.cut):
                if cut and warn:
                    warnings.warn(f"a prompt is too long for this model; it does not see {cut!r}")
            ids[name] = np.asarray(found.ids, np.int32)
        return ids

    def read(value):
        given = value if isinstance(value, Mapping) else {"prompt": value}
        if "prompt" not in given or set(given) - {"prompt", "negative"}:
            raise UserError(f"cond has the parts {', '.join(sorted(map(str, given)))}; give texts, or "
                            f'{{"prompt": texts, "negative": texts}}')
        parts = {part: texts if isinstance(texts, Mapping) else tokens(texts) for part, texts in given.items() if texts is not None}
        n = max(len(ids) for of in parts.values() for ids in of.values())
        if any(len(ids) not in (1, n) for of in parts.values() for ids in of.values()):
            raise UserError("as many negative prompts as prompts must be given, or one for all")
        return {part: {name: np.broadcast_to(ids, (n, ids.shape[1])) for name, ids in of.items()} for part, of in parts.items()}

    empty = jax.jit(against)(params, tokens(""))
    if zero_null:
        empty = {place: a if place == "time_ids" else jnp.zeros_like(a) for place, a in empty.items()}

    def null(n: int) -> Mapping[str, Array]:
        return {place: jnp.broadcast_to(a, (n, *a.shape[1:])) for place, a in empty.items()}

    def opposite(params, value, keys, codec):
        return against(params, value["negative"]) if "negative" in value else null(len(keys))

    def draw(batch, keys):
        return {"prompt": {name: batch[f"prompt_{name}"] for name in towers}}

    return Conditioner(needs=needs, fields=tuple(f"prompt_{name}" for name in towers), draw=draw, read=read, null=null, drop=DROP,
                       encode=lambda params, value, keys, codec: places(params, value["prompt"]), opposite=opposite,
                       tokens=lambda texts: {f"prompt_{name}": ids for name, ids in tokens(list(texts), warn=False).items()})
