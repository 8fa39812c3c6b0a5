"""A text tower from its directory in a published checkpoint, such as CHECKPOINT/text_encoder."""
from typing import Any, Callable, Optional, Tuple

import jax

from ldm_jax.types import PyTree
from ldm_jax.weights.layouts import open_weights, read_config
from ldm_jax.weights.maps_clip import clip_text_arguments, clip_text_rules, today
from ldm_jax.weights.rules import load


def load_text_tower(directory: str, build: Callable[..., Any], *, dtype: str = "float32", variant: Optional[str] = None,
                    place: Any = None) -> Tuple[Any, PyTree]:
    """(net, params) of a text tower of CLIP from its config.json and weights.

    Args:
      build: `ldm_jax.models.clip.clip_text`.
      dtype: of the computation; parameters are float32.
      variant: of the files, such as "fp16", see `layouts.find_weights`.
      place: (path, shape, dtype) -> the Sharding of a parameter, see `rules.load`.

    Raises:
      UserError: for files that are missing or damaged, the config of another model, options that are not supported, and arrays
        that do not fit the config.
    """
    config, arrays = read_config(directory), today(open_weights(directory, variant))
    arguments = clip_text_arguments(config, arrays)
    net = build(**arguments, dtype=dtype)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return net, load(clip_text_rules(arguments), arrays, shapes, place=place, what=f"the weights in {directory!r}")
