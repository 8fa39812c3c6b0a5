"""The conditioners: what a net can be told beside x_t. See conditions.py for what they have in common.

A row of CONDITIONERS takes a `Space` and its options. What it reads from a user is checked here, by name.
"""
from typing import Any, Callable, Mapping, Optional, Sequence, Tuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.systems.conditions import Conditioner, Space
from ldm_jax.types import Array, UserError, expand, normal, to_signed, uniform


def class_label(space: Space, *, drop: float = 0.1) -> Conditioner:
    """One of the data's classes, a value being ids [B] in 0..num_classes-1. Null: the id num_classes."""
    classes = space.num_classes
    if classes is None:
        raise UserError("the conditioner of a class needs data with classes; this has none (data.num_classes)")

    def read(value):
        ids = _array(value, "iu", f"class ids, integers from 0 to {classes - 1}")
        if ids.ndim > 1:
            raise UserError(f"cond has shape {ids.shape}; give one class id for each picture, or one for all")
        _in_range("class id", ids, classes)
        return np.atleast_1d(ids).astype(np.int32)

    return Conditioner(needs={"num_classes": classes}, fields=("class",), drop=drop, read=read,
                       draw=lambda batch, keys: batch["class"], encode=lambda params, ids, keys, codec: {"class": ids},
                       null=lambda n: {"class": jnp.full((n,), classes, jnp.int32)})


def vector(space: Space, *, field: str = "vector", drop: float = 0.1) -> Conditioner:
    """Numbers [B, D] of a field of the data, added to the time through two layers. Null: zeros."""
    (size,) = _field(space, field, 1, "numbers")

    def read(value):
        return _examples(_array(value, "fiu", f"vectors of {size} numbers"), (size,), "vectors").astype(np.float32)

    return Conditioner(needs={"vector_dim": size}, fields=(field,), drop=drop, read=read,
                       draw=lambda batch, keys: batch[field].astype(jnp.float32),
                       encode=lambda params, value, keys, codec: {"vector": value}, null=lambda n: {"vector": jnp.zeros((n, size))})


def sequence(space: Space, *, field: str = "sequence", mask_field: str = "", drop: float = 0.1) -> Conditioner:
    """Tokens [B, S, D] of a field of the data, for cross-attention; any S at sampling.

    A value is {"tokens": [B, S, D], "mask": bool [B, S]}, the mask all true where the data has none; a user may give the tokens
    alone. Null: one token of zeros, which is also what a sequence without any token is encoded as.

    Args:
      mask_field: the field [S] that says which tokens count; "" for none.
    """
    length, size = _field(space, field, 2, "tokens")
    if mask_field and tuple(_field(space, mask_field, 1, "a mask")) != (length,):
        raise UserError(f"field {mask_field!r} has shape {space.fields[mask_field]}; a mask of {field!r} has ({length},)")

    def draw(batch, keys):
        tokens = batch[field].astype(jnp.float32)
        mask = batch[mask_field].astype(bool) if mask_field else jnp.ones(tokens.shape[:2], bool)
        return {"tokens": tokens, "mask": mask}

    def encode(params, value, keys, codec):
        none = ~jnp.any(value["mask"], axis=1, keepdims=True)
        mask = value["mask"] | (none & (jnp.arange(value["mask"].shape[1]) == 0)[None])
        return {"context": jnp.where(value["mask"][..., None], value["tokens"], 0.0), "context_mask": mask}

    def read(value):
        given = value if isinstance(value, Mapping) else {"tokens": value}
        _parts(given, ("tokens",), ("mask",), "a sequence")
        tokens = _array(given["tokens"], "fiu", f"sequences of tokens of {size} numbers")
        tokens = tokens[None] if tokens.ndim == 2 else tokens
        if tokens.ndim != 3 or tokens.shape[-1] != size or not tokens.shape[1]:
            raise UserError(f"a sequence has shape {tokens.shape}; this model takes [pictures, tokens, {size}], or "
                            f"[tokens, {size}] for all")
        mask = np.ones(tokens.shape[1:2]) if given.get("mask") is None else _array(given["mask"], "biuf", "a mask of 0 and 1")
        return _together({"tokens": tokens.astype(np.float32), "mask": _examples(mask, tokens.shape[1:2], "masks").astype(bool)})

    return Conditioner(needs={"context_dim": size}, fields=(field,) + ((mask_field,) if mask_field else ()), drop=drop, read=read,
                       draw=draw, encode=encode,
                       null=lambda n: {"context": jnp.zeros((n, 1, size)), "context_mask": jnp.ones((n, 1), bool)})


def low_resolution(space: Space, *, factor: int = 4, max_noise: float = 0.5, method: str = "bilinear",
                   drop: float = 0.0) -> Conditioner:
    """The picture at 1 / factor of its size, enlarged and concatenated to x_t: super-resolution, a stage of a cascade.

    A value is {"image": [B, H / factor, W / factor, C] in [0, 1], "level": [B]}; a user may give the pictures alone, their level
    is 0. The net gets z = sqrt(1 - s^2) y + s eps, eps ~ N(0, I), of the picture y in [-1, 1], and the level s itself as one number
    of its vector; training draws s ~ U(0, max_noise) (noise conditioning augmentation: Ho et al. 2022, "Cascaded diffusion models";
    Saharia et al. 2022). Null: zeros.

    Args:
      factor: the real pictures are made small by the mean over factor x factor pixels.
      max_noise: the largest s, at most 1; 0 for none.
      method: "bilinear" or "nearest", how z comes to the size of x_t.
    """
    if not 0.0 <= max_noise <= 1.0:
        raise UserError(f"max_noise={max_noise} of low_resolution must be in 0..1")
    return _small_picture(space, factor, method, drop, lambda s: {"vector": s[:, None]}, {"vector_dim": 1}, float(max_noise))


def stepped_low_resolution(space: Space, *, factor: int = 4, abar: Optional[Sequence[float]] = None,
                           highest: int = 0, usual: int = 0) -> Conditioner:
    """`low_resolution` whose level is a step k of a table: the net gets z = sqrt(abar_k) y + sqrt(1 - abar_k) eps, and k.

    k fills the place of a class, in a net whose class_kind is "number". Without a table there is no noise, and nothing is told.

    Args:
      abar: alpha^2 of the steps. highest: the largest k that may be given. usual: the k of pictures that are given without one.
    """
    if abar is None:
        return _small_picture(space, factor, "nearest", 0.0, lambda k: {}, {}, 0.0)
    if not 0 <= usual <= highest < len(abar):
        raise UserError(f"noise levels of the small picture up to {highest}, usually {usual}, of a table of {len(abar)}: they must "
                        f"be usual <= highest < length")
    sigma = np.sqrt(1.0 - np.asarray(abar, np.float64)).astype(np.float32)
    return _small_picture(space, factor, "nearest", 0.0, lambda k: {"class": k}, {}, highest, usual, sigma)


def _small_picture(space: Space, factor: int, method: str, drop: float, told: Callable[[Array], Mapping[str, Array]],
                   needs: Mapping[str, int], highest: float, usual: float = 0.0, table: Optional[np.ndarray] = None) -> Conditioner:
    """What the conditioners of small pictures share.

    told: levels [B] -> place -> what the net is told of them. needs: of that. table: the standard deviations of levels that are
    whole numbers; None for levels that are standard deviations.
    """
    H, W, C = space.image_shape
    if factor < 1 or H % factor or W % factor:
        raise UserError(f"factor={factor} of low_resolution must divide the image size {H}x{W}")
    if method not in ("bilinear", "nearest"):
        raise UserError(f"unknown method {method!r} of low_resolution; choose from: bilinear, nearest")
    small, size = (H // factor, W // factor, C), space.shape[:2]
    kinds, dtype = ("fiu", jnp.float32) if table is None else ("iu", jnp.int32)

    def draw(batch, keys):
        image = to_signed(batch["image"]) * 0.5 + 0.5
        image = image.reshape(-1, small[0], factor, small[1], factor, C).mean((2, 4))
        level = uniform(keys, len(keys))
        return {"image": image, "level": highest * level if table is None else jnp.floor((highest + 1) * level).astype(dtype)}

    def encode(params, value, keys, codec):
        y, s = value["image"] * 2.0 - 1.0, value["level"] if table is None else jnp.asarray(table)[value["level"]]
        z = expand(jnp.sqrt(1.0 - s**2), y) * y + expand(s, y) * normal(keys, y.shape)
        return {"concat": _resize(z, size, method), **told(value["level"])}

    def read(value):
        given = value if isinstance(value, Mapping) else {"image": value}
        _parts(given, ("image",), ("level",), "a low-resolution condition")
        level = _array(usual if given.get("level") is None else given["level"], kinds, f"a noise level from 0 to {highest}" +
                       ("" if table is None else ", a whole number"))
        if level.ndim > 1 or level.min() < 0 or level.max() > highest:
            raise UserError(f"level={given['level']!r} of a low-resolution picture: give numbers from 0 to {highest}, one "
                            f"each or one for all")
        return _together({"image": read_pictures(given["image"], small), "level": np.atleast_1d(level).astype(dtype)})

    return Conditioner(needs={"concat_channels": C, **needs}, fields=("image",), drop=drop, read=read, draw=draw, encode=encode,
                       null=lambda n: {"concat": jnp.zeros((n, *size, C)), **told(jnp.zeros((n,), dtype))},
                       show=lambda value: _resize(value["image"], (H, W), "nearest"))


def semantic_map(space: Space, *, classes: int, field: str = "map", drop: float = 0.1) -> Conditioner:
    """Which of `classes` kinds each pixel shows, ids [B, H, W] of a field, one-hot and concatenated to x_t. Null: all zeros.

    In latent systems every H / h-th row and W / w-th column is taken.
    """
    H, W, C = space.image_shape
    h, w = space.shape[:2]
    if tuple(_field(space, field, 2, "a map")) != (H, W):
        raise UserError(f"field {field!r} has shape {tuple(space.fields[field])}; a semantic map has the picture's, {(H, W)}")
    if H % h or W % w:
        raise UserError(f"a semantic map of {H}x{W} has no whole stride to {h}x{w}")
    if classes < 1:
        raise UserError(f"classes={classes} of a semantic map must be at least 1")

    def encode(params, value, keys, codec):
        return {"concat": jax.nn.one_hot(value[:, ::H // h, ::W // w], classes, dtype=jnp.float32)}

    def read(value):
        ids = _examples(_array(value, "iu", f"maps of ids, integers from 0 to {classes - 1}"), (H, W), "semantic maps")
        _in_range("id", ids, classes, " in a semantic map")
        return ids.astype(np.int32)

    def show(value):
        hue = value[..., None] / classes + jnp.arange(3).reshape(1, 1, 1, 3) / 3
        colours = jnp.where(value[..., None] == 0, 0.0, 0.5 + 0.5 * jnp.cos(2 * jnp.pi * hue))
        return jnp.mean(colours, -1, keepdims=True) if C == 1 else colours

    return Conditioner(needs={"concat_channels": classes}, fields=(field,), drop=drop, read=read, encode=encode, show=show,
                       draw=lambda batch, keys: batch[field].astype(jnp.int32),
                       null=lambda n: {"concat": jnp.zeros((n, h, w, classes))})


def masked_image(space: Space, *, smallest: float = 0.25, largest: float = 0.75, drop: float = 0.0) -> Conditioner:
    """A picture of which a part is to be kept, concatenated to x_t with its mask: inpainting.

    A value is {"image": [B, H, W, C] in [0, 1], "mask": [B, H, W, 1]}, the mask 1 where the picture is to be made anew. The net gets
    the mask and picture x (1 - mask), with the picture in [-1, 1]; in latent systems every H / h-th row and W / w-th column of the
    mask, and the encoder's answer to picture x (1 - mask) (Rombach et al. 2022, section 4.5). Null: a mask of ones, and zeros: the
    picture of which nothing is kept.

    Args:
      smallest, largest: training takes out one rectangle; each side is drawn between these parts of the picture's.
    """
    H, W, C = space.image_shape
    h, w, c = space.shape
    if not 0.0 < smallest <= largest <= 1.0:
        raise UserError(f"smallest={smallest}, largest={largest} of masked_image must satisfy 0 < smallest <= largest <= 1")
    if H % h or W % w:
        raise UserError(f"a mask of {H}x{W} has no whole stride to {h}x{w}")

    def rectangle(key):
        """The mask of one rectangle, [H, W, 1]."""
        inside = jnp.ones((H, W), bool)
        for axis, n in enumerate((H, W)):
            u = jax.random.uniform(jax.random.fold_in(key, axis), (2,))
            side = jnp.maximum(jnp.round((smallest + (largest - smallest) * u[0]) * n), 1.0)
            start = jnp.floor(u[1] * (n - side + 1))
            line = (jnp.arange(n) >= start) & (jnp.arange(n) < start + side)
            inside &= line[:, None] if axis == 0 else line[None, :]
        return inside[..., None].astype(jnp.float32)

    def draw(batch, keys):
        return {"image": to_signed(batch["image"]) * 0.5 + 0.5, "mask": jax.vmap(rectangle)(keys)}

    def encode(params, value, keys, codec):
        masked = codec.encode(params, {"image": (value["image"] * 2.0 - 1.0) * (1.0 - value["mask"])}, keys)
        return {"concat": jnp.concatenate([value["mask"][:, ::H // h, ::W // w], masked], -1)}

    def read(value):
        if not isinstance(value, Mapping):
            raise UserError('a masked picture is given as {"image": pictures, "mask": 1 where they are made anew, 0 elsewhere}')
        _parts(value, ("image", "mask"), (), "a masked picture")
        return _together({"image": read_pictures(value["image"], (H, W, C)), "mask": read_masks(value["mask"], (H, W))})

    def null(n):
        return {"concat": jnp.broadcast_to(jnp.arange(c + 1) == 0, (n, h, w, c + 1)).astype(jnp.float32)}

    return Conditioner(needs={"concat_channels": c + 1}, fields=("image",), drop=drop, read=read, draw=draw, encode=encode,
                       null=null, show=lambda value: value["image"] * (1.0 - value["mask"]) + 0.5 * value["mask"])


# name -> (space, options) -> Conditioner
CONDITIONERS = {"class": class_label, "sequence": sequence, "vector": vector, "low_resolution": low_resolution,
                "semantic_map": semantic_map, "masked_image": masked_image}


def read_pictures(value: Any, shape: Tuple[int, int, int]) -> np.ndarray:
    """Pictures of a user, uint8 or in [0, 1], as float32 [n, H, W, C] in [0, 1]."""
    image = _array(value, "fiu", f"pictures {shape}, uint8 or in [0, 1]")
    image = _examples(image.astype(np.float32) / (255.0 if image.dtype == np.uint8 else 1.0), shape, "pictures")
    if image.min() < 0.0 or image.max() > 1.0:
        raise UserError(f"pictures with values from {image.min():.3g} to {image.max():.3g} were given; give uint8, or [0, 1]")
    return image


def read_masks(value: Any, size: Tuple[int, int]) -> np.ndarray:
    """Masks of a user, [H, W], [n, H, W] or with a last axis of 1, of 0 and 1 or 0 and 255, as float32 [n, H, W, 1] of 0 and 1."""
    mask = _array(value, "biuf", "a mask of 0 and 1")
    mask = mask[..., 0] if mask.ndim > 2 and mask.shape[-1] == 1 and mask.shape[-3:-1] == tuple(size) else mask
    white = 255.0 if mask.dtype == np.uint8 and mask.max() > 1 else 1.0
    mask = _examples(mask, tuple(size), "masks")[..., None].astype(np.float32) / white
    if not np.isin(mask, (0.0, 1.0)).all():
        raise UserError("a mask must hold 0 (to be kept) and 1 (to be made anew) only")
    return mask


def _resize(image: Array, size: Tuple[int, int], method: str) -> Array:
    return jax.image.resize(image, (image.shape[0], *size, image.shape[-1]), method)


def _field(space: Space, field: str, rank: int, what: str) -> Tuple[int, ...]:
    if field not in space.fields:
        raise UserError(f"the data has no field {field!r}; it has: {', '.join(sorted(space.fields)) or 'none'} (data.fields)")
    if len(space.fields[field]) != rank:
        raise UserError(f"field {field!r} has shape {tuple(space.fields[field])}; {what} need {rank} axes for each example")
    return tuple(space.fields[field])


def _array(value: Any, kinds: str, what: str) -> np.ndarray:
    """`value` as an array whose dtype is one of numpy's `kinds`."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        array = np.empty(0, object)
    if array.dtype.kind not in kinds or not array.size:
        raise UserError(f"cond={str(value)[:60]!r}: this model takes {what}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"cond holds numbers that are not finite; this model takes {what}")
    return array


def _examples(array: np.ndarray, shape: Tuple[int, ...], what: str) -> np.ndarray:
    """`array`, of one example or of several, with a leading axis of examples."""
    if array.shape == shape:
        return array[None]
    if array.shape[1:] != shape:
        raise UserError(f"{what} of shape {array.shape} were given; this model takes {shape} for each picture, or one for all")
    return array


def _in_range(what: str, ids: np.ndarray, count: int, of: str = "") -> None:
    bad = ids[(ids < 0) | (ids >= count)]
    if bad.size:
        raise UserError(f"{what} {bad[0]} is out of range; this model knows 0 to {count - 1}{of}")


def _parts(given: Mapping[str, Any], required: Sequence[str], optional: Sequence[str], what: str) -> None:
    if not set(required) <= set(given) <= {*required, *optional}:
        raise UserError(f"{what} has the parts {', '.join(sorted(map(str, given)))}; it takes "
                        f"{', '.join(required)}" + (f" and optionally {', '.join(optional)}" if optional else ""))


def _together(parts: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The parts of one value with equal leading axes; a part given once is for all."""
    n = max(map(len, parts.values()))
    for name, a in parts.items():
        if len(a) not in (1, n):
            raise UserError(f"{len(a)} of {name!r} were given for {n} pictures; give one each, or one for all")
    return {name: np.broadcast_to(a, (n, *a.shape[1:])) for name, a in parts.items()}
