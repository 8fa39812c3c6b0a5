"""A run whose workdir is in a bucket, through the command line, and everything else that may lie in one."""
import concurrent.futures
import io
import json
import signal
import subprocess
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

import ldm_jax
from ldm_jax import api, paths, pipelines, recipe, stages
from ldm_jax.data.captions import decoded
from ldm_jax.data.latents import are_there, open_latents, write_latents
from ldm_jax.data.sources import SOURCES
from ldm_jax.data.text import load_tokenizer
from ldm_jax.training.logs import Logs, drop_after
from ldm_jax.types import UserError
from ldm_jax.weights.lora import Pair, read_pairs, write_pairs
from tests.conftest import ROOT
from tests.data.test_latents import CLASS, LIKE, MEAN, STAMP
from tests.runs import command, environment, mains
from tests.tiny import stable_diffusion

RUN = ("--config=configs/digits.py:smoke", "--config.net.name=dit", "--config.train.log_every=2")


def lines_of(workdir):
    return [json.loads(line)["step"] for line in paths.read_text(f"{workdir}/metrics.jsonl").splitlines()]


@pytest.mark.slow
@pytest.mark.long
def test_a_run_in_a_bucket(bucket, tmp_path):
    """Killed while its first checkpoint is written, it goes on and ends with the parameters of a local run, and is used from there."""
    workdir, here = f"{bucket}/run", str(tmp_path / "run")
    process = subprocess.Popen(command(*RUN, f"--workdir={workdir}"), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    while process.poll() is None and not paths.isdir(f"{workdir}/checkpoints"):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not paths.exists(f"{workdir}/checkpoints/20/commit_success.txt")
    assert lines_of(workdir) == [2, 4, 6, 8, 10]  # they are ahead of the checkpoint

    out, picture = f"{bucket}/exported", f"{bucket}/picture.png"
    Image.new("L", (8, 8), 99).save(file := io.BytesIO(), "png")
    paths.write_bytes(picture, file.getvalue())
    done = mains([[*RUN, f"--workdir={workdir}"], [*RUN, f"--workdir={here}"],
                  [f"--workdir={workdir}", "--mode=sample", "--num=4", f"--image={picture}"], [f"--workdir={workdir}", "--mode=eval"],
                  [f"--workdir={workdir}", "--mode=export", f"--out={out}"],
                  ["--workdir=gs://nobucket/run", *RUN], [f"--workdir={bucket}/none", "--mode=eval"],
                  [*RUN, f"--workdir={workdir}", "--config.net.dit.depth=2"]], tmp_path)
    for result in done[:5]:
        assert result.returncode == 0, result.stderr
    for result, says in zip(done[5:], ("there is no such bucket", "holds no run", "holds a run of another config: net.dit.depth")):
        assert result.returncode == 2 and "Traceback" not in result.stderr and says in result.stderr.splitlines()[-1], result.stderr
    mine, reference = ldm_jax.load(workdir), ldm_jax.load(here)
    jax.tree.map(np.testing.assert_array_equal, mine.params, reference.params)
    assert lines_of(workdir) == lines_of(here) == list(range(2, 21, 2))
    assert paths.listdir(workdir)[:3] == ["checkpoints", "config.json", "eval.json"]
    events = [paths.read_bytes(f"{workdir}/{name}") for name in paths.listdir(workdir) if name.startswith("events.out.tfevents")]
    assert len(events) == 2 and all(b"images_per_s" in event for event in events)
    pictures = {"denoising.png", "grid.png", "real_and_generated.png", "sampled_seed0_n4.png", "step_0000010_grid.png"}
    assert set(paths.listdir(f"{workdir}/samples")) == pictures
    assert len(json.loads(paths.read_text(f"{workdir}/eval.json"))) == 5
    assert {"model_index.json", "transformer", "scheduler"} <= set(paths.listdir(out))
    started = stages.given({**api.read_config(workdir), "init_dir": workdir}, str(tmp_path), None, mine.system)
    jax.tree.map(np.testing.assert_array_equal, started, mine.params)


def test_a_published_checkpoint(bucket, tmp_path):
    here = stable_diffusion(tmp_path / "sd")
    for name in paths.files_below(here):
        paths.upload(f"{here}/{name}", f"{bucket}/sd/{name}")
    there = f"{bucket}/sd"
    a, b = pipelines.load_pipeline(here), pipelines.load_pipeline(there)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert recipe.sampler_of({"init_from": there, "sampler": {"name": "", "grid": ""}})["name"] == a.defaults["name"]
    np.testing.assert_array_equal(*(load_tokenizer(f"{where}/tokenizer")(["a red fox"]).ids for where in (here, there)))
    assert b.save_pretrained(f"{bucket}/again") is None
    assert {str(name) for name in paths.files_below(f"{bucket}/again")} >= {
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt"}
    with pytest.raises(UserError, match="is there already and not empty"):
        b.save_pretrained(f"{bucket}/again")
    net, params = ldm_jax.load_net(f"{bucket}/again/vae")
    jax.tree.map(np.testing.assert_array_equal, params, a.nets["autoencoder"][1])
    with pytest.raises(UserError, match="is no component of a published checkpoint"):
        ldm_jax.load_net(f"{bucket}/none")


def test_adapters(bucket):
    pair = Pair(np.ones((2, 3), np.float32), np.ones((4, 2), np.float32), 0.5)
    write_pairs(f"{bucket}/lora", {"unet": {"x.to_q": pair}})
    found = read_pairs(f"{bucket}/lora", {"unet": {"x.to_q": (4, 3)}})["unet"]["x.to_q"]
    np.testing.assert_array_equal(found.down, pair.down)
    assert found.scale == 0.5


def test_a_cache_of_latents(bucket):
    directory = f"{bucket}/latents"
    paths.write_bytes(f"{directory}/latents-00000-of-00002.array_record", b"left by a process that was killed")
    assert not are_there(directory)
    barrier = threading.Barrier(2, timeout=30)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # in the place of two processes
        list(pool.map(lambda i: write_latents(directory, [{"mean": MEAN[11 * i:][:12], "class": CLASS[11 * i:][:12]}], stamp=STAMP, size=23,
                                              shards=1, share=(i, 2), wait=lambda why: barrier.wait()), range(2)))
    assert are_there(directory)
    np.testing.assert_array_equal(open_latents(directory, stamp=STAMP, like=LIKE).read([22, 0, 7])["mean"], MEAN[[22, 0, 7]])
    with pytest.raises(UserError, match="another statistics"):
        open_latents(directory, stamp={**STAMP, "statistics": "c3"}, like=LIKE)


def test_a_folder_with_captions(root):
    rng, images = np.random.default_rng(0), {}
    for i in range(6):
        images[f"{i}.png"] = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(images[f"{i}.png"]).save(file := io.BytesIO(), "png")
        paths.makedirs(root)
        paths.write_bytes(f"{root}/{i}.png", file.getvalue())
        if i:
            paths.write_text(f"{root}/{i}.txt", f"picture {i}\n")
    folder = dict(path=root, image_size=4, held_out=0.0, fields=("text",))
    with pytest.raises(UserError, match="1 of 6 images.*have no caption, such as 0.png"):
        SOURCES["folder"](**folder)
    paths.write_text(f"{root}/metadata.jsonl", '{"file_name": "0.png", "text": "the first"}\n')
    batch = SOURCES["folder"](**folder, cache=False).read([3, 0, 3])
    np.testing.assert_array_equal(batch["image"], np.stack([images[f"{i}.png"] for i in (3, 0, 3)]))
    assert decoded(batch["text"]) == ["picture 3", "the first", "picture 3"]
    paths.write_bytes(f"{root}/2.png", b"no picture")
    with pytest.raises(UserError, match=r"cannot read the image .*/2.png: cannot identify image file"):
        SOURCES["folder"](**folder, cache=False).read([2, 1])
    with pytest.raises(UserError, match="no image directory .*/none"):
        SOURCES["folder"](path=f"{root}/none", image_size=4)


def test_a_set_in_the_layout_of_tfds(bucket, cifar10):
    for name in paths.files_below(cifar10[0]):
        paths.upload(f"{cifar10[0]}/{name}", f"{bucket}/tfds/{name}")
    here, there = (SOURCES["tfds"]("test", name="cifar10", data_dir=str(d), cache=False) for d in (cifar10[0], f"{bucket}/tfds"))
    for name, a in here.read([3, 0, 5]).items():
        np.testing.assert_array_equal(there.read([3, 0, 5])[name], a)
    with pytest.raises(UserError, match="mnist is not prepared in gs://.*\n.* on this machine and copy it there: .*gcloud storage cp"):
        SOURCES["tfds"]("test", name="mnist", data_dir=f"{bucket}/tfds")


def test_numbers_are_appended_and_cut(root):
    paths.makedirs(root)
    with Logs(root) as logs:
        logs.scalars(1, {"loss": 2.0})
        logs.flush()
        assert paths.read_text(f"{root}/metrics.jsonl") == '{"step": 1, "loss": 2.0}\n'
        logs.scalars(2, {"loss": 1.5})
    with Logs(root) as logs:
        logs.scalars(3, {"loss": 1.0})
    assert lines_of(root) == [1, 2, 3]
    drop_after(f"{root}/metrics.jsonl", 2)
    drop_after(f"{root}/none.jsonl", 2)
    assert lines_of(root) == [1, 2] and not paths.exists(f"{root}/none.jsonl")


def test_numbers_in_a_bucket_are_seen_while_a_run_goes_on(bucket, monkeypatch):
    monkeypatch.setattr("ldm_jax.training.logs.UPLOAD_S", 0.05)
    with Logs(bucket) as logs:
        logs.scalars(1, {"loss": 2.0})
        time.sleep(0.1)
        logs.scalars(2, {"loss": 1.0})
        assert lines_of(bucket) == [1, 2]
