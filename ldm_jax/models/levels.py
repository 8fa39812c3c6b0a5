"""What a U-Net is made of, as data: its levels on the way down, the middle and the way up, its time and its other inputs."""
import dataclasses
from typing import Optional, Tuple

from ldm_jax.types import UserError

RESAMPLES = ("conv", "conv_centred", "block", "skip")


@dataclasses.dataclass(frozen=True)
class Level:
    """One level of one of the ways, or the middle.

    Attributes:
      channels: of its blocks.
      blocks: how many; the middle has one, or two with the attention between them.
      attention: None; "self", a plain attention; "cross", spatial transformers.
      depths: of each of its transformers.
      heads, head_width: of its attention; by default the heads share the channels.
      attention_groups: of the norm of a plain attention; None is the net's, 0 no norm at all.
      resample: to the next level, None at the last: "conv", "conv_centred" and "block" as `unet` has it, "skip" that of Song et
        al. 2021 (NCSN++): FIR filters in a residual block, and the image itself brought along at each size.
      skip: groups as NCSN++ has them, min(channels / 4, 32).
      late: a single attention, behind all blocks.
      groups: of the blocks' norms; None is the net's.
      scale: what the sums of its residual blocks and plain attentions are divided by.
      raw_time: the blocks take the embedding without the activation that stands behind it otherwise.
      only_cross: the transformers' first attention reads the context too.
    """
    channels: int
    blocks: int = 1
    attention: Optional[str] = None
    depths: Tuple[int, ...] = ()
    heads: int = 1
    head_width: Optional[int] = None
    attention_groups: Optional[int] = None
    resample: Optional[str] = None
    skip: bool = False
    late: bool = False
    groups: Optional[int] = None
    scale: float = 1.0
    raw_time: bool = False
    only_cross: bool = False

    @property
    def inner(self) -> int:
        """The width of all heads together."""
        return self.heads * (self.head_width or self.channels // self.heads)


@dataclasses.dataclass(frozen=True)
class Time:
    """How the time becomes an embedding of `hidden` channels: features of it, then two layers with `act` between them.

    Attributes:
      kind: "sinusoids", `width` of them in `order` and with `shift`, see `layers.timestep_embedding`; "fourier" and
        "log_fourier", cosines and sines of 2 pi w t or 2 pi w log t for `width` / 2 fixed random w (Song et al. 2021); "table",
        learned rows for the integers up to `table`.
      post_act: behind the two layers.
      cond_dim: channels of cond["time_cond"], which goes through a matrix and is added to the features.
      divide: the net's output is divided by the time, which is then a noise level sigma.
    """
    width: int
    hidden: int
    kind: str = "sinusoids"
    order: str = "sin_cos"
    shift: Optional[float] = None
    act: str = "silu"
    post_act: Optional[str] = None
    table: Optional[int] = None
    cond_dim: Optional[int] = None
    divide: bool = False


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What else the U-Net takes.

    Attributes:
      classes: rows of the table of classes.
      class_kind: None; "table"; "number", features as the time's through two layers of their own.
      vector: None; "mlp" two layers; "linear" one; "identity".
      join: "add" the class's and vector's embedding to the time's, or "concat" it.
      time_ids_dim: see `Net`.
      context_dim: the context goes through a matrix to so many channels first.
      act: of the embedding of "number".
      emb_act: of the sum of all embeddings, besides that in front of each block.
      centre: images are in [0, 1], and 2 x - 1 is what goes in.
    """
    classes: Optional[int] = None
    class_kind: Optional[str] = None
    vector: Optional[str] = None
    join: str = "add"
    time_ids_dim: Optional[int] = None
    context_dim: Optional[int] = None
    act: str = "silu"
    emb_act: Optional[str] = None
    centre: bool = False


def check_ways(down: Tuple[Level, ...], middle: Optional[Level], up: Tuple[Level, ...]) -> None:
    """Raises UserError for levels that do not make a U-Net; both ways are listed from the largest image to the smallest."""
    if not down or len(down) != len(up):
        raise UserError(f"a U-Net has as many levels up as down, at least one; these are {len(down)} down and {len(up)} up")
    for a, b in zip(down, up):
        if b.blocks != a.blocks + 1:
            raise UserError(f"a level with {a.blocks} blocks down has {a.blocks + 1} up, not {b.blocks}")
    for way in (down, up):
        if len({level.skip for level in way}) > 1:
            raise UserError("either all levels of a way have skip blocks (SkipDownBlock2D and the like) or none has")
    for level in (*down, *up, *([middle] if middle else [])):
        if level.inner < 1 or level.channels < 1:
            raise UserError(f"{level.heads} heads do not fit a level of {level.channels} channels")
