"""What a run logs, and a disk that has no more room for it."""
import glob
import json
import resource

import pytest

from ldm_jax.training.logs import Logs, drop_after, writing
from ldm_jax.types import UserError


def test_both_files_say_the_same(tmp_path):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c
    for steps in ((1, 2), (3,)):
        with Logs(str(tmp_path)) as logs:
            for step in steps:
                logs.scalars(step, {"loss": step / 4, "norm": 2.0 * step})
    lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    assert lines == [{"step": step, "loss": step / 4, "norm": 2.0 * step} for step in (1, 2, 3)]
    with open(sorted(glob.glob(str(tmp_path / "events.out.tfevents.*")))[-1], "rb") as f:
        data = f.read()
    found = []
    while data:  # length, its checksum, the event, its checksum
        n = int.from_bytes(data[:8], "little")
        assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
        event = Event.FromString(data[12:12 + n])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + n:]
    assert found[-2:] == [(3, "loss", 0.75), (3, "norm", 6.0)]


@pytest.fixture
def small_files():
    """No file may grow beyond 4 KiB, which is how a full disk looks."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("values", [{"loss": 1.0}, {str(i): 1.0 for i in range(40)}], ids=["metrics first", "events first"])
def test_a_full_disk_is_an_error_that_names_the_directory(tmp_path, small_files, values):
    """And not a wait for a thread that died of it."""
    with pytest.raises(UserError, match=f"cannot write to workdir '{tmp_path}'.*free some space"):
        with Logs(str(tmp_path)) as logs:
            for step in range(1000):
                logs.scalars(step, values)


def test_lines_beyond_a_step_and_half_of_one_are_dropped(tmp_path, small_files):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 6))
    path.write_bytes((whole + '{"step": 3, "lo').encode() + b"\x8d\n")
    drop_after(str(path), 4)
    assert [json.loads(line)["step"] for line in open(path)] == [1, 2, 3, 4]
    drop_after(str(tmp_path / "none"), 4)


def test_other_errors_are_left_alone(tmp_path):
    with pytest.raises(KeyError), writing(str(tmp_path)):
        raise KeyError
