"""Text towers in the files of Stable Diffusion: CLIP's by transformers' names (version 1), OpenCLIP's by its own (2), both (XL).

OpenCLIP's tower is read up to the layer that the model takes its states from, and normed behind it.
"""
from typing import Any, Dict, List, Mapping, Tuple

from ldm_jax.weights import maps_clip
from ldm_jax.weights.options import options, refuse
from ldm_jax.weights.original_dit import fused
from ldm_jax.weights.rules import Rule, linear, norm, table

VIT_L = "openai/clip-vit-large-patch14"
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}  # of VIT_L
OPEN = {"context_length": 77, "vocab_size": 49408}
ARCHES = {"ViT-H-14": {"width": 1024, "heads": 16, "layers": 24, "embed_dim": 1024},
          "ViT-bigG-14": {"width": 1280, "heads": 20, "layers": 32, "embed_dim": 1280}}
LAYERS = {"last": 0, "penultimate": 1}  # how many blocks are left out
PAD = 0  # OpenCLIP fills texts up with this id whatever the tokeniser's files say


def open_arguments(params: Mapping[str, Any], projects: bool = False) -> Dict[str, Any]:
    """The arguments of `ldm_jax.models.clip.clip_text` for the params of a FrozenOpenCLIPEmbedder.

    text_cfg: what differs from the sizes of `arch`, by OpenCLIP's names. projects: the pooled output is wanted too, and with it
    all layers.
    """
    said = options(params, {"arch": "ViT-H-14", "layer": "last", "text_cfg": {}, "max_length": 77},
                   {"layer": tuple(LAYERS), "arch": tuple(ARCHES)}, {"version", "device", "freeze"})
    cfg = {"_class_name": "FrozenOpenCLIPEmbedder", **said["text_cfg"]}
    size = options(cfg, {**OPEN, **ARCHES[said["arch"]]})
    depth = size["layers"] - (0 if projects else LAYERS[said["layer"]])
    if depth < 1 or said["max_length"] > size["context_length"]:
        refuse(cfg, [f"layers={size['layers']}, context_length={size['context_length']} with layer={said['layer']!r}, "
                     f"max_length={said['max_length']}"])
    return dict(vocab_size=size["vocab_size"], width=size["width"], depth=depth, num_heads=size["heads"],
                max_length=size["context_length"], activation="gelu", projection_dim=size["embed_dim"] if projects else None)


def open_rules(arguments: Mapping[str, Any]) -> List[Rule]:
    """The rules of OpenCLIP's tower with these arguments."""
    block, depth = "transformer.resblocks.{}.", arguments["depth"]
    rules = [*table("token_embedding", "token"), Rule("positional_embedding", "position"), *norm("ln_final", "norm_out")]
    for theirs, ours in (("ln_1", "norm_1"), ("ln_2", "norm_2")):
        rules += norm(block + theirs, f"blocks/{ours}", layers=depth)
    rules += fused(f"{block}attn.in_proj_weight", f"{block}attn.in_proj_bias", "blocks", layers=depth)
    for theirs, ours in (("attn.out_proj", "out"), ("mlp.c_fc", "mlp_in"), ("mlp.c_proj", "mlp_out")):
        rules += linear(block + theirs, f"blocks/{ours}", layers=depth)
    return rules + ([Rule("text_projection", "projection/kernel")] if arguments["projection_dim"] else [])


def open_unused(arguments: Mapping[str, Any], params: Mapping[str, Any]) -> Tuple[str, ...]:
    """Names that such a file has and the tower has not: the block behind its last, and what compares texts with images."""
    if arguments["projection_dim"]:
        return (r"logit_scale", r"attn_mask")
    behind = tuple(rf"transformer\.resblocks\.{arguments['depth'] + i}\..*" for i in range(LAYERS[params.get("layer", "last")]))
    return (r"logit_scale", r"attn_mask", r"text_projection", *behind)


def clip_arguments(params: Mapping[str, Any], arrays: Mapping[str, Any]) -> Dict[str, Any]:
    """The arguments of `ldm_jax.models.clip.clip_text` for the params of a FrozenCLIPEmbedder.

    text_config: the config.json of a tower other than ViT-L/14's.
    """
    said = options(params, {"version": VIT_L, "text_config": {}, "max_length": 77, "layer": "last"},
                   {"version": lambda name: name == VIT_L or bool(params.get("text_config")), "layer": ("last",),
                    "layer_idx": (None,)}, {"device", "freeze"})
    return maps_clip.clip_text_arguments({**CLIP, **said["text_config"]}, arrays)
