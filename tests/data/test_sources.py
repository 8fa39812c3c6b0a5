"""Sources: every row of SOURCES gives what its description says; splits do not overlap; mistakes are named."""
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import SOURCES, Source, cached
from ldm_jax.data.directories import find
from ldm_jax.data.records import tfds
from ldm_jax.data.sources import _SHAPES, digits, folder, shapes
from ldm_jax.types import UserError
from tests.data.archives import pixels

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
REAL = os.path.join(ROOT, "..", "shared", "data", "tfds")


def write_images(root, files, size=(12, 9)):
    for i, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(*size[::-1], 3 + i)[..., :3]).save(path)
    return str(root)


@pytest.fixture
def arguments(tmp_path, cifar10):
    """What the rows of SOURCES that need arguments are given here."""
    path = write_images(tmp_path, [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(20)])
    return {"folder": {"path": path, "image_size": 8}, "tfds": {"name": "cifar10", "data_dir": str(cifar10[0])},
            "shapes": {"count": 30}}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_as_it_describes_itself(name, arguments):
    seen = {}
    for split in ("train", "test"):
        source = SOURCES[name](split, **arguments.get(name, {}))
        ids = list(range(source.size))
        batch = source.read(ids)
        assert batch["image"].shape == (source.size, *source.image_shape) and batch["image"].dtype == np.uint8
        assert batch["class"].shape == (source.size,) and batch["class"].dtype == np.int32
        assert source.num_classes == len(source.class_names)
        assert 0 <= batch["class"].min() <= batch["class"].max() < source.num_classes
        mixed = [ids[-1], 0, ids[-1], 1]
        again = source.read(mixed)
        assert np.array_equal(again["image"], batch["image"][mixed]) and np.array_equal(again["class"], batch["class"][mixed])
        again["image"][:] = 0  # the caller's own
        assert np.array_equal(source.read(ids)["image"], batch["image"])
        fresh = SOURCES[name](split, **arguments.get(name, {})).read(ids)
        assert np.array_equal(fresh["image"], batch["image"])
        seen[split] = {image.tobytes() for image in batch["image"]}
    assert not seen["train"] & seen["test"]


def test_digits_are_scikit_learns_split_by_class():
    from sklearn.datasets import load_digits

    train, test = digits("train"), digits("test")
    assert (train.size, test.size) == (1297, 500)
    both = [s.read(range(s.size)) for s in (train, test)]
    data = load_digits()
    found = sorted((image.tobytes(), label) for b in both for image, label in zip(b["image"], b["class"]))
    exact = data.images[..., None].astype(np.float64) * 255 / 16
    nearest = np.floor(exact + 0.5).astype(np.uint8)  # 8 / 16 is the only tie: 127.5
    nearest[exact == 127.5] = 128
    assert found == sorted((image.tobytes(), label) for image, label in zip(nearest, data.target))
    share = np.bincount(both[1]["class"]) / np.bincount(data.target)
    assert np.all(abs(share - 500 / 1797) < 0.5 / 170)  # each class within half an example


def test_shapes_depend_on_seed_split_and_index_alone():
    a = shapes(count=20, cache=False).read([13])["image"]
    assert np.array_equal(a, shapes(count=500).read([7, 13])["image"][1:])
    assert not np.array_equal(a, shapes("test", count=20).read([13])["image"])
    assert not np.array_equal(a, shapes(count=20, seed=1).read([13])["image"])
    assert shapes(count=20).read(range(20))["class"].tolist() == [*range(10)] * 2
    assert shapes(size=16).read([0])["image"].shape == (1, 16, 16, 3)


def test_the_fields_of_shapes_say_what_is_drawn():
    size, plain = 16, shapes(size=16, count=20)
    source = shapes(size=16, count=20, fields=("vector", "map", "sequence", "sequence_mask"))
    batch = source.read(range(20))
    assert set(batch) == {"image", "class", *source.fields} and set(plain.read([0])) == {"image", "class"}
    assert np.array_equal(batch["image"], plain.read(range(20))["image"])
    for name, field in source.fields.items():
        assert batch[name].shape == (20, *field.shape) and batch[name].dtype == field.dtype
        assert np.array_equal(source.read([7, 3])[name], batch[name][[7, 3]])  # from the cache
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    for i, (x, y, radius, *colours) in enumerate(batch["vector"].astype(np.float64)):
        kind = batch["class"][i]
        inside = list(_SHAPES.values())[kind]((axis[None] - x) / radius, (axis[:, None] - y) / radius) * radius
        cover = np.clip(0.5 + inside / (2 / size), 0, 1)[..., None]  # of a pixel, from the distance to the edge
        colour, ground = (np.asarray(colours).reshape(2, 3) + 1) * 127.5
        assert np.abs(batch["image"][i] - (cover * colour + (1 - cover) * ground)).max() <= 0.51
        assert np.array_equal(batch["map"][i], np.where(inside >= 0, kind + 1, 0))
        np.testing.assert_allclose(batch["sequence"][i, 0], np.eye(10)[kind].tolist() + [1, 0, 0], atol=1e-6)
        np.testing.assert_allclose(batch["sequence"][i, 1], [*colours[:3]] + [0] * 7 + [0, 1, 0], atol=1e-6)
        np.testing.assert_allclose(batch["sequence"][i, 2], [x, y, radius] + [0] * 7 + [0, 0, 1], atol=1e-6)
    there = shapes(count=2000, size=8, fields=["sequence_mask"]).read(range(2000))["sequence_mask"]
    assert set(np.unique(there)) == {0, 1} and (abs(there.mean(0) - 0.75) < 4 * 0.0097).all()
    with pytest.raises(UserError, match="unknown field of shapes 'size'; choose from: map, sequence, sequence_mask, vector"):
        shapes(fields=("size",))


@pytest.mark.parametrize("name", _SHAPES)
def test_shapes_fit_their_place_and_keep_their_class_when_mirrored(name):
    u, v = np.meshgrid(np.linspace(-1.5, 1.5, 61), np.linspace(-1.5, 1.5, 61))
    inside = _SHAPES[name](u, v) > 0
    np.testing.assert_allclose(_SHAPES[name](-u, v), _SHAPES[name](u, v), atol=1e-12)
    assert not inside[(abs(u) > 1.01) | (abs(v) > 1.01)].any() and 0.1 < inside.sum() * 0.05**2 < 4  # area, of 4 in all


def test_each_example_is_fetched_once_into_the_cache():
    asked = []

    def read(ids):
        asked.extend(ids)
        return {"image": np.array(ids, np.uint8).reshape(-1, 1, 1, 1), "class": np.array(ids, np.int32) % 3}

    source = Source("count", (1, 1, 1), 3, ("a", "b", "c"), 10, read)
    kept = cached(source)
    for ids in ([3, 1, 3], [1, 2], range(10), [9, 0]):
        batch = kept.read(list(ids))
        assert batch["image"].ravel().tolist() == list(ids) and batch["class"].tolist() == [i % 3 for i in ids]
    assert sorted(asked) == list(range(10))
    assert cached(source, limit=9) is source


def test_folder_classes_split_and_crop(tmp_path):
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, :10], image[:, 10:20], image[:, 20:30], image[:, 30:] = 10, 20, 30, 40
    for name in ("b", "a/deep", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / name / "x.png")
    Image.fromarray(image).convert("RGBA").save(tmp_path / "b" / "y.PNG")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    source = folder(path=str(tmp_path), image_size=20, held_out=0)
    batch = source.read(range(source.size))
    assert source.class_names == ("a", "b") and batch["class"].tolist() == [0, 1, 1]
    assert (batch["image"] == image[:, 10:30]).all()  # the centre, where no scaling is needed
    small = folder(path=str(tmp_path), image_size=10, channels=1, held_out=0).read([0])["image"]
    assert small.shape == (1, 10, 10, 1) and abs(small[0, 5, 1, 0] - 20.0) <= 1 and abs(small[0, 5, 8, 0] - 30.0) <= 1
    big = folder(path=str(tmp_path), image_size=40, held_out=0).read([0])["image"]
    assert big.shape == (1, 40, 40, 3) and (big[0, :, 2] == 20).all() and (big[0, :, 37] == 30).all()


def test_folder_without_subdirectories_has_no_classes_and_a_stable_split(tmp_path):
    path = write_images(tmp_path, [f"{i}.png" for i in range(40)])
    splits = {s: folder(s, path=path, image_size=9, held_out=0.25) for s in ("train", "test")}
    assert splits["train"].num_classes is None and splits["train"].class_names == ()
    content = {s: {i.tobytes() for i in source.read(range(source.size))["image"]} for s, source in splits.items()}
    assert "class" not in splits["train"].read([0])
    assert len(content["train"] | content["test"]) == splits["train"].size + splits["test"].size == 40
    assert 4 <= splits["test"].size <= 16
    write_images(tmp_path, [f"0{i}.png" for i in range(15)])
    later = folder("test", path=path, image_size=9, held_out=0.25)
    assert content["test"] <= {i.tobytes() for i in later.read(range(later.size))["image"]}


def test_folder_names_the_image_it_cannot_read(tmp_path):
    path = write_images(tmp_path, ["a/1.png", "a/2.png", "a/3.png"])
    whole = (tmp_path / "a" / "2.png").read_bytes()
    for damaged in (b"", b"not an image", whole[:len(whole) // 2]):
        (tmp_path / "a" / "2.png").write_bytes(damaged)
        source = folder(path=path, image_size=8, held_out=0)
        with pytest.raises(UserError, match=r"a/2\.png"):
            source.read([0, 1])
        assert source.read([0, 2])["image"].shape == (2, 8, 8, 3)


@pytest.mark.parametrize("files, arguments, says", [
    (None, {}, "no image directory"),
    ([], {}, "no images in"),
    (["a/1.png", "2.png"], {}, "2.png"),
    (["1.png"], {"split": "validation"}, "train, test"),
    (["1.png"], {"split": "test", "held_out": 0}, "held_out"),
    (["1.png"], {"channels": 4}, "channels 4"),
    (["1.png"], {"image_size": 0}, "image_size 0"),
])
def test_folder_errors(files, arguments, says, tmp_path):
    path = tmp_path / "images"
    if files is not None:
        path.mkdir()
        write_images(path, files)
    with pytest.raises(UserError, match=says) as e:
        folder(**{"path": str(path), "image_size": 8, **arguments})
    assert len(str(e.value).splitlines()) <= 2


@pytest.mark.parametrize("real", [False, True][:1 + os.path.isdir(REAL)])
def test_tfds_reads_the_same_as_tfds_itself(real, cifar10):
    import tensorflow_datasets as tfds_lib

    directory = REAL if real else str(cifar10[0])
    source = tfds("test", name="cifar10", data_dir=directory)
    assert source.image_shape == (32, 32, 3)
    if real:
        assert source.size == 10000 and source.class_names[6] == "frog"
    ids = [source.size - 1, 0, 3, 3]
    rows = tfds_lib.data_source("cifar10", split="test", data_dir=directory, download=False).__getitems__(ids)
    batch = source.read(ids)
    assert np.array_equal(batch["image"], np.stack([row["image"] for row in rows]))
    assert batch["class"].tolist() == [row["label"] for row in rows]


def test_tfds_resizes_slices_and_looks_in_order(cifar10, tmp_path, monkeypatch):
    directory, content = cifar10
    images = np.stack(tfds("test", name="cifar10", data_dir=str(directory)).read(range(6))["image"])
    small = tfds("test", name="cifar10", data_dir=[str(tmp_path), str(directory)], image_size=16)
    assert small.image_shape == (16, 16, 3)
    mean = small.read(range(6))["image"].mean((1, 2))
    assert np.all(abs(mean - images.mean((1, 2))) < 6)  # shrinking keeps the mean colour, up to the edges
    assert tfds("train[:50%]", name="cifar10", data_dir=str(directory)).size == 15
    monkeypatch.setenv("TFDS_DATA_DIR", str(directory))
    assert tfds("train", name="cifar10:3.0.2").size == 30
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(directory, tmp_path / "tensorflow_datasets")
    assert tfds("test", name="cifar10").size == 6


def test_the_newest_version_is_read(tmp_path):
    for version in ("3.0.2", "3.0.10", "2.9.9", "incomplete.XYZ_4.0.0"):
        (tmp_path / "cifar10" / version).mkdir(parents=True)
        (tmp_path / "cifar10" / version / "dataset_info.json").write_text("{}")
    assert find("cifar10", [tmp_path / "none", tmp_path]).name == "3.0.10"
    assert find("cifar10:2.9.9", [tmp_path]).name == "2.9.9"
    assert find("cifar10:9.9.9", [tmp_path]) is None and find("cifar100", [tmp_path]) is None
    (tmp_path / "emnist" / "digits" / "3.1.0").mkdir(parents=True)
    with pytest.raises(UserError, match="emnist/digits"):
        find("emnist", [tmp_path])


@pytest.mark.parametrize("name, says", [
    ("cifar11", ["unknown data set 'cifar11'", "cifar10"]),
    ("zzzzqqqq", ["unknown data set 'zzzzqqqq'", "catalog"]),
    ("kmnist", ["is not prepared in", "tfds build kmnist --file_format=array_record --data_dir="]),
    ("cifar10:1.2.3", ["is not prepared in"]),
    ("../cifar10", ["is not the name of a data set"]),
])
def test_missing_sets_are_explained_in_two_lines(name, says, tmp_path, no_network):
    with pytest.raises(UserError) as e:
        tfds("train", name=name, data_dir=str(tmp_path))
    assert all(part in str(e.value) for part in says), str(e.value)
    assert len(str(e.value).splitlines()) <= 2 and len(str(e.value)) < 500


def test_missing_set_is_not_fetched_where_that_is_not_wanted(tmp_path):
    with pytest.raises(UserError, match="python -m ldm_jax.data.prepare --name=cifar10 --data_dir="):
        tfds("train", name="cifar10", data_dir=str(tmp_path), download=False)


@pytest.mark.parametrize("damage", ["no info", "bad info", "no features", "no shard", "cut shard", "wrong bytes"])
def test_damaged_directory_is_named(damage, cifar10, tmp_path):
    path = tmp_path / "cifar10" / "3.0.2"
    shutil.copytree(cifar10[0] / "cifar10" / "3.0.2", path)
    shard = next(path.glob("*train*"))
    data = bytearray(shard.read_bytes())
    {"no info": lambda: (path / "dataset_info.json").unlink(),
     "bad info": lambda: (path / "dataset_info.json").write_text('{"name": "cif'),
     "no features": lambda: (path / "features.json").unlink(),
     "no shard": shard.unlink,
     "cut shard": lambda: shard.write_bytes(data[:1000]),
     "wrong bytes": lambda: shard.write_bytes(data[:30000] + bytes(30000) + data[60000:])}[damage]()
    with pytest.raises(UserError) as e:
        source = tfds("train", name="cifar10", data_dir=str(tmp_path))
        source.read(range(source.size))
    assert str(path) in str(e.value) and "damaged" in str(e.value) and len(str(e.value).splitlines()) == 2


def test_unknown_split(cifar10):
    with pytest.raises(UserError, match="choose from: train, test"):
        tfds("validation", name="cifar10", data_dir=str(cifar10[0]))


def test_importing_the_package_loads_none_of_the_heavy_libraries():
    code = ("import sys, ldm_jax, ldm_jax.data; "
            "print([m for m in ('grain', 'tensorflow_datasets', 'sklearn', 'PIL', 'cv2', 'requests') if m in sys.modules])")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
