"""Several processes as one run: the numbers of a single process, its files once, and what ends it."""
import functools
import glob
import json
import os
import re
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.runs import command, environment, main
from tests.test_main import DIGITS, parameters

pytestmark = [pytest.mark.slow, pytest.mark.long]
RUN = (DIGITS, "--config.net.name=dit", "--config.train.save_every=5", "--config.train.log_every=5",
       "--config.optimizer.decay=constant", "--process_timeout=5")


def start(count, *arguments):
    """`count` processes of one command line, as any launcher starts them; each has one device."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    variables = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    return [subprocess.Popen(command(*arguments), cwd=ROOT, env=environment(**variables, JAX_PROCESS_ID=str(i)), text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(count)]


def ends(processes):
    """[(exit code, what was said)]"""
    said = [p.communicate(timeout=240)[1] for p in processes]
    return list(zip([p.returncode for p in processes], said))


def losses(workdir):
    return {line["step"]: line["loss"] for line in map(json.loads, open(workdir / "metrics.jsonl"))}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    result = main(*RUN, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    return workdir


def test_two_processes_are_one_run_and_any_number_goes_on(alone, tmp_path):
    """2 to step 10, then 4 with the tensor axis across them, then 1: the loss curve, the parameters and the pictures of one process."""
    workdir = tmp_path / "run"
    for count, more in ((2, ("--config.train.steps=10", "--config.mesh.fsdp=2")),
                        (4, ("--config.train.steps=15", "--config.mesh.tensor=2"))):
        result = ends(start(count, *RUN, f"--workdir={workdir}", *more))
        assert [code for code, _ in result] == [0] * count, result
        assert all("step" not in said for _, said in result[1:])  # one speaks
    result = main(*RUN, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert losses(workdir).keys() == losses(alone).keys() and len(losses(workdir)) == 4
    np.testing.assert_allclose(list(losses(workdir).values()), list(losses(alone).values()), rtol=1e-4)
    (_, mine), (_, theirs) = parameters(workdir), parameters(alone)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=5e-4), mine.ema, theirs.ema)
    assert len(glob.glob(str(workdir / "events*"))) == 3  # one for each start, of one process each


def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path):
    workdir = tmp_path / "run"
    processes = start(2, *RUN, f"--workdir={workdir}", "--config.train.steps=100000", "--config.train.save_every=100000")
    deadline = time.time() + 200
    while not (workdir / "metrics.jsonl").exists() or not os.path.getsize(workdir / "metrics.jsonl"):
        assert time.time() < deadline and not any(p.poll() for p in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    stopped = ends(processes)
    assert [code for code, _ in stopped] == [143, 143], stopped
    steps = {re.search(r"stopped by SIGTERM after step (\d+), saved in", said).group(1) for _, said in stopped}
    assert steps == {os.path.basename(path) for path in glob.glob(str(workdir / "checkpoints" / "[0-9]*"))} and len(steps) == 1


def test_fifty_thousand_pictures_in_short(alone, tmp_path):
    """1,001 pictures by two processes are those of one, in files of arrays; a second call makes only what is missing."""
    sampling = ("--mode=sample", "--num=1001", "--config.sampler.steps=2")
    single = main(f"--workdir={alone}", *RUN, *sampling)
    assert single.returncode == 0, single.stderr
    directory = alone / "samples" / "sampled_seed0_n1001"
    one = np.concatenate([np.load(path) for path in sorted(glob.glob(str(directory / "0*.npy")))])
    assert one.shape == (1001, 8, 8, 1) and one.dtype == np.uint8 and len(np.load(directory / "labels.npy")) == 1001
    os.remove(directory / "00000000.npy")
    again = ends(start(2, f"--workdir={alone}", *RUN, *sampling))
    assert [code for code, _ in again] == [0, 0] and "1000 new pictures of 1001" in again[0][1], again
    two = np.concatenate([np.load(path) for path in sorted(glob.glob(str(directory / "0*.npy")))])
    assert np.abs(one.astype(int) - two).max() <= 1
    other = main(f"--workdir={alone}", *RUN, "--mode=sample", "--num=1001", "--config.sampler.steps=3")
    assert other.returncode == 2 and "other sampler" in other.stderr
