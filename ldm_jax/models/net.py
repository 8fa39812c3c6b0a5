"""What the rest of the library sees of a denoising network: pure functions over a plain nested dict of parameters."""
import dataclasses
import functools
from typing import Any, Mapping, Optional, Tuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.models.init import initialise
from ldm_jax.models.kept import CONDITION, TIME
from ldm_jax.models.placing import applied
from ldm_jax.types import Array, Cond, PyTree, UserError


@dataclasses.dataclass(frozen=True)
class Net:
    """A denoising network; `module(x_t, time, cond, train)` is its Linen module, time in the module's own unit.

    Attributes:
      image_shape: (H, W, C) of x_t.
      out_channels: channels of the raw output; 2 C where a variance is learned.
      time_scale: what t in [0, 1] is multiplied by for the module; not used with `timesteps`.
      timesteps: T of a discrete process: the module is given k = round(t T) - 1 in 0..T-1.
      num_classes: takes cond["class"], ids [B] in 0..num_classes; the id num_classes is the null class.
      class_kind: "null" as above; "plain" for ids in 0..num_classes - 1, without a null class; "number" for any numbers [B], such
        as a level of noise, whatever num_classes says. The latter two must always be given.
      context_dim: takes cond["context"] [B, S, context_dim], and optionally cond["context_mask"], bool [B, S].
      vector_dim: takes cond["vector"] [B, vector_dim].
      concat_channels: takes cond["concat"] [B, H, W, concat_channels], or an x_t that has these channels behind its own.
      time_ids_dim: may instead take its vector in two pieces, cond["vector"] [B, T] and numbers cond["time_ids"] [B, n], whose
        embeddings of time_ids_dim channels each follow it: T + n time_ids_dim = vector_dim.
      time_cond_dim: may take cond["time_cond"] [B, time_cond_dim], added to the embedding of the time.
      dropout: whether the module has any dropout.
    """
    module: Any
    image_shape: Tuple[int, int, int]
    out_channels: int
    time_scale: float = 1000.0
    timesteps: Optional[int] = None
    num_classes: Optional[int] = None
    context_dim: Optional[int] = None
    vector_dim: Optional[int] = None
    concat_channels: Optional[int] = None
    dropout: bool = False
    class_kind: str = "null"
    time_ids_dim: Optional[int] = None
    time_cond_dim: Optional[int] = None

    def init(self, key: Array) -> PyTree:
        """Fresh parameters: a plain nested dict of float32 arrays."""
        return _init(self, key)

    def apply(self, params: PyTree, x_t: Array, t: Array, cond: Any = None, train: bool = False,
              rngs: Optional[Mapping[str, Array]] = None, kept: Mapping[str, PyTree] = {}) -> Array:
        """The raw output, float32 [B, H, W, out_channels].

        Args:
          x_t: [B, H, W, C].
          t: [B] in [0, 1].
          cond: a mapping of the names above, bare class ids [B], or None for the null class (or no class at all).
          train: dropout is active; then rngs must hold a "dropout" key where the network has dropout.
          kept: what `of_condition` gave for the same cond, and a row of what `of_times` gave for the same t, in place of computing it.

        Raises:
          UserError: for a condition that the network has no place for or that it misses, and for a missing dropout key.
        """
        if train and self.dropout and "dropout" not in (rngs or {}):
            raise UserError('train=True on a network with dropout needs rngs={"dropout": key}')
        C = self.image_shape[-1]
        if self.concat_channels and x_t.shape[-1] == C + self.concat_channels and (cond is None or isinstance(cond, Mapping)):
            cond, x_t = {"concat": x_t[..., C:], **(cond or {})}, x_t[..., :C]
        cond = self.conditions(cond, x_t.shape[0])
        out = applied(self.module, params, x_t, self.module_time(t), cond, train, kept=kept, rngs=rngs)
        return out.astype(jnp.float32)

    def of_condition(self, params: PyTree, x_t: Array, cond: Any = None) -> PyTree:
        """What depends on the condition alone, such as keys and values of a text, for `apply`'s `kept`. Of x_t the shape matters."""
        return self._kept(CONDITION, params, x_t, jnp.zeros(len(x_t)), cond) if self.context_dim else {}

    def of_times(self, params: PyTree, x_t: Array, times: Array, cond: Any = None) -> PyTree:
        """What depends on time, class and vector alone, such as adaLN's modulations, at each of `times` [N], which a whole batch shares.

        Its arrays have an axis of N in front; `jax.tree.map(lambda a: a[i], ...)` is for `apply`'s `kept` at times[i].
        """
        return jax.vmap(lambda t: self._kept(TIME, params, x_t, jnp.full(len(x_t), t), cond))(times)

    def _kept(self, collection: str, params: PyTree, x_t: Array, t: Array, cond: Any) -> PyTree:
        if not isinstance(self.module, nn.Module):
            return {}
        cond = self.conditions(cond, len(x_t))
        return self.module.apply({"params": params}, x_t, self.module_time(t), cond, mutable=[collection])[1]

    def module_time(self, t: Array) -> Array:
        """t in [0, 1] in the module's unit, float32."""
        t = jnp.asarray(t, jnp.float32)
        return t * self.time_scale if self.timesteps is None else jnp.round(t * self.timesteps) - 1.0

    def conditions(self, cond: Any, batch: int) -> Cond:
        """`cond` as a mapping that has every condition the module takes."""
        cond = {} if cond is None else dict(cond) if isinstance(cond, Mapping) else {"class": jnp.asarray(cond)}
        classes = self.num_classes or self.class_kind == "number"
        takes = {name for name, size in (("class", classes), ("context", self.context_dim), ("vector", self.vector_dim),
                                         ("concat", self.concat_channels)) if size}
        if "class" in takes and cond.get("class") is None and self.class_kind == "null":
            cond["class"] = jnp.full((batch,), self.num_classes, jnp.int32)
        may = {name for name, size in (("context_mask", self.context_dim), ("time_ids", self.time_ids_dim),
                                       ("time_cond", self.time_cond_dim)) if size}
        extra = set(cond) - takes - may
        if extra or takes - set(cond):
            raise UserError(f"this network takes the conditions {sorted(takes)} and was given {sorted(cond)}; give it exactly "
                            f"those, or build it for the others (num_classes, context_dim, vector_dim, concat_channels)")
        return cond


@functools.partial(jax.jit, static_argnums=0)
def _init(net: Net, key: Array) -> PyTree:
    spec = jax.ShapeDtypeStruct
    cond = {}
    if net.num_classes or net.class_kind == "number":
        cond["class"] = spec((1,), jnp.int32)
    if net.context_dim:
        cond["context"] = spec((1, 1, net.context_dim), jnp.float32)
    if net.vector_dim:
        cond["vector"] = spec((1, net.vector_dim), jnp.float32)
    if net.concat_channels:
        cond["concat"] = spec((1, *net.image_shape[:2], net.concat_channels), jnp.float32)
    if net.time_cond_dim:
        cond["time_cond"] = spec((1, net.time_cond_dim), jnp.float32)
    x_t, time = spec((1, *net.image_shape), jnp.float32), spec((1,), jnp.float32)
    return initialise(net.module, key, x_t, time, cond)
