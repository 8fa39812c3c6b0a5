"""--dry-run: figures that can be had by hand, what would not fit, and nothing written."""
import re

import pytest

from tests.runs import mains

pytestmark = [pytest.mark.slow, pytest.mark.long]
RUN = ("--config=configs/digits.py:smoke", "--config.net.name=dit", "--dry-run")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    split = ("--devices=8", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    return mains([RUN, (*RUN, *split), (*RUN, "--device_memory=0.0001"), (*RUN, f"--workdir={folder / 'run'}", "--config.mesh.fsdp=3"),
                  (*RUN, "--config.mesh.rules=((\"nowhere\",(\"fsdp\",)),)"), (*RUN, "--config.mesh.rules=((\"q/kernel$\",(\"rows\",)),)"),
                  ("--config=configs/ldm_cifar.py:smoke", "--dry-run", "--config.net.name=dit")], folder), folder


def figure(text, name):
    number, unit = re.search(rf"{name}: ([\d.,]+) ?(\w+)?", text).groups()
    return float(number.replace(",", "")) * {"GB": 1e9, "MB": 1e6, "kB": 1e3}.get(unit, 1)


def test_one_device(reports):
    text = reports[0][0].stdout
    assert reports[0][0].returncode == 0 and '"system": "pixel"' in text
    count = figure(text, "parameters of net, trained")
    assert figure(text, "bytes per device, parameters") == pytest.approx(4 * count, rel=1e-3)
    assert figure(text, "bytes per device, averages") == pytest.approx(4 * count, rel=1e-3)
    assert figure(text, "bytes per device, optimiser") == pytest.approx(8 * count, rel=1e-3)  # Adam's two moments
    assert figure(text, "bytes per device, batch") == pytest.approx(64 * (8 * 8 + 4), rel=1e-3)  # uint8 pictures, int32 classes
    assert "collectives per step: none" in text and "fits: " in text


def test_a_mesh(reports):
    text = reports[0][1].stdout
    assert reports[0][1].returncode == 0 and "mesh: data=2 x fsdp=2 x sequence=1 x tensor=2" in text
    assert figure(text, "bytes per device, batch") == pytest.approx(16 * (8 * 8 + 4), rel=1e-3)
    assert figure(text, "bytes per device, parameters") < 4 * figure(text, "parameters of net, trained")
    assert re.search(r"all-reduce per step: \d+, .* received by each device", text)


def test_what_would_not_fit_and_mistakes(reports):
    results, folder = reports
    assert results[2].returncode == 2 and "DOES NOT FIT" in results[2].stderr and "Raise mesh.fsdp" in results[2].stderr.splitlines()[-1]
    assert results[3].returncode == 2 and "fsdp=3" in results[3].stderr and not (folder / "run").exists()
    assert results[4].returncode == 2 and "matches no parameter" in results[4].stderr
    assert results[5].returncode == 2 and "names the axis 'rows'" in results[5].stderr


def test_both_stages(reports):
    text = reports[0][6].stdout
    assert reports[0][6].returncode == 0, reports[0][6].stderr
    assert "first stage" in text and "second stage" in text and "parameters of autoencoder, held" in text
