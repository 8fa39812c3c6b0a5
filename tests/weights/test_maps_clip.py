"""The config and the names of published text towers, without their library. (tests/parity/test_clip_text.py has the numbers.)"""
import json

import jax
import numpy as np
import pytest

from ldm_jax.models.clip import ACTIVATIONS, TEXT_TOWERS, clip_text
from ldm_jax.published import load_net
from ldm_jax.types import UserError
from ldm_jax.weights.maps_clip import clip_text_arguments, clip_text_config, clip_text_rules
from ldm_jax.weights.rules import save
from ldm_jax.weights.stored import write_safetensors
from tests.models.tiny import random_params

OLD = {  # as published with Stable Diffusion 1.5
    "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"], "attention_dropout": 0.0,
    "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
    "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
    "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768,
    "torch_dtype": "float32", "transformers_version": "4.22.0.dev0", "vocab_size": 49408}
SMALL = dict(vocab_size=20, width=12, depth=2, num_heads=3, mlp_width=20, max_length=9, eps=1e-3)


def publish(folder, net, params, **options):
    config = {**clip_text_config(net.arguments), **options}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    arrays = save(clip_text_rules(net.arguments), params)
    write_safetensors(str(folder / "model.safetensors"), arrays)
    return arrays


def test_a_published_config():
    assert clip_text(**clip_text_arguments(OLD)) == clip_text(**TEXT_TOWERS["clip_vit_l"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("eos_id, projection_dim", [(None, None), (7, 5), (7, None)])
def test_there_and_back(tmp_path, activation, eos_id, projection_dim):
    net = clip_text(**SMALL, activation=activation, eos_id=eos_id, projection_dim=projection_dim)
    params = random_params(net)
    publish(tmp_path, net, params)
    again, loaded = load_net(str(tmp_path))
    assert again == net
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("projection_dim", [None, 5])
def test_without_architectures_the_file_tells(tmp_path, projection_dim):
    net = clip_text(**SMALL, projection_dim=projection_dim)
    publish(tmp_path, net, random_params(net), architectures=None)
    assert load_net(str(tmp_path))[0] == net


def test_placed_where_asked(tmp_path):
    """Each parameter goes to its sharding; here the widest axis of what is large over eight devices."""
    net = clip_text(**{**SMALL, "width": 24, "mlp_width": 16})
    params, mesh = random_params(net), jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    publish(tmp_path, net, params)

    def place(path, shape, dtype):
        spec = (None, None, "fsdp") if path.endswith("mlp_in/kernel") else ()
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    _, loaded = load_net(str(tmp_path), place=place)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert {s.data.shape for s in loaded["blocks"]["mlp_in"]["kernel"].addressable_shards} == {(2, 24, 2)}


@pytest.mark.parametrize("change, words", [
    ({"hidden_act": "tanh"}, r"hidden_act='tanh' \(supported: 'quick_gelu', 'gelu'"), ({"novelty": 3}, "novelty=3"),
    ({"attention_dropout": 0.1, "quantization_config": {}}, r"quantization_config={}, attention_dropout=0.1 \(supported: 0.0\)"),
    ({"model_type": "t5"}, "model_type 't5'"), ({"architectures": ["CLIPModel"]}, "'CLIPModel'; choose from: CLIPTextModel"),
    ({"eos_token_id": [2, 7]}, r"eos_token_id=.2, 7"), ({"hidden_size": "768"}, "hidden_size='768'")])
def test_options_refused(change, words):
    with pytest.raises(UserError, match=words):
        clip_text_arguments({**OLD, **change})


@pytest.mark.parametrize("damage, words", [
    (lambda a: a.pop("text_model.final_layer_norm.bias"), r"1 \(text_model.final_layer_norm.bias\) missing"),
    (lambda a: a.update({"text_model.encoder.layers.2.mlp.fc1.bias": np.zeros(20, np.float32)}), "layers.2.*fc1.bias.* left over"),
    (lambda a: a.update({"text_projection.weight": np.zeros((5, 12), np.float32)}), "text_projection.weight.* left over"),
    (lambda a: a.update({"text_model.embeddings.position_ids": np.arange(9)[::-1].copy()}), "position_ids are not 0, 1, 2"),
    (lambda a: a.update({"text_model.encoder.layers.1.mlp.fc1.weight": np.zeros((12, 20), np.float32)}),
     r"\(12, 20\) instead of \(20, 12\)")])
def test_arrays_refused(tmp_path, damage, words):
    net = clip_text(**SMALL)
    arrays = publish(tmp_path, net, random_params(net))
    damage(arrays)
    write_safetensors(str(tmp_path / "model.safetensors"), arrays)
    with pytest.raises(UserError, match=words):
        load_net(str(tmp_path))
