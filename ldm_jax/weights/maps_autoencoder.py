"""AutoencoderKL and VQModel of diffusers: their config as arguments of our builders, and the names of their arrays."""
from typing import Any, Dict, List, Mapping

from ldm_jax.weights.options import options, refuse, sides
from ldm_jax.weights.rules import Rule, conv, linear, norm, pointwise, table

DEFAULTS = {"in_channels": 3, "out_channels": 3, "down_block_types": ("DownEncoderBlock2D",),
            "up_block_types": ("UpDecoderBlock2D",), "block_out_channels": (64,), "layers_per_block": 1, "act_fn": "silu",
            "latent_channels": 4, "norm_num_groups": 32, "sample_size": 32, "scaling_factor": 0.18215,
            "mid_block_add_attention": True}
KL = {**DEFAULTS, "shift_factor": None, "latents_mean": None, "latents_std": None, "use_quant_conv": True,
      "use_post_quant_conv": True}
VQ = {**DEFAULTS, "latent_channels": 3, "num_vq_embeddings": 256, "vq_embed_dim": None}
DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}  # whether there is an attention after each block
UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
NO_EFFECT = {"force_upcast"}  # of float16, in which nothing is computed here
VQ_NO_EFFECT = NO_EFFECT | {"lookup_from_codebook"}  # of decoding what is not to be quantised, by ids


def _common(config: Mapping[str, Any], said: Mapping[str, Any]) -> Dict[str, Any]:
    channels = said["block_out_channels"]
    n, factor = len(channels), 2 ** (len(channels) - 1)
    refuse(config, [f"{key}={said[key]!r}" for key, table in (("down_block_types", DOWN), ("up_block_types", UP))
                    if len(said[key]) != n or not set(said[key]) <= set(table)])
    H, W = sides(said["sample_size"], 32, factor)
    heights = [H >> i for i in range(n)]
    return dict(image_shape=(H, W, said["in_channels"]), factor=factor, channels=channels,
                num_res_blocks=said["layers_per_block"], attention=tuple(h for h, t in zip(heights,
                said["down_block_types"]) if DOWN[t]),
                up_attention=tuple(h for h, t in zip(heights, reversed(said["up_block_types"])) if UP[t]),
                mid_attention=said["mid_block_add_attention"], out_channels=said["out_channels"], act=said["act_fn"],
                norm_groups=said["norm_num_groups"])


def kl_arguments(config: Mapping[str, Any], arrays: Mapping[str, Any]) -> Dict[str, Any]:
    """The arguments of `ldm_jax.models.autoencoder.kl` for the config of an AutoencoderKL."""
    said = options(config, KL, {"act_fn": ("silu", "swish", "mish", "gelu", "relu")}, NO_EFFECT)
    mean, std = said["latents_mean"], said["latents_std"]
    if (mean is None) != (std is None) or (mean is not None and said["shift_factor"] is not None):
        refuse(config, [f"latents_mean={mean!r}", f"latents_std={std!r}", f"shift_factor={said['shift_factor']!r} together"])
    scale, shift = said["scaling_factor"], said["shift_factor"] or 0.0
    if mean is not None:
        scale, shift = tuple(scale / s for s in std), mean
    return dict(_common(config, said), latent_channels=said["latent_channels"], scale=scale, shift=shift,
                quant=(said["use_quant_conv"], said["use_post_quant_conv"]))


def vq_arguments(config: Mapping[str, Any], arrays: Mapping[str, Any]) -> Dict[str, Any]:
    """The arguments of `ldm_jax.models.autoencoder.vq` for the config of a VQModel."""
    said = options(config, VQ, {"act_fn": ("silu", "swish", "mish", "gelu", "relu"), "norm_type": ("group",)}, VQ_NO_EFFECT)
    latent = said["vq_embed_dim"] or said["latent_channels"]
    return dict(_common(config, said), latent_channels=latent, inner_channels=said["latent_channels"],
                codes=said["num_vq_embeddings"], scale=said["scaling_factor"])


def autoencoder_rules(arguments: Mapping[str, Any], config: Mapping[str, Any] = {}) -> List[Rule]:
    """The rules of a first stage with these arguments."""
    channels, blocks, H = arguments["channels"], arguments["num_res_blocks"], arguments["image_shape"][0]
    last, rules = len(channels) - 1, []
    for side in ("encoder", "decoder"):
        way, attention = ("down", "attention") if side == "encoder" else ("up", "up_attention")
        name, ours, h = f"{side}.", f"{side}/", channels[0 if way == "down" else -1]
        rules += conv(f"{name}conv_in", f"{ours}conv_in")
        for i in range(last + 1) if way == "down" else reversed(range(last + 1)):
            theirs = f"{name}{way}_blocks.{i if way == 'down' else last - i}."
            for j in range(blocks + (way == "up")):
                rules += res(f"{theirs}resnets.{j}", f"{ours}{way}_{i}_block_{j}", h != channels[i])
                h = channels[i]
                if H >> i in arguments[attention]:
                    rules += attention_block(f"{theirs}attentions.{j}", f"{ours}{way}_{i}_attention_{j}")
            if i != (last if way == "down" else 0):
                rules += conv(f"{theirs}{way}samplers.0.conv", f"{ours}{way}_{i}_resample")
        rules += res(f"{name}mid_block.resnets.0", f"{ours}mid_block_0") + res(f"{name}mid_block.resnets.1", f"{ours}mid_block_1")
        if arguments["mid_attention"]:
            rules += attention_block(f"{name}mid_block.attentions.0", f"{ours}mid_attention")
        rules += norm(f"{name}conv_norm_out", f"{ours}norm_out") + conv(f"{name}conv_out", f"{ours}conv_out")
    quant = arguments.get("quant", (True, True))
    rules += pointwise("quant_conv", "quant_in") if quant[0] else []
    rules += pointwise("post_quant_conv", "quant_out") if quant[1] else []
    return rules + (table("quantize.embedding", "codebook") if arguments.get("codes") else [])


def res(theirs: str, ours: str, skip: bool = False, time: bool = False) -> List[Rule]:
    """The rules of a residual block, with a 1x1 convolution beside it or a matrix for the time where it has them."""
    rules = []
    for k in (1, 2):
        rules += norm(f"{theirs}.norm{k}", f"{ours}/norm_{k}") + conv(f"{theirs}.conv{k}", f"{ours}/conv_{k}")
    rules += linear(f"{theirs}.time_emb_proj", f"{ours}/emb") if time else []
    return rules + (pointwise(f"{theirs}.conv_shortcut", f"{ours}/skip") if skip else [])


def attention_block(theirs: str, ours: str, normed: bool = True) -> List[Rule]:
    """The rules of a plain attention."""
    rules = norm(f"{theirs}.group_norm", f"{ours}/norm") if normed else []
    return rules + [rule for a, b in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "out"))
                    for rule in linear(f"{theirs}.{a}", f"{ours}/{b}")]
