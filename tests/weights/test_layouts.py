"""Directories of published components: which file is read, what an index may say, damage, and options that are not supported."""
import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ldm_jax.published import load_net
from ldm_jax.types import UserError
from ldm_jax.weights import layouts
from ldm_jax.weights.stored import open_safetensors, write_safetensors

ARRAYS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones((), np.float16), "c": np.zeros((0, 2), np.int64),
          "d": np.array([1.5, -2], ml_dtypes.bfloat16)}


def same(arrays, want):
    assert set(arrays) == set(want)
    for name, array in want.items():
        got = np.asarray(arrays[name])
        assert got.dtype == array.dtype and got.shape == array.shape
        np.testing.assert_array_equal(got, array)


def test_safetensors_in_and_out(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "theirs.safetensors")
    same(open_safetensors(str(tmp_path / "theirs.safetensors")), ARRAYS)
    write_safetensors(str(tmp_path / "ours.safetensors"), {"t": ARRAYS["b"].T, **ARRAYS})
    same(safetensors.numpy.load_file(tmp_path / "ours.safetensors"), {"t": ARRAYS["b"].T, **ARRAYS})
    assert os.listdir(tmp_path / ".") and not [n for n in os.listdir(tmp_path) if "partial" in n]


HEADER = lambda text, values=b"": struct.pack("<Q", len(text)) + text + values
ENTRY = b'{"a":{"dtype":"%s","shape":%s,"data_offsets":%s}}'


@pytest.mark.parametrize("content, words", [
    (b"", "cut short"), (b"\xff" * 7, "cut short"), (struct.pack("<Q", 2**40) + b"{}", "cut short"), (HEADER(b"{"), "damaged"),
    (HEADER(b"[1]"), "damaged"), (HEADER(ENTRY % (b"F32", b"[2]", b"[0,8]"), b"1234567"), "'a' ends at byte .* cut short"),
    (HEADER(ENTRY % (b"F32", b"[2]", b"[0,4]"), b"1234"), "4 bytes for a F32 array of shape .2,."),
    (HEADER(ENTRY % (b"F8_E4M3", b"[2]", b"[0,2]"), b"12"), "F8_E4M3; convert"),
    (HEADER(ENTRY % (b"F32", b"[-1]", b"[4,0]"), b"1234"), "negative"),
    (HEADER(b'{"a":{"dtype":"F32"}}'), "damaged"),
])
def test_damaged_files_are_refused_with_the_reason(content, words, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        open_safetensors(str(path))
    assert str(path) in str(error.value)


ST = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("files, variant, want", [
    ([ST], None, ST), ([ST, "diffusion_pytorch_model.bin"], None, ST),
    (["diffusion_pytorch_model.bin"], None, "diffusion_pytorch_model.bin"),
    ([ST, "diffusion_pytorch_model.fp16.safetensors"], None, ST),
    ([ST, "diffusion_pytorch_model.fp16.safetensors"], "fp16", "diffusion_pytorch_model.fp16.safetensors"),
    (["diffusion_pytorch_model.fp16.safetensors"], None, "diffusion_pytorch_model.fp16.safetensors"),
    (["diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.fp16.bin"], None,
     "diffusion_pytorch_model.fp16.bin"),
    (["model.safetensors"], None, "model.safetensors"),
    ([f"{ST}.index.json", "diffusion_pytorch_model-00001-of-00002.safetensors"], None, f"{ST}.index.json"),
    ([f"{ST}.index.fp16.json", "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"], None, f"{ST}.index.fp16.json"),
    ([], None, "it has none"), ([ST], "fp16", "variant 'fp16'; it has diffusion_pytorch_model.safetensors"),
    (["diffusion_pytorch_model.non_ema.safetensors"], None, "it has .*non_ema"),
    (["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bf16.safetensors"], None, "choose one with variant="),
])
def test_which_file_is_read(files, variant, want, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    if want in files:
        assert layouts.find_weights(str(tmp_path), variant) == str(tmp_path / want)
    else:
        with pytest.raises(UserError, match=want):
            layouts.find_weights(str(tmp_path), variant)


def sharded(folder, weight_map):
    write_safetensors(str(folder / "one.safetensors"), {"x": ARRAYS["b"]})
    write_safetensors(str(folder / "two.safetensors"), {"y": ARRAYS["d"]})
    (folder / f"{ST}.index.json").write_text(json.dumps({"weight_map": weight_map} if weight_map is not None else 7))
    return str(folder)


def test_several_files(tmp_path):
    same(layouts.open_weights(sharded(tmp_path, {"x": "one.safetensors", "y": "two.safetensors"})),
         {"x": ARRAYS["b"], "y": ARRAYS["d"]})


@pytest.mark.parametrize("weight_map, words", [
    *(({"x": name}, "own directory") for name in ("../one.safetensors", "/etc/passwd", "a/one.safetensors", "..", "one.txt",
                                                  "..\\one.safetensors")),
    ({"x": "gone.safetensors"}, "no file .*gone"), ({"x": 3}, "no weight_map"), (None, "no weight_map"),
    ({"x": "one.safetensors", "z": "one.safetensors"}, "does not fit one.safetensors: 1 arrays .* 'z'"),
    ({"q": "two.safetensors"}, "does not fit two"),
])
def test_what_an_index_may_not_say(weight_map, words, tmp_path):
    (tmp_path / "inner").mkdir()
    write_safetensors(str(tmp_path / "one.safetensors"), {"x": ARRAYS["b"]})
    with pytest.raises(UserError, match=words):
        layouts.open_weights(sharded(tmp_path / "inner", weight_map))


def test_older_names():
    arrays = {"mid_block.attentions.0.query.weight": ARRAYS["b"], "a.attentions.1.proj_attn.bias": ARRAYS["d"],
              "d.downsamplers.0.Conv2d_0.bias": ARRAYS["d"], "d.downsamplers.0.conv.bias": ARRAYS["d"]}
    same(layouts.renamed(arrays, "x"), {"mid_block.attentions.0.to_q.weight": ARRAYS["b"],
                                        "a.attentions.1.to_out.0.bias": ARRAYS["d"],
                                        "d.downsamplers.0.conv.bias": ARRAYS["d"]})
    with pytest.raises(UserError, match="two different arrays"):
        layouts.renamed({**arrays, "d.downsamplers.0.conv.bias": ARRAYS["d"] + 1}, "x")


REFUSED = [
    ("UNet2DConditionModel", dict(dual_cross_attention=True), "dual_cross_attention=True"),
    ("UNet2DConditionModel", dict(attention_type="gated"), "attention_type='gated'"),
    ("UNet2DConditionModel", dict(num_attention_heads=4), "num_attention_heads=4"),
    ("UNet2DConditionModel", dict(addition_embed_type="text_image"), "'text_image' .supported: None, 'text_time'"),
    ("UNet2DConditionModel", dict(down_block_types=["SimpleCrossAttnDownBlock2D"] * 4), "down_block_types=.'Simple"),
    ("UNet2DConditionModel", dict(up_block_types=["CrossAttnDownBlock2D"] * 4), "up_block_types="),
    ("UNet2DConditionModel", dict(cross_attention_dim=[8, 8, 16, 8]), "cross_attention_dim="),
    ("UNet2DConditionModel", dict(attention_head_dim=[8, 8]), "attention_head_dim=.8, 8. for 4 levels"),
    ("UNet2DConditionModel", dict(addition_embed_type="text_time", addition_time_embed_dim=8),
     "projection_class_embeddings_input_dim"),
    ("UNet2DConditionModel", dict(brand_new_option=3), "brand_new_option=3"),
    ("UNet2DModel", dict(norm_num_groups=None), "norm_num_groups=None"),
    ("UNet2DModel", dict(resnet_time_scale_shift="spatial"), "resnet_time_scale_shift='spatial'"),
    ("UNet2DModel", dict(down_block_types=["KDownBlock2D"] * 4, downsample_padding=2), "downsample_padding=2"),
    ("VQModel", dict(norm_type="spatial"), "norm_type='spatial'"),
    ("AutoencoderKL", dict(latents_mean=[0.0]), "latents_mean=.0.0,., latents_std=None"),
    ("AutoencoderKL", dict(down_block_types=["DownBlock2D"]), "down_block_types"),
    ("DiTTransformer2DModel", dict(norm_type="ada_norm"), "norm_type='ada_norm'"),
    ("Transformer2DModel", dict(num_embeds_ada_norm=10, patch_size=2, sample_size=8, in_channels=4, cross_attention_dim=8,
                                norm_type="ada_norm_zero"), "cross_attention_dim=8"),
    ("Transformer2DModel", dict(in_channels=320, num_attention_heads=8), "norm_type"),
    ("FluxTransformer2DModel", {}, "'FluxTransformer2DModel'; choose from: AutoencoderKL"),
]


@pytest.mark.parametrize("kind, options, words", REFUSED)
def test_options_that_are_not_supported_are_refused_by_name_and_value(kind, options, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind, **options}))
    write_safetensors(str(tmp_path / ST), {"x": ARRAYS["b"]})
    with pytest.raises(UserError, match=words):
        load_net(str(tmp_path))


def test_weights_of_another_model_and_builders_options(tmp_path):
    config = {"_class_name": "VQModel", "_diffusers_version": "0.1", "block_out_channels": [8], "norm_num_groups": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_safetensors(str(tmp_path / ST), {"x": ARRAYS["b"]})
    with pytest.raises(UserError, match="do not fit their config: .* missing; 1 .x. left over"):
        load_net(str(tmp_path))
    with pytest.raises(UserError, match="colour.*choose from the arguments of ldm_jax.models.autoencoder.vq"):
        load_net(str(tmp_path), colour=3)
    with pytest.raises(UserError, match="no component .*no config.json"):
        load_net(str(tmp_path / "none"))
