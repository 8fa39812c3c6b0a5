"""The fault campaign in short, and that it can fail: a run that goes on wrongly must be counted as lost."""
import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.runs import environment

pytestmark = [pytest.mark.slow, pytest.mark.long]

SHORT = ["half of a checkpoint removed", "SIGKILL inside a save", "disk full", "SIGKILL to process 1 of 2"]

CAMPAIGN = """
import json, sys
from ldm_jax import drawing, run
from tests import faults
drawing.draw = lambda *args: []  # most of the time of so short a run
folder, kinds = sys.argv[1], json.loads(sys.argv[2])
campaign = faults.begin(folder, 0)
done = faults.run(campaign, kinds, say=lambda line: print(line, file=sys.stderr))

run.batches = lambda right=run.batches, *, start, **options: right(start=start + (start > 0), **options)  # leaves out a batch
skipping = []
wrong = faults.run(campaign, ["half of a checkpoint removed"], say=skipping.append)
from ldm_jax.training.checkpoint import Checkpoints
Checkpoints.restore = lambda self, abstract, **options: None  # what is saved is not looked at
forgetting = faults.attempt(campaign, 1, "array file cut off")
print(json.dumps({"done": done, "wrong": wrong, "skipping": skipping, "forgetting": forgetting,
                  "table": faults.table(done + wrong, markdown=True), "plans": [faults.plan(100, seed) for seed in (3, 3, 4)],
                  "weights": {kind: fault.weight for kind, fault in faults.FAULTS.items()}}))
"""


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """In a process of its own: this one has asked JAX for its devices, and could not be forked."""
    done = subprocess.run([sys.executable, "-c", CAMPAIGN, str(tmp_path_factory.mktemp("faults")), json.dumps(SHORT)], cwd=ROOT,
                          env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_the_short_campaign_loses_nothing(campaign):
    found, said = campaign
    assert [(kind, outcome) for kind, outcome, _ in found["done"]] == [(kind, "recovered") for kind in SHORT], said


def test_what_goes_on_wrongly_is_lost(campaign):
    found, _ = campaign
    assert found["wrong"][0][1] == "lost" and "differs from the unbroken run's" in found["skipping"][0]
    assert found["forgetting"][0] == "lost" and "went on from step 0, and the newest good checkpoint was" in found["forgetting"][1]


def test_the_table_counts_right(campaign):
    rows = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ")[1:] for row in campaign[0]["table"]}
    assert rows["half of a checkpoint removed"] == ["2", "1", "1"] and rows["disk full"] == ["1", "1", "0"]
    assert rows["all"] == ["5", "4", "1"]


def test_every_kind_has_its_part_of_a_campaign(campaign):
    """And the same seed the same plan."""
    (first, same, other), weights = campaign[0]["plans"], campaign[0]["weights"]
    assert first == same != other and len(first) == 100 and set(first) == set(weights)
    assert sum(weights.values()) == 100
    assert all(abs(first.count(kind) - weight) <= 1 for kind, weight in weights.items())
