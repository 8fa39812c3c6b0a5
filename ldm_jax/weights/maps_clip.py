"""CLIP's text towers of transformers: their config as arguments of our builder and the reverse, and the names of their arrays.

The arrays are named text_model.NAME in the files of all releases but the newest, which name those of a tower without a projection
NAME; `today` gives them one name.
"""
import re
from typing import Any, Dict, List, Mapping

import numpy as np

from ldm_jax.types import UserError, lookup
from ldm_jax.weights.options import options
from ldm_jax.weights.rules import Rule, linear, norm, table

ARCHITECTURES = {"CLIPTextModel": False, "CLIPTextModelWithProjection": True}  # whether it projects
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
               "relu": "relu", "silu": "silu", "swish": "silu"}
DEFAULTS = {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "projection_dim": 512, "num_hidden_layers": 12,
            "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
            "eos_token_id": 49407}
NO_EFFECT = {  # on what a trained tower gives
    "architectures", "model_type", "name_or_path", "transformers_version", "torch_dtype", "dtype", "bos_token_id", "pad_token_id",
    "initializer_factor", "initializer_range", "_attn_implementation_autoset", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "gradient_checkpointing", "torchscript", "tie_word_embeddings"}
OWN = re.compile(r"^(?=embeddings\.|encoder\.layers\.|final_layer_norm\.)")
POSITIONS, PROJECTION = "text_model.embeddings.position_ids", "text_projection"


def _integer(value: Any) -> bool:
    return type(value) is int


ONLY = {"hidden_act": tuple(ACTIVATIONS), "attention_dropout": (0.0,), "dropout": (0.0,), "chunk_size_feed_forward": (0,),
        "is_decoder": (False,), "is_encoder_decoder": (False,), "add_cross_attention": (False,), "pruned_heads": ({},),
        "layer_norm_eps": lambda value: isinstance(value, (int, float)),
        **{key: _integer for key in DEFAULTS if key not in ("hidden_act", "layer_norm_eps", "projection_dim")}}


def clip_text_arguments(config: Mapping[str, Any], arrays: Mapping[str, Any] = {}) -> Dict[str, Any]:
    """The arguments of `ldm_jax.models.clip.clip_text` for the config of a text tower.

    Args:
      arrays: of the file, whose names tell whether there is a projection where the config does not.

    Raises:
      UserError: for the config of another model, and for options and values that are not supported.
    """
    kind = config.get("model_type", "clip_text_model")
    if kind != "clip_text_model":
        raise UserError(f"the config is of model_type {kind!r}; a text tower of CLIP has 'clip_text_model'")
    projects = [lookup(ARCHITECTURES, name, "architecture of a text tower") for name in config.get("architectures") or []]
    projects = projects[0] if projects else f"{PROJECTION}.weight" in arrays
    said = options(config, DEFAULTS, ONLY | ({"projection_dim": _integer} if projects else {}), NO_EFFECT)
    eos = said["eos_token_id"]
    return {"vocab_size": said["vocab_size"], "width": said["hidden_size"], "depth": said["num_hidden_layers"],
            "num_heads": said["num_attention_heads"], "mlp_width": said["intermediate_size"],
            "max_length": said["max_position_embeddings"], "activation": ACTIVATIONS[said["hidden_act"]],
            "eps": said["layer_norm_eps"], "projection_dim": said["projection_dim"] if projects else None,
            "eos_id": None if eos == 2 else eos}  # 2 stands in old configs, whose towers pool at the highest id


def clip_text_config(arguments: Mapping[str, Any]) -> Dict[str, Any]:
    """The config.json of a tower with these arguments, such as `TextTower.arguments`; the inverse of `clip_text_arguments`."""
    a, activations = arguments, {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {"architectures": ["CLIPTextModelWithProjection" if a["projection_dim"] else "CLIPTextModel"],
            "model_type": "clip_text_model", "vocab_size": a["vocab_size"], "hidden_size": a["width"],
            "num_hidden_layers": a["depth"], "num_attention_heads": a["num_heads"], "intermediate_size": a["mlp_width"],
            "max_position_embeddings": a["max_length"], "hidden_act": activations[a["activation"]], "layer_norm_eps": a["eps"],
            "eos_token_id": 2 if a["eos_id"] is None else a["eos_id"], "projection_dim": a["projection_dim"] or a["width"],
            "attention_dropout": 0.0}


def clip_text_rules(arguments: Mapping[str, Any], config: Mapping[str, Any] = {}) -> List[Rule]:
    """The rules of a text tower with these arguments."""
    block, depth = "text_model.encoder.layers.{}.", arguments["depth"]
    rules = [*table("text_model.embeddings.token_embedding", "token"),
             Rule("text_model.embeddings.position_embedding.weight", "position"),
             *norm("text_model.final_layer_norm", "norm_out")]
    for theirs, ours in (("layer_norm1", "norm_1"), ("layer_norm2", "norm_2")):
        rules += norm(block + theirs, f"blocks/{ours}", layers=depth)
    for theirs, ours in (("self_attn.q_proj", "q"), ("self_attn.k_proj", "k"), ("self_attn.v_proj", "v"),
                         ("self_attn.out_proj", "out"), ("mlp.fc1", "mlp_in"), ("mlp.fc2", "mlp_out")):
        rules += linear(block + theirs, f"blocks/{ours}", layers=depth)
    return rules + (linear(PROJECTION, "projection", bias=False) if arguments["projection_dim"] else [])


def today(arrays: Mapping[str, Any]) -> Dict[str, Any]:
    """The arrays of a text tower by the names of the rules, without the numbers of the positions that old files hold.

    Raises:
      UserError: when those are not 0, 1, 2 and so on: the tower has no others.
    """
    bare = not any(name.startswith("text_model.") for name in arrays)
    named = {OWN.sub("text_model.", name) if bare else name: array for name, array in arrays.items()}
    positions = named.pop(POSITIONS, None)
    if positions is not None and not np.array_equal(np.ravel(positions), np.arange(np.size(positions))):
        raise UserError(f"{POSITIONS} are not 0, 1, 2 and so on, which alone is supported")
    return named
