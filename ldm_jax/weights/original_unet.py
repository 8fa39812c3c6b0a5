"""The U-Net of Dhariwal & Nichol's and Rombach et al.'s own files: its flags as levels of ours, and the names of its arrays.

    input_blocks.N.0, .1     convolution, then a residual block and perhaps an attention each, or what halves the size
    middle_block.0, .1, .2   residual block, attention, residual block
    output_blocks.N.0, .1    the same on the way up; what doubles the size stands last in its level's last block
    time_embed, label_emb, out

A plain attention is published with its queries, keys and values as one matrix. Its rows lie head by head, each with its own
queries, keys and values ("legacy"), or all queries, all keys, all values ("new").
"""
from typing import Any, Callable, Dict, List, Mapping, Tuple

import numpy as np

from ldm_jax.weights.maps_unet import transformer
from ldm_jax.weights.options import options, refuse, tuples
from ldm_jax.weights.rules import LINEAR, Rule, Transform, conv, linear, norm, pointwise, table

GROUPS = 32
MULTS = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)}
ENLARGED = {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)}  # of the nets that enlarge pictures

FLAGS = {"image_size": 64, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
         "num_head_channels": -1, "attention_resolutions": "16,8", "channel_mult": "", "dropout": 0.0, "class_cond": False,
         "use_scale_shift_norm": True, "resblock_updown": False, "use_new_attention_order": False, "learn_sigma": False,
         "small_size": None, "large_size": None, "num_classes": 1000}
FLAGS_NO_EFFECT = {"use_checkpoint", "use_fp16"}
CLASSIFIER = {"image_size": 64, "classifier_width": 128, "classifier_depth": 2, "classifier_attention_resolutions": "32,16,8",
              "classifier_use_scale_shift_norm": True, "classifier_resblock_updown": True, "classifier_pool": "attention",
              "channel_mult": "", "num_head_channels": 64, "num_classes": 1000}
POOLS = {"attention": "attention", "adaptive": "mean"}

UNET = {"in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": 2, "attention_resolutions": (4, 2, 1),
        "dropout": 0.0, "channel_mult": (1, 2, 4, 8), "num_classes": None, "num_heads": -1, "num_head_channels": -1,
        "num_heads_upsample": -1, "use_scale_shift_norm": False, "resblock_updown": False, "use_new_attention_order": False,
        "use_spatial_transformer": False, "transformer_depth": 1, "context_dim": None, "use_linear_in_transformer": False,
        "adm_in_channels": None}
UNET_ONLY = {"conv_resample": (True,), "dims": (2,), "n_embed": (None,), "disable_self_attentions": (None,),
             "num_attention_blocks": (None,), "disable_middle_self_attn": (False,),
             "num_classes": lambda n: n in (None, "sequential") or isinstance(n, int)}
UNET_NO_EFFECT = {"image_size", "use_checkpoint", "use_fp16", "use_bf16", "legacy", "spatial_transformer_attn_type"}


def numbers(value: Any, kind: Callable = int) -> Tuple:
    """"32,16,8", one number, or several, as a tuple."""
    if isinstance(value, str):
        value = value.split(",") if value else ()
    return tuple(kind(v) for v in (value if isinstance(value, (list, tuple)) else (value,)))


def adm_arguments(flags: Mapping[str, Any]) -> Dict[str, Any]:
    """The arguments of `ldm_jax.models.unet.unet_of_levels` for the flags of guided-diffusion, with its names and defaults.

    A net that enlarges pictures has small_size and large_size in the place of image_size.
    """
    said = options(flags, FLAGS, {}, FLAGS_NO_EFFECT)
    large = said["large_size"]
    if (large is None) != (said["small_size"] is None):
        refuse(flags, [f"large_size={large!r}", f"small_size={said['small_size']!r} together"])
    size = large or said["image_size"]
    mults = _mults(flags, said, size, ENLARGED if large else MULTS)
    attending = {size // r for r in numbers(said["attention_resolutions"])}
    classes = said["num_classes"] if said["class_cond"] else None
    return _arguments(
        flags, (size, size, 3), 6 if said["learn_sigma"] else 3, said["num_channels"], mults,
        (said["num_res_blocks"],) * len(mults), attending, _heads(flags, said), said, first=int(mults[0] * said["num_channels"]),
        classes=classes, concat=3 if large else None)


def _mults(flags, said, size, sizes) -> Tuple[float, ...]:
    mults = numbers(said["channel_mult"], float) or sizes.get(size)
    if not mults:
        refuse(flags, [f"image size {size} without channel_mult (known: {', '.join(map(str, sizes))})"])
    return tuple(mults)


def _heads(flags, said) -> Callable[[int, bool], int]:
    """(channels, whether on the way up) -> heads."""
    def heads(channels: int, up: bool) -> int:
        if said["num_head_channels"] != -1:
            count, whole = channels // said["num_head_channels"], channels % said["num_head_channels"] == 0
        else:
            count = said["num_heads_upsample"] if up and said["num_heads_upsample"] != -1 else said["num_heads"]
            whole = count > 0 and channels % count == 0
        if not whole or count < 1:
            refuse(flags, [f"num_heads={said['num_heads']!r}, num_head_channels={said['num_head_channels']!r} for {channels} "
                           f"channels"])
        return count

    return heads


def _arguments(flags, image_shape, out_channels, width, mults, blocks, attending, heads, said, *, first, classes=None,
               concat=None, depths=None, context=None, vector=None) -> Dict[str, Any]:
    """The arguments of a net whose level i is halved i times. depths: of each level's transformers, None for plain attentions."""
    n, back = len(mults), "block" if said["resblock_updown"] else "conv"
    channels = [int(mult * width) for mult in mults]
    wrong = [c for c in (first, *channels) if c % GROUPS or not c]
    if wrong:
        refuse(flags, [f"{wrong[0]} channels, no multiple of {GROUPS}"])

    def level(i: int, up: bool) -> Dict[str, Any]:
        fields = dict(channels=channels[i], blocks=blocks[i] + up, attention=None, resample=None)
        if i != n - 1 and not up:
            fields["resample"] = "block" if said["resblock_updown"] else "conv_centred"
        elif i and up:
            fields["resample"] = back
        return {**fields, **attention(i, blocks[i] + up, up)} if 2**i in attending else fields

    def attention(i: int, count: int, up: bool) -> Dict[str, Any]:
        found = dict(attention="cross" if depths else "self", heads=heads(channels[i], up))
        return {**found, "depths": (depths[i],) * count} if depths else found

    middle = dict(channels=channels[-1], blocks=2, **attention(n - 1, 1, False))
    inputs = dict(classes=classes, class_kind="table" if classes else None)
    if vector:
        inputs.update(vector="mlp")
    return dict(
        image_shape=image_shape, out_channels=out_channels, width=first, down=[level(i, False) for i in range(n)], middle=middle,
        up=[level(i, True) for i in range(n)], time=dict(width=width, hidden=4 * width, order="cos_sin"), inputs=inputs,
        class_kind="plain" if classes else "null", num_classes=classes, context_dim=context, vector_dim=vector,
        concat_channels=concat, dropout=said["dropout"], scale_shift=said["use_scale_shift_norm"], norm_groups=GROUPS)


def ldm_arguments(params: Mapping[str, Any], image_shape: Tuple[int, int, int]) -> Dict[str, Any]:
    """The same for the unet_config of a yaml of Rombach et al.; channels beyond those of `image_shape` are concatenated ones."""
    said = options(params, UNET, UNET_ONLY, UNET_NO_EFFECT)
    mults, width, C = said["channel_mult"], said["model_channels"], image_shape[2]
    blocks = said["num_res_blocks"] if isinstance(said["num_res_blocks"], tuple) else (said["num_res_blocks"],) * len(mults)
    depths, cross = said["transformer_depth"], said["use_spatial_transformer"]
    depths = depths if isinstance(depths, tuple) else (depths,) * len(mults)
    wrong = []
    if len(blocks) != len(mults) or len(depths) != len(mults):
        wrong.append(f"num_res_blocks={said['num_res_blocks']!r}, transformer_depth={said['transformer_depth']!r} for "
                     f"{len(mults)} levels")
    if bool(cross) != bool(said["context_dim"]):
        wrong.append(f"use_spatial_transformer={cross!r} with context_dim={said['context_dim']!r}")
    if cross and said["num_heads_upsample"] != -1:
        wrong.append(f"num_heads_upsample={said['num_heads_upsample']!r} with use_spatial_transformer")
    if said["in_channels"] < C:
        wrong.append(f"in_channels={said['in_channels']!r} for x_t of {C} channels")
    if (said["num_classes"] == "sequential") != bool(said["adm_in_channels"]):
        wrong.append(f"num_classes={said['num_classes']!r} with adm_in_channels={said['adm_in_channels']!r}")
    refuse(params, wrong)
    context = tuples(said["context_dim"])
    if isinstance(context, tuple):
        if len(set(context)) != 1:
            refuse(params, [f"context_dim={context!r} that differ"])
        context = context[0]
    classes = said["num_classes"] if isinstance(said["num_classes"], int) else None
    return _arguments(params, image_shape, said["out_channels"], width, mults, blocks, set(said["attention_resolutions"]),
                      _heads(params, said), said, first=width, classes=classes, concat=said["in_channels"] - C or None,
                      depths=depths if cross else None, context=context, vector=said["adm_in_channels"])


def classifier_arguments(flags: Mapping[str, Any]) -> Dict[str, Any]:
    """The arguments of `ldm_jax.models.classifier.noisy_classifier` for the flags of guided-diffusion, with its defaults."""
    said = options(flags, CLASSIFIER, {"classifier_pool": tuple(POOLS)}, {"classifier_use_fp16"})
    size, width = said["image_size"], said["classifier_width"]
    mults = _mults(flags, said, size, MULTS)
    attending = {size // r for r in numbers(said["classifier_attention_resolutions"])}
    first = int(mults[0] * width)
    whole = [int(mult * width) / first for mult in mults]
    if any(m != int(m) for m in whole) or first % GROUPS:
        refuse(flags, [f"channel_mult={mults!r} with classifier_width={width!r}"])
    return dict(
        image_shape=(size, size, 3), num_classes=said["num_classes"], width=first, time_width=width,
        mults=tuple(map(int, whole)), num_res_blocks=said["classifier_depth"],
        attention=tuple(size >> i for i in range(len(mults)) if 2**i in attending), head_width=said["num_head_channels"],
        pooling=POOLS[said["classifier_pool"]], resample="block" if said["classifier_resblock_updown"] else "conv_centred",
        scale_shift=said["classifier_use_scale_shift_norm"], norm_groups=GROUPS, timesteps=1000)


def _flat(a: np.ndarray) -> np.ndarray:
    """A convolution over a line, of one value [out, in, 1], as the matrix that it is."""
    if a.ndim == 3 and a.shape[2] == 1:
        return a[:, :, 0]
    if a.ndim not in (1, 2):
        raise ValueError("not a matrix")
    return a


LINE = Transform(lambda a: LINEAR.into(_flat(a)), lambda a: a.T[:, :, None])


def _heads_first(heads: int, matrix: bool) -> Transform:
    def into(a):
        rest = _flat(a).shape[1:]
        a = _flat(a).reshape(heads, 3, -1, *rest)
        return [a[:, i].reshape(-1, *rest) for i in range(3)]

    def out_of(parts):
        rest = parts[0].shape[1:]
        a = np.stack([p.reshape(heads, -1, *rest) for p in parts], 1).reshape(-1, *rest)
        return a[:, :, None] if matrix else a

    return Transform(into, out_of)


def _parts_first(matrix: bool) -> Transform:
    return Transform(lambda a: np.split(_flat(a), 3),
                     lambda parts: np.concatenate(parts)[:, :, None] if matrix else np.concatenate(parts))


def fused_attention(theirs: str, ours: str, heads: int, order: str) -> List[Rule]:
    """The rules of queries, keys and values in one matrix. order: "legacy" or "new"."""
    rules = []
    for name, leaf, matrix in (("weight", "kernel", True), ("bias", "bias", False)):
        parts = _heads_first(heads, matrix) if order == "legacy" else _parts_first(matrix)
        transform = dict(transform=LINEAR) if matrix else {}
        rules.append(Rule(f"{theirs}.{name}", tuple(f"{ours}/{x}/{leaf}" for x in "qkv"), parts=parts, **transform))
    return rules


def plain_attention(theirs: str, ours: str, heads: int, order: str) -> List[Rule]:
    return [*norm(f"{theirs}.norm", f"{ours}/norm"), *fused_attention(f"{theirs}.qkv", ours, heads, order),
            Rule(f"{theirs}.proj_out.weight", f"{ours}/out/kernel", LINE), Rule(f"{theirs}.proj_out.bias", f"{ours}/out/bias")]


def res(theirs: str, ours: str, skip: bool = False) -> List[Rule]:
    """The rules of a residual block, with a 1x1 convolution beside it where it has one."""
    rules = [*norm(f"{theirs}.in_layers.0", f"{ours}/norm_1"), *conv(f"{theirs}.in_layers.2", f"{ours}/conv_1"),
             *linear(f"{theirs}.emb_layers.1", f"{ours}/emb"), *norm(f"{theirs}.out_layers.0", f"{ours}/norm_2"),
             *conv(f"{theirs}.out_layers.3", f"{ours}/conv_2")]
    return rules + (pointwise(f"{theirs}.skip_connection", f"{ours}/skip") if skip else [])


def _descent(width: int, down, middle, order: str, project) -> Tuple[List[Rule], List[int], Callable]:
    """(the rules of the first half, the channels kept, the rules of one attention)."""
    def attention(level, j, theirs, ours):
        if level["attention"] == "cross":
            return transformer(theirs, ours, level["depths"][j], project)
        return plain_attention(theirs, ours, level["heads"], order)

    rules, h, kept, k = conv("input_blocks.0.0", "conv_in"), width, [width], 1
    rules += linear("time_embed.0", "time_1") + linear("time_embed.2", "time_2")
    for i, level in enumerate(down):
        for j in range(level["blocks"]):
            rules += res(f"input_blocks.{k}.0", f"down_{i}_block_{j}", h != level["channels"])
            if level.get("attention"):
                rules += attention(level, j, f"input_blocks.{k}.1", f"down_{i}_attention_{j}")
            h, k = level["channels"], k + 1
            kept.append(h)
        if level["resample"]:
            block = level["resample"] == "block"
            rules += (res if block else conv)(f"input_blocks.{k}.0" + ("" if block else ".op"), f"down_{i}_resample")
            kept, k = [*kept, h], k + 1
    rules += res("middle_block.0", "mid_block_0") + attention(middle, 0, "middle_block.1", "mid_attention")
    return rules + res("middle_block.2", "mid_block_1"), kept, attention


def unet_rules(arguments: Mapping[str, Any], order: str = "legacy", linear_projection: bool = False) -> List[Rule]:
    """The rules of a U-Net with these arguments.

    order: of the plain attentions. linear_projection: transformers begin and end with a matrix instead of a 1x1 convolution.
    """
    up, h, k = arguments["up"], arguments["middle"]["channels"], 0
    rules, kept, attention = _descent(arguments["width"], arguments["down"], arguments["middle"], order,
                                      linear if linear_projection else pointwise)
    for i, level in reversed(list(enumerate(up))):
        for j in range(level["blocks"]):
            rules += res(f"output_blocks.{k}.0", f"up_{i}_block_{j}", h + kept.pop() != level["channels"])
            h, place = level["channels"], 1
            if level.get("attention"):
                rules += attention(level, j, f"output_blocks.{k}.1", f"up_{i}_attention_{j}")
                place = 2
            if level["resample"] and j == level["blocks"] - 1:
                block = level["resample"] == "block"
                rules += (res if block else conv)(f"output_blocks.{k}.{place}" + ("" if block else ".conv"), f"up_{i}_resample")
            k += 1
    if arguments["inputs"]["class_kind"]:
        rules += table("label_emb", "class")
    if arguments["inputs"].get("vector"):
        rules += linear("label_emb.0.0", "vector_1") + linear("label_emb.0.2", "vector_2")
    return rules + norm("out.0", "norm_out") + conv("out.2", "conv_out")


def classifier_rules(arguments: Mapping[str, Any]) -> List[Rule]:
    """The rules of a classifier of noisy images with these arguments."""
    a, n = arguments, len(arguments["mults"])
    level = lambda i: dict(channels=a["width"] * a["mults"][i], blocks=a["num_res_blocks"], resample=None if i == n - 1 else
                           a["resample"], attention="self" if a["image_shape"][0] >> i in a["attention"] else None,
                           heads=a["width"] * a["mults"][i] // a["head_width"])
    down = [level(i) for i in range(n)]
    rules, _, _ = _descent(a["width"], down, {**down[-1], "attention": "self"}, "legacy", None)
    rules += norm("out.0", "norm_out")
    if a["pooling"] == "mean":
        return rules + pointwise("out.3", "logits")
    pool = fused_attention("out.2.qkv_proj", "pool", 1, "new")
    transposed = Transform(lambda x: _matrix(x).T, lambda x: x.T)
    return rules + pool + [Rule("out.2.positional_embedding", "pool/positions", transposed),
                           Rule("out.2.c_proj.weight", "logits/kernel", LINE), Rule("out.2.c_proj.bias", "logits/bias")]


def _matrix(a: np.ndarray) -> np.ndarray:
    if a.ndim != 2:
        raise ValueError("not a matrix")
    return a
