"""Small random files by the names in which their authors published them, and references of those nets that read such names."""
import math
import re

import numpy as np
import pytest

from ldm_jax.weights import maps_clip, original_autoencoder, original_bert, original_clip, original_unet, originals
from tests.weights.named import names

torch = pytest.importorskip("torch")
F = torch.nn.functional


def drawn(shapes, prefix="", seed=0):
    """Random tensors of these shapes: none of them zero, nor such that a sum explodes."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in sorted(shapes.items()):
        a = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            a = a if "embedding" in name else a * float(np.prod(shape[1:])) ** -0.5
        else:
            a = 0.2 * a + float(name.endswith("weight"))
        state[prefix + name] = a
    return state


def of_ldm(config):
    """The names in front of the dot and behind it: U-Net, first stage and text tower of a config of `ldm`."""
    _, params = originals.original_config(config)
    said = originals.ldm_options(params)
    _, unet = originals.target(said["unet_config"], "unet_config")
    size = said["image_size"]
    arguments = original_unet.ldm_arguments(unet, (size, size, said["channels"]))
    layout = original_unet.unet_rules(arguments, linear_projection=unet.get("use_linear_in_transformer", False))
    state = drawn(names("unet_of_levels", arguments, layout), "model.diffusion_model.")
    builder, arguments = original_autoencoder.autoencoder_arguments(*originals.target(said["first_stage_config"], ""), 1.0)
    state |= drawn(names(builder, arguments, original_autoencoder.autoencoder_rules(arguments)), "first_stage_model.", 1)
    if said["cond_stage_config"] == originals.UNCONDITIONAL:
        return state
    kind, params = originals.target(said["cond_stage_config"], "")
    if kind == "FrozenCLIPEmbedder":
        return state | drawn(clip(params), "cond_stage_model.transformer.", 2)
    if kind == "FrozenOpenCLIPEmbedder":  # the whole tower is in the file
        return state | drawn(open_clip({**params, "layer": "last"}), "cond_stage_model.model.", 2)
    if kind == "BERTEmbedder":
        arguments, block = original_bert.bert_arguments(params), re.compile(r"(attention|mlp)\.(\d+)\.")
        layer = lambda m: f"attn_layers.layers.{2 * int(m[2]) + (m[1] == 'mlp')}."
        found = names("bert_text", arguments, original_bert.bert_rules(arguments))
        found = {block.sub(layer, name): shape for name, shape in found.items()}
        return state | drawn(found | {"to_logits.bias": (params["vocab_size"],)}, "cond_stage_model.transformer.", 2)
    if kind == "GeneralConditioner":
        second = {"arch": "ViT-bigG-14", "text_cfg": params["text_cfg"]}
        return state | drawn(clip({"text_config": params["text_config"]}), "conditioner.embedders.0.transformer.", 2) | drawn(
            open_clip(second), "conditioner.embedders.1.model.", 3)
    return state | drawn({"embedding.weight": (params["n_classes"], params["embed_dim"])}, "cond_stage_model.", 2)


def clip(params):
    arguments = original_clip.clip_arguments(params, {})
    return names("clip_text", arguments, maps_clip.clip_text_rules(arguments))


def open_clip(params):
    arguments = original_clip.open_arguments(params, projects=True)
    return {**names("clip_text", arguments, original_clip.open_rules(arguments)), "logit_scale": ()}


def alphas(first, last, steps=1000):
    """The table of alphas that files of `ldm` carry."""
    return torch.cumprod(1 - torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2, 0).float()


def sinusoids(t, width):
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * torch.arange(width // 2) / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], -1)


def adm(state, x, t, y=None, *, width, blocks, heads, order, block_resampling=False, scale_shift=True):
    """The raw output of the U-Net (Dhariwal & Nichol 2021) with the tensors of `state`. heads: channels -> their number."""
    linear = lambda name, a: F.linear(a, state[f"{name}.weight"], state[f"{name}.bias"])
    norm = lambda name, a: F.group_norm(a, 32, state[f"{name}.weight"], state[f"{name}.bias"])
    larger = lambda a: a.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def conv(name, a, **options):
        weight = state[f"{name}.weight"]
        return F.conv2d(a, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2, **options)

    def res(p, h, emb, resize):
        e = linear(f"{p}.emb_layers.1", F.silu(emb))[:, :, None, None]
        a = conv(f"{p}.in_layers.2", resize(F.silu(norm(f"{p}.in_layers.0", h))))
        if scale_shift:
            scale, shift = e.chunk(2, 1)
            a = norm(f"{p}.out_layers.0", a) * (1 + scale) + shift
        else:
            a = norm(f"{p}.out_layers.0", a + e)
        h = resize(h)
        return conv(f"{p}.out_layers.3", F.silu(a)) + (conv(f"{p}.skip_connection", h) if f"{p}.skip_connection.weight" in state else h)

    def attend(p, h):
        B, C, H, W = h.shape
        n = heads(C)
        a = F.conv1d(norm(f"{p}.norm", h).reshape(B, C, -1), state[f"{p}.qkv.weight"], state[f"{p}.qkv.bias"])
        if order == "new":
            q, k, v = a.reshape(B, 3, n, C // n, H * W).unbind(1)
        else:
            q, k, v = a.reshape(B, n, 3, C // n, H * W).unbind(2)
        a = torch.softmax(q.transpose(2, 3) @ k / math.sqrt(C // n), -1) @ v.transpose(2, 3)
        a = F.conv1d(a.transpose(2, 3).reshape(B, C, -1), state[f"{p}.proj_out.weight"], state[f"{p}.proj_out.bias"])
        return h + a.reshape(h.shape)

    def module(p, h, emb, resize):
        if f"{p}.in_layers.0.weight" in state:
            return res(p, h, emb, resize)
        if f"{p}.qkv.weight" in state:
            return attend(p, h)
        if f"{p}.op.weight" in state:
            return conv(f"{p}.op", h, stride=2)
        if f"{p}.conv.weight" in state:
            return conv(f"{p}.conv", larger(h))
        return conv(p, h)

    count = lambda p: len({name[len(p) + 1:].split(".")[0] for name in state if name.startswith(f"{p}.")})
    same = lambda a: a
    emb = linear("time_embed.2", F.silu(linear("time_embed.0", sinusoids(t, width))))
    emb = emb if y is None else emb + state["label_emb.weight"][y]
    h, kept = x, []
    for n in range(count("input_blocks")):
        smaller = block_resampling and n and n % (blocks + 1) == 0
        for m in range(count(f"input_blocks.{n}")):
            h = module(f"input_blocks.{n}.{m}", h, emb, (lambda a: F.avg_pool2d(a, 2)) if smaller else same)
        kept.append(h)
    for m in range(3):
        h = module(f"middle_block.{m}", h, emb, same)
    if not count("output_blocks"):
        return F.silu(norm("out.0", h))
    for n in range(count("output_blocks")):
        h = torch.cat([h, kept.pop()], 1)
        for m in range(count(f"output_blocks.{n}")):
            h = module(f"output_blocks.{n}.{m}", h, emb, larger if m else same)
    return conv("out.2", F.silu(norm("out.0", h)))


def adm_classifier(state, x, t, *, pool, head_width, **options):
    """The logits of the classifier of noisy images; the answer of the mean to all, or the mean alone."""
    h = adm(state, x, t, heads=lambda channels: channels // head_width, order="legacy", **options)
    B, C, n = *h.shape[:2], h.shape[1] // head_width
    h = h.reshape(B, C, -1)
    if pool == "adaptive":
        return F.linear(h.mean(-1), state["out.3.weight"][:, :, 0, 0], state["out.3.bias"])
    h = torch.cat([h.mean(-1, keepdim=True), h], -1) + state["out.2.positional_embedding"]
    q, k, v = F.conv1d(h, state["out.2.qkv_proj.weight"], state["out.2.qkv_proj.bias"]).reshape(B, 3, n, C // n, -1).unbind(1)
    h = (torch.softmax(q.transpose(2, 3) @ k / math.sqrt(C // n), -1) @ v.transpose(2, 3)).transpose(2, 3).reshape(B, C, -1)
    return F.linear(h[..., 0], state["out.2.c_proj.weight"][:, :, 0], state["out.2.c_proj.bias"])


def positions(side, width):
    """The fixed positions in DiT's files: sines and cosines of the column, then of the row."""
    angles = np.arange(side)[:, None] / 10000.0 ** (np.arange(width // 4) / (width // 4))
    part = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    column, row = np.tile(part, (side, 1)), np.repeat(part, side, 0)
    return torch.tensor(np.concatenate([column, row], 1)[None], dtype=torch.float32)


def dit(state, x, t, y, *, depth, heads, patch):
    """The raw output of DiT (Peebles & Xie 2023) with the tensors of `state`."""
    linear = lambda name, a: F.linear(a, state[f"{name}.weight"], state[f"{name}.bias"])
    moved = lambda a, shift, scale: F.layer_norm(a, a.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    h = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    B, D, rows, cols = h.shape
    h = h.flatten(2).transpose(1, 2) + state["pos_embed"]
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", sinusoids(t, 256)))) + state["y_embedder.embedding_table.weight"][y]
    c = F.silu(c)
    for i in range(depth):
        p = f"blocks.{i}"
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = linear(f"{p}.adaLN_modulation.1", c).chunk(6, -1)
        q, k, v = linear(f"{p}.attn.qkv", moved(h, shift_1, scale_1)).reshape(B, -1, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        a = (torch.softmax(q @ k.transpose(2, 3) / math.sqrt(D // heads), -1) @ v).transpose(1, 2).reshape(B, -1, D)
        h = h + gate_1[:, None] * linear(f"{p}.attn.proj", a)
        a = F.gelu(linear(f"{p}.mlp.fc1", moved(h, shift_2, scale_2)), approximate="tanh")
        h = h + gate_2[:, None] * linear(f"{p}.mlp.fc2", a)
    h = linear("final_layer.linear", moved(h, *linear("final_layer.adaLN_modulation.1", c).chunk(2, -1)))
    return h.reshape(B, rows, cols, patch, patch, -1).permute(0, 5, 1, 3, 2, 4).reshape(B, -1, rows * patch, cols * patch)
