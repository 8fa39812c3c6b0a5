"""The command line: train, sample and eval as a user would, and every mistake that the README promises to explain."""
import json
import os
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax.training.checkpoint import Checkpoints
from tests.conftest import ROOT
from tests.runs import command, environment, main, mains, smoke
from tests.training.test_checkpoint import arrays_of, flip

pytestmark = pytest.mark.slow

DIGITS = "--config=configs/digits.py:smoke"
RUN = (DIGITS, "--config.net.name=dit")  # one block: the least to trace


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and what it said."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    return workdir, main(*RUN, f"--workdir={workdir}")


def copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")


def refused(result, *says, code=2, threads=False):
    """One or two lines that say this, the exit code, and no traceback, but for what threads of Orbax's print before it."""
    lines = [line for line in result.stderr.strip().splitlines() if line.strip()]
    assert result.returncode == code, result.stderr
    assert threads or "Traceback" not in result.stderr
    assert len(lines[-1]) < 500 and "error: " in " ".join(lines[-2:])
    last = " ".join(lines[-2:])
    for text in says:
        assert text in last, last


def parameters(workdir):
    """Everything in the newest checkpoint, as numpy."""
    from ldm_jax.recipe import build_optimizer, build_system
    from ldm_jax.training.state import new_state
    config = smoke("digits")
    config["net"]["name"] = "dit"
    system = build_system(config)
    tx = build_optimizer(config, system.trained)
    abstract = jax.eval_shape(lambda key: new_state(system.init(key), system.trained, tx), jax.random.key(0))
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        step, state, _ = checkpoints.restore(abstract, warn=pytest.fail)
    return step, jax.tree.map(np.asarray, state)


def test_training_leaves_what_it_promises(finished):
    workdir, result = finished
    assert result.returncode == 0, result.stderr
    names = set(os.listdir(workdir))
    assert {"checkpoints", "config.json", "metrics.jsonl", "samples"} <= names and any(n.startswith("events.out.tfevents") for n in names)
    for name in ("grid", "denoising", "real_and_generated"):
        assert (workdir / "samples" / f"{name}.png").stat().st_size > 500
    lines = [json.loads(line) for line in open(workdir / "metrics.jsonl")]
    assert lines[-1]["step"] == 20 and {"loss", "grad_norm", "images_per_s", "mse_t0.0-0.1"} <= set(lines[-1])
    assert set(lines[-1]["grad_norms"]) >= {"net/block_0", "net/patch_out"}
    assert "images/s" in result.stderr and "loss" in result.stderr
    assert json.load(open(workdir / "config.json"))["train"]["steps"] == 20


def test_a_second_start_trains_no_further(finished):
    workdir, _ = finished
    before = open(workdir / "metrics.jsonl").read()
    result = main(*RUN, f"--workdir={workdir}")
    assert result.returncode == 0 and open(workdir / "metrics.jsonl").read() == before


def test_sample_and_eval(finished):
    workdir, _ = finished
    result = main(f"--workdir={workdir}", "--mode=sample", "--num=6", "--class_id=3,4", "--seed=5")
    assert result.returncode == 0 and "images/s" in result.stderr, result.stderr
    again = main(f"--workdir={workdir}", "--mode=sample", "--num=6", "--class_id=3,4", "--seed=5")
    made = sorted(n for n in os.listdir(workdir / "samples") if n.startswith("sampled"))
    assert len(made) == 2, again.stderr  # the first is not overwritten
    assert open(workdir / "samples" / made[0], "rb").read() == open(workdir / "samples" / made[1], "rb").read()
    result = main(f"--workdir={workdir}", "--mode=eval")
    assert result.returncode == 0, result.stderr
    values = json.load(open(workdir / "eval.json"))
    assert len(values) == 5 and all(name in result.stdout for name in values)
    assert values["real test images labelled right, by the same"] > 0.95


def test_asked_to_stop_it_saves_and_goes_on(tmp_path):
    workdir = tmp_path / "stopped"
    long = ("--config.train.steps=100000", "--config.train.log_every=5")
    process = subprocess.Popen(command(*RUN, f"--workdir={workdir}", *long), cwd=ROOT, env=environment(), text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (workdir / "metrics.jsonl").exists() or (workdir / "metrics.jsonl").stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "saved in" in said and "Traceback" not in said
    step = max(int(n) for n in os.listdir(workdir / "checkpoints") if n.isdigit())
    assert f"after step {step}" in said


MISTAKES = [
    ((DIGITS, "--config.net.unet.widht=3"), ("widht", "width")),
    ((DIGITS, "--config.train.steps=many"), ("train.steps", "many")),
    ((DIGITS, "--config.sampler.name=dimm"), ("unknown sampler 'dimm'", "ddim")),
    ((DIGITS, "--config.process.schedule.name=cosin"), ("unknown schedule 'cosin'", "cosine")),
    ((DIGITS, "--config.process.parameterization=w"), ("unknown parameterization 'w'", "eps")),
    ((DIGITS, "--config.net.name=vit"), ("unknown net 'vit'", "dit, unet")),
    ((DIGITS, "--config.optimizer.name=adan"), ("unknown optimizer 'adan'", "adamw")),
    ((DIGITS, "--config.data.name=digitz"), ("unknown data source 'digitz'", "digits")),
    ((DIGITS, "--config.process.schedule.name=rectified_flow", "--config.process.parameterization=eps"), ("cannot be used", "flow")),
    ((DIGITS, "--config.mesh.fsdp=3"), ("mesh", "fsdp=3")),
    ((DIGITS, "--config.data.num_classes=7"), ("10 classes", "7")),
    (("--config=configs/digits.py:large",), ("unknown variant 'large'", "smoke")),
    (("--config=configs/nowhere.py",), ("nowhere.py",)),
    ((), ("--config",)),
    ((DIGITS, "extra"), ("unexpected argument 'extra'",)),
    ((DIGITS, "--weights=somewhere"), ("--weights is for --mode=sample and --mode=export", "--config.init_from=DIR")),
    ((DIGITS, "--mode=eval", "--prompt=cat"), ("--prompt is for --mode=sample, not for eval",)),
    (("--mode=sample", "--weights=nowhere"), ("--weights='nowhere' holds no published checkpoint",)),
    (("--mode=sample", "--weights=nowhere.ckpt", "--original=sd3"), ("unknown original layout 'sd3'", "sd1", "and others")),
]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """What the command line said to each mistake, and to the third with --debug; and where it would have worked."""
    folder = tmp_path_factory.mktemp("mistakes")
    lines = [[*arguments, f"--workdir={folder / 'run'}"] for arguments, _ in MISTAKES]
    return folder / "run", mains([*lines, [*lines[2], "--debug"]], folder)


@pytest.mark.parametrize("i", range(len(MISTAKES)), ids=lambda i: str(MISTAKES[i][1][0]))
def test_mistakes_in_the_command(refusals, i):
    workdir, results = refusals
    refused(results[i], *MISTAKES[i][1])
    assert not workdir.exists()


def test_debug_shows_the_traceback(refusals):
    result = refusals[1][-1]
    assert result.returncode == 2 and "Traceback" in result.stderr


def test_missing_data(tmp_path):
    result = main("--config=configs/ldm_cifar.py", f"--workdir={tmp_path / 'run'}", f"--config.data.tfds.data_dir={tmp_path}",
                  http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    refused(result, "cifar10", "prepare")


def test_class_out_of_range(finished, tmp_path):
    lines = [[f"--workdir={finished[0]}", "--mode=sample", f"--class_id={given}"] for given in ("12", "seven")]
    twelve, seven, text = mains([*lines, [f"--workdir={finished[0]}", "--mode=sample", "--prompt=cat"]], tmp_path)
    refused(text, "--prompt was given, and this model takes no text; it takes: class")
    refused(twelve, "class id 12 is out of range", "0 to 9")
    refused(seven, "--class_id=seven")


def test_sampling_where_nothing_was_trained(tmp_path):
    refused(main(f"--workdir={tmp_path}", "--mode=sample"), "holds no run")


def test_a_workdir_of_another_config(finished):
    refused(main(*RUN, f"--workdir={finished[0]}", "--config.optimizer.learning_rate=1.0"), "another config", "optimizer.learning_rate")


def test_an_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    refused(main(DIGITS, f"--workdir={tmp_path / 'file' / 'run'}"), "cannot write", "choose another --workdir")


@pytest.mark.long
def test_a_full_workdir(tmp_path):
    """No file may grow beyond 64 KiB, which is how a full disk looks to a checkpoint."""
    result = main(*RUN, f"--workdir={tmp_path / 'run'}", shell_prefix="ulimit -f 128",
                  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="1000")  # nothing is added to the cache: it would be cut off there
    refused(result, "could not be written", "to go on", threads=True)


@pytest.mark.long
def test_a_damaged_checkpoint(finished, tmp_path):
    workdir = copy(finished, tmp_path)
    flip(arrays_of(workdir / "checkpoints", 20))
    result = main(*RUN, f"--workdir={workdir}")
    assert result.returncode == 0 and "checkpoint 20" in result.stderr and "trying the one before" in result.stderr, result.stderr
    jax.tree.map(np.testing.assert_array_equal, parameters(workdir), parameters(finished[0]))


def test_a_loss_that_is_not_finite(tmp_path):
    """A few lines say where and what to do; the state is kept beside the checkpoints, as a run that opens. The second step moves the
    last layer's weights to 2e37 at most, so that of its 16 normalised inputs' sum the squared error overflows, and nothing before."""
    workdir = tmp_path / "run"
    result = main(*RUN, f"--workdir={workdir}", "--config.optimizer.learning_rate=1e38", "--config.train.save_every=2",
                  "--config.train.log_every=4")
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    lines = result.stderr.strip().splitlines()
    said = lines[next(i for i, line in enumerate(lines) if "error: not finite at step 3:" in line):]
    kept = workdir / "nonfinite_0000003"
    for text in ("loss of 64 of 64 examples: ids ", "; t 0.", "first: the loss, after the last layer", f"kept: {kept}",
                 "checkpoints of the run: 2", "lower optimizer.learning_rate", f"init_dir={kept}"):
        assert text in "\n".join(said), said
    assert len(said) <= 7 and parameters(workdir)[0] == 2 and parameters(kept)[0] == 2
    ours, theirs = (parameters(directory)[1] for directory in (workdir, kept))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert ldm_jax.load(str(kept)).system.image_shape == (8, 8, 1)
    assert [json.loads(line)["step"] for line in open(workdir / "metrics.jsonl")] == [2]
