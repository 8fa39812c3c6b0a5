"""DiT, the diffusion transformer of Peebles & Xie 2023, with adaLN-Zero conditioning.

The image is cut into p x p patches, each a token. With c = time + class embedding and the six vectors
(shift_1, scale_1, gate_1, shift_2, scale_2, gate_2) = linear(silu(c)), which are zero at first, a block is

    x = x + gate_1 * attention(norm(x) (1 + scale_1) + shift_1)
    x = x + gate_2 * mlp(norm(x) (1 + scale_2) + shift_2)

With a context, a sequence such as a text encoder's, x = x + cross_attention(x, context) stands between the two, its output zero
at first (Chen et al. 2023, PixArt-alpha). The context goes through two layers first, the same for every block.

Options from later work: RMSNorm (Zhang & Sennrich 2019), SwiGLU (Shazeer 2020), rotary positions (Su et al. 2021) over rows and
columns, normalised queries and keys (Dehghani et al. 2023), register tokens (Darcet et al. 2023).
"""
from typing import Any, Optional, Sequence, Tuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ldm_jax.models import layers
from ldm_jax.models.attention import ATTENTION, CrossAttention, attention, heads_of
from ldm_jax.models.init import small, zeros
from ldm_jax.models.kept import CONDITION, TIME, kept
from ldm_jax.models.layers import LayerNorm, RMSNorm, dense, written
from ldm_jax.models.net import Net
from ldm_jax.types import Array, Cond, UserError, lookup

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # depth, width, heads
NORMS = {"layer": LayerNorm, "rms": RMSNorm}
MLPS = {  # whether the feed-forward is gated, and its activation
    "gelu": (False, nn.gelu), "gelu_exact": (False, lambda x: nn.gelu(x, approximate=False)), "silu": (False, nn.silu),
    "gelu_sigmoid": (False, lambda x: x * nn.sigmoid(1.702 * x)), "swiglu": (True, nn.silu),
    "geglu": (True, lambda x: nn.gelu(x, approximate=False)),
}


def sincos_positions(rows: int, cols: int, dim: int, base: Optional[int] = None, scale: float = 1.0) -> np.ndarray:
    """float32 [rows * cols, dim]: (sin, cos) of the column in the first half of the channels, of the row in the second.

    With `base` the positions run over base / scale along each side, whatever the number of rows and columns is.
    """
    freqs = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
    part = lambda at: np.concatenate([np.sin(at[:, None] * freqs), np.cos(at[:, None] * freqs)], 1)
    row, col = np.divmod(np.arange(rows * cols), cols)
    if base:
        row, col = row * (base / rows / scale), col * (base / cols / scale)
    return np.concatenate([part(col), part(row)], 1).astype(np.float32)


def rotary_angles(rows: int, cols: int, dim: int, registers: int = 0) -> np.ndarray:
    """float32 [registers + rows * cols, dim / 2]: angles of the pairs of channels, the first half by row, the second by column.

    Registers have angle 0: they are not turned.
    """
    freqs = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
    row, col = np.divmod(np.arange(rows * cols), cols)
    angles = np.concatenate([row[:, None] * freqs, col[:, None] * freqs], 1)
    return np.concatenate([np.zeros((registers, dim // 2)), angles]).astype(np.float32)


def rotate(x: Array, angles: np.ndarray) -> Array:
    """Turn the pairs (x[..., i], x[..., i + D/2]) of x [B, S, H, D] by angles [S, D/2]."""
    cos, sin = (jnp.asarray(f(angles))[None, :, None, :] for f in (np.cos, np.sin))
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


class Block(nn.Module):
    """One transformer block; c is silu of the embedding, [B, width]. Returns (x, None) as a scan's body does.

    context None is a block without cross-attention; mask: [B, 1, 1, S], or None.
    """
    num_heads: int
    mlp_width: int
    grid: Tuple[int, int]
    registers: int
    norm: str
    mlp: str
    rotary: bool
    qk_norm: bool
    qkv_bias: bool
    norm_2: Tuple[float, bool]  # eps, affine
    upcast: bool
    dropout: float
    impl: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, c: Array, context: Optional[Array] = None, mask: Optional[Array] = None, train: bool = False):
        B, S, D = x.shape
        norm = lambda name, eps, affine: NORMS[self.norm](eps, affine, self.dtype, name=name)
        gated, act = MLPS[self.mlp]
        modulation = kept(self, TIME, "of_c", lambda: dense(6 * D, "modulation", self.dtype, init=zeros)(c)[:, None])
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, -1)

        h = norm("norm_1", 1e-6, False)(x) * (1 + scale_1) + shift_1
        q, k, v = (dense(D, n, self.dtype, self.qkv_bias)(h).reshape(B, S, self.num_heads, -1) for n in ("q", "k", "v"))
        if self.qk_norm:
            q, k = (RMSNorm(dtype=self.dtype, name=n)(a) for n, a in (("q_norm", q), ("k_norm", k)))
        if self.rotary:
            angles = rotary_angles(*self.grid, q.shape[-1], self.registers)
            q, k = rotate(q, angles), rotate(k, angles)
        if self.upcast:
            q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
        h = dense(D, "out", self.dtype)(attention(q, k, v, impl=self.impl).reshape(B, S, D))
        x = written(x + gate_1 * h)
        if context is not None:
            cross = CrossAttention(self.num_heads, self.impl, use_bias=True, zero_out=True, dtype=self.dtype, name="cross")
            x = written(x + cross(x, context, mask))

        h = norm("norm_2", *self.norm_2)(x) * (1 + scale_2) + shift_2
        h = dense(self.mlp_width * (2 if gated else 1), "mlp_in", self.dtype)(h)
        if gated:
            value, gate = jnp.split(h, 2, -1)
            h = value * act(gate)
        else:
            h = act(h)
        h = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(h)
        return written(x + gate_2 * dense(D, "mlp_out", self.dtype)(h)), None


def embed(time: Array, cond: Cond, width: int, num_classes: Optional[int], shift: float, dtype: Any) -> Array:
    """What the time and the class say, [B, width], as layers of the module that calls it."""
    emb = layers.timestep_embedding(time, 256, shift=shift).astype(dtype)
    c = dense(width, "time_2", dtype, init=small)(nn.silu(dense(width, "time_1", dtype, init=small)(emb)))
    if num_classes:
        c = c + nn.Embed(num_classes + 1, width, dtype=dtype, embedding_init=small, name="class")(cond["class"])
    return c


class Embedder(nn.Module):
    """`embed` for one block alone."""
    width: int
    num_classes: Optional[int]
    shift: float
    dtype: Any

    @nn.compact
    def __call__(self, time: Array, cond: Cond) -> Array:
        return embed(time, cond, self.width, self.num_classes, self.shift, self.dtype)


class DiT(nn.Module):
    """See `dit`."""
    out_channels: int
    patch: int
    width: int
    depth: int
    num_classes: Optional[int]
    vector: bool
    registers: int
    positions: Tuple[Optional[int], float]  # base and scale
    time_shift: float
    shared: bool
    block: Any
    scan_layers: bool
    remat: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, time: Array, cond: Cond, train: bool = False) -> Array:
        if "concat" in cond:
            x = jnp.concatenate([x, cond["concat"]], -1)
        (B, H, W, C), p, D = x.shape, self.patch, self.width
        rows, cols = H // p, W // p
        x = x.reshape(B, rows, p, cols, p, C).transpose(0, 1, 3, 2, 4, 5).reshape(B, rows * cols, p * p * C)
        x = dense(D, "patch_in", self.dtype)(x.astype(self.dtype))
        x = x + jnp.asarray(sincos_positions(rows, cols, D, *self.positions), self.dtype)[None]

        options = (D, self.num_classes, self.time_shift, self.dtype)
        if self.shared:
            cs = [embed(time, cond, *options)]
        else:
            cs = [Embedder(*options, name=f"embed_{i}")(time, cond) for i in range(self.depth)]
        if self.vector:
            vector = dense(D, "vector_1", self.dtype, init=small)(cond["vector"].astype(self.dtype))
            vector = dense(D, "vector_2", self.dtype, init=small)(nn.silu(vector))
            cs = [c + vector for c in cs]
        cs = [nn.silu(c) for c in cs]
        c = cs[0]
        context, mask = cond.get("context"), cond.get("context_mask")
        if context is not None:
            context = dense(D, "context_1", self.dtype, init=small)(context.astype(self.dtype))
            context = dense(D, "context_2", self.dtype, init=small)(nn.gelu(context))
        mask = None if mask is None else mask[:, None, None, :]

        if self.registers:
            tokens = self.param("registers", small, (self.registers, D)).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(tokens[None], (B, self.registers, D)), x], 1)
        Layer = layers.rematerialised(Block, self.remat, train=5, prevent_cse=not self.scan_layers)
        if self.scan_layers:
            stack = nn.scan(Layer, variable_axes={"params": 0, CONDITION: 0, TIME: 0}, split_rngs={"params": True, "dropout": True},
                            in_axes=nn.broadcast, length=self.depth)
            x, _ = stack(**dict(self.block), name="blocks")(x, c, context, mask, train)
        else:
            for i in range(self.depth):
                x, _ = Layer(**dict(self.block), name=f"block_{i}")(x, cs[i % len(cs)], context, mask, train)
        x = x[:, self.registers:]

        modulation = kept(self, TIME, "of_c", lambda: dense(2 * D, "modulation_out", self.dtype, init=zeros)(c)[:, None])
        shift, scale = jnp.split(modulation, 2, -1)
        x = NORMS[dict(self.block)["norm"]](1e-6, affine=False, dtype=self.dtype, name="norm_out")(x) * (1 + scale) + shift
        x = dense(p * p * self.out_channels, "patch_out", self.dtype, init=zeros)(x)
        x = x.reshape(B, rows, cols, p, p, self.out_channels).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(B, H, W, self.out_channels)


def dit(image_shape: Sequence[int], num_classes: Optional[int] = None, out_channels: Optional[int] = None, *, size: str = "S",
        patch: int = 2, width: Optional[int] = None, depth: Optional[int] = None, num_heads: Optional[int] = None,
        mlp_ratio: float = 4.0, context_dim: Optional[int] = None, vector_dim: Optional[int] = None,
        concat_channels: Optional[int] = None, dropout: float = 0.0, norm: str = "layer", mlp: str = "gelu", rotary: bool = False,
        qk_norm: bool = False, registers: int = 0, qkv_bias: bool = True, norm_2: Tuple[float, bool] = (1e-6, False),
        upcast: bool = False, positions: Tuple[Optional[int], float] = (None, 1.0), time_shift: float = 0.0,
        embedders: str = "shared", scan_layers: bool = False, remat: str = "none", time_scale: float = 1000.0,
        timesteps: Optional[int] = None, attention_impl: str = "auto", dtype: str = "float32") -> Net:
    """A diffusion transformer. `dit(shape, 1000, 2 * C, size="XL", patch=2)` is DiT-XL/2.

    Args:
      image_shape: (H, W, C) of x_t; H and W divisible by `patch`.
      num_classes: class-conditional, with one class more that is the null class.
      out_channels: of the raw output, by default C; 2 C for a learned variance.
      size: a row of SIZES; `depth`, `width` and `num_heads` change it where they are given.
      mlp_ratio: hidden width of the feed-forward over `width`; two thirds of it where it is gated, so that the parameters stay.
      context_dim: takes a sequence of that width, to which every block attends.
      vector_dim: takes a vector, added to the time embedding through two layers.
      concat_channels: takes an image of that many channels, concatenated to x_t.
      norm: "layer" or "rms". mlp: a row of MLPS.
      rotary: turn queries and keys by row and column, beside the fixed positions.
      qk_norm: RMSNorm of each head's queries and keys in self-attention.
      registers: learned tokens that go along with the image's.
      qkv_bias: of queries, keys and values in self-attention. upcast: it is done in float32.
      norm_2: (eps, affine) of the norm in front of the feed-forward.
      positions: (base, scale), see `sincos_positions`. time_shift: see `layers.timestep_embedding`.
      embedders: "shared", one for all; "each", a time and class embedding of its own for each block, the first of them also the
        last layer's.
      scan_layers: scan over the blocks, their parameters stacked under "blocks": depth costs no compile time. With remat="none"
        the backward pass keeps more memory than the unrolled blocks.
      remat: "full" recomputes each block in the backward pass, "dots" keeps its matrix products.
      time_scale, timesteps: the unit of time, see `Net`.
      attention_impl: a row of `attention.ATTENTION`; "auto" is the fastest for the machine, the dtype and the width of the heads.
      dtype: "float32" or "bfloat16", of the computation; parameters are float32.

    Raises:
      UserError: for unknown names and for sizes that do not fit together.
    """
    H, W, C = image_shape = tuple(int(n) for n in image_shape)
    base_depth, base_width, base_heads = lookup(SIZES, size, "size of the DiT")
    depth, width, num_heads = depth or base_depth, width or base_width, num_heads or base_heads
    if H % patch or W % patch:
        raise UserError(f"image size {H}x{W} is not divisible by patch={patch}; choose a patch that divides both")
    if width % 4:
        raise UserError(f"width={width} of the DiT must be divisible by 4, for the positions")
    heads = heads_of(width, num_heads, None)
    if rotary and (width // heads) % 4:
        raise UserError(f"rotary positions need heads of a width divisible by 4; width={width} with num_heads={heads} gives "
                        f"{width // heads}")
    lookup(NORMS, norm, "norm of the DiT")
    lookup(layers.REMAT, remat, "remat")
    lookup(ATTENTION, attention_impl, "attention_impl")
    gated, compute = lookup(MLPS, mlp, "mlp of the DiT")[0], layers.compute_dtype(dtype)
    if embedders not in ("shared", "each") or (embedders == "each" and scan_layers):
        raise UserError(f"embedders={embedders!r} of the DiT must be 'shared', or 'each' without scan_layers")
    block = dict(num_heads=heads, mlp_width=round(width * mlp_ratio * (2 / 3 if gated else 1)), grid=(H // patch, W // patch),
                 registers=registers, norm=norm, mlp=mlp, rotary=rotary, qk_norm=qk_norm, qkv_bias=qkv_bias, norm_2=tuple(norm_2),
                 upcast=upcast, dropout=dropout, impl=attention_impl, dtype=compute)
    module = DiT(out_channels=out_channels or C, patch=patch, width=width, depth=depth, num_classes=num_classes,
                 vector=bool(vector_dim), registers=registers, positions=tuple(positions), time_shift=time_shift,
                 shared=embedders == "shared", block=tuple(block.items()), scan_layers=scan_layers, remat=remat, dtype=compute)
    return Net(module, image_shape, out_channels or C, time_scale, timesteps, num_classes, context_dim, vector_dim,
               concat_channels, dropout > 0)
