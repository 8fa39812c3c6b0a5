"""LPIPS, from files of random weights in the published layouts, and PatchGAN against PyTorch."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.discriminator import patchgan
from ldm_jax.models.features import lpips
from ldm_jax.models.layers import num_groups
from ldm_jax.weights import read_arrays
from tests.models.tiny import random_params

torch = pytest.importorskip("torch")
F = torch.nn.functional

# VGG16's `features` in torchvision without the last: channels of a convolution with a relu behind it, or M, a 2x2 maximum
CONFIGURATION = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
COMPARED = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3


def nchw(image):
    return torch.from_numpy(np.array(image)).permute(0, 3, 1, 2)


class VGGFeatures:
    def __init__(self):
        generator, self.layers, self.state, inputs = torch.Generator().manual_seed(0), [], {}, 3
        for channels in CONFIGURATION:
            if channels == "M":
                self.layers.append(lambda h: F.max_pool2d(h, 2))
                continue
            index = len(self.layers)
            weight = torch.randn(channels, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
            bias = 0.1 * torch.randn(channels, generator=generator)
            self.state |= {f"features.{index}.weight": weight, f"features.{index}.bias": bias}
            self.layers += [lambda h, w=weight, b=bias: F.conv2d(h, w, b, padding=1), F.relu]
            inputs = channels
        self.linear = {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1, generator=generator)
                       for i, n in enumerate((64, 128, 256, 512, 512))}

    def distance(self, x, y):
        shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
        a, b, total = (x - shift) / scale, (y - shift) / scale, 0.0
        for i, layer in enumerate(self.layers):
            a, b = layer(a), layer(b)
            if i in COMPARED:
                normed = [h / (h.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for h in (a, b)]
                difference = (normed[0] - normed[1]) ** 2
                total = total + F.conv2d(difference, self.linear[f"lin{COMPARED.index(i)}.model.1.weight"]).mean((1, 2, 3))
        return total


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The peer, and the parameters read from its two files, the first in the format of old torch files."""
    peer, folder = VGGFeatures(), tmp_path_factory.mktemp("weights")
    torch.save({**peer.state, "classifier.0.weight": torch.zeros(2, 2)}, folder / "vgg.pth", _use_new_zipfile_serialization=False)
    torch.save(peer.linear, folder / "lin.pth")
    net = lpips(str(folder / "vgg.pth"), str(folder / "lin.pth"))
    return peer, net, net.read(read_arrays)


def test_lpips(published):
    """Value and gradient, at a size whose halves are odd twice."""
    peer, net, params = published
    x, y = (jax.random.uniform(jax.random.key(i), (2, 35, 18, 3), minval=-1, maxval=1) for i in (0, 1))
    got, gradient = jax.jit(jax.value_and_grad(lambda y: (lambda d: (jnp.sum(d), d))(net.apply(params, x, y)), has_aux=True))(y)
    b = nchw(y).requires_grad_()
    want = peer.distance(nchw(x), b)
    np.testing.assert_allclose(got[1], want.detach(), rtol=1e-4)
    slope = torch.autograd.grad(want.sum(), b)[0].permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(gradient, slope, atol=1e-4 * np.abs(slope).max())


def test_lpips_in_bfloat16(published):
    _, net, params = published
    x, y = jax.random.uniform(jax.random.key(0), (2, 1, 16, 16, 3), minval=-1, maxval=1)
    want, got = (jax.jit(lpips(net.vgg, net.linear, dtype).apply)(params, x, y) for dtype in ("float32", "bfloat16"))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0.03)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("layers, size", [(3, (33, 40)), (1, (8, 8))])
def test_patchgan(norm, layers, size):
    net = patchgan((*size, 3), width=8, layers=layers, norm=norm)
    params = random_params(net)
    x = jax.random.normal(jax.random.key(0), (3, *size, 3))
    got = np.asarray(jax.jit(net.apply)(params, x))

    stack, inputs = [], 3
    for i in range(layers + 1):
        width = 8 * min(2**i, 8)
        bias = i == 0 or norm != "batch"
        stack.append((f"conv_{i}", torch.nn.Conv2d(inputs, width, 4, 2 if i < layers else 1, 1, bias=bias)))
        if i and norm != "none":
            norms = {"batch": lambda: torch.nn.BatchNorm2d(width), "group": lambda: torch.nn.GroupNorm(num_groups(width), width)}
            stack.append((f"norm_{i}", norms[norm]()))
        stack.append((None, torch.nn.LeakyReLU(0.2)))
        inputs = width
    stack.append(("conv_out", torch.nn.Conv2d(inputs, 1, 4, 1, 1)))
    for name, module in stack:
        own = {"weight": "kernel" if name and name.startswith("conv") else "scale", "bias": "bias"}
        for key, parameter in module.named_parameters():
            value = params[name][own[key]]
            parameter.data = torch.from_numpy(value.transpose(3, 2, 0, 1).copy() if value.ndim == 4 else value)
    with torch.no_grad():
        want = torch.nn.Sequential(*(module for _, module in stack)).train()(nchw(x)).permute(0, 2, 3, 1).numpy()
    assert got.shape == want.shape and np.std(want) > 0.05
    np.testing.assert_allclose(got, want, atol=1e-4)
