"""The fault campaign in short, and that it can fail: a run that goes on wrongly must be counted as lost."""
import json
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.runs import environment

pytestmark = pytest.mark.slow

SHORT = ["array file cut off", "SIGTERM", "SIGKILL inside a save", "disk full", "SIGKILL to process 1 of 2"]

CAMPAIGN = """
import json, sys
from tests import faults
folder, kinds = sys.argv[1], json.loads(sys.argv[2])
campaign = faults.begin(folder, 0)
done = faults.run(campaign, kinds, say=lambda line: print(line, file=sys.stderr))

from ldm_jax import run
run.batches = lambda right=run.batches, *, start, **options: right(start=start + (start > 0), **options)  # leaves out a batch
wrong = faults.run(campaign, ["half of a checkpoint removed"], say=lambda line: None)
what = faults.attempt(campaign, 1, "half of a checkpoint removed")[1]

from ldm_jax.training.checkpoint import Checkpoints
Checkpoints.restore = lambda self, abstract, **options: None  # what is saved is not looked at
begun = faults.attempt(campaign, 2, "array file cut off")[1]
print(json.dumps({"done": done, "table": faults.table(done + wrong, markdown=True), "wrong": wrong, "what": what, "begun": begun}))
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
    assert [kind for kind, _, seconds in found["done"] if seconds] == ["SIGTERM"]


def test_what_goes_on_wrongly_is_lost(campaign):
    found, _ = campaign
    assert found["wrong"][0][1] == "lost" and "differ" in found["what"]
    assert "went on from step 0, and the newest good checkpoint was" in found["begun"]


def test_the_table_counts_right(campaign):
    rows = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ")[1:] for row in campaign[0]["table"]}
    assert rows["half of a checkpoint removed"] == ["1", "0", "1"] and rows["SIGTERM"] == ["1", "1", "0"]
    assert rows["all"] == ["6", "5", "1"]


def test_every_kind_has_its_part_of_a_campaign(campaign):
    """And the same seed the same plan."""
    code = "import json, sys; from tests import faults; print(json.dumps([faults.plan(100, 3), faults.plan(100, 3), faults.plan(100, 4), {k: f.weight for k, f in faults.FAULTS.items()}]))"
    first, same, other, weights = json.loads(subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True,
                                                            text=True, check=True).stdout)
    assert first == same != other and len(first) == 100 and set(first) == set(weights)
    assert sum(weights.values()) == 100
    assert all(abs(first.count(kind) - weight) <= 1 for kind, weight in weights.items())
