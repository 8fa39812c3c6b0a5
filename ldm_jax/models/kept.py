"""What a network computes from its condition or from the time alone: the same in every step of sampling, so it is computed before them.

A layer names such a value with `kept`. `Net.of_condition` and `Net.of_times` run a network for these values alone, and `Net.apply`
takes them in place of computing them. They travel in two of Flax's collections, which no caller of a Net sees: CONDITION has what the
condition alone decides (keys and values of a text), TIME what time, class and vector do (the modulations of adaLN and AdaGN).
"""
from typing import Callable

import flax.linen as nn

from ldm_jax.types import Array

CONDITION, TIME = "condition", "time"


def kept(module: nn.Module, collection: str, name: str, compute: Callable[[], Array]) -> Array:
    """compute(), or what it gave before where the module was given that; remembered where the collection is asked for."""
    if module.has_variable(collection, name):
        return module.get_variable(collection, name)
    value = compute()
    if module.is_mutable_collection(collection) and not module.is_initializing():
        module.put_variable(collection, name, value)
    return value
