"""A Stable Diffusion small enough for tests, written to disk in the published layout by the library itself."""
import json

import jax
import numpy as np

from ldm_jax.data.bytepairs import LETTERS
from ldm_jax.models.autoencoder import kl
from ldm_jax.models.clip import clip_text
from ldm_jax.models.unet import unet
from ldm_jax.published import save_net

WORDS = "cat dawn ox fox"


def filled(net, seed):
    """Parameters of which none is zero."""
    rng = np.random.default_rng(seed)

    def random(path, a):
        if a.ndim > 1:
            return rng.standard_normal(a.shape) * (1.0 if "embedding" in str(path) else np.prod(a.shape[:-1]) ** -0.5)
        return 0.2 * rng.standard_normal(a.shape) + (path[-1].key == "scale")

    return jax.tree_util.tree_map_with_path(lambda path, a: random(path, a).astype(np.float32), jax.eval_shape(net.init, jax.random.key(0)))


def tokenizer(folder):
    letters = sorted(LETTERS)
    merges = list(dict.fromkeys((word[:i], word[i] + ("</w>" if i + 1 == len(word) else ""))
                                for word in WORDS.split() for i in range(1, len(word))))
    tokens = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    tokens = list(dict.fromkeys(tokens))
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, "pad_token": "<|endoftext|>"}))
    return len(tokens)


def stable_diffusion(folder, masked=False):
    """Pictures of 8x8, latents of 4x4x4; with `masked` the kind that fills pictures in."""
    words = tokenizer(folder / "tokenizer")
    kind = "StableDiffusionInpaintPipeline" if masked else "StableDiffusionPipeline"
    parts = {"text_encoder": clip_text(vocab_size=words, width=12, depth=2, num_heads=2, mlp_width=20),
             "vae": kl((8, 8, 3), 2, 4, width=8, mults=(1, 2), num_res_blocks=1, norm_groups=4, scale=0.4),
             "unet": unet((4, 4, 4), width=8, mults=(1, 2), num_res_blocks=1, attention=(4,), num_heads=2, transformer_depth=1,
                          context_dim=12, norm_groups=4, resample="conv_centred", time_order="cos_sin", timesteps=1000,
                          concat_channels=5 if masked else None)}
    for i, (name, net) in enumerate(parts.items()):
        save_net(str(folder / name), net, filled(net, i))
    (folder / "scheduler").mkdir()
    scheduler = dict(_class_name="DDIMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                     clip_sample=False, set_alpha_to_one=False)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {"_class_name": kind, **{name: ["transformers" if name == "text_encoder" else "diffusers", name] for name in parts},
             "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)
