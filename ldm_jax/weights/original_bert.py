"""The text tower in the file of the first latent text-to-image model: a BERTEmbedder, and the names of its arrays.

Layer 2 i of a file is the attention of block i, layer 2 i + 1 its feed-forward; `by_block` gives them that number.
"""
import re
from typing import Any, Dict, List, Mapping

from ldm_jax.weights.options import options
from ldm_jax.weights.rules import Rule, linear, norm, table

DEFAULTS = {"n_embed": None, "n_layer": None, "vocab_size": 30522, "max_seq_len": 77}
LAYER = re.compile(r"attn_layers\.layers\.(\d+)\.")
UNUSED = (r"to_logits\..*",)  # guesses words in its training, and says nothing of the text


def bert_arguments(params: Mapping[str, Any]) -> Dict[str, Any]:
    """The arguments of `ldm_jax.models.bert.bert_text` for the params of a BERTEmbedder."""
    whole = {key: lambda value: type(value) is int for key in DEFAULTS}
    said = options(params, DEFAULTS, {**whole, "use_tokenizer": (True,)}, {"device", "embedding_dropout"})
    return dict(vocab_size=said["vocab_size"], width=said["n_embed"], depth=said["n_layer"], mlp_width=4 * said["n_embed"],
                max_length=said["max_seq_len"])


def by_block(arrays: Mapping[str, Any]) -> Dict[str, Any]:
    """The arrays with attention.i and mlp.i in the place of the numbers of layers."""
    def named(match):
        i = int(match[1])
        return f"{('attention', 'mlp')[i % 2]}.{i // 2}."

    return {LAYER.sub(named, name): array for name, array in arrays.items()}


def bert_rules(arguments: Mapping[str, Any]) -> List[Rule]:
    """The rules of a text tower with these arguments."""
    many = dict(layers=arguments["depth"])
    rules = [*table("token_emb", "token"), Rule("pos_emb.emb.weight", "position"), *norm("norm", "norm_out"),
             *norm("attention.{}.0", "blocks/norm_1", **many), *norm("mlp.{}.0", "blocks/norm_2", **many)]
    for x in "qkv":
        rules += linear(f"attention.{{}}.1.to_{x}", f"blocks/{x}", bias=False, **many)
    for theirs, ours in (("attention.{}.1.to_out", "out"), ("mlp.{}.1.net.0.0", "mlp_in"), ("mlp.{}.1.net.2", "mlp_out")):
        rules += linear(theirs, f"blocks/{ours}", **many)
    return rules
