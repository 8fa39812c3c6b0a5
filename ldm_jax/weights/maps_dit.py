"""DiTTransformer2DModel of diffusers, and the Transformer2DModel that it was before: the config, and the names of the arrays.

Each block is published with an embedding of the time and the class of its own. In the published DiT they are equal, and are one
here; where they differ, each block keeps its own.
"""
from typing import Any, Dict, List, Mapping

import numpy as np

from ldm_jax.weights.options import options, refuse, sides
from ldm_jax.weights.rules import Rule, linear, norm, patches, table

DEFAULTS = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": None, "num_layers": 28,
            "dropout": 0.0, "attention_bias": True, "sample_size": 32, "patch_size": 2, "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000, "upcast_attention": False, "norm_elementwise_affine": False, "norm_eps": 1e-5}
OLD = {**DEFAULTS, "attention_head_dim": 88, "in_channels": None, "num_layers": 1, "attention_bias": False, "sample_size": None,
       "patch_size": None, "activation_fn": "geglu", "num_embeds_ada_norm": None, "norm_elementwise_affine": True,
       "interpolation_scale": None}
MLPS = {"gelu": "gelu_exact", "gelu-approximate": "gelu", "geglu": "geglu", "geglu-approximate": "gelu_sigmoid",
        "swiglu": "swiglu", "linear-silu": "silu"}
ONLY = {"norm_type": ("ada_norm_zero",), "activation_fn": tuple(MLPS), "num_embeds_ada_norm": lambda n: isinstance(n, int),
        "patch_size": lambda n: isinstance(n, int)}
OLD_ONLY = {**ONLY, "norm_type": lambda name: name == "ada_norm_zero", "cross_attention_dim": (None,),
            "num_vector_embeds": (None,), "only_cross_attention": (False,), "double_self_attention": (False,),
            "attention_type": ("default",),
            "caption_channels": (None,), "use_additional_conditions": (None, False)}
NO_EFFECT = {"norm_num_groups"}  # of images without patches
OLD_NO_EFFECT = NO_EFFECT | {"use_linear_projection"}
EMBEDDERS = ("timestep_embedder.linear_1.weight", "timestep_embedder.linear_1.bias", "timestep_embedder.linear_2.weight",
             "timestep_embedder.linear_2.bias", "class_embedder.embedding_table.weight")


def dit_arguments(config: Mapping[str, Any], arrays: Mapping[str, Any]) -> Dict[str, Any]:
    """The arguments of `ldm_jax.models.dit.dit` for a config; the arrays tell whether the embeddings are equal."""
    old = config.get("_class_name") == "Transformer2DModel"
    said = options(config, OLD if old else DEFAULTS, OLD_ONLY if old else ONLY, OLD_NO_EFFECT if old else NO_EFFECT)
    wrong = [f"{key}={said[key]!r}" for key in ("in_channels", "sample_size", "patch_size") if not isinstance(said[key], int)]
    refuse(config, wrong)
    heads, patch, size = said["num_attention_heads"], said["patch_size"], said["sample_size"]
    scale = (said["interpolation_scale"] or max(size // 64, 1)) if old else 1.0
    mlp = MLPS[said["activation_fn"]]
    return dict(image_shape=(*sides(size, size, patch), said["in_channels"]), num_classes=said["num_embeds_ada_norm"],
                out_channels=said["out_channels"] or said["in_channels"], patch=patch, width=heads * said["attention_head_dim"],
                depth=said["num_layers"], num_heads=heads, mlp_ratio=6.0 if mlp in ("geglu", "swiglu") else 4.0, mlp=mlp,
                dropout=said["dropout"], qkv_bias=said["attention_bias"], upcast=said["upcast_attention"],
                norm_2=(said["norm_eps"], said["norm_elementwise_affine"]), positions=(size // patch, scale), time_shift=1.0,
                embedders="shared" if _equal(arrays, said["num_layers"]) else "each", timesteps=1000)


def _equal(arrays: Mapping[str, Any], depth: int) -> bool:
    """Whether the embeddings of all blocks are equal, as far as they are there."""
    for name in EMBEDDERS:
        found = [arrays[key] for key in (f"transformer_blocks.{i}.norm1.emb.{name}" for i in range(depth)) if key in arrays]
        first = np.asarray(found[0]) if found else None
        if any(not np.array_equal(first, np.asarray(other)) for other in found[1:]):
            return False
    return True


def dit_rules(arguments: Mapping[str, Any], config: Mapping[str, Any]) -> List[Rule]:
    """The rules of a DiT with these arguments."""
    depth, p, rules = arguments["depth"], patches(arguments["patch"]), []
    if arguments.get("embedders") == "each":
        for i in range(depth):
            rules += _embedding(f"transformer_blocks.{i}.norm1.emb", f"embed_{i}/")
    else:
        rules += _embedding("transformer_blocks.{}.norm1.emb", "", copies=depth)
    blocks = [("transformer_blocks.{}", "blocks", dict(layers=depth))] if arguments.get("scan_layers") else [
        (f"transformer_blocks.{i}", f"block_{i}", {}) for i in range(depth)]
    for theirs, ours, many in blocks:
        rules += linear(f"{theirs}.norm1.linear", f"{ours}/modulation", **many)
        for a, b in (("to_q", "q"), ("to_k", "k"), ("to_v", "v")):
            rules += linear(f"{theirs}.attn1.{a}", f"{ours}/{b}", arguments["qkv_bias"], **many)
        rules += linear(f"{theirs}.attn1.to_out.0", f"{ours}/out", **many)
        if arguments["norm_2"][1]:
            rules += norm(f"{theirs}.norm3", f"{ours}/norm_2", **many)
        rules += linear(f"{theirs}.ff.net.0.proj", f"{ours}/mlp_in", **many)
        rules += linear(f"{theirs}.ff.net.2", f"{ours}/mlp_out", **many)
    return rules + [Rule("pos_embed.proj.weight", "patch_in/kernel", p), Rule("pos_embed.proj.bias", "patch_in/bias"),
                    *linear("proj_out_1", "modulation_out"), *linear("proj_out_2", "patch_out")]


def _embedding(theirs: str, ours: str, **options: Any) -> List[Rule]:
    return (linear(f"{theirs}.timestep_embedder.linear_1", f"{ours}time_1", **options) +
            linear(f"{theirs}.timestep_embedder.linear_2", f"{ours}time_2", **options) +
            table(f"{theirs}.class_embedder.embedding_table", f"{ours}class", **options))
