"""UNet2DModel and UNet2DConditionModel of diffusers: their config as levels of our U-Net, and the names of their arrays.

What the names of options do not tell: in the transformers of UNet2DConditionModel `attention_head_dim` is the number of heads, in
plain attentions the width of one, where the way up reads the list from the smallest image. resnet_out_scale_factor and
resnet_skip_time_act act in Resnet*sampleBlock2D alone, the skip blocks always divide by sqrt(2), and the middle's transformer is
not divided. The images that are concatenated to x_t are the channels that the net has in but not out.
"""
import math
from typing import Any, Dict, List, Mapping, Optional, Tuple

from ldm_jax.weights.maps_autoencoder import attention_block, res
from ldm_jax.weights.options import options, per_level, refuse, sides
from ldm_jax.weights.rules import Rule, conv, linear, norm, pointwise, table

ACTS = ("silu", "swish", "mish", "gelu", "relu")
PADDINGS = {0: "conv", 1: "conv_centred"}

COMMON = {"sample_size": None, "center_input_sample": False, "time_embedding_type": "positional", "time_embedding_dim": None,
          "freq_shift": 0, "flip_sin_to_cos": True, "layers_per_block": 2, "mid_block_scale_factor": 1, "downsample_padding": 1,
          "dropout": 0.0, "act_fn": "silu", "attention_head_dim": 8, "norm_num_groups": 32, "norm_eps": 1e-5,
          "resnet_time_scale_shift": "default", "class_embed_type": None, "num_class_embeds": None}
PLAIN = {**COMMON, "in_channels": 3, "out_channels": 3, "down_block_types": ("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
         "mid_block_type": "UNetMidBlock2D", "up_block_types": ("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
         "block_out_channels": (224, 448, 672, 896), "downsample_type": "conv", "upsample_type": "conv",
         "attn_norm_num_groups": None, "add_attention": True, "num_train_timesteps": None}
CONDITION = {**COMMON, "in_channels": 4, "out_channels": 4,
             "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "mid_block_type": "UNetMidBlock2DCrossAttn",
             "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, "only_cross_attention": False,
             "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 1280, "transformer_layers_per_block": 1,
             "reverse_transformer_layers_per_block": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
             "use_linear_projection": False, "addition_embed_type": None, "addition_time_embed_dim": None,
             "upcast_attention": False, "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
             "time_embedding_act_fn": None, "timestep_post_act": None, "time_cond_proj_dim": None, "conv_in_kernel": 3,
             "conv_out_kernel": 3, "projection_class_embeddings_input_dim": None, "class_embeddings_concat": False}
PLAIN_ONLY = {"act_fn": ACTS, "resnet_time_scale_shift": ("default", "scale_shift"), "downsample_padding": (0, 1),
              "time_embedding_type": ("positional", "fourier", "learned"), "mid_block_type": ("UNetMidBlock2D", None),
              "class_embed_type": (None, "timestep", "identity"), "downsample_type": ("conv", "resnet"),
              "upsample_type": ("conv", "resnet")}
CONDITION_ONLY = {"act_fn": ACTS, "resnet_time_scale_shift": ("default", "scale_shift"), "downsample_padding": (0, 1),
                  "time_embedding_type": ("positional", "fourier"),
                  "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
                  "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
                  "addition_embed_type": (None, "text_time"), "encoder_hid_dim_type": (None, "text_proj"),
                  "time_embedding_act_fn": (None, *ACTS), "timestep_post_act": (None, *ACTS), "dual_cross_attention": (False,),
                  "attention_type": ("default",), "cross_attention_norm": (None,), "num_attention_heads": (None,),
                  "conv_in_kernel": lambda k: k % 2 == 1, "conv_out_kernel": lambda k: k % 2 == 1}
CONDITION_NO_EFFECT = {"addition_embed_type_num_heads", "mid_block_only_cross_attention"}  # of what is refused above

# block types without Down/Up: (attention, how it resamples where that is not an option)
KINDS = {"Block2D": (None, "conv"), "AttnBlock2D": ("self", "conv"), "CrossAttnBlock2D": ("cross", "conv"),
         "ResnetsampleBlock2D": (None, "block"), "SkipBlock2D": (None, "skip"), "AttnSkipBlock2D": ("self", "skip")}


def _kind(block: str, way: str, allowed: Tuple[str, ...]) -> Optional[Tuple[Optional[str], str]]:
    """The row of KINDS of a published block type, None where there is none."""
    name = block.removeprefix("UNetRes")
    plain = name.replace(way, "", 1).replace(way.lower() + "sample", "sample", 1)
    wanted = [key for key in allowed if key == plain]
    return KINDS[wanted[0]] if wanted and name != plain else None


def _ways(config: Mapping[str, Any], said: Mapping[str, Any], allowed: Tuple[str, ...]):
    """(the kinds down, the kinds up), from the largest image to the smallest; refuses unknown block types."""
    n = len(said["block_out_channels"])
    kinds, wrong = [], []
    for way, key in (("Down", "down_block_types"), ("Up", "up_block_types")):
        found = [_kind(block, way, allowed) for block in said[key]]
        if len(found) != n or None in found:
            wrong.append(f"{key}={said[key]!r}")
        kinds.append(found)
    refuse(config, wrong)
    return kinds[0], kinds[1][::-1]


def _level(channels: int, blocks: int, kind: Tuple[Optional[str], str], resample: Optional[str], **fields: Any) -> Dict[str, Any]:
    attention, how = kind
    skip = how == "skip"
    level = dict(channels=channels, blocks=blocks, attention=attention, resample=resample, **fields)
    if attention == "self" and skip:
        level["attention_groups"] = 32
    return {**level, "skip": True, "scale": math.sqrt(2.0)} if skip else level


def _self_heads(channels: int, head_width: Optional[int]) -> Dict[str, Any]:
    width = head_width or channels
    return dict(heads=channels // width, head_width=width)


def _inputs(config, said, hidden):
    """(fields of Inputs, class_kind, num_classes, vector_dim) of the class embedding that both kinds of net have."""
    kind, inputs, classes, vector = said["class_embed_type"], {}, ("null", None), None
    if kind is None and said["num_class_embeds"] is not None:
        inputs, classes = dict(classes=said["num_class_embeds"], class_kind="table"), ("plain", said["num_class_embeds"])
    elif kind == "timestep":
        if said["time_embedding_type"] != "positional":
            refuse(config, [f"class_embed_type='timestep' with time_embedding_type={said['time_embedding_type']!r}"])
        inputs, classes = dict(class_kind="number"), ("number", None)
    elif kind == "identity":
        inputs, vector = dict(vector="identity"), hidden
    return inputs, classes, vector


def _frame(config, said, time, inputs, classes, vector, **rest) -> Dict[str, Any]:
    C, concat = said["in_channels"], 0
    if C > said["out_channels"]:
        C, concat = said["out_channels"], C - said["out_channels"]
    n = len(said["block_out_channels"])
    return dict(image_shape=(*sides(said["sample_size"], 64, 2 ** (n - 1)), C), concat_channels=concat or None,
                out_channels=said["out_channels"], width=said["block_out_channels"][0], time=time,
                inputs=dict(inputs, centre=said["center_input_sample"]), class_kind=classes[0], num_classes=classes[1],
                vector_dim=vector, dropout=said["dropout"], scale_shift=said["resnet_time_scale_shift"] == "scale_shift",
                act=said["act_fn"], norm_eps=said["norm_eps"], **rest)


def _sinusoids(said, hidden):
    return dict(width=said["block_out_channels"][0], hidden=hidden, order="cos_sin" if said["flip_sin_to_cos"] else "sin_cos",
                shift=said["freq_shift"])


def unet2d_arguments(config: Mapping[str, Any], arrays: Mapping[str, Any]) -> Dict[str, Any]:
    """The arguments of `ldm_jax.models.unet.unet_of_levels` for the config of a UNet2DModel.

    With Fourier features the net's time is the noise level itself (`time_scale` 1); otherwise it is that of 1000 steps.
    """
    said = options(config, PLAIN, PLAIN_ONLY)
    widths, n = said["block_out_channels"], len(said["block_out_channels"])
    down, up = _ways(config, said, ("Block2D", "AttnBlock2D", "ResnetsampleBlock2D", "SkipBlock2D", "AttnSkipBlock2D"))
    groups, blocks = said["norm_num_groups"], said["layers_per_block"]
    if groups is None and not all(kind[1] == "skip" for kind in (*down, *up)):
        refuse(config, ["norm_num_groups=None with blocks other than skip blocks"])
    few = lambda channels: min(channels // 4, 32)

    def level(i: int, kind, way: str) -> Dict[str, Any]:
        resample = kind[1]
        if kind == KINDS["AttnBlock2D"]:
            resample = {"conv": "conv", "resnet": "block"}[said[f"{way}sample_type"]]
        if resample == "conv" and way == "down":
            resample = PADDINGS[said["downsample_padding"]]
        heads = _self_heads(widths[i], said["attention_head_dim"]) if kind[0] else {}
        last = i == (n - 1 if way == "down" else 0)
        late = dict(late=True) if way == "up" and kind == KINDS["AttnSkipBlock2D"] else {}
        return _level(widths[i], blocks + (way == "up"), kind, None if last else resample, **heads, **late)

    middle = None
    if said["mid_block_type"]:
        normed = said["attn_norm_num_groups"]
        if normed is None:
            normed = (groups or few(widths[-1])) if said["resnet_time_scale_shift"] == "default" else 0
        middle = dict(channels=widths[-1], blocks=2, groups=groups or few(widths[-1]), scale=said["mid_block_scale_factor"])
        if said["add_attention"]:
            middle.update(attention="self", attention_groups=normed, **_self_heads(widths[-1], said["attention_head_dim"]))
    hidden = said["time_embedding_dim"] or 4 * widths[0]
    inputs, classes, vector = _inputs(config, said, hidden)
    time, unit = _sinusoids(said, hidden), dict(timesteps=1000)
    if said["time_embedding_type"] == "fourier":
        time = dict(kind="log_fourier", width=2 * widths[0], hidden=hidden, order="sin_cos", divide=True)
        unit = dict(time_scale=1.0)
    elif said["time_embedding_type"] == "learned":
        time = dict(kind="table", width=widths[0], hidden=hidden, table=said["num_train_timesteps"])
    return _frame(config, said, time, inputs, classes, vector, down=[level(i, down[i], "down") for i in range(n)], middle=middle,
                  up=[level(i, up[i], "up") for i in range(n)], norm_groups=groups or few(widths[0]), **unit)


def condition_arguments(config: Mapping[str, Any], arrays: Mapping[str, Any]) -> Dict[str, Any]:
    """The arguments of `ldm_jax.models.unet.unet_of_levels` for the config of a UNet2DConditionModel."""
    said = options(config, CONDITION, CONDITION_ONLY, CONDITION_NO_EFFECT)
    widths, n = said["block_out_channels"], len(said["block_out_channels"])
    down, up = _ways(config, said, ("Block2D", "AttnBlock2D", "CrossAttnBlock2D", "ResnetsampleBlock2D"))
    each = lambda name: per_level(said[name], n, name, config)
    heads, blocks, only_cross = each("attention_head_dim"), each("layers_per_block"), each("only_cross_attention")
    dims, depths = each("cross_attention_dim"), each("transformer_layers_per_block")
    reverse = said["reverse_transformer_layers_per_block"]
    up_depths = depths if reverse is None else per_level(reverse, n, "reverse_transformer_layers_per_block", config)[::-1]
    if said["norm_num_groups"] is None:
        refuse(config, ["norm_num_groups=None"])

    def cross(i: int, depth: Any, count: int) -> Dict[str, Any]:
        depth = depth if isinstance(depth, tuple) else (depth,) * count
        if len(depth) < count or heads[i] is None or heads[i] > widths[i]:
            refuse(config, [f"transformer_layers_per_block={depth!r} or attention_head_dim={heads[i]!r} at level {i}"])
        return dict(depths=depth[:count], heads=heads[i])

    def level(i: int, kind, way: str) -> Dict[str, Any]:
        count, fields = blocks[i] + (way == "up"), {}
        if kind[0] == "cross":
            fields = dict(cross(i, (depths if way == "down" else up_depths)[i], count), only_cross=only_cross[i])
        elif kind[0]:
            fields = _self_heads(widths[i], heads[i if way == "down" else n - 1 - i])  # their list is not reversed on the way up
        elif kind[1] == "block":
            fields = dict(scale=said["resnet_out_scale_factor"], raw_time=said["resnet_skip_time_act"])
        resample = PADDINGS[said["downsample_padding"]] if kind[1] == "conv" and way == "down" else kind[1]
        return _level(widths[i], count, kind, None if i == (n - 1 if way == "down" else 0) else resample, **fields)

    middle = None
    if said["mid_block_type"]:
        middle = dict(channels=widths[-1], blocks=1, scale=said["mid_block_scale_factor"])
        if said["mid_block_type"] == "UNetMidBlock2DCrossAttn":
            middle.update(cross(n - 1, depths[-1], 1), blocks=2, attention="cross")
    crossing = {dims[i] for i in range(n) if "cross" in (down[i][0], up[i][0])}
    crossing |= {dims[-1]} if middle and middle.get("attention") else set()
    if len(crossing) > 1 or None in crossing:
        refuse(config, [f"cross_attention_dim={said['cross_attention_dim']!r} that differ or are missing, for one context"])
    context = crossing.pop() if crossing else None

    fourier = said["time_embedding_type"] == "fourier"
    hidden = said["time_embedding_dim"] or widths[0] * (2 if fourier else 4)
    inputs, classes, vector = _inputs(config, said, hidden)
    given = said["projection_class_embeddings_input_dim"]
    if said["class_embed_type"] in ("projection", "simple_projection"):
        inputs, vector = dict(vector="mlp" if said["class_embed_type"] == "projection" else "linear"), given
    if said["class_embed_type"] == "timestep":
        inputs["act"] = said["act_fn"]
    if said["addition_embed_type"]:
        if vector or said["class_embeddings_concat"]:
            refuse(config, [f"addition_embed_type={said['addition_embed_type']!r} with class_embed_type="
                            f"{said['class_embed_type']!r}, class_embeddings_concat={said['class_embeddings_concat']!r}"])
        inputs, vector = dict(inputs, vector="mlp", time_ids_dim=said["addition_time_embed_dim"]), given
    if inputs.get("vector") and not vector:
        refuse(config, [f"projection_class_embeddings_input_dim={given!r}"])
    if said["class_embeddings_concat"]:
        inputs["join"] = "concat"
    outer = said["encoder_hid_dim"]
    if said["encoder_hid_dim_type"] and not outer:
        refuse(config, [f"encoder_hid_dim={outer!r} with encoder_hid_dim_type={said['encoder_hid_dim_type']!r}"])
    inputs = dict(inputs, emb_act=said["time_embedding_act_fn"], context_dim=context if outer else None)
    time = dict(_sinusoids(said, hidden), act=said["act_fn"], post_act=said["timestep_post_act"],
                cond_dim=said["time_cond_proj_dim"])
    if fourier:
        time = dict(time, kind="fourier", width=hidden, shift=None)
    return _frame(config, said, time, inputs, classes, vector, down=[level(i, down[i], "down") for i in range(n)], middle=middle,
                  up=[level(i, up[i], "up") for i in range(n)], norm_groups=said["norm_num_groups"], end_act=said["act_fn"],
                  kernels=(said["conv_in_kernel"], said["conv_out_kernel"]), upcast=said["upcast_attention"],
                  context_dim=(outer or context) if context else None,
                  **(dict(time_scale=1.0) if fourier else dict(timesteps=1000)))


def unet_rules(arguments: Mapping[str, Any], config: Mapping[str, Any]) -> List[Rule]:
    """The rules of a U-Net with these arguments; the config says what is published as a matrix and where the vector goes."""
    project = linear if config.get("use_linear_projection") else pointwise
    down, up, middle, time, inputs = (arguments[name] for name in ("down", "up", "middle", "time", "inputs"))
    rules, last = conv("conv_in", "conv_in"), len(down) - 1

    def attention(level, j, theirs, ours):
        if level["attention"] == "self":
            return attention_block(theirs, ours, level.get("attention_groups") != 0)
        return transformer(theirs, ours, level["depths"][j], project)

    def resample(level, theirs, way, ours):
        kind = level.get("resample")
        if kind == "skip":
            image = pointwise if way == "down" else conv
            normed = norm(f"{theirs}.skip_norm", f"{ours}_image_norm") if way == "up" else []
            return (res(f"{theirs}.resnet_{way}", f"{ours}_resample", True, True) + normed +
                    image(f"{theirs}.skip_conv", f"{ours}_image"))
        if kind == "block":
            return res(f"{theirs}.{way}samplers.0", f"{ours}_resample", False, True)
        return conv(f"{theirs}.{way}samplers.0.conv", f"{ours}_resample") if kind else []

    h, kept = arguments["width"], [arguments["width"]]
    for i, level in enumerate(down):
        theirs, ours = f"down_blocks.{i}", f"down_{i}"
        for j in range(level["blocks"]):
            rules += res(f"{theirs}.resnets.{j}", f"{ours}_block_{j}", h != level["channels"], True)
            h = level["channels"]
            kept.append(h)
            if level.get("attention"):
                rules += attention(level, j, f"{theirs}.attentions.{j}", f"{ours}_attention_{j}")
        kept += [h] if level.get("resample") else []
        rules += resample(level, theirs, "down", ours)
    if middle:
        for j in range(middle["blocks"]):
            rules += res(f"mid_block.resnets.{j}", f"mid_block_{j}", False, True)
        if middle.get("attention"):
            rules += attention(middle, 0, "mid_block.attentions.0", "mid_attention")
    for i, level in reversed(list(enumerate(up))):
        theirs, ours = f"up_blocks.{last - i}", f"up_{i}"
        for j in range(level["blocks"]):
            rules += res(f"{theirs}.resnets.{j}", f"{ours}_block_{j}", h + kept.pop() != level["channels"], True)
            h = level["channels"]
            if level.get("attention") and not (level.get("late") and j):
                rules += attention(level, j, f"{theirs}.attentions.{j}", f"{ours}_attention_{j}")
        rules += resample(level, theirs, "up", ours)
    return rules + norm("conv_norm_out", "norm_out") + conv("conv_out", "conv_out") + _embeddings(time, inputs, config)


def _embeddings(time: Mapping[str, Any], inputs: Mapping[str, Any], config: Mapping[str, Any]) -> List[Rule]:
    two = lambda theirs, ours: linear(f"{theirs}.linear_1", f"{ours}_1") + linear(f"{theirs}.linear_2", f"{ours}_2")
    rules = two("time_embedding", "time")
    if time.get("cond_dim"):
        rules += linear("time_embedding.cond_proj", "time_cond", bias=False)
    if time.get("kind") in ("fourier", "log_fourier"):
        rules.append(Rule("time_proj.weight", "time_frequencies"))
    elif time.get("kind") == "table":
        rules += table("time_proj", "time_table")
    if inputs.get("class_kind") == "table":
        rules += table("class_embedding", "class")
    elif inputs.get("class_kind") == "number":
        rules += two("class_embedding", "class")
    if inputs.get("vector") == "mlp":
        rules += two("add_embedding" if config.get("addition_embed_type") else "class_embedding", "vector")
    elif inputs.get("vector") == "linear":
        rules += linear("class_embedding", "vector_1")
    return rules + (linear("encoder_hid_proj", "context_in") if inputs.get("context_dim") else [])


def transformer(theirs: str, ours: str, depth: int, project: Any) -> List[Rule]:
    """The rules of a spatial transformer; `project` is the kind of its first and last matrix."""
    rules = norm(f"{theirs}.norm", f"{ours}/norm")
    rules += project(f"{theirs}.proj_in", f"{ours}/project_in") + project(f"{theirs}.proj_out", f"{ours}/project_out")
    for k in range(depth):
        a, b = f"{theirs}.transformer_blocks.{k}", f"{ours}/block_{k}"
        for i in (1, 2, 3):
            rules += norm(f"{a}.norm{i}", f"{b}/norm_{i}")
        for their, own in (("attn1", "self_attention"), ("attn2", "cross_attention")):
            for x in "qkv":
                rules += linear(f"{a}.{their}.to_{x}", f"{b}/{own}/{x}", bias=False)
            rules += linear(f"{a}.{their}.to_out.0", f"{b}/{own}/out")
        rules += linear(f"{a}.ff.net.0.proj", f"{b}/ff_in") + linear(f"{a}.ff.net.2", f"{b}/ff_out")
    return rules
