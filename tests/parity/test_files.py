"""What torch.save and safetensors write, in each of their formats, read here without torch: the same bits."""
import collections

import ml_dtypes
import numpy as np
import pytest

from ldm_jax.weights import read_arrays

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
          torch.uint8, torch.bool, torch.complex64, torch.complex128]


def same(array, tensor):
    """Equal shapes, dtypes and bits."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        assert array.dtype == ml_dtypes.bfloat16
        array, tensor = np.ascontiguousarray(array).reshape(array.shape).view(np.int16), tensor.view(torch.int16)
    want = tensor.numpy()
    assert array.dtype == want.dtype and array.shape == want.shape
    np.testing.assert_array_equal(array, want)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_save(zipped, tmp_path):
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    tensors = {
        "transposed": base.T, "part": base[2:4, 1::3], "row": base[5], "scalar": base[3, 3], "expanded": base[0, :1].expand(5, 4),
        "empty": torch.zeros(0, 4), "bare scalar": torch.tensor(3), "parameter": torch.nn.Parameter(base[1]),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        **{str(dtype): (10 * torch.randn(3, 5)).to(dtype) for dtype in DTYPES},
        **{f"part of {dtype}": (10 * torch.randn(3, 5)).to(dtype)[1:, ::2] for dtype in DTYPES},
    }
    tree = {"state_dict": net.state_dict(), "epoch": 3, "rate": 1e-4, "betas": (0.9, 0.999), "note": "x", "tags": {1, 2},
            "optimizer": torch.optim.Adam(net.parameters()).state_dict(), "list": [base, {"deep": base.half()}],
            "ordered": collections.OrderedDict(tensors)}
    torch.save(tree, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    arrays = read_arrays(tmp_path / "a.pt")
    wanted = {**{f"ordered.{k}": t for k, t in tensors.items()}, **{f"state_dict.{k}": t for k, t in net.state_dict().items()},
              "list.0": base, "list.1.deep": base.half()}
    assert set(arrays) == set(wanted)
    for key, tensor in wanted.items():
        same(arrays[key], tensor)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_every_pickle_protocol(zipped, protocol, tmp_path):
    state = torch.nn.Linear(3, 2).state_dict()
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    arrays = read_arrays(tmp_path / "a.pth")
    assert set(arrays) == {"weight", "bias"}
    for key, tensor in state.items():
        same(arrays[key], tensor)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module_is_refused(zipped, tmp_path):
    torch.save(torch.nn.Linear(3, 2), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="torch.nn.modules.linear.Linear|whole module"):
        read_arrays(tmp_path / "a.pth")


def test_safetensors(tmp_path):
    tensors = {str(dtype): (10 * torch.randn(3, 5)).to(dtype) for dtype in DTYPES[:10]}
    safetensors_torch.save_file(tensors, tmp_path / "a.safetensors")
    arrays = read_arrays(tmp_path / "a.safetensors")
    assert set(arrays) == set(tensors)
    for key, tensor in tensors.items():
        same(arrays[key], tensor)
