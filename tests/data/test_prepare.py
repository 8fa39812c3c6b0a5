"""Preparing the official archives without TensorFlow: exact pixels and labels back, nothing half-done, clear errors."""
import contextlib
import http.server
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest

from ldm_jax.data import prepare
from ldm_jax.data.directories import find
from ldm_jax.data.records import tfds
from ldm_jax.types import UserError
from tests.data.archives import CIFAR10, cifar_archive, idx_files, pixels, register

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def in_key_order(source_split, n, prefix):
    """A cifar split's records by their id, since TFDS stores them shuffled."""
    rows = source_split.__getitems__(list(range(n)))
    rows.sort(key=lambda row: row["id"])
    assert [row["id"].decode() for row in rows] == [f"{prefix}_{i:05d}" for i in range(n)]
    return rows


def test_cifar10_comes_back_exactly_through_the_ordinary_call(cifar10):
    import tensorflow_datasets as tfds_lib

    directory, content = cifar10
    for split, (labels, images) in content.items():
        rows = in_key_order(tfds_lib.data_source("cifar10", split=split, data_dir=directory, download=False), len(labels), split)
        assert np.array_equal(np.stack([row["image"] for row in rows]), images)
        assert [row["label"] for row in rows] == labels[:, 0].tolist()
    info = tfds_lib.builder("cifar10", data_dir=directory).info
    assert info.features["label"].names == CIFAR10
    assert "tensorflow" not in sys.modules
    assert sorted(p.name for p in directory.iterdir()) == ["cifar10"]  # no scratch left


def test_cifar100_has_both_labels(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds_lib

    labels = np.array([[3, 17], [19, 99], [0, 0]])
    names = {"coarse_label_names.txt": [f"c{i}" for i in range(20)], "fine_label_names.txt": [f"f{i}" for i in range(100)]}
    members = {"train.bin": (labels, pixels(3, 32, 32, 3)), "test.bin": (labels[:2], pixels(2, 32, 32, 3))}
    cifar_archive(tmp_path / "cifar-100-binary.tar.gz", "cifar-100-binary", members, names)
    register(monkeypatch, "cifar100", tmp_path)
    out = tmp_path / "out"
    assert prepare.main(["--name=cifar100", f"--data_dir={out}", f"--archive={tmp_path / 'cifar-100-binary.tar.gz'}"]) == 0
    rows = in_key_order(tfds_lib.data_source("cifar100", split="train", data_dir=out, download=False), 3, "train")
    assert [[row["coarse_label"], row["label"]] for row in rows] == labels.tolist()
    assert np.array_equal(np.stack([row["image"] for row in rows]), members["train.bin"][1])
    source = tfds("train", name="cifar100", data_dir=str(out))
    assert source.num_classes == 100 and source.class_names[17] == "f17"  # the fine label is the class
    assert sorted(source.read(range(3))["class"].tolist()) == [0, 17, 99]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist_kinds(name, tmp_path, monkeypatch):
    content = idx_files(tmp_path)
    register(monkeypatch, name, tmp_path)
    prepare.prepare(name, tmp_path / "out", archive=tmp_path)
    for split, (images, labels) in content.items():
        source = tfds(split, name=name, data_dir=str(tmp_path / "out"))
        assert source.image_shape == (28, 28, 1) and source.num_classes == 10 and source.size == len(labels)
        batch = source.read(range(source.size))
        expected = {image.tobytes(): label for image, label in zip(images, labels)}
        assert {image.tobytes(): label for image, label in zip(batch["image"], batch["class"])} == expected


@contextlib.contextmanager
def server(directory, cut=None):
    """A proxy that answers every request from `directory` by the file's name, only the first `cut` bytes where that is given."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            file = directory / self.path.rsplit("/", 1)[1]
            if not file.is_file():
                return self.send_error(404)
            data = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:cut])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", asked
        httpd.shutdown()


def test_first_use_downloads_checks_and_prepares(tmp_path, monkeypatch, no_network):
    files = tmp_path / "files"
    files.mkdir()
    content = idx_files(files)
    out = tmp_path / "out"
    with server(files) as (url, asked):
        monkeypatch.setenv("http_proxy", url)
        with pytest.raises(UserError, match="SHA-256"):  # these are not the official files
            tfds("test", name="fashion_mnist", data_dir=str(out))
        assert find("fashion_mnist", [out]) is None and not list(out.rglob("*.gz*"))
        register(monkeypatch, "fashion_mnist", files)
        source = tfds("test", name="fashion_mnist", data_dir=str(out))
    assert sorted(source.read(range(source.size))["class"]) == sorted(content["test"][1])
    assert all(path.startswith("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/") for path in asked)
    assert source.class_names[0] == "T-shirt/top"


@pytest.mark.parametrize("fault, says", [("cut", "could not be downloaded"), ("gone", "404")])
def test_failed_download_says_how_to_go_on(fault, says, tmp_path, monkeypatch, no_network, capsys):
    idx_files(tmp_path)
    register(monkeypatch, "fashion_mnist", tmp_path)
    if fault == "gone":
        (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with server(tmp_path, cut=100 if fault == "cut" else None) as (url, _):
        monkeypatch.setenv("http_proxy", url)
        assert prepare.main(["--name=fashion_mnist", f"--data_dir={tmp_path / 'out'}"]) == 2
    message = capsys.readouterr().err.strip()
    assert says in message and len(message.splitlines()) == 2
    assert f"python -m ldm_jax.data.prepare --name=fashion_mnist --data_dir={tmp_path / 'out'} --archive=" in message
    assert not list((tmp_path / "out").rglob("*.part"))


def test_without_a_network_it_fails_at_once(tmp_path, no_network):
    since = time.perf_counter()
    with pytest.raises(UserError) as e:
        tfds("train", name="cifar10", data_dir=[str(tmp_path / "a"), str(tmp_path / "b")])
    assert time.perf_counter() - since < 10
    for part in (str(tmp_path / "a"), "cs.toronto.edu", "refused", f"--name=cifar10 --data_dir={tmp_path / 'b'} --archive="):
        assert part in str(e.value)
    assert len(str(e.value).splitlines()) == 2


@pytest.mark.parametrize("damage", ["no file", "other bytes", "cut record", "not a tar"])
def test_bad_archives_are_refused_and_leave_nothing(damage, tmp_path, monkeypatch, capsys):
    archive, out = tmp_path / "cifar-10-binary.tar.gz", tmp_path / "out"
    data = np.zeros((2, 1)), pixels(2, 32, 32, 3)
    members = {f"data_batch_{k}.bin": data for k in range(1, 6)}
    members["test_batch.bin"] = (data[0], data[1][:, :31]) if damage == "cut record" else data
    cifar_archive(archive, "cifar-10-batches-bin", members, {"batches.meta.txt": CIFAR10})
    if damage == "not a tar":
        archive.write_bytes(b"<html>moved</html>")
    if damage in ("cut record", "not a tar"):  # past the checksum, so that the readers must notice
        register(monkeypatch, "cifar10", tmp_path)
    if damage == "no file":
        archive.unlink()
    assert prepare.main(["--name=cifar10", f"--data_dir={out}", f"--archive={tmp_path}"]) == 2
    message = capsys.readouterr().err.strip().splitlines()
    error = "\n".join(message[[i for i, line in enumerate(message) if line.startswith("error: ")][0]:])
    says = {"no file": "no file", "other bytes": "SHA-256", "cut record": "test_batch.bin", "not a tar": "cannot be unpacked"}
    assert says[damage] in error and len(error.splitlines()) <= 2
    assert find("cifar10", [out]) is None and not list(out.rglob("*.*"))


@pytest.mark.parametrize("name", ["../out.bin", "a/../../out.bin", "{tmp_path}/out.bin"])
def test_an_archive_writes_nowhere_but_where_it_is_unpacked(name, tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for part in ("a/in.bin", name.format(tmp_path=tmp_path)):
            entry = tarfile.TarInfo(part)
            entry.size = 3
            tar.addfile(entry, io.BytesIO(b"abc"))
    (tmp_path / "into").mkdir()
    with pytest.raises(UserError, match="cannot be unpacked: .*out.bin"):
        prepare._Files({"x.tar.gz": tmp_path / "a.tar.gz"}, tmp_path / "into").download_and_extract("x.tar.gz")
    assert (tmp_path / "into" / "a" / "in.bin").read_bytes() == b"abc" and not (tmp_path / "out.bin").exists()


def test_unknown_name_and_unwritable_directory(tmp_path, capsys):
    assert prepare.main(["--name=cifar", f"--data_dir={tmp_path}"]) == 2
    assert "cifar10, cifar100, fashion_mnist, mnist" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another"):
        prepare.prepare("mnist", tmp_path / "file" / "data")


def test_a_directory_without_a_description_does_not_count_as_prepared(tmp_path):
    (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"3\.0\.1 is damaged.*\nremove it"):
        prepare.prepare("mnist", tmp_path)


KILLED = """
import sys, time
from ldm_jax.data import prepare
from tests.data.archives import register
import pytest
png = prepare._png
def slow(image):
    time.sleep(0.02)
    return png(image)
prepare._png = slow
from pathlib import Path
register(pytest.MonkeyPatch(), "mnist", Path(sys.argv[1]))
prepare.prepare("mnist", sys.argv[2], archive=sys.argv[1])
"""


def test_killed_preparation_leaves_nothing_that_looks_prepared(tmp_path, monkeypatch):
    idx_files(tmp_path, n_train=100, n_test=5)
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), str(out)], cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.time() + 60
    while not list(out.glob("mnist/incomplete*")) and time.time() < until and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be killed"
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(out.glob("mnist/incomplete*"))  # it was at work
    assert find("mnist", [out]) is None
    register(monkeypatch, "mnist", tmp_path)
    prepare.prepare("mnist", out, archive=tmp_path)
    assert tfds("train", name="mnist", data_dir=str(out)).size == 100
