"""The suites of what feeds a training loop and of what saves it, on a network of a few parameters."""
import pytest

from ldm_jax import recipe
from ldm_jax.benchmark import nets, reading, saving
from ldm_jax.benchmark.settings import Settings
from ldm_jax.models.unet import unet

CASE = nets.Case(lambda **options: unet((32, 32, 3), width=8, mults=(1,), num_res_blocks=1, attention=(), mid_attention=False, **options),
                 (32, 32, 3), None, (8, 8), (8, 8))


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(recipe, "cifar10_or_shapes", lambda: dict(name="shapes", shapes=dict(size=32, count=300)))
    for name, value in {"READ": 4, "DECODED": 2, "STEPS": 3}.items():
        monkeypatch.setattr(reading, name, value)
    reading.sources.cache_clear()
    yield
    reading.sources.cache_clear()


def test_what_is_delivered_taken_and_waited_for(few):
    rows = {row.what: row for row in reading.run("tiny", CASE, Settings(rounds=2))}
    delivered, taken = rows["pipeline, batch 128, from memory"], rows["update, batch 8"]
    ratio = rows["delivered from memory for each one taken"]
    pairs = [a / b for a, b in zip(delivered.detail["rates"], taken.detail["rates"])]
    assert ratio.low == pytest.approx(min(pairs)) and ratio.high == pytest.approx(max(pairs))
    assert rows["sent to the devices"].value == 32 * 32 * 3 + 4  # uint8 pixels and an int32 class
    assert 0 <= rows["of the loop's time"].value < 100


def test_what_a_save_costs():
    rows = {row.what: row for row in saving.run("tiny", CASE, Settings(rounds=2))}
    (stalled,) = [row for what, row in rows.items() if what.startswith("stalled by a save")]
    (slowed,) = [row for what, row in rows.items() if what.startswith("updates slowed")]
    share = rows["of the time of 1,000 updates, both"]
    bounds = [(a + b) / (10 * stalled.detail["step_ms"]) for a, b in ((stalled.low, slowed.low), (stalled.high, slowed.high))]
    assert bounds[0] <= share.low <= share.value <= share.high <= bounds[1]
    assert stalled.detail["megabytes"] > 0 and rows["stalled by a run's first save"].value > 0
