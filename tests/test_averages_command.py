"""Averages of any length from the command line: a run that is killed, goes on, and is put together, and what else takes the result."""
import json
import os
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax.types import UserError
from tests.conftest import ROOT
from tests.runs import command, environment, main, mains

pytestmark = [pytest.mark.slow, pytest.mark.long]

RUN = ("--config=configs/digits.py:smoke", "--config.net.name=dit", "--config.train.averages.stds=0.05,0.1",
       "--config.train.averages.every=2", "--config.train.save_every=5", "--config.train.log_every=5", "--config.train.keep=1",
       "--config.train.keep_best=loss")


def test_killed_resumed_put_together_and_sampled(tmp_path):
    workdir = tmp_path / "run"
    process = subprocess.Popen(command(*RUN, f"--workdir={workdir}"), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while process.poll() is None and not (workdir / "checkpoints" / "5").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    result = main(*RUN, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert sorted(int(n) for n in os.listdir(workdir / "averages") if n.isdigit()) == list(range(2, 21, 2))
    losses = {line["step"]: line["loss"] for line in map(json.loads, open(workdir / "metrics.jsonl")) if line["step"] % 5 == 0}
    assert {int(n) for n in os.listdir(workdir / "checkpoints") if n.isdigit()} == {20, min(losses, key=losses.get)}

    flags = (["--std=0.08,0.2", "--step=10"], ["--std=0.08"], [], ["--std=short"])
    lines = [[f"--workdir={workdir}", "--mode=ema", *some] for some in flags]
    lines += [[f"--workdir={workdir / 'ema_0.080'}", "--mode=sample", "--num=2", "--class_id=3"]]
    partly, made, nothing, text, again = mains(lines, tmp_path)
    assert made.returncode == 0 and "relative error 0.00" in made.stderr, made.stderr
    assert partly.returncode == 2 and "cannot be made of 5 snapshots" in partly.stderr and (workdir / "ema_0.080_step_0000010").exists()
    assert nothing.returncode == text.returncode == 2 and "--std=0.08" in nothing.stderr and "--std=short" in text.stderr
    assert again.returncode == 0 and (workdir / "ema_0.080" / "samples" / "sampled_seed0_n2.png").exists(), again.stderr

    written, direct, usual = ldm_jax.load(str(workdir / "ema_0.080")), ldm_jax.load(str(workdir), ema=0.08), ldm_jax.load(str(workdir))
    jax.tree.map(np.testing.assert_array_equal, written.params, direct.params)
    changes = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), written.params, usual.params)
    assert 0.0 < max(jax.tree.leaves(changes)) < 0.5
    with pytest.raises(UserError, match="no snapshot of step 3"):
        ldm_jax.load(str(workdir), ema=0.08, step=3)
    with pytest.raises(UserError, match="kept no averages|holds no run"):
        ldm_jax.load(str(workdir / "ema_0.080"), ema=0.08)
