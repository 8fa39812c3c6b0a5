"""LoRA against diffusers and PEFT: their files here, merged or by themselves, and ours there, give the same outputs."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.lora import load_lora, read_lora, save_lora
from ldm_jax.models import lora
from ldm_jax.models.lora import Lora
from ldm_jax.published import load_net

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors")
safetensors_torch = pytest.importorskip("safetensors.torch")

from tests.parity.test_components import CONDITION, DIT, STEPS, TIMES, nchw, normal, randomise  # noqa: E402

TOLERANCE = 1e-4  # of the largest value
WORDS = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             max_position_embeddings=9, eos_token_id=49, bos_token_id=48, pad_token_id=49)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
IDS = np.random.default_rng(5).integers(0, 48, (2, 9))
IDS[:, -1] = 49


def fill(model, seed=0):
    """Random A and B, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = 0.5 * torch.randn(p.shape, generator=generator)
    return model


def pair(folder, name, model, **options):
    """(their model, the function that loads its twin of ours)."""
    model = randomise(model)
    model.save_pretrained(folder / name)
    return model, load_net(str(folder / name), **options)


def unet_pair(folder, kind="sd1"):
    return pair(folder, "unet", diffusers.UNet2DConditionModel(**CONDITION[kind]), attention_impl="einsum")


def tower_pair(folder):
    config = transformers.CLIPTextConfig(**WORDS, architectures=["CLIPTextModel"])
    return pair(folder, "text_encoder", transformers.CLIPTextModel(config))


def pipeline(unet, tower):
    return diffusers.StableDiffusionPipeline(None, tower, None, unet, diffusers.DDIMScheduler(), None, None,
                                             requires_safety_checker=False)


X, CONTEXT, FORWARDS = normal(2, 8, 8, 4), normal(2, 7, 10, seed=1), {}


@torch.no_grad()
def unet_theirs(model, x=X):
    return model(nchw(x), torch.from_numpy(STEPS), torch.from_numpy(CONTEXT)).sample.numpy().transpose(0, 2, 3, 1)


def unet_ours(net, params):
    forward = FORWARDS.setdefault(net, jax.jit(net.apply))
    return np.asarray(forward(params, X, jnp.asarray(TIMES, jnp.float32), {"context": CONTEXT}))


@torch.no_grad()
def tower_theirs(model):
    return model(torch.from_numpy(IDS)).last_hidden_state.numpy()


def tower_ours(net, params):
    return np.asarray(net.apply(params, jnp.asarray(IDS)).last)


def close(got, want, base):
    """Equal, and not what it is without adapters."""
    scale = np.abs(want).max()
    assert np.abs(want - base).max() > 0.05 * scale
    np.testing.assert_allclose(got, want, atol=TOLERANCE * scale, rtol=0)


def both_ways(folder, nets, params, ours, theirs, base, **options):
    """The file in `folder`, added to the parameters and by itself, gives what their models give; half of it is half way there."""
    merged = load_lora(str(folder), nets, params, **options)
    alone = read_lora(str(folder), nets, jax.eval_shape(lambda: params), **options)
    again = lora.merge_all(params, alone)
    for name in ours:
        for tree in (merged, again):
            close(ours[name](nets[name], tree[name]), theirs[name], base[name])
    half = load_lora(str(folder), nets, params, strength=0.5, **options), lora.merge_all(params, alone, 0.5)
    full = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(merged)}
    start = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for tree in half:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            np.testing.assert_allclose(leaf, (full[path] + start[path]) / 2, atol=1e-5)
    return alone


def test_stable_diffusion_with_a_text_tower(tmp_path):
    """Convolutions, matrices, 1x1 projections and the embedding of the time; ranks and alphas of their own; and out again."""
    unet, (net, params) = unet_pair(tmp_path)
    tower, (text, words) = tower_pair(tmp_path)
    nets, all_params = {"net": net, "text_encoder": text}, {"net": params, "text_encoder": words}
    base = {"net": unet_theirs(unet), "text_encoder": tower_theirs(tower)}
    unet.add_adapter(peft.LoraConfig(
        r=3, lora_alpha=5, init_lora_weights=False, rank_pattern={"conv1": 2}, alpha_pattern={"mid_block.*to_q": 9},
        target_modules=[*ATTENTION, "proj_in", "conv1", "conv_in", "time_embedding.linear_1", "downsamplers.0.conv",
                        "ff.net.0.proj"]))
    tower.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, rank_pattern={"layers.1.self_attn.q_proj": 4},
                                      target_modules=["q_proj", "out_proj", "fc1"]))
    fill(unet), fill(tower, 1)
    state = [peft.get_peft_model_state_dict(model, adapter_name=name) for model, name in ((unet, "default"), (tower, "default"))]
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs", unet_lora_layers=state[0], text_encoder_lora_layers=state[1],
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=tower.peft_config["default"].to_dict())
    theirs = {"net": unet_theirs(unet), "text_encoder": tower_theirs(tower)}
    ours = {"net": unet_ours, "text_encoder": tower_ours}
    alone = both_ways(tmp_path / "theirs", nets, all_params, ours, theirs, base)

    configs = {"net": json.loads((tmp_path / "unet" / "config.json").read_text())}
    save_lora(str(tmp_path / "ours"), nets, all_params, alone, configs=configs)
    again = safetensors_torch.load_file(tmp_path / "ours" / "pytorch_lora_weights.safetensors")
    want = {f"unet.{name}": a for name, a in state[0].items()} | {
        f"text_encoder.text_model.{name.removeprefix('text_model.')}": a for name, a in state[1].items()}
    assert set(again) == set(want)
    for name, a in want.items():
        assert torch.equal(again[name], a), name
    fresh = pipeline(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval(),
                     transformers.CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval())
    fresh.load_lora_weights(tmp_path / "ours")
    close(unet_theirs(fresh.unet), theirs["net"], base["net"])
    close(tower_theirs(fresh.text_encoder), theirs["text_encoder"], base["text_encoder"])


def test_ours_opens_there(tmp_path):
    """Adapters made here, with an alpha of their own and no published config at hand."""
    unet, (net, params) = unet_pair(tmp_path)
    tower, (text, words) = tower_pair(tmp_path)
    nets, all_params = {"net": net, "text_encoder": text}, {"net": params, "text_encoder": words}
    made = {name: lora.init(jax.random.key(i), tree, rank=3) for i, (name, tree) in enumerate(all_params.items())}
    rng = np.random.default_rng(0)
    made = Lora(jax.tree.map(lambda a: a + np.float32(0.3 * rng.standard_normal(a.shape)), made), 4 / 3)
    save_lora(str(tmp_path / "ours"), nets, all_params, made)
    base, merged = (unet_theirs(unet), tower_theirs(tower)), lora.merge_all(all_params, made)
    pipe = pipeline(unet, tower)
    pipe.load_lora_weights(tmp_path / "ours")
    close(unet_theirs(pipe.unet), unet_ours(net, merged["net"]), base[0])
    close(tower_theirs(pipe.text_encoder), tower_ours(text, merged["text_encoder"]), base[1])


SPELLINGS = {  # how files have the two arrays of a module, a number standing for alpha
    "diffusers": lambda m: (f"unet.{m}.lora.down.weight", f"unet.{m}.lora.up.weight"),
    "at first": lambda m: tuple(f"unet.{m.replace('.to_', '.processor.to_').removesuffix('.0')}_lora.{way}.weight"
                                for way in ("down", "up")),
    "kohya": lambda m: tuple(f"lora_unet_{m.replace('.', '_')}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")),
}
FIRST = {  # modules as they were first published -> today, of this small U-Net
    "input_blocks.1.0": "down_blocks.0.resnets.0", "input_blocks.1.1": "down_blocks.0.attentions.0",
    "input_blocks.3.0": "down_blocks.1.resnets.0", "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0", "middle_block.2": "mid_block.resnets.1",
    "output_blocks.0.0": "up_blocks.0.resnets.0", "output_blocks.1.0": "up_blocks.0.resnets.1",
    "output_blocks.2.0": "up_blocks.1.resnets.0", "output_blocks.2.1": "up_blocks.1.attentions.0",
    "output_blocks.3.0": "up_blocks.1.resnets.1", "output_blocks.3.1": "up_blocks.1.attentions.1",
    "in_layers.2": "conv1", "out_layers.3": "conv2"}


def first(module):
    """kohya's names in files for XL."""
    for old, new in FIRST.items():
        module = module.replace(new, old)
    return SPELLINGS["kohya"](module)


SPELLINGS["kohya of XL"] = first


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_names(spelling, tmp_path):
    """Files as they were once named, which they read and we read."""
    unet, (net, params) = unet_pair(tmp_path)
    base = unet_theirs(unet)
    more = [] if spelling == "at first" else ["proj_out", "conv2"]
    unet.add_adapter(peft.LoraConfig(r=3, init_lora_weights=False, target_modules=[*ATTENTION, *more]))
    state, arrays = peft.get_peft_model_state_dict(fill(unet)), {}
    unet.delete_adapters("default")
    for name in [n for n in state if "lora_A" in n]:
        module = name.removesuffix(".lora_A.weight")
        values = state[name], state[f"{module}.lora_B.weight"], torch.tensor(2.0 if "conv2" in module else 5.0)
        arrays.update(zip(SPELLINGS[spelling](module), values))
    path = tmp_path / ("pytorch_lora_weights.bin" if spelling == "at first" else "pytorch_lora_weights.safetensors")
    (torch.save if path.suffix == ".bin" else safetensors_torch.save_file)(arrays, path)
    state, alphas = pipeline(unet, None).lora_state_dict(path, unet_config=unet.config)
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    both_ways(path, {"net": net}, {"net": params}, {"net": unet_ours}, {"net": unet_theirs(unet)}, {"net": base})


@torch.no_grad()
def dit_theirs(model):
    out = model(nchw(normal(2, 8, 8, 3)), torch.from_numpy(STEPS), torch.tensor([3, 10])).sample
    return out.numpy().transpose(0, 2, 3, 1)


def dit_ours(net, params):
    forward = FORWARDS.setdefault(net, jax.jit(net.apply))
    return np.asarray(forward(params, normal(2, 8, 8, 3), jnp.asarray(TIMES, jnp.float32), np.array([3, 10])))


@pytest.mark.parametrize("stacked", [False, True])
def test_dit(stacked, tmp_path):
    """What PEFT itself writes, of patches and blocks, here one by one or stacked, with ranks of their own; and out again."""
    model = randomise(diffusers.DiTTransformer2DModel(**DIT))
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    model.save_pretrained(tmp_path)
    net, params = load_net(str(tmp_path), scan_layers=stacked)
    base = dit_theirs(model)
    config = peft.LoraConfig(r=2, lora_alpha=3, use_rslora=True, rank_pattern={"blocks.1.attn1.to_k": 3},
                             target_modules=[*ATTENTION, "pos_embed.proj", "norm1.linear", "0.ff.net.2", "proj_out_2"])
    wrapped = fill(peft.get_peft_model(model, config))
    wrapped.save_pretrained(tmp_path / "theirs")
    theirs = dit_theirs(wrapped)
    alone = both_ways(tmp_path / "theirs", {"net": net}, {"net": params}, {"net": dit_ours}, {"net": theirs}, {"net": base})

    save_lora(str(tmp_path / "ours.safetensors"), {"net": net}, {"net": params}, alone)
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        state = {name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()}
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    for name, a in peft.get_peft_model_state_dict(wrapped).items():
        assert torch.equal(state.pop(name.removeprefix("base_model.model.")), a), name
    assert not state
    fresh = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    config = peft.LoraConfig(**{key.removeprefix("transformer."): value for key, value in settings.items()})
    peft.inject_adapter_in_model(config, fresh)
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        peft.set_peft_model_state_dict(fresh, {name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()})
    close(dit_theirs(fresh), theirs, base)
