"""The reverse of the maps: the published config of a net of ours, from the arguments that would build it.

What a published config cannot say shows when it is read again: it must give the same arguments.
"""
from typing import Any, Dict, Mapping, Optional

from ldm_jax.types import UserError
from ldm_jax.weights import maps_autoencoder, maps_dit, maps_unet

LEVEL = dict(attention=None, depths=(), heads=1, head_width=None, attention_groups=None, resample=None, skip=False, late=False,
             groups=None, scale=1.0, raw_time=False, only_cross=False)
TIME = dict(kind="sinusoids", order="sin_cos", shift=None, act="silu", post_act=None, table=None, cond_dim=None, divide=False)
INPUTS = dict(classes=None, class_kind=None, vector=None, join="add", time_ids_dim=None, context_dim=None, act="silu",
              emb_act=None, centre=False)
NET = dict(end_act="silu", kernels=(3, 3), upcast=False, concat_channels=None, vector_dim=None, context_dim=None, dropout=0.0)
UNITS = ("class_kind", "num_classes", "time_scale", "timesteps", "image_shape")  # what a config does not fix


def _size(image_shape) -> Any:
    H, W = image_shape[:2]
    return H if H == W else [H, W]


def _same(config: Mapping[str, Any], ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Dict[str, Any]:
    wrong = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    if wrong:
        raise UserError(f"no {config['_class_name']} is like this net, which cannot be exported: its {wrong[0]} is "
                        f"{ours.get(wrong[0])!r} and would become {theirs.get(wrong[0])!r}")
    return dict(config)


def autoencoder_config(arguments: Mapping[str, Any]) -> Dict[str, Any]:
    """The config of an AutoencoderKL or VQModel with the arguments of `first_stage`.

    Raises:
      UserError: where there is none.
    """
    a, vq = arguments, bool(arguments.get("codes"))
    H, n = a["image_shape"][0], len(a["channels"])
    types = lambda key, plain, attn: [attn if H >> i in a[key] else plain for i in range(n)]
    config = dict(
        _class_name="VQModel" if vq else "AutoencoderKL", in_channels=a["image_shape"][2], out_channels=a["out_channels"],
        down_block_types=types("attention", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=types("up_attention", "UpDecoderBlock2D", "AttnUpDecoderBlock2D")[::-1],
        block_out_channels=list(a["channels"]), layers_per_block=a["num_res_blocks"], act_fn=a["act"],
        norm_num_groups=a["norm_groups"], sample_size=_size(a["image_shape"]), mid_block_add_attention=a["mid_attention"])
    if vq:
        config.update(latent_channels=a["inner_channels"], vq_embed_dim=a["latent_channels"], num_vq_embeddings=a["codes"],
                      scaling_factor=a["scale"])
    else:
        config.update(latent_channels=a["latent_channels"], use_quant_conv=a["quant"][0], use_post_quant_conv=a["quant"][1])
        if isinstance(a["scale"], tuple) or isinstance(a["shift"], tuple):
            many = lambda value: list(value) if isinstance(value, tuple) else [value] * a["latent_channels"]
            config.update(scaling_factor=1.0, latents_mean=many(a["shift"]), latents_std=[1.0 / s for s in many(a["scale"])])
        else:
            config.update(scaling_factor=a["scale"], shift_factor=a["shift"] or None)
    again = (maps_autoencoder.vq_arguments if vq else maps_autoencoder.kl_arguments)(config, {})

    def strict(d):  # scales aside, which went through a division
        d = {"quant": (True, True), "codes": None, "inner_channels": d["latent_channels"], **d}
        return {key: value for key, value in d.items() if key not in ("scale", "shift")}
    return _same(config, strict(a), strict(again))


def dit_config(arguments: Mapping[str, Any]) -> Dict[str, Any]:
    """The config of a DiTTransformer2DModel with the arguments of `dit`.

    Raises:
      UserError: where there is none.
    """
    a = arguments
    mlps = {ours: theirs for theirs, ours in maps_dit.MLPS.items()}
    config = dict(
        _class_name="DiTTransformer2DModel", num_attention_heads=a["num_heads"], attention_head_dim=a["width"] // a["num_heads"],
        in_channels=a["image_shape"][2], out_channels=a["out_channels"], num_layers=a["depth"], dropout=a["dropout"],
        attention_bias=a["qkv_bias"], sample_size=a["image_shape"][0], patch_size=a["patch"], activation_fn=mlps.get(a["mlp"]),
        num_embeds_ada_norm=a["num_classes"], upcast_attention=a["upcast"], norm_elementwise_affine=a["norm_2"][1],
        norm_eps=a["norm_2"][0], norm_type="ada_norm_zero", norm_num_groups=32)
    again = maps_dit.dit_arguments(config, {})
    plain = dict(norm="layer", rotary=False, qk_norm=False, registers=0, context_dim=None, vector_dim=None, concat_channels=None)

    def strict(d):
        return {key: value for key, value in {**plain, **d}.items() if key not in ("embedders", "scan_layers", *UNITS)}
    return _same(config, strict(a), strict(again))


def unet_config(arguments: Mapping[str, Any]) -> Dict[str, Any]:
    """The config of a UNet2DModel or, where it takes one, of a UNet2DConditionModel, with the arguments of `unet_of_levels`.

    Raises:
      UserError: where there is none.
    """
    a = {**NET, **arguments}
    time, inputs, groups = {**TIME, **a["time"]}, {**INPUTS, **a["inputs"]}, a["norm_groups"]
    down, up = ([{**LEVEL, **level} for level in a[way]] for way in ("down", "up"))
    middle, n, levels = a["middle"] and {**LEVEL, **a["middle"]}, len(down), down + up
    widths, blocks = [level["channels"] for level in down], [level["blocks"] for level in down]
    crossing = [level for level in (*levels, middle) if level and level["attention"] == "cross"]
    condition = bool(
        crossing or inputs["vector"] in ("mlp", "linear") or inputs["join"] != "add" or inputs["emb_act"] or time["cond_dim"] or
        time["post_act"] or a["kernels"] != (3, 3) or time["act"] != "silu" or a["end_act"] != "silu" or len(set(blocks)) > 1 or
        time["kind"] == "fourier" or (middle and middle["blocks"] == 1) or
        any(level["raw_time"] or (level["scale"] != 1 and not level["skip"]) for level in levels))
    paddings = {level["resample"] for level in down} & {"conv", "conv_centred"}
    resnet = {way: any(level["attention"] == "self" and level["resample"] == "block" for level in levels)
              for way, levels in (("down", down), ("up", up))}
    shift = (0 if time["order"] == "cos_sin" else 1) if time["shift"] is None else time["shift"]
    config = dict(
        _class_name="UNet2DConditionModel" if condition else "UNet2DModel", sample_size=_size(a["image_shape"]),
        in_channels=a["image_shape"][2] + (a["concat_channels"] or 0), out_channels=a["out_channels"],
        center_input_sample=inputs["centre"], time_embedding_dim=time["hidden"], freq_shift=shift,
        flip_sin_to_cos=time["order"] == "cos_sin", block_out_channels=widths,
        layers_per_block=blocks if len(set(blocks)) > 1 else blocks[0], downsample_padding=0 if paddings == {"conv"} else 1,
        dropout=a["dropout"], act_fn=a["act"], norm_num_groups=groups, norm_eps=a["norm_eps"],
        resnet_time_scale_shift="scale_shift" if a["scale_shift"] else "default",
        down_block_types=[_block(level, "Down") for level in down], up_block_types=[_block(level, "Up") for level in up[::-1]],
        mid_block_scale_factor=middle["scale"] if middle else 1)
    if inputs["class_kind"] == "table":
        config["num_class_embeds"] = inputs["classes"]
    elif inputs["class_kind"] == "number" or inputs["vector"] == "identity":
        config["class_embed_type"] = "timestep" if inputs["class_kind"] else "identity"
    widths_of = lambda level: level["head_width"] or level["channels"] // level["heads"]
    if condition:
        heads = [None] * n
        for i, level in [*enumerate(down), *enumerate(up)]:
            if level["attention"] == "cross":
                heads[i] = level["heads"]
            elif level["attention"]:  # on the way up their list begins at the smallest image
                heads[i if level is down[i] else n - 1 - i] = widths_of(level)
        middle_crosses = middle and middle["attention"] == "cross"
        if middle_crosses and heads[-1] is None:
            heads[-1] = middle["heads"]
        depths = [list(level["depths"][:level["blocks"]]) if level["attention"] == "cross" else None for level in down]
        if depths[-1] is None:
            depths[-1] = [middle["depths"][0]] if middle_crosses else 1
        up_depths = [list(level["depths"][:level["blocks"]]) if level["attention"] == "cross" else 1 for level in up]
        one = lambda depth: depth if not isinstance(depth, list) or len(set(depth)) > 1 else depth[0]
        depths, up_depths = [one(depth) if depth else up_depths[i] for i, depth in enumerate(depths)], [one(d) for d in up_depths]
        plain = all(isinstance(d, int) for d in depths) and all(
            up_depths[i] == depths[i] or up[i]["attention"] != "cross" for i in range(n))
        config.update(
            attention_head_dim=[h or 1 for h in heads], transformer_layers_per_block=depths, upcast_attention=a["upcast"],
            reverse_transformer_layers_per_block=None if plain else up_depths[::-1], use_linear_projection=True,
            only_cross_attention=[level["only_cross"] or other["only_cross"] for level, other in zip(down, up)],
            cross_attention_dim=(inputs["context_dim"] or a["context_dim"]) or 1280,
            resnet_out_scale_factor=next((level["scale"] for level in levels if level["scale"] != 1), 1.0),
            resnet_skip_time_act=any(level["raw_time"] for level in levels), conv_in_kernel=a["kernels"][0],
            conv_out_kernel=a["kernels"][1], time_embedding_act_fn=inputs["emb_act"], timestep_post_act=time["post_act"],
            time_cond_proj_dim=time["cond_dim"], class_embeddings_concat=inputs["join"] == "concat",
            mid_block_type=None if not middle else "UNetMidBlock2DCrossAttn" if middle_crosses else "UNetMidBlock2D",
            time_embedding_type="fourier" if time["kind"] == "fourier" else "positional")
        if inputs["context_dim"]:
            config.update(encoder_hid_dim=a["context_dim"], encoder_hid_dim_type="text_proj")
        if inputs["time_ids_dim"]:
            config.update(addition_embed_type="text_time", addition_time_embed_dim=inputs["time_ids_dim"])
        elif inputs["vector"] in ("mlp", "linear"):
            config["class_embed_type"] = "projection" if inputs["vector"] == "mlp" else "simple_projection"
        if inputs["vector"] in ("mlp", "linear"):
            config["projection_class_embeddings_input_dim"] = a["vector_dim"]
    else:
        attending = [level for level in (*levels, middle) if level and level["attention"] == "self"]
        head_widths = {widths_of(level) for level in attending}
        config.update(
            attention_head_dim=None if all(level["heads"] == 1 and widths_of(level) == level["channels"] for level in attending)
            else min(head_widths), add_attention=bool(middle and middle["attention"]),
            mid_block_type="UNetMidBlock2D" if middle else None, num_train_timesteps=time["table"],
            downsample_type="resnet" if resnet["down"] else "conv", upsample_type="resnet" if resnet["up"] else "conv",
            time_embedding_type={"sinusoids": "positional", "log_fourier": "fourier", "table": "learned"}[time["kind"]])
        if middle and middle["attention"]:
            normed = middle["attention_groups"]
            config["attn_norm_num_groups"] = (groups if normed is None else normed) or None
        if all(level["skip"] for level in levels):
            config["norm_num_groups"] = None
    read = maps_unet.condition_arguments if condition else maps_unet.unet2d_arguments
    return _same(config, _canonical(a), _canonical(read(config, {})))


def _block(level: Mapping[str, Any], way: str) -> str:
    """The published type of a level."""
    attention = {None: "", "self": "Attn", "cross": "CrossAttn"}[level["attention"]]
    if level["skip"]:
        return f"{attention}Skip{way}Block2D"
    raw = level["resample"] == "block" or level["raw_time"] or level["scale"] != 1
    return f"Resnet{way}sampleBlock2D" if raw and not attention else f"{attention}{way}Block2D"


def _canonical(arguments: Mapping[str, Any]) -> Dict[str, Any]:
    """The arguments with their defaults, and without what has no effect."""
    a = {**NET, **arguments}
    time, inputs = {**TIME, **a.pop("time")}, {**INPUTS, **a.pop("inputs")}
    if time["kind"] == "sinusoids":
        time["shift"] = (0 if time["order"] == "cos_sin" else 1) if time["shift"] is None else time["shift"]
    out = {key: value for key, value in a.items() if key not in (*UNITS, "down", "middle", "up")}
    out["in_channels"] = a["image_shape"][2]
    out.update({f"time {key}": value for key, value in time.items() if not (key in ("shift",) and time["kind"] != "sinusoids")})
    out.update({f"input {key}": value for key, value in inputs.items() if key != "act" or inputs["class_kind"] == "number"})
    for way in ("down", "middle", "up"):
        levels = a[way] if way != "middle" else [a[way]] if a[way] else []
        out[way] = [_effective({**LEVEL, **level}, a["norm_groups"], 1 if way == "middle" else level["blocks"])
                    for level in levels]
    return out


def _effective(level: Mapping[str, Any], groups: Optional[int], attentions: int) -> Dict[str, Any]:
    plain, cross = level["attention"] == "self", level["attention"] == "cross"
    width = level["head_width"] or level["channels"] // level["heads"]
    attention_groups = groups if level["attention_groups"] is None else level["attention_groups"]
    return dict({key: level[key] for key in ("channels", "blocks", "attention", "resample", "skip", "late", "raw_time")},
                depths=tuple(level["depths"][:attentions]) if cross else (), scale=round(level["scale"], 12),
                heads=(level["heads"], width) if level["attention"] else None,
                attention_groups=attention_groups if plain else None,
                groups=None if level["skip"] else level["groups"] or groups, only_cross=level["only_cross"] and cross)
