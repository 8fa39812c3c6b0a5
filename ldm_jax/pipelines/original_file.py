"""One file with all of a model's weights, and how its nets are made."""
import dataclasses
import math
from typing import Any, List, Mapping, Optional, Tuple

import jax

from ldm_jax.models.classifier import noisy_classifier
from ldm_jax.published import BUILDERS, PARAM_DTYPES, load_net
from ldm_jax.types import PyTree, UserError, lookup
from ldm_jax.weights import rules

LOADERS = {**BUILDERS, "noisy_classifier": noisy_classifier}


@dataclasses.dataclass(frozen=True)
class File:
    """A file of weights, by name and not read yet, and how its nets are made.

    Attributes:
      ema: whether the averaged weights are wanted; None for those that the program of the model samples with.
      vae, tokenizer: directories, None where none is given.
      size: of the pictures, None for the config's.
    """
    path: str
    arrays: Mapping[str, Any]
    dtype: str
    param_dtype: str
    ema: Optional[bool]
    vae: Optional[str]
    tokenizer: Optional[str]
    size: Optional[Tuple[int, int]]

    def net(self, builder: str, arguments: Mapping[str, Any], layout: List[rules.Rule], arrays: Mapping[str, Any],
            what: str) -> Tuple[Any, PyTree]:
        """(net, parameters) of the arrays that are all of one net; `what` names them in errors."""
        net = self.build(builder, arguments)
        return net, self.load(net, layout, arrays, what)

    def build(self, builder: str, arguments: Mapping[str, Any]) -> Any:
        return LOADERS[builder](**arguments, dtype=self.dtype)

    def refuse(self, **given: Any) -> None:
        """Raises UserError for what is given and this kind of model has no use for."""
        if wrong := [name for name, value in given.items() if value is not None]:
            raise UserError(f"this model takes no {wrong[0]}; leave {wrong[0]}= out")

    def load(self, net: Any, layout: List[rules.Rule], arrays: Mapping[str, Any], what: str) -> PyTree:
        """The parameters of a net. The largest arrays come first, when there is little beside the copies that reading makes."""
        shapes = jax.eval_shape(net.init, jax.random.key(0))
        dtype = lookup(PARAM_DTYPES, self.param_dtype, "param_dtype")
        size = lambda rule: max((math.prod(arrays[name].shape) for name in rule.names if name in arrays), default=0)
        return rules.load(sorted(layout, key=size, reverse=True), arrays, shapes, dtype=dtype, what=f"the {what} in {self.path!r}")

    def first_stage(self) -> Tuple[Any, PyTree]:
        """That of the directory `vae`."""
        return load_net(self.vae, dtype=self.dtype, param_dtype=self.param_dtype)
