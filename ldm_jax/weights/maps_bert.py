"""The text tower LDMBertModel of diffusers: its config as arguments of our builder, and the names of its arrays."""
from typing import Any, Dict, List, Mapping

from ldm_jax.weights import maps_clip
from ldm_jax.weights.options import options
from ldm_jax.weights.rules import Rule, linear, norm, table

DEFAULTS = {"vocab_size": 30522, "max_position_embeddings": 77, "encoder_layers": 32, "encoder_ffn_dim": 5120,
            "encoder_attention_heads": 8, "head_dim": 64, "activation_function": "gelu", "d_model": 1280}
NO_EFFECT = maps_clip.NO_EFFECT | {  # on what a trained tower gives
    "dropout", "attention_dropout", "activation_dropout", "classifier_dropout", "encoder_layerdrop", "init_std", "scale_embedding",
    "num_hidden_layers"}
WORDS = "to_logits."  # guesses words in its training, and says nothing of the text


def bert_arguments(config: Mapping[str, Any], arrays: Mapping[str, Any] = {}) -> Dict[str, Any]:
    """The arguments of `ldm_jax.models.bert.bert_text` for the config of a text tower.

    Raises:
      UserError: for options and values that are not supported.
    """
    whole = {key: lambda value: type(value) is int for key in DEFAULTS if key != "activation_function"}
    said = options(config, DEFAULTS, {**whole, "activation_function": tuple(maps_clip.ACTIVATIONS), "is_decoder": (False,),
                                      "chunk_size_feed_forward": (0,), "pruned_heads": ({},)}, NO_EFFECT)
    return {"vocab_size": said["vocab_size"], "width": said["d_model"], "depth": said["encoder_layers"],
            "num_heads": said["encoder_attention_heads"], "head_width": said["head_dim"], "mlp_width": said["encoder_ffn_dim"],
            "max_length": said["max_position_embeddings"], "activation": maps_clip.ACTIVATIONS[said["activation_function"]]}


def bert_rules(arguments: Mapping[str, Any], config: Mapping[str, Any] = {}) -> List[Rule]:
    """The rules of a text tower with these arguments."""
    block, depth = "model.layers.{}.", arguments["depth"]
    rules = [*table("model.embed_tokens", "token"), Rule("model.embed_positions.weight", "position"),
             *norm("model.layer_norm", "norm_out")]
    for theirs, ours in (("self_attn_layer_norm", "norm_1"), ("final_layer_norm", "norm_2")):
        rules += norm(block + theirs, f"blocks/{ours}", layers=depth)
    for name in ("q", "k", "v"):
        rules += linear(f"{block}self_attn.{name}_proj", f"blocks/{name}", bias=False, layers=depth)
    for theirs, ours in (("self_attn.out_proj", "out"), ("fc1", "mlp_in"), ("fc2", "mlp_out")):
        rules += linear(block + theirs, f"blocks/{ours}", layers=depth)
    return rules


def without_words(arrays: Mapping[str, Any]) -> Dict[str, Any]:
    """The arrays without those of the layer that guesses words."""
    return {name: array for name, array in arrays.items() if not name.startswith(WORDS)}
