"""Perceptual distances: LPIPS on weights chosen so that it has a closed form, pyramids against matrices in float64."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.features import PERCEPTUALS, laplacian, lpips
from ldm_jax.types import UserError

MAKE = {"lpips": lambda: lpips("vgg.pth", "lin.pth"), "laplacian": laplacian}
CHANNELS = (64, 128, 256, 512, 512)
TORCHVISION = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # indices of VGG16's convolutions


def colours(seed, n=2):
    """n images of 32 x 48 pixels in squares of 16, each square of one colour, and those colours [n, 2, 3, 3]."""
    colour = np.random.default_rng(seed).uniform(-1, 1, (n, 2, 3, 3))
    return jnp.asarray(np.repeat(np.repeat(colour, 16, 1), 16, 2), jnp.float32), colour


def test_lpips_in_closed_form():
    """Convolutions that split a pixel into its positive and negative parts, 6 channels, and pass those on; one image is grey."""
    net, rng = MAKE["lpips"](), np.random.default_rng(0)
    params = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), jax.eval_shape(net.init, jax.random.key(0)))
    for name, p in params.items():
        if name == "conv_0_0":
            p["kernel"][1, 1, range(3), range(3)] = 1
            p["kernel"][1, 1, range(3), range(3, 6)] = -1
        elif name.startswith("conv"):
            p["kernel"][1, 1, range(6), range(6)] = 1.5
        else:
            p["scale"][:] = rng.uniform(size=p["scale"].shape)
    (x, a), (y, b) = colours(0), colours(1)

    def directions(colour):
        f = (colour - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
        f = np.concatenate([np.maximum(f, 0), np.maximum(-f, 0)], -1)
        return f / np.linalg.norm(f, axis=-1, keepdims=True)

    weights = sum(params[f"linear_{i}"]["scale"][:6].astype(np.float64) for i in range(5))
    want = ((directions(a[..., :1]) - directions(b)) ** 2 @ weights).mean((1, 2))
    np.testing.assert_allclose(jax.jit(net.apply)(params, x[..., :1], y), want, rtol=1e-5)


def test_lpips_has_a_gradient_where_no_feature_is_active():
    net = MAKE["lpips"]()
    params = jax.tree.map(lambda a: jnp.zeros(a.shape), jax.eval_shape(net.init, jax.random.key(0)))
    gradient = jax.jit(jax.grad(lambda y: net.apply(params, jnp.ones((1, 16, 16, 3)), y)[0]))(jnp.zeros((1, 16, 16, 3)))
    assert np.all(np.isfinite(gradient))


def vgg_file():
    rng, arrays, inputs = np.random.default_rng(0), {}, 3
    widths = [n for n, times in zip(CHANNELS, (2, 2, 3, 3, 3)) for _ in range(times)]
    for index, n in zip(TORCHVISION, widths):
        arrays[f"features.{index}.weight"] = np.broadcast_to(np.float32(index), (n, inputs, 3, 3))
        arrays[f"features.{index}.bias"] = np.full(n, index + 0.5, np.float32)
        inputs = n
    arrays["features.2.weight"] = rng.normal(size=(64, 64, 3, 3)).astype(np.float32)
    return {**arrays, "classifier.0.weight": np.zeros((2, 2))}


def linear_file(style="lin{}.model.1.weight"):
    return {style.format(i): np.full((1, n, 1, 1), i, np.float64) for i, n in enumerate(CHANNELS)}


@pytest.mark.parametrize("style", ["lin{}.model.1.weight", "lin{}.model.0.weight", "lin{}.weight", "lins.{}.model.1.weight"])
def test_lpips_reads_its_two_files(style):
    net, files = MAKE["lpips"](), {"vgg.pth": vgg_file(), "lin.pth": linear_file(style)}
    params = net.read(files.__getitem__)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)
    assert sum(a.size for a in jax.tree.leaves(params)) == 14714688 + 1472  # VGG16's convolutions, and a weight per channel
    kernel = files["vgg.pth"]["features.2.weight"]
    assert params["conv_0_1"]["kernel"][0, 2, 5, 7] == kernel[7, 5, 0, 2]
    biases = [params[name]["bias"][0] - 0.5 for name in sorted(params) if name.startswith("conv")]
    assert tuple(biases) == TORCHVISION and [params[f"linear_{i}"]["scale"][0] for i in range(5)] == [0, 1, 2, 3, 4]
    assert "vgg.pth" in net.describe() and "lin.pth" in net.describe()


@pytest.mark.parametrize("file, change, words", [
    ("vgg.pth", lambda a: a.pop("features.28.bias"), "vgg.pth is not VGG16.*features.28.bias is missing"),
    ("vgg.pth", lambda a: a.update({"features.0.weight": np.zeros((64, 1, 3, 3))}), r"features.0.weight has shape.*, not"),
    ("vgg.pth", lambda a: a.clear(), "features.0.weight is missing.* and 23 more"),
    ("lin.pth", lambda a: a.pop("lin4.model.1.weight"), "lin.pth is not the linear.*lin4.model.1.weight is missing"),
    ("lin.pth", lambda a: a.update({"lin3.model.1.weight": -np.ones((1, 512, 1, 1))}), "lin3.model.1.weight.*negative"),
])
def test_files_of_another_network_are_refused(file, change, words):
    files = {"vgg.pth": vgg_file(), "lin.pth": linear_file()}
    change(files[file])
    with pytest.raises(UserError, match=words):
        MAKE["lpips"]().read(files.__getitem__)


def test_lpips_refuses_images_and_options():
    net = MAKE["lpips"]()
    for shape in ((1, 15, 32, 3), (1, 32, 32, 4)):
        with pytest.raises(UserError, match="16x16"):
            net.apply({}, jnp.zeros(shape), jnp.zeros(shape))
    with pytest.raises(UserError, match="needs linear"):
        lpips("vgg.pth", "")
    with pytest.raises(UserError, match="half.*bfloat16, float32"):
        lpips("vgg.pth", "lin.pth", dtype="half")


# ---- pyramids ------------------------------------------------------------------------------------------------------

def blur_matrix(n):
    """(1, 4, 6, 4, 1) / 16 about each of n points, the sequence mirrored about its first and last value."""
    matrix = np.zeros((n, n))
    for i in range(n):
        for k, w in zip(range(-2, 3), (1, 4, 6, 4, 1)):
            matrix[i, n - 1 - abs(n - 1 - abs(i + k))] += w / 16
    return matrix


def pyramid(x, levels):
    """The levels of a Laplacian pyramid of an image [H, W]: as many bands, then what is left."""
    bands = []
    for _ in range(levels):
        down = [blur_matrix(n)[::2] for n in x.shape]
        up = [2 * blur_matrix(2 * len(r))[:, ::2][:n] for r, n in zip(down, x.shape)]
        low = down[0] @ x @ down[1].T
        bands.append(x - up[0] @ low @ up[1].T)
        x = low
    return [*bands, x]


@pytest.mark.parametrize("size, options, levels", [((16, 16), {}, 2), ((13, 22), {}, 1), ((32, 35), {}, 3), ((5, 5), {}, 0),
                                                   ((32, 32), dict(levels=1), 1), ((8, 8), dict(levels=9), 1)])
def test_laplacian_against_matrices(size, options, levels):
    x, y = np.random.default_rng(0).normal(size=(2, 1, *size, 2))
    bands = [[np.abs(a - b).mean() for a, b in zip(pyramid(x[0, ..., c], levels), pyramid(y[0, ..., c], levels))] for c in (0, 1)]
    got = jax.jit(lambda x, y: laplacian(**options).apply({}, x, y))(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(got, np.mean(np.sum(bands, 1)), rtol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (11, 12), (32, 32)])
def test_laplacian_of_what_one_level_holds(size):
    """A constant is in the last level alone and a checkerboard, which the filter removes, in the first: both are |difference|."""
    zero, board = jnp.zeros((1, *size, 1)), jnp.asarray(1.0 - 2.0 * (np.indices(size).sum(0) % 2))[None, :, :, None]
    apply = jax.jit(lambda x, y: laplacian().apply({}, x, y))
    for picture in (zero + 1, board, -board):
        np.testing.assert_allclose(apply(0.5 * picture, zero), 0.5, rtol=1e-5)


def test_laplacian_has_no_parameters():
    net = laplacian()
    assert net.init(jax.random.key(0)) == net.read() == net.read(None) == {} and "laplacian" in net.describe().lower()
    with pytest.raises(UserError, match="levels=-1"):
        laplacian(levels=-1)


# ---- all -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(PERCEPTUALS))
def test_distances_are_per_example(name):
    net = MAKE[name]()
    params = jax.tree.map(lambda a: 0.1 * np.abs(np.random.default_rng(a.size).standard_normal(a.shape, np.float32)),
                          jax.eval_shape(net.init, jax.random.key(0)))
    x, y = jax.random.uniform(jax.random.key(0), (2, 3, 16, 16, 3), minval=-1, maxval=1)
    apply = jax.jit(net.apply)
    d, changed = apply(params, x, y), apply(params, x, y.at[1].set(x[1]))
    assert d.shape == (3,) and d.dtype == jnp.float32 and np.all(d > 0)
    np.testing.assert_allclose(changed, np.where(np.arange(3) == 1, 0, d), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(apply(params, y, x), d, rtol=1e-5)
    assert "\n" not in net.describe()
