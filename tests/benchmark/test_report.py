"""Turns, ratios, the table and the JSON of the benchmark, and its command line."""
import io
import json
import os
import platform
import subprocess
import sys

import pytest

from ldm_jax.benchmark import nets, report, sampling, suites, timing, training
from ldm_jax.benchmark.settings import Settings
from ldm_jax.models.dit import dit
from ldm_jax.types import UserError, lookup
from tests.conftest import ROOT

CASE = nets.Case(lambda **options: dit((8, 8, 4), width=16, depth=1, num_heads=2, **options), (8, 8, 4), "class", (8, 4), (8, 4))


def test_calls_take_turns_and_the_first_round_does_not_count():
    said = []
    times = timing.alternate({"a": lambda: said.append("a"), "b": lambda: said.append("b")}, rounds=3, warm=2)
    assert said == ["a", "b"] * 5 and {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_of_pairs_and_above_one_where_we_are_faster():
    assert timing.ratios([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]) == (1.0, 0.5, 2.0)


def test_the_better_way_of_the_peer_counts():
    best, ratio = training.fastest({"ldm_jax": [1.0, 1.0], "torch eager": [3.0, 3.0], "torch compiled": [2.0, 4.0]})
    assert best in ("torch eager", "torch compiled") and training.fastest({"ldm_jax": [1.0]}) == (None, None)
    assert training.fastest({"ldm_jax": [1.0], "x": [3.0], "y": [2.0]}) == ("y", (2.0, 2.0, 2.0))


def test_updates_and_pictures_of_a_small_network():
    rows = [*training.run("tiny", CASE, Settings(rounds=2)), *sampling.run("tiny", CASE, Settings(rounds=1, steps=2))]
    update = rows[0]
    assert update.value == pytest.approx(8 / (update.detail["step_ms"] / 1e3)) and update.low <= update.value <= update.high
    assert update.detail["gflop_per_image"] > 0 and rows[1].unit == "%"
    assert {row.what for row in rows if row.suite == "sample"} == {
        f"2 DDIM steps, {n}{guided}" for n in ("1 picture", "4 pictures") for guided in ("", ", guided")}


def test_what_is_measured_apart_has_a_new_process_and_its_errors_arrive():
    assert len({os.getpid(), suites.apart(os.getpid), suites.apart(os.getpid)}) == 3
    with pytest.raises(UserError, match="unknown net 'x'"):
        suites.apart(lookup, {"y": 0}, "x", "net")


def test_json_and_table(tmp_path):
    row = report.Row("train", "net", "update, batch 8", 1234.5, "images/s", 1000.0, 1500.0, ("torch eager", 617.0), (2.0, 1.9, 2.1))
    path = tmp_path / "new" / "out.json"
    report.write(str(path), [row], report.facts(), ["--suite=train"])
    said = json.loads(path.read_text())
    assert said["rows"][0]["ratio"] == [2.0, 1.9, 2.1] and {"date", "device", "versions", "commit", "command"} <= set(said)
    assert "jax" in said["versions"]
    assert report.table([row]).splitlines()[-1] == (
        "| train | net | update, batch 8 | 1,234 images/s (1,000 to 1,500) | torch eager: 617 | 2.00 (1.90 to 2.10) |")


@pytest.mark.parametrize("said, want", [
    ("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\nflags\t\t: fma avx512f\n", "AMD EPYC (family 26 model 2, AVX-512)"),
    ("cpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\nflags\t\t: fma avx2\n", "AMD EPYC (family 25 model 1)"),
    ("processor\t: 0\nFeatures\t: fp asimd\n", platform.processor() or platform.machine()),
])
def test_the_processor_is_named_with_its_kind(said, want, monkeypatch):
    monkeypatch.setattr(report, "open", lambda path: io.StringIO(said), raising=False)
    assert report.processor() == want


@pytest.mark.parametrize("wrong, said", [("--suite=speed", "unknown suite 'speed'; choose from: checkpoint"),
                                         ("--net=resnet", "unknown net 'resnet'; choose from: ddpm_cifar"),
                                         ("now", "unexpected argument")])
def test_a_mistake_is_one_line(wrong, said):
    out = subprocess.run([sys.executable, "-m", "ldm_jax.benchmark", wrong], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 2 and said in out.stderr and "Traceback" not in out.stderr
