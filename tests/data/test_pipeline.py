"""Batches: a permutation per epoch, a function of (seed, index), the same on any number of processes, resumable."""
import copy
import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ldm_jax.data import SOURCES, Source, batches, cached
from ldm_jax.data.base import Field
from ldm_jax.data.pipeline import Batches, permuted
from ldm_jax.types import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def numbered(n, labelled=True):
    """Example i has class i and an image of i at the left and 0 at the right."""
    def read(ids):
        image = np.zeros((len(ids), 2, 2, 1), np.uint8)
        image[:, :, 0, 0] = np.asarray(ids)[:, None]
        return {"image": image, "class": np.asarray(ids, np.int32)} if labelled else {"image": image}
    return Source("numbered", (2, 2, 1), n if labelled else None, tuple(map(str, range(n))) if labelled else (), n, read)


def take(count, source=None, **arguments):
    with batches(source or numbered(23), **{"batch_size": 8, "seed": 0, **arguments}) as it:
        return [next(it) for _ in range(count)]


def order(taken):
    return np.concatenate([b["class"] for b in taken]).tolist()


def same(a, b):
    return all(x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("batch_size", [5, 23, 60])  # 60: more than the source holds
def test_every_example_comes_once_per_epoch_in_a_new_order(batch_size):
    stream = order(take(-(-4 * 23 // batch_size), batch_size=batch_size))
    epochs = [stream[i * 23:(i + 1) * 23] for i in range(4)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and epochs[0] != list(range(23))
    assert order(take(3, seed=1)) != order(take(3, seed=0)) == order(take(3, seed=0))


@pytest.mark.parametrize("size, seed", [(1, 0), (23, 0), (50_000, 7), (1000, 2**32 - 1)])
def test_the_order_is_grains(size, seed):
    """Bit for bit, in the first epoch, over its end, and far on: runs that are under way go on with the data that they would have had."""
    import grain

    stream = grain.MapDataset.range(size).seed(seed).shuffle().repeat()
    for first in (0, max(size - 20, 0), 10**6 * size + 3):
        assert permuted(size, seed, first, first + 40).tolist() == [stream[i] for i in range(first, first + 40)]


def test_memory_changes_nothing(cifar10):
    """Batches of decoded pictures that are kept are those of pictures that are decoded each time, from the start and gone on with."""
    kept, decoded = (SOURCES["tfds"]("train", name="cifar10", data_dir=str(cifar10[0]), cache=cache) for cache in (True, False))
    whole = take(12, decoded, flip=True)  # three epochs of 30
    assert same(take(12, kept, flip=True), whole)
    assert same(take(5, kept, flip=True, start=7), whole[7:])  # from memory by now
    assert same(take(5, SOURCES["tfds"]("train", name="cifar10", data_dir=str(cifar10[0])), flip=True, start=7), whole[7:])


def test_image_and_class_belong_together():
    for b in take(4):
        assert b["image"].dtype == np.uint8 and b["class"].dtype == np.int32
        assert np.array_equal(b["image"][:, 0, 0, 0], b["class"]) and not b["image"][:, :, 1].any()
    assert take(1, numbered(5, labelled=False))[0].keys() == {"image"}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shares_laid_side_by_side_are_the_batch_of_one_process(count):
    whole = take(9, flip=True)
    shares = [take(9, flip=True, share=(p, count)) for p in range(count)]
    joined = [{k: np.concatenate([share[i][k] for share in shares]) for k in whole[i]} for i in range(9)]
    assert same(joined, whole)
    assert all(share[0]["class"].shape == (8 // count,) for share in shares)


def test_batch_k_needs_no_history():
    whole = take(12, flip=True)
    for k in (0, 1, 7, 11):
        assert same(take(1, flip=True, start=k), whole[k:k + 1])


@pytest.mark.parametrize("batch_size, k", [(8, 0), (8, 4), (60, 1)])
def test_the_ids_of_a_batch_are_those_that_are_read(batch_size, k):
    """Within an epoch and over its end, of the whole batch whatever the share of this process is."""
    whole = order(take(1, batch_size=batch_size, start=k))
    for share in ((0, 1), (1, 2)):
        with batches(numbered(23), batch_size=batch_size, seed=0, share=share) as it:
            assert it.ids(k).tolist() == whole


def test_mirroring_mirrors_half_of_the_images_and_nothing_else():
    mirrored = []
    for b in take(50, flip=True):
        left, right = b["image"][:, :, 0, 0], b["image"][:, :, 1, 0]
        flipped = (right == b["class"][:, None]).all(1) & (left == 0).all(1)
        straight = (left == b["class"][:, None]).all(1) & (right == 0).all(1)
        assert np.all(flipped | straight)
        mirrored.extend(flipped[b["class"] > 0])
    assert abs(np.mean(mirrored) - 0.5) < 4 * 0.5 / len(mirrored)**0.5
    assert len(mirrored) > 300


def test_what_lies_on_the_picture_is_mirrored_with_it_and_what_would_be_untrue_is_refused():
    def read(ids):
        image = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 1)).astype(np.uint8)[ids]
        return {"image": image, "map": image[..., 0].astype(np.int32) + 1, "weight": np.asarray(ids, np.float32)}

    fields = {"map": Field((4, 4), "int32", "spatial"), "weight": Field(())}
    source = Source("fields", (4, 4, 1), None, (), 23, read, fields)
    whole, flipped = read(range(23))["image"], 0
    for b in take(5, cached(source), flip=True):
        straight = whole[b["weight"].astype(int)]
        assert np.array_equal(b["map"], b["image"][..., 0].astype(np.int32) + 1)
        assert all(np.array_equal(a, s) or np.array_equal(a, s[:, ::-1]) for a, s in zip(b["image"], straight))
        flipped += sum(not np.array_equal(a, s) for a, s in zip(b["image"], straight))
    assert 5 < flipped < 35
    untrue = dataclasses.replace(source, fields={**fields, "place": Field((2,), mirrored="untrue")})
    with pytest.raises(UserError, match="flip=True would make the field 'place' of data 'fields' untrue"):
        batches(untrue, batch_size=2, seed=0, flip=True)
    batches(untrue, batch_size=2, seed=0).close()


def test_state_restores_on_any_number_of_processes():
    whole = take(14, flip=True)
    with batches(numbered(23), batch_size=8, seed=0, flip=True) as it:
        for _ in range(6):
            next(it)
        state = json.loads(json.dumps(it.get_state()))
        assert state == {"next_index": 6}
        assert same([next(it) for _ in range(3)], whole[6:9])
        it.set_state(state)  # back again, with batches already read ahead
        assert same([next(it) for _ in range(3)], whole[6:9]) and it.get_state() == {"next_index": 9}
    shares = []
    for p in range(2):
        with batches(numbered(23), batch_size=8, seed=0, flip=True, share=(p, 2)) as it:
            it.set_state(state)
            shares.append([next(it) for _ in range(8)])
    assert same([{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*shares)], whole[6:])


def test_arrays_arrive_sharded_over_the_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, P("data"))
    for placed, plain in zip(take(4, place=lambda a, first, size: jax.device_put(a, sharding), flip=True), take(4, flip=True)):
        for name, a in placed.items():
            assert a.sharding.is_equivalent_to(sharding, a.ndim) and a.shape == plain[name].shape
            assert np.array_equal(np.asarray(a), plain[name])


def test_an_error_of_the_source_reaches_the_caller():
    def read(ids):
        if 3 in ids:
            raise UserError("cannot read the image 3.png")
        return numbered(23).read(ids)

    source = Source("broken", (2, 2, 1), 23, tuple(map(str, range(23))), 23, read)
    with pytest.raises(UserError, match="3.png"):
        take(3, source)


def test_closed_is_closed():
    it = batches(numbered(5), batch_size=2, seed=0)
    next(it)
    it.close()
    it.close()
    with pytest.raises(ValueError, match="closed"):
        next(it)


@pytest.mark.parametrize("arguments, says", [
    ({"batch_size": 0}, "batch_size 0"),
    ({"batch_size": 6, "share": (0, 4)}, "batch_size 6.*multiple of 4"),
    ({"share": (2, 2)}, "share .2, 2."),
    ({"seed": -1}, "seed -1"),
    ({"seed": 2**32}, "seed"),
    ({"start": -1}, "start"),
    ({"num_workers": -1}, "num_workers -1"),
])
def test_errors(arguments, says):
    with pytest.raises(UserError, match=says):
        batches(numbered(23), **{"batch_size": 8, "seed": 0, **arguments})
    with pytest.raises(UserError, match="no images"):
        batches(numbered(0), batch_size=8, seed=0)


AT_EXIT = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import NamedSharding, PartitionSpec as P
from ldm_jax.data import SOURCES, batches
sharding = NamedSharding(jax.make_mesh((4,), ("data",)), P("data"))
it = batches(SOURCES["shapes"](count=50), batch_size=8, seed=0, place=lambda a, first, size: jax.device_put(a, sharding))
next(it)
"""


def test_a_process_that_leaves_an_iterator_open_still_ends_cleanly():
    run = subprocess.run([sys.executable, "-c", AT_EXIT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_cache_that_is_being_filled_is_copied_empty():
    """A worker's copy of rows taken before they were written, beside marks taken after, would be read as pictures."""
    source = SOURCES["shapes"](count=20)
    want = source.read(range(20))
    other = copy.copy(source.read)  # by what pickle goes by as well
    assert source.read.have.all() and not other.have.any()
    for name, a in other(range(20)).items():
        np.testing.assert_array_equal(a, want[name])


WORKERS = """
import numpy as np
from ldm_jax.data import SOURCES, batches
if __name__ == "__main__":
    source = SOURCES["shapes"](count=50)
    same = dict(batch_size=8, seed=0, flip=True, start=3)
    with batches(source, **same) as a, batches(source, **same, num_workers=2) as b:
        print(all(np.array_equal(x[k], y[k]) for _ in range(5) for x, y in [(next(a), next(b))] for k in x), b.get_state())
"""


def test_worker_processes_change_nothing(tmp_path):
    (tmp_path / "script.py").write_text(WORKERS)
    run = subprocess.run([sys.executable, tmp_path / "script.py"], env={**os.environ, "PYTHONPATH": ROOT},
                         capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "True {'next_index': 8}", run.stderr


def test_real_source_end_to_end():
    source = SOURCES["digits"]("train")
    taken = take(3, source, batch_size=64)
    whole = source.read(range(source.size))
    everything = {image.tobytes(): c for image, c in zip(whole["image"], whole["class"])}
    assert all(everything[image.tobytes()] == c for b in taken for image, c in zip(b["image"], b["class"]))


def test_a_decoding_process_that_was_killed_is_said():
    """Grain's own words for it, which have no line of their own elsewhere; other errors pass."""
    def make(said):
        def of(first):
            raise RuntimeError(said)
            yield
        return of

    with pytest.raises(UserError, match="ended by signal 9.*goes on from the last checkpoint"):
        next(Batches(make("Worker process was terminated unexpectedly with exit code -9. Search the logs"), 0, None))
    with pytest.raises(RuntimeError, match="else"):
        next(Batches(make("something else"), 0, None))
