"""The same networks and the same work in PyTorch (the `parity` extra): an AdamW update with its moving average, and DDIM sampling.

Each is run eagerly and compiled, with fused attention and a fused optimiser, in float32 on CPU and under bfloat16 autocast on a GPU.
U-Nets are those of diffusers; DiT is written here after Peebles & Xie 2023, its parameters named as in their files.
"""
import copy
import functools
import math
from typing import Any, Callable, Dict, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ldm_jax.benchmark import nets
from ldm_jax.models.dit import SIZES, sincos_positions
from ldm_jax.types import UserError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _linears(*sizes: int) -> nn.Sequential:
    """Linear layers with silu between them; a single one has silu in front of it."""
    if len(sizes) == 2:
        return nn.Sequential(nn.SiLU(), nn.Linear(*sizes))
    return nn.Sequential(nn.Linear(*sizes[:2]), nn.SiLU(), nn.Linear(*sizes[1:]))


class Block(nn.Module):
    """A block of DiT; c [B, D] has been through no activation."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.adaLN_modulation = _linears(width, 6 * width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x, c):
        B, S, D = x.shape
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        h = F.layer_norm(x, (D,), eps=1e-6) * (1 + scale_1) + shift_1
        q, k, v = self.attn["qkv"](h).reshape(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        x = x + gate_1 * self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, S, D))
        h = F.layer_norm(x, (D,), eps=1e-6) * (1 + scale_2) + shift_2
        return x + gate_2 * self.mlp["fc2"](F.gelu(self.mlp["fc1"](h), approximate="tanh"))


class DiT(nn.Module):
    """(x [B, C, H, W], t [B] in 0..999, y [B]) -> [B, C, H, W]."""

    def __init__(self, side: int, channels: int, depth: int, width: int, heads: int, patch: int = 2, classes: int = nets.CLASSES):
        super().__init__()
        self.patch, self.out = patch, channels
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, patch)})
        self.t_embedder = nn.ModuleDict({"mlp": _linears(256, width, width)})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        last = nn.Linear(width, patch * patch * channels)
        self.final_layer = nn.ModuleDict({"adaLN_modulation": _linears(width, 2 * width), "linear": last})
        self.register_buffer("pos_embed", torch.tensor(sincos_positions(side // patch, side // patch, width))[None])

    def forward(self, x, t, y):
        x = self.x_embedder["proj"](x)
        B, D, rows, cols = x.shape
        x = x.flatten(2).transpose(1, 2) + self.pos_embed
        angles = t[:, None] * torch.exp(-math.log(10000.0) / 128 * torch.arange(128, device=t.device))
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], -1)) + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        x = self.final_layer["linear"](F.layer_norm(x, (D,), eps=1e-6) * (1 + scale) + shift)
        p = self.patch
        return x.reshape(B, rows, cols, p, p, self.out).permute(0, 5, 1, 3, 2, 4).reshape(B, self.out, rows * p, cols * p)


def _dit(size: str) -> nn.Module:
    depth, width, heads = SIZES[size]
    return DiT(32, 4, depth, width, heads)


def _ddpm_cifar() -> nn.Module:
    from diffusers import UNet2DModel
    return UNet2DModel(sample_size=32, in_channels=3, out_channels=3, block_out_channels=(128, 256, 256, 256), layers_per_block=2,
                       down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                       up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), norm_eps=1e-6, attention_head_dim=None,
                       dropout=0.1, downsample_padding=0)


def _digits() -> nn.Module:
    from diffusers import UNet2DModel
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
                       down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                       attention_head_dim=16, dropout=0.1, num_class_embeds=nets.CLASSES + 1)


def _sd_1() -> nn.Module:
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


# name of a case -> () -> its network, with fresh parameters
PEERS = {"dit_s2": lambda: _dit("S"), "dit_b2": lambda: _dit("B"), "dit_xl2": lambda: _dit("XL"), "ddpm_cifar": _ddpm_cifar,
         "digits": _digits, "sd_1": _sd_1}


def _made(name: str) -> nn.Module:
    if name not in PEERS:
        raise UserError(f"net {name!r} has no peer in torch; choose from: {', '.join(PEERS)}")
    net = PEERS[name]().to(DEVICE)
    return net if name.startswith("dit") else net.to(memory_format=torch.channels_last)


def raw(net: nn.Module, x, t, cond) -> Any:
    """The network's output, whichever class it is of."""
    if cond is None:
        return net(x, t).sample
    return net(x, t, cond) if isinstance(net, DiT) or isinstance(getattr(net, "_orig_mod", None), DiT) else net(x, t, cond).sample


def _given(case: nets.Case, num: int, null: bool = False):
    cond = nets.condition_of(case, num)
    if cond is None:
        return None
    a = torch.tensor(cond["context"] if isinstance(cond, dict) else cond.astype(np.int64), device=DEVICE)
    return (torch.zeros_like(a) if a.ndim > 1 else torch.full_like(a, nets.CLASSES)) if null else a


def _schedule() -> torch.Tensor:
    """abar_k = alpha^2 of the linear schedule, k = 0..999 (Ho et al. 2020)."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float().to(DEVICE)


def _autocast():
    return torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")



def training(name: str, size: int, labels: Sequence[str]) -> Dict[str, Callable[[], None]]:
    """label -> one update, each with parameters of its own."""
    case = nets.CASES[name]
    images = torch.tensor(np.asarray(nets.batch_of(case, size)["image"]), device=DEVICE).permute(0, 3, 1, 2)
    cond, abar, net = _given(case, size), _schedule(), _made(name).train()

    def update(net: nn.Module) -> Callable[[], None]:
        parameters = list(net.parameters())
        tx, ema = torch.optim.AdamW(parameters, 1e-4, fused=True), [p.detach().clone() for p in parameters]
        compiled = torch.compile(net) if label == "torch compiled" else net

        def step():
            x0 = images.float() / 127.5 - 1.0
            k, noise = torch.randint(0, 1000, (size,), device=DEVICE), torch.randn_like(x0)
            a = abar[k].reshape(-1, 1, 1, 1)
            with _autocast():
                loss = F.mse_loss(raw(compiled, a.sqrt() * x0 + (1 - a).sqrt() * noise, k, cond).float(), noise)
            tx.zero_grad(set_to_none=True)
            loss.backward()
            tx.step()
            torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1e-4)
            loss.item()

        return step

    calls = {}
    for label in labels:
        calls[label] = update(copy.deepcopy(net))
    return calls


@torch.no_grad()
def ddim(net: Callable, x, ks, abar, cond, null=None, guidance: float = 1.0):
    """DDIM over the steps ks, descending, to step -1 where abar = 1 (Song, Meng & Ermon 2021, eq. 12, eta = 0)."""
    for k, s in zip(ks, [*ks[1:], -1]):
        t = torch.full((len(x),), k, device=x.device)
        with _autocast():
            if guidance == 1.0:
                eps = raw(net, x, t, cond).float()
            else:
                both = raw(net, torch.cat([x, x]), torch.cat([t, t]), torch.cat([cond, null])).float()
                c, u = both.chunk(2)
                eps = u + guidance * (c - u)
        a, b = abar[k], abar[s] if s >= 0 else torch.ones((), device=x.device)
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    return x


@functools.lru_cache(maxsize=1)
def _for_sampling(name: str) -> Dict[str, nn.Module]:
    net = _made(name).eval()
    return {"torch eager": net, "torch compiled": torch.compile(net)}


def sampling(name: str, count: int, guidance: float, steps: int, labels: Sequence[str]) -> Dict[str, Callable[[], Any]]:
    """label -> pictures, as numbers in [0, 1] on the host."""
    case = nets.CASES[name]
    cond, null, abar, made = _given(case, count), _given(case, count, null=True), _schedule(), _for_sampling(name)
    ks = [round(1000 * (steps - i) / steps) - 1 for i in range(steps)]

    def pictures(net):
        H, W, C = case.shape
        x = torch.randn(count, C, H, W, device=DEVICE)
        x = x if name.startswith("dit") else x.contiguous(memory_format=torch.channels_last)
        return (ddim(net, x, ks, abar, cond, null, guidance) / 2 + 0.5).clamp(0, 1).cpu().numpy()

    return {label: functools.partial(pictures, made[label]) for label in labels}
