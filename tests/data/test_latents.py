"""The latent cache: what is written is read, in any order, and what does not belong together is refused."""
import json

import numpy as np
import pytest

from ldm_jax.data.base import Source
from ldm_jax.data.latents import open_latents, write_latents
from ldm_jax.types import UserError

STAMP = {"autoencoder": "a1", "statistics": "b2"}
LIKE = Source("pictures", (8, 8, 3), 10, tuple("0123456789"), 11, None)
RNG = np.random.default_rng(0)
MEAN, CLASS = RNG.normal(size=(23, 2, 2, 4)).astype(np.float16), RNG.integers(0, 10, 23).astype(np.int32)


@pytest.fixture
def cache(tmp_path):
    directory = str(tmp_path / "latents")
    write_latents(directory, ({"mean": MEAN[i:i + 5], "class": CLASS[i:i + 5]} for i in range(0, 23, 5)), stamp=STAMP, size=23, shards=3)
    return directory


def test_records_come_back_as_they_were_written(cache, tmp_path):
    source = open_latents(cache, stamp=STAMP, like=LIKE)
    assert source.size == 23 and len(list((tmp_path / "latents").glob("*-of-00003.array_record"))) == 3
    ids = [22, 0, 7, 8, 7, 15]  # over all three files, one twice
    batch = source.read(ids)
    np.testing.assert_array_equal(batch["mean"], MEAN[ids])
    np.testing.assert_array_equal(batch["class"], CLASS[ids])
    assert batch["mean"].dtype == np.float16 and batch["class"].dtype == np.int32 and batch["mean"].flags.writeable


def test_another_stamp_is_refused_by_name(cache):
    with pytest.raises(UserError, match="another statistics .b2 there, c3 here.*remove"):
        open_latents(cache, stamp={**STAMP, "statistics": "c3"}, like=LIKE)


def test_damage_is_refused(cache, tmp_path):
    index = tmp_path / "latents" / "index.json"
    whole = index.read_text()
    index.write_text(json.dumps({**json.loads(whole), "size": 24}))
    with pytest.raises(UserError, match="23 records of 24"):
        open_latents(cache, stamp=STAMP, like=LIKE)
    index.write_text(whole)
    next((tmp_path / "latents").glob("*00001-of*")).unlink()
    with pytest.raises(UserError, match="00001-of-00003.array_record is missing"):
        open_latents(cache, stamp=STAMP, like=LIKE)
    index.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        open_latents(cache, stamp=STAMP, like=LIKE)


def test_a_cache_appears_whole_or_not_at_all(tmp_path):
    directory = tmp_path / "latents"

    def broken():
        yield {"mean": MEAN[:5]}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_latents(str(directory), broken(), stamp=STAMP, size=23)
    assert not directory.exists()
    write_latents(str(directory), [{"mean": MEAN}], stamp=STAMP, size=23)
    np.testing.assert_array_equal(open_latents(str(directory), stamp=STAMP, like=LIKE).read(range(23))["mean"], MEAN)
