"""Perceptual distances between images: LPIPS, which has learned weights, and Laplacian pyramids, which have none.

Each row of PERCEPTUALS builds an object with init(key) -> params, read(read_arrays) -> params, apply(params, x, y) -> [B] and
describe() -> str. Where the weights are files, `read` is given the function that reads one: path -> {name: array}.
"""
import dataclasses
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.models.convolution import convolve
from ldm_jax.models.layers import compute_dtype
from ldm_jax.types import Array, PyTree, UserError

ReadArrays = Callable[[str], Mapping[str, np.ndarray]]

# VGG16 (Simonyan & Zisserman 2015, D): channels of the 3x3 convolutions, a 2x2 maximum between the groups; the features that
# LPIPS compares are those after the last relu of each group
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of R, G and B in [-1, 1], as ImageNet has them
EPS = 1e-10
LINEAR_NAMES = ("lin{}.model.1.weight", "lin{}.model.0.weight", "lin{}.weight", "lins.{}.model.1.weight")


def _convolutions():
    """(group, place in it, channels in, channels out, torchvision's index) of each convolution."""
    inputs, index = 3, 0
    for i, group in enumerate(VGG16):
        for j, channels in enumerate(group):
            yield i, j, inputs, channels, index
            inputs, index = channels, index + 2  # a relu stands behind each
        index += 1  # and the maximum behind a group


@dataclasses.dataclass(frozen=True)
class LPIPS:
    """See `lpips`. Parameters: {"conv_I_J": {"kernel" [3, 3, in, out], "bias" [out]}, "linear_I": {"scale" [channels]}}."""
    vgg: str
    linear: str
    dtype: Any

    def init(self, key: Array) -> PyTree:
        """Parameters of the right shapes, all zero; the values are the files' (`read`)."""
        params = {f"conv_{i}_{j}": {"kernel": jnp.zeros((3, 3, m, n)), "bias": jnp.zeros(n)}
                  for i, j, m, n, _ in _convolutions()}
        return params | {f"linear_{i}": {"scale": jnp.zeros(group[-1])} for i, group in enumerate(VGG16)}

    def read(self, read_arrays: ReadArrays) -> PyTree:
        """The parameters in the two files, float32.

        Raises:
          UserError: when an array is missing or has another shape, or a linear weight is negative, and as `read_arrays` does.
        """
        shapes = {}
        for i, j, m, n, index in _convolutions():
            shapes |= {f"features.{index}.weight": (n, m, 3, 3), f"features.{index}.bias": (n,)}
        vgg = _checked(read_arrays(self.vgg), shapes, self.vgg, "VGG16 in torchvision's names")
        linear = read_arrays(self.linear)
        style = next((s for s in LINEAR_NAMES if s.format(0) in linear), LINEAR_NAMES[0])
        shapes = {style.format(i): (1, group[-1], 1, 1) for i, group in enumerate(VGG16)}
        linear = _checked(linear, shapes, self.linear, "the linear weights of LPIPS for VGG16")
        negative = [name for name, a in linear.items() if np.any(a < 0)]
        if negative:
            raise UserError(f"{self.linear}: {negative[0]} has negative values; the linear weights of LPIPS are not negative")
        params = {f"conv_{i}_{j}": {"kernel": vgg[f"features.{index}.weight"].transpose(2, 3, 1, 0),
                                    "bias": vgg[f"features.{index}.bias"]} for i, j, _, _, index in _convolutions()}
        return params | {f"linear_{i}": {"scale": linear[style.format(i)].reshape(-1)} for i in range(len(VGG16))}

    def apply(self, params: PyTree, x: Array, y: Array) -> Array:
        """The distance [B], float32, of images x and y [B, H, W, C] in [-1, 1], C 1 (repeated) or 3, H and W at least 16."""
        for image in (x, y):
            if image.shape[-1] not in (1, 3) or min(image.shape[1:3]) < 16:
                raise UserError(f"lpips was given images of shape {tuple(image.shape[1:])}; it takes 1 or 3 channels and at "
                                f"least 16x16 pixels, the laplacian distance takes any")
        total = 0.0
        for i, (f, g) in enumerate(zip(self._features(params, x), self._features(params, y))):
            difference = jnp.square(_normalised(f) - _normalised(g))
            total = total + jnp.mean(difference @ params[f"linear_{i}"]["scale"], (1, 2))
        return total

    def _features(self, params: PyTree, x: Array):
        h = jnp.broadcast_to(x.astype(jnp.float32), (*x.shape[:3], 3))
        h = ((h - jnp.array(SHIFT).reshape(1, 1, 1, 3)) / jnp.array(SCALE).reshape(1, 1, 1, 3)).astype(self.dtype)
        for i, group in enumerate(VGG16):
            if i > 0:
                B, H, W, C = h.shape
                h = jnp.max(h[:, :H // 2 * 2, :W // 2 * 2].reshape(B, H // 2, 2, W // 2, 2, C), (2, 4))
            for j in range(len(group)):
                p = params[f"conv_{i}_{j}"]
                h = convolve(h, p["kernel"].astype(self.dtype), (1, 1), "SAME")
                h = jax.nn.relu(h + p["bias"].astype(self.dtype).reshape(1, 1, 1, -1))
            yield h

    def describe(self) -> str:
        return f"perceptual distance: LPIPS, VGG16 from {self.vgg}, linear weights from {self.linear}"


def _normalised(features: Array) -> Array:
    """f / (|f| + 1e-10) over the channels, float32; the floor under the square keeps the gradient finite where f = 0."""
    f = features.astype(jnp.float32)
    norm = jnp.sqrt(jnp.maximum(jnp.sum(f**2, -1, keepdims=True), EPS**2))
    return f / (norm + EPS)


def _checked(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, Tuple[int, ...]], path: str,
             what: str) -> Dict[str, np.ndarray]:
    """The arrays that `shapes` names, float32, or a UserError that lists what is missing or of another shape."""
    wrong = [f"{name} is missing" if name not in arrays else f"{name} has shape {arrays[name].shape}, not {shape}"
             for name, shape in shapes.items() if name not in arrays or arrays[name].shape != shape]
    if wrong:
        more = f" and {len(wrong) - 3} more" if wrong[3:] else ""
        raise UserError(f"{path} is not {what}: {'; '.join(wrong[:3])}{more}")
    return {name: np.asarray(arrays[name], np.float32) for name in shapes}


def lpips(vgg: str, linear: str, dtype: str = "float32") -> LPIPS:
    """LPIPS v0.1 with VGG16 (Zhang et al. 2018).

        d(x, y) = sum_l mean_hw sum_c w_lc (f_l(x) / |f_l(x)| - f_l(y) / |f_l(y)|)^2_hwc,    w >= 0

    f_l the features at relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, the norms over the channels.

    Args:
      vgg: path of VGG16's weights in torchvision's names (features.0.weight, ...; the classifier is ignored).
      linear: path of w in the lpips package's names (lin0.model.1.weight, ...; lin0.weight is understood too).
      dtype: "float32" or "bfloat16", of the features; their differences are float32.

    Raises:
      UserError: for an empty path or an unknown dtype. The files are read by `read` alone.
    """
    for name, path in (("vgg", vgg), ("linear", linear)):
        if not path:
            raise UserError(f"lpips needs {name}, the path of a file of weights; "
                            f"the laplacian distance needs none (perceptual name=laplacian)")
    return LPIPS(str(vgg), str(linear), compute_dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Laplacian:
    """See `laplacian`. There are no parameters: {}."""
    levels: Optional[int] = None

    def init(self, key: Array) -> PyTree:
        return {}

    def read(self, read_arrays: Optional[ReadArrays] = None) -> PyTree:
        return {}

    def apply(self, params: PyTree, x: Array, y: Array) -> Array:
        """The distance [B], float32, of images x and y [B, H, W, C] in [-1, 1]."""
        low = x.astype(jnp.float32) - y.astype(jnp.float32)  # the pyramid is linear
        most = max(0, min(low.shape[1:3]).bit_length() - 3)
        total = 0.0
        for _ in range(most if self.levels is None else min(self.levels, most)):
            high, low = low, _reduce(_reduce(low, 1), 2)
            size = high.shape[1:3]
            total = total + _mean_abs(high - _expand(_expand(low, 1, size[0]), 2, size[1]))
        return total + _mean_abs(low)

    def describe(self) -> str:
        return "perceptual distance: L1 of Laplacian pyramids, without learned weights, in place of LPIPS"


def _mean_abs(x: Array) -> Array:
    return jnp.mean(jnp.abs(x), axis=(1, 2, 3))


def _blur(x: Array, axis: int) -> Array:
    """Correlation with (1, 4, 6, 4, 1) / 16 along an axis, mirrored at the ends."""
    n = x.shape[axis]
    padded = jnp.pad(x, [(2, 2) if a == axis else (0, 0) for a in range(x.ndim)], mode="reflect")
    return sum(w / 16 * jax.lax.slice_in_dim(padded, k, k + n, axis=axis) for k, w in enumerate((1, 4, 6, 4, 1)))


def _reduce(x: Array, axis: int) -> Array:
    """Blurred, every other value from the first: n -> ceil(n / 2)."""
    return jax.lax.slice_in_dim(_blur(x, axis), 0, None, stride=2, axis=axis)


def _expand(x: Array, axis: int, n: int) -> Array:
    """Zeros put between the values, blurred, doubled: ceil(n / 2) -> n. A constant stays as it is."""
    spread = jnp.stack([x, jnp.zeros_like(x)], axis + 1).reshape(*x.shape[:axis], -1, *x.shape[axis + 1:])
    return 2 * jax.lax.slice_in_dim(_blur(spread, axis), 0, n, axis=axis)


def laplacian(levels: Optional[int] = None) -> Laplacian:
    """The L1 distance of Laplacian pyramids: Lap1 of Bojanowski et al. 2018 per value of the image.

        d(x, y) = sum_{j = 0..J} mean |L_j(x) - L_j(y)|,    L_j = G_j - expand(G_{j+1}) for j < J,    L_J = G_J

    G_0 = x, G_{j+1} = reduce(G_j), of half the size, with the filter (1, 4, 6, 4, 1) / 16 on both axes (Burt & Adelson 1983). A
    level has 4^-j as many values as the image, so d = 1 / D sum_j 2^{2j} |L_j(x) - L_j(y)|_1, D = H W C: the paper's weights.

    Args:
      levels: J; by default, and at most, floor(log2 min(H, W)) - 2, which ends at 4 to 7 pixels.

    Raises:
      UserError: for negative levels.
    """
    if levels is not None and levels < 0:
        raise UserError(f"levels={levels} of the laplacian distance is negative; give 0 (plain L1) or more, or leave it out")
    return Laplacian(levels)


PERCEPTUALS = {"lpips": lpips, "laplacian": laplacian}
