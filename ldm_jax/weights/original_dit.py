"""DiT in the files of Peebles & Xie: the arguments of their class as those of our builder, and the names of its arrays."""
from typing import Any, Dict, List, Mapping

from ldm_jax.weights.options import options
from ldm_jax.weights.rules import LINEAR, Rule, linear, patches, table

SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}  # depth, hidden_size, num_heads
DEFAULTS = {"input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28, "num_heads": 16,
            "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 1000, "learn_sigma": True}
POSITIONS = "pos_embed"  # fixed sines and cosines, not read but compared


def dit_arguments(config: Mapping[str, Any]) -> Dict[str, Any]:
    """The arguments of `ldm_jax.models.dit.dit`."""
    said = options(config, DEFAULTS, {"class_dropout_prob": lambda p: p > 0})
    size, C = said["input_size"], said["in_channels"]
    return dict(image_shape=(size, size, C), num_classes=said["num_classes"], out_channels=2 * C if said["learn_sigma"] else C,
                patch=said["patch_size"], width=said["hidden_size"], depth=said["depth"], num_heads=said["num_heads"],
                mlp_ratio=said["mlp_ratio"], time_shift=0.0, timesteps=1000)


def dit_rules(arguments: Mapping[str, Any]) -> List[Rule]:
    """The rules of a DiT with these arguments, but for `POSITIONS`."""
    depth = arguments["depth"]
    rules = [Rule("x_embedder.proj.weight", "patch_in/kernel", patches(arguments["patch"])),
             Rule("x_embedder.proj.bias", "patch_in/bias"), *linear("t_embedder.mlp.0", "time_1"),
             *linear("t_embedder.mlp.2", "time_2"), *table("y_embedder.embedding_table", "class"),
             *linear("final_layer.adaLN_modulation.1", "modulation_out"), *linear("final_layer.linear", "patch_out")]
    blocks = [("blocks.{}", "blocks", dict(layers=depth))] if arguments.get("scan_layers") else [
        (f"blocks.{i}", f"block_{i}", {}) for i in range(depth)]
    for theirs, ours, many in blocks:
        for name, own in (("adaLN_modulation.1", "modulation"), ("attn.proj", "out"), ("mlp.fc1", "mlp_in"),
                          ("mlp.fc2", "mlp_out")):
            rules += linear(f"{theirs}.{name}", f"{ours}/{own}", **many)
        rules += fused(f"{theirs}.attn.qkv.weight", f"{theirs}.attn.qkv.bias", ours, **many)
    return rules


def fused(weight: str, bias: str, ours: str, **many: Any) -> List[Rule]:
    """The rules of queries, keys and values as one matrix, one after the other."""
    return [Rule(weight, tuple(f"{ours}/{x}/kernel" for x in "qkv"), LINEAR, **many),
            Rule(bias, tuple(f"{ours}/{x}/bias" for x in "qkv"), **many)]
