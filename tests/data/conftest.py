"""A small prepared set that the data tests share, and a machine without a network."""
import numpy as np
import pytest

from ldm_jax.data import prepare
from tests.data.archives import CIFAR10, cifar_archive, register


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory):
    """A directory with a 36-image cifar10 prepared in it, and its content {split: (labels [n], images [n, 32, 32, 3])}."""
    archive, out = tmp_path_factory.mktemp("archive"), tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    members = {f: (rng.integers(0, 10, (6, 1)), rng.integers(0, 256, (6, 32, 32, 3), np.uint8))
               for f in [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]}
    cifar_archive(archive / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", members, {"batches.meta.txt": CIFAR10})
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch, "cifar10", archive)
        prepare.prepare("cifar10", out, archive=archive)
    train = [members[f] for f in members if f != "test_batch.bin"]
    return out, {"train": tuple(np.concatenate(part) for part in zip(*train)), "test": members["test_batch.bin"]}


@pytest.fixture
def no_network(monkeypatch):
    """Every download ends at a closed port of this machine."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
