"""The first stages in the files of Rombach et al.: the yaml's values as arguments of our builders, and the names of the arrays.

Both ways count their levels from the largest image here, and attention is a set of 1x1 convolutions.
"""
from typing import Any, Dict, List, Mapping, Tuple

from ldm_jax.weights.options import options, refuse
from ldm_jax.weights.rules import Rule, conv, norm, pointwise, table

DD = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": (1, 2, 4, 8),
      "num_res_blocks": 2, "attn_resolutions": (), "dropout": 0.0, "attn_type": "vanilla"}
DD_ONLY = {"attn_type": ("vanilla", "vanilla-xformers", "memory-efficient-cross-attn", "none"), "resamp_with_conv": (True,),
           "use_linear_attn": (False,), "give_pre_end": (False,), "tanh_out": (False,),
           "ch_mult": lambda mults: bool(mults) and mults[0] == 1}
NO_EFFECT = {"lossconfig", "monitor", "ckpt_path", "ignore_keys", "image_key", "batch_resize_range", "scheduler_config",
             "lr_g_factor", "ema_decay", "learn_logvar"}
KINDS = {"AutoencoderKL": "kl", "AutoencoderKLInferenceWrapper": "kl", "VQModelInterface": "vq", "VQModel": "vq"}
UNUSED = (r"loss\..*", r"model_ema\..*")  # of training: the discriminator, and its average
GROUPS = 32


def autoencoder_arguments(kind: str, params: Mapping[str, Any], scale: float) -> Tuple[str, Dict[str, Any]]:
    """(the name of our builder, its arguments) for the params of a first_stage_config, whose target is a class named `kind`."""
    if kind not in KINDS:
        refuse(params, [f"first_stage_config.target={kind!r} (supported: {', '.join(KINDS)})"])
    vq = KINDS[kind] == "vq"
    found = options(params, {"embed_dim": None, "ddconfig": {}, **({"n_embed": None} if vq else {})},
                    {"remap": (None,), "sane_index_shape": (False,), "colorize_nlabels": (None,)}, NO_EFFECT | {"use_ema"})
    dd = {"_class_name": kind, **found["ddconfig"]}
    said, wrong = options(dd, DD, DD_ONLY), []
    sizes = [key for key in ("embed_dim", *(("n_embed",) if vq else ())) if not isinstance(found[key], int)]
    wrong += [f"{key}={found[key]!r}" for key in sizes]
    if said["double_z"] is vq:
        wrong.append(f"double_z={said['double_z']!r}")
    if not vq and found["embed_dim"] != said["z_channels"]:
        wrong.append(f"embed_dim={found['embed_dim']!r} with z_channels={said['z_channels']!r}")
    refuse(dd, wrong)
    n, size, attends = len(said["ch_mult"]), said["resolution"], said["attn_type"] != "none"
    arguments = dict(
        image_shape=(size, size, said["in_channels"]), factor=2 ** (n - 1), latent_channels=found["embed_dim"],
        channels=tuple(said["ch"] * mult for mult in said["ch_mult"]), num_res_blocks=said["num_res_blocks"],
        attention=tuple(size >> i for i in range(n) if size >> i in said["attn_resolutions"]) if attends else (),
        mid_attention=attends, out_channels=said["out_ch"], dropout=said["dropout"], norm_groups=GROUPS, scale=scale)
    if vq:
        arguments.update(inner_channels=said["z_channels"], codes=found["n_embed"])
    return KINDS[kind], arguments


def autoencoder_rules(arguments: Mapping[str, Any]) -> List[Rule]:
    """The rules of a first stage with these arguments."""
    channels, H, rules = arguments["channels"], arguments["image_shape"][0], []
    last = len(channels) - 1
    for side, way in (("encoder", "down"), ("decoder", "up")):
        rules += conv(f"{side}.conv_in", f"{side}/conv_in")
        h = channels[0 if way == "down" else -1]
        for i in range(last + 1) if way == "down" else reversed(range(last + 1)):
            for j in range(arguments["num_res_blocks"] + (way == "up")):
                rules += _res(f"{side}.{way}.{i}.block.{j}", f"{side}/{way}_{i}_block_{j}", h != channels[i])
                h = channels[i]
                if H >> i in arguments["attention"]:
                    rules += _attention(f"{side}.{way}.{i}.attn.{j}", f"{side}/{way}_{i}_attention_{j}")
            if i != (last if way == "down" else 0):
                rules += conv(f"{side}.{way}.{i}.{way}sample.conv", f"{side}/{way}_{i}_resample")
        for k in (1, 2):
            rules += _res(f"{side}.mid.block_{k}", f"{side}/mid_block_{k - 1}")
        if arguments["mid_attention"]:
            rules += _attention(f"{side}.mid.attn_1", f"{side}/mid_attention")
        rules += norm(f"{side}.norm_out", f"{side}/norm_out") + conv(f"{side}.conv_out", f"{side}/conv_out")
    rules += pointwise("quant_conv", "quant_in") + pointwise("post_quant_conv", "quant_out")
    return rules + (table("quantize.embedding", "codebook") if arguments.get("codes") else [])


def _res(theirs: str, ours: str, skip: bool = False) -> List[Rule]:
    rules = []
    for k in (1, 2):
        rules += norm(f"{theirs}.norm{k}", f"{ours}/norm_{k}") + conv(f"{theirs}.conv{k}", f"{ours}/conv_{k}")
    return rules + (pointwise(f"{theirs}.nin_shortcut", f"{ours}/skip") if skip else [])


def _attention(theirs: str, ours: str) -> List[Rule]:
    rules = norm(f"{theirs}.norm", f"{ours}/norm")
    for name, own in (("q", "q"), ("k", "k"), ("v", "v"), ("proj_out", "out")):
        rules += pointwise(f"{theirs}.{name}", f"{ours}/{own}")
    return rules
