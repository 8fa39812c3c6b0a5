"""Files of adapters: bit for bit there and back, W + s B A in published names, the settings in a file, and what is refused."""
import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest

from ldm_jax.lora import load_lora, read_lora, save_lora
from ldm_jax.models import lora
from ldm_jax.models.clip import clip_text
from ldm_jax.models.dit import dit
from ldm_jax.models.lora import Lora
from ldm_jax.models.unet import unet
from ldm_jax.published import CONFIGS, arguments_of
from ldm_jax.types import UserError
from ldm_jax.weights import adapters as published
from ldm_jax.weights import rules
from ldm_jax.weights.lora import SETTINGS, Pair
from ldm_jax.weights.stored import open_safetensors, read_metadata, write_safetensors
from tests.models.tiny import random_params

SMALL = dict(width=8, mults=(1, 2), num_res_blocks=1, norm_groups=4, num_heads=2, timesteps=1000, time_order="cos_sin")
DIT = dict(patch=2, width=8, depth=3, num_heads=2, time_shift=1.0)
UNET = unet((4, 4, 2), **SMALL, resample="conv_centred", attention=(2,), transformer_depth=1, context_dim=6)
TOWER = clip_text(vocab_size=11, width=8, depth=3, num_heads=2, max_length=5, projection_dim=4)
NETS = {  # the nets of a system, targets
    "ldm": ({"net": UNET, "text_encoder": TOWER, "autoencoder": object()},
            (*lora.ATTENTION, "conv_1/kernel$", "project_in", "time_1")),
    "ddpm": ({"net": unet((4, 4, 2), **SMALL, attention=(2,))}, (*lora.ATTENTION, "resample", "skip/kernel")),
    "dit": ({"net": dit((4, 4, 2), 3, **DIT)}, (*lora.ATTENTION, "patch_in", "mlp_out")),
    "stacked dit": ({"net": dit((4, 4, 2), 3, **DIT, scan_layers=True)}, (*lora.ATTENTION, "patch_out")),
    "xl": ({"text_encoder": TOWER, "text_encoder_2": clip_text(vocab_size=7, width=6, depth=1, num_heads=2, max_length=4)},
           lora.ATTENTION),
}
FILE = "pytorch_lora_weights.safetensors"


def system(name):
    """(nets, their parameters, adapters without a zero in them, of several ranks and scales)."""
    nets, targets = NETS[name]
    params = {n: random_params(net) if hasattr(net, "init") else {"w": np.ones(1, np.float32)} for n, net in nets.items()}
    rng, adapters, scales = np.random.default_rng(0), {}, {}
    for n, tree in params.items():
        if n == "autoencoder":
            continue
        usual = tuple(t for t in targets if t in lora.ATTENTION or n == "net")
        flat, scales[n] = {}, {}
        for i, (path, kernel) in enumerate(lora.kernels(tree, usual).items()):
            r, lead = 2 + (i % 3 == 1), kernel.shape[:kernel.ndim == 3]
            flat[f"{path}/A"] = rng.standard_normal((*kernel.shape[:-1], r), np.float32)
            flat[f"{path}/B"] = rng.standard_normal((*lead, r, kernel.shape[-1]), np.float32)
            scales[n][path] = 0.5 * np.arange(1, 1 + lead[0]) / r if lead else (0.7 if i % 3 else 5) / r
        adapters[n] = rules.unflatten(flat)
    return nets, params, Lora(adapters, scales)


def rules_of(net, params):
    config_of, of = CONFIGS[type(net.module)]
    arguments = arguments_of(net, params)
    return of(arguments, config_of(arguments))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", NETS)
def test_there_and_back(name, tmp_path):
    nets, params, whole = system(name)
    save_lora(str(tmp_path), nets, params, whole)
    back = read_lora(str(tmp_path / FILE), nets, jax.eval_shape(lambda: params))
    same(dict(back.adapters), dict(whole.adapters))
    same(dict(back.scale), dict(whole.scale))
    save_lora(str(tmp_path / "again.safetensors"), nets, params, back)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / FILE).read_bytes()


@pytest.mark.parametrize("name", NETS)
def test_published_weights_plus_the_product(name, tmp_path):
    """Merged either way, and written under published names: X.weight + (alpha / r) B A, and all else as it was, bit for bit."""
    nets, params, whole = system(name)
    save_lora(str(tmp_path), nets, params, whole)
    arrays = {key: np.asarray(a) for key, a in open_safetensors(str(tmp_path / FILE)).items()}
    said = json.loads(read_metadata(str(tmp_path / FILE))[SETTINGS])
    called = {"net": "transformer" if "dit" in name else "unet"}
    for got in (load_lora(str(tmp_path), nets, params), lora.merge_all(params, read_lora(str(tmp_path), nets, params))):
        assert set(got) == set(params)
        for n, net in nets.items():
            if n not in whole.adapters:
                same(got[n], params[n])
                continue
            before, after = (rules.save(rules_of(net, params[n]), tree) for tree in (params[n], got[n]))
            prefix, changed = called.get(n, n), 0
            for key, old in before.items():
                module = f"{prefix}.{key.removesuffix('.weight')}"
                if f"{module}.lora_A.weight" not in arrays or not key.endswith(".weight"):
                    np.testing.assert_array_equal(after[key], old, err_msg=key)
                    continue
                A, B = (np.float64(arrays[f"{module}.lora_{x}.weight"]) for x in "AB")
                module, r, changed = module.removeprefix(f"{prefix}."), len(A), changed + 1
                key_of = module.removeprefix("text_model.") if module.startswith("text_model.") else f"^{module}"
                assert said[f"{prefix}.rank_pattern"].get(key_of, said[f"{prefix}.r"]) == r
                alpha = said[f"{prefix}.alpha_pattern"].get(key_of, said[f"{prefix}.lora_alpha"])
                product = np.einsum("or,ri->oi", B.reshape(len(B), r), A.reshape(r, -1)).reshape(old.shape)
                np.testing.assert_allclose(after[key], old + alpha / r * product, atol=2e-5, rtol=1e-5, err_msg=key)
            assert 2 * changed == sum(key.startswith(prefix + ".") for key in arrays) > 0


def test_strength_dtype_and_one_net_of_several(tmp_path):
    nets, params, whole = system("ldm")
    save_lora(str(tmp_path), nets, params, whole)
    low = {n: jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), tree) for n, tree in params.items()}
    got = load_lora(str(tmp_path), nets, low, strength=-2.0, only=["text_encoder"])
    assert got["net"] is low["net"] and got["autoencoder"] is low["autoencoder"]
    want = lora.merge(jax.tree.map(np.float32, low["text_encoder"]), whole.adapters["text_encoder"],
                      {path: -2 * s for path, s in whole.scale["text_encoder"].items()})
    for a, b in zip(jax.tree.leaves(got["text_encoder"]), jax.tree.leaves(want)):
        assert a.dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(np.float32(a), b, rtol=2**-7, atol=1e-6)


def test_fresh_adapters_with_one_alpha(tmp_path):
    """What a first training saves: a number for the scale, and B still zero."""
    nets, params, _ = system("stacked dit")
    fresh = {"net": lora.init(jax.random.key(0), params["net"], rank=4)}
    save_lora(str(tmp_path), nets, params, Lora(fresh, 6 / 4))
    said = json.loads(read_metadata(str(tmp_path / FILE))[SETTINGS])
    assert (said["transformer.r"], said["transformer.lora_alpha"]) == (4, 6)
    assert not said["transformer.rank_pattern"] and not said["transformer.alpha_pattern"]
    same(dict(read_lora(str(tmp_path), nets, params).adapters), jax.tree.map(np.asarray, fresh))
    same(load_lora(str(tmp_path), nets, params), params)


def pair(n_in, n_out, r=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((r, n_in), np.float32), rng.standard_normal((n_out, r), np.float32)


def write(path, modules, settings=None, ends=(".lora_A.weight", ".lora_B.weight"), more={}):
    arrays = {f"{module}{end}": a for module, ab in modules.items() for end, a in zip(ends, ab)}
    write_safetensors(str(path), {**arrays, **more}, {SETTINGS: json.dumps(settings)} if settings else {})
    return str(path)


Q, LAYER = "text_model.encoder.layers.{}.self_attn.q_proj", "encoder.layers.{}.self_attn.q_proj"
TOWERS = {"text_encoder": TOWER}


def scales_in(path):
    whole = read_lora(path, TOWERS, {"text_encoder": random_params(TOWER)})
    return whole.scale["text_encoder"]["blocks/q/kernel"].tolist()


def test_layers_of_several_ranks_and_without_adapters(tmp_path):
    """Filled up with zeros, which count for nothing, get no gradient and are not written."""
    pairs = {f"text_encoder.{Q.format(i)}": pair(8, 8, r, i) for i, r in ((0, 1), (2, 3))}
    path, params = write(tmp_path / "a.safetensors", pairs), {"text_encoder": random_params(TOWER)}
    whole = read_lora(path, TOWERS, params)
    q = whole.adapters["text_encoder"]["blocks"]["q"]["kernel"]
    assert q["A"].shape == (3, 8, 3) and not q["A"][1].any() and not q["B"][1].any() and not q["A"][0, :, 1:].any()
    assert scales_in(path) == [1.0, 0.0, 1.0]
    merged = lambda adapters: lora.merge(params["text_encoder"], adapters, whole.scale["text_encoder"])["blocks"]["q"]["kernel"]
    grads = jax.grad(lambda adapters: (merged(adapters)**2).sum())(whole.adapters["text_encoder"])
    for x in "AB":
        np.testing.assert_array_equal(np.asarray(grads["blocks"]["q"]["kernel"][x])[q[x] == 0], 0)
    save_lora(str(tmp_path / "b.safetensors"), TOWERS, params, whole)
    back = open_safetensors(str(tmp_path / "b.safetensors"))
    assert len(back) == 4
    for module, ab in pairs.items():
        for x, a in zip("AB", ab):
            np.testing.assert_array_equal(back[f"{module}.lora_{x}.weight"], a)


SETTINGS_OF = {  # settings, more arrays -> alpha / r of the three layers, of rank 2
    "none": ({}, {}, [1, 1, 1]),
    "one": ({"r": 2, "lora_alpha": 3}, {}, [1.5, 1.5, 1.5]),
    "patterns": ({"lora_alpha": 2, "alpha_pattern": {"layers.1.*q_proj": 4, "^encoder.layers.2.self_attn.q_proj": 6, "proj": 8}},
                 {}, [1, 2, 3]),
    "stabilised": ({"lora_alpha": 4, "use_rslora": True}, {}, [4 / 2**0.5] * 3),
    "arrays": ({"lora_alpha": 4}, {f"text_encoder.{Q.format(1)}.alpha": np.float16(1.0)}, [2, 0.5, 2]),
}


@pytest.mark.parametrize("kind", SETTINGS_OF)
@pytest.mark.parametrize("module", [Q, LAYER])
def test_alpha(kind, module, tmp_path):
    said, more, want = SETTINGS_OF[kind]
    path = write(tmp_path / "a.safetensors", {f"text_encoder.{module.format(i)}": pair(8, 8) for i in range(3)},
                 {f"text_encoder.{key}": value for key, value in said.items()}, more=more)
    np.testing.assert_allclose(scales_in(path), want)


NAMES = {  # how files name layer 1's q, up to what tells the two arrays apart
    "peft's own": (f"base_model.model.{Q}", (".lora_A.weight", ".lora_B.weight")),
    "bare": (LAYER, (".lora_A.weight", ".lora_B.weight")),
    "diffusers": (f"text_encoder.{Q}", (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")),
    "at first": ("text_encoder.text_model.encoder.layers.{}.self_attn.to_q_lora", (".down.weight", ".up.weight")),
    "kohya": ("lora_te_text_model_encoder_layers_{}_self_attn_q_proj", (".lora_down.weight", ".lora_up.weight")),
    "kohya of xl": ("lora_te1_text_model_encoder_layers_{}_self_attn_q_proj", (".lora_down.weight", ".lora_up.weight")),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_a_text_tower(kind, tmp_path):
    module, ends = NAMES[kind]
    down, up = pair(8, 8)
    path = write(tmp_path / "adapter_model.safetensors", {module.format(1): (down, up)}, ends=ends)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, "peft_type": "LORA"}))
    whole = read_lora(str(tmp_path), TOWERS, {"text_encoder": random_params(TOWER)})
    q = whole.adapters["text_encoder"]["blocks"]["q"]["kernel"]
    np.testing.assert_array_equal(q["A"][1], down.T)
    np.testing.assert_array_equal(q["B"][1], up.T)
    assert whole.scale["text_encoder"]["blocks/q/kernel"][1] == 3 and list(open_safetensors(path))


def test_fused_and_copied_parameters():
    """A rule's own transform carries the product over, wherever one array is several parameters or several arrays are one."""
    fused = [rules.Rule("qkv.weight", ("q", "k", "v"), rules.LINEAR, parts=rules.Transform(
        lambda a: [a[0::3], a[1::3], a[2::3]], lambda parts: np.stack(parts, 1).reshape(9, 4)))]
    params = {x: np.ones((4, 3), np.float32) for x in "qkv"}
    modules, (down, up) = published.modules_of(fused, params), pair(4, 9)
    got = published.add(params, {"qkv": Pair(down, up, 0.5)}, modules, 2.0)
    for i, x in enumerate("qkv"):
        np.testing.assert_allclose(got[x], 1 + (up @ down)[i::3].T, rtol=1e-6)
    with pytest.raises(UserError, match=r"1 \(qkv\) of the adapted modules share"):
        published.to_ours({"qkv": Pair(down, up, 0.5)}, modules)

    copied, params = rules.linear("b.{}.a", "a", bias=False, copies=2), {"a": {"kernel": np.ones((4, 9), np.float32)}}
    modules = published.modules_of(copied, params)
    both = {f"b.{i}.a": Pair(down, up, 1.0) for i in range(2)}
    np.testing.assert_allclose(published.add(params, both, modules)["a"]["kernel"], 1 + (up @ down).T, rtol=1e-6)
    for other in ({"b.0.a": both["b.0.a"]}, {**both, "b.1.a": Pair(down, up + 1, 1.0)}, {**both, "b.1.a": Pair(down, up, 2.0)}):
        with pytest.raises(UserError, match="2 modules b.0.a and so on differently"):
            published.add(params, other, modules)


GOOD = {f"text_encoder.{Q.format(0)}": pair(8, 8)}
T = f"text_encoder.{Q.format(1)}"
REFUSED = {  # modules, more arrays, settings -> words of the error
    "module": ({**GOOD, f"text_encoder.{Q.format(7)}": pair(8, 8)}, {}, None, r"2 \(text_encoder.text_model.encoder.layers.7"),
    "embedding": ({}, {"text_encoder.text_model.embeddings.token_embedding.lora_embedding_A": np.ones((2, 11), np.float32)}, None,
                  "fit no module"),
    "norm": ({"text_encoder.text_model.final_layer_norm": pair(8, 8)}, {}, None, "that fit no module"),
    "kind": (GOOD, {f"text_encoder.{Q.format(0)}.lora_magnitude_vector": np.ones(8, np.float32)}, None,
             "lora_magnitude_vector.* fit no module"),
    "other net": ({**GOOD, "unet.conv_in": pair(8, 8)}, {}, None, r"2 \(unet.conv_in.lora_A.weight, .* nets that were not given"),
    "lone": (GOOD, {f"{T}.lora_A.weight": pair(8, 8)[0]}, None, r"1 \(text_encoder.text_model.*q_proj\) with only one"),
    "lone alpha": (GOOD, {f"{T}.alpha": np.ones((), np.float32)}, None, "with only one of the two"),
    "inputs": ({T: pair(7, 8)}, {}, None, r"\(8, 2\) x \(2, 7\) for \(8, 8\)\) of shapes"),
    "outputs": ({T: pair(8, 9)}, {}, None, "of shapes that do not fit"),
    "ranks": ({T: (pair(8, 8, 2)[0], pair(8, 8, 3)[1])}, {}, None, "of shapes that do not fit"),
    "kernel": ({T: (np.ones((2, 8, 3, 3), np.float32), np.ones((8, 2, 1, 1), np.float32))}, {}, None, "of shapes that do not"),
    "integers": ({T: tuple(np.int8(a) for a in pair(8, 8))}, {}, None, "of shapes that do not fit"),
    "said rank": (GOOD, {}, {"text_encoder.r": 4}, r"q_proj 2 instead of 4\) of another rank than the file says"),
    "said pattern": (GOOD, {}, {"text_encoder.r": 2, "text_encoder.rank_pattern": {"q_proj": 3}}, "2 instead of 3"),
    "dora": (GOOD, {}, {"text_encoder.use_dora": True}, "not plain LoRA .use_dora=True"),
    "pissa": (GOOD, {}, {"text_encoder.init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "no pattern": (GOOD, {}, {"text_encoder.alpha_pattern": {"(": 3}}, "no regular expression"),
    "no object": (GOOD, {}, [1], "no JSON object"),
    "twice": (GOOD, {f"text_encoder.{LAYER.format(0)}.lora.up.weight": pair(8, 8)[1]}, None, "that are there twice"),
    "nothing": ({}, {}, None, "holds no LoRA adapters of text_encoder"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind, tmp_path):
    modules, more, settings, words = REFUSED[kind]
    path = write(tmp_path / "a.safetensors", modules, settings, more=more)
    with pytest.raises(UserError, match=words):
        load_lora(path, TOWERS, {"text_encoder": random_params(TOWER)})


def test_everything_that_does_not_fit_is_in_one_error(tmp_path):
    path = write(tmp_path / "a.safetensors", {T: pair(7, 8), "unet.a": pair(2, 2), "x": pair(2, 2)})
    with pytest.raises(UserError) as error:
        load_lora(path, TOWERS, {"text_encoder": random_params(TOWER)})
    for words in ("2 (x.lora_A.weight, x.lora_B.weight) that fit no", "2 (unet.a.lora_A.weight",
                  f"1 ({T} (8, 2) x (2, 7) for (8, 8)) of shapes"):
        assert words in str(error.value), str(error.value)


def test_one_module_under_two_names(tmp_path):
    params = {"net": random_params(UNET)}
    names = {"unet.conv_in": (np.ones((1, 2, 3, 3), np.float32), np.ones((8, 1, 1, 1), np.float32))}
    load_lora(write(tmp_path / "a.safetensors", names), {"net": UNET}, params)
    names["lora_unet_input_blocks_0_0"] = names["unet.conv_in"]
    with pytest.raises(UserError, match="under two names"):
        load_lora(write(tmp_path / "b.safetensors", names), {"net": UNET}, params)


@pytest.mark.parametrize("call, words", [
    (lambda d: load_lora(d, TOWERS, {}), "unknown net with parameters 'text_encoder'"),
    (lambda d: load_lora(d, TOWERS, {"text_encoder": random_params(TOWER)}), f"no file of LoRA adapters such as {FILE}"),
    (lambda d: load_lora(d + "/x.safetensors", TOWERS, {"text_encoder": random_params(TOWER)}), "no file"),
    (lambda d: load_lora(d, {"net": UNET, "autoencoder": object()}, {}, only=["autoencoder"]), "'autoencoder' can have no LoRA"),
    (lambda d: save_lora(d, TOWERS, {"text_encoder": random_params(TOWER)}, Lora({"net": {}})), "unknown net 'net'"),
])
def test_other_mistakes(call, words, tmp_path):
    with pytest.raises(UserError, match=words):
        call(str(tmp_path))


def test_kernels_without_a_module_of_their_own_are_not_saved(tmp_path):
    net = dit((4, 4, 2), 3, **DIT)
    params = {"net": random_params(net)}
    whole = Lora({"net": lora.init(jax.random.key(0), params["net"], ["time_1/kernel"], 2)})
    with pytest.raises(UserError, match=r"1 \(time_1/kernel\) of the adapted parameters"):
        save_lora(str(tmp_path), {"net": net}, params, whole)
    assert not os.listdir(tmp_path)
