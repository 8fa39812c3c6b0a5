"""The directory of one component of a published checkpoint: config.json beside one file of weights, or several with an index.

    config.json
    diffusion_pytorch_model[.VARIANT].safetensors               or  model[.VARIANT].safetensors  for a text tower
    diffusion_pytorch_model.safetensors.index[.VARIANT].json    {"weight_map": {name: file in the same directory}}
    ... .bin                                                    the same as torch files
"""
import fnmatch
import json
import os
import re
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional

import numpy as np

from ldm_jax import paths
from ldm_jax.types import UserError
from ldm_jax.weights import maps_autoencoder, maps_bert, maps_clip, maps_dit, maps_unet
from ldm_jax.weights.files import open_arrays
from ldm_jax.weights.rules import Rule
from ldm_jax.weights.stored import open_safetensors

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
PRECISIONS = ("fp16", "bf16", "fp32")  # the variants that may stand in for a file without one: the same weights in another dtype

_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
RENAMED = (  # names in older files -> those of today
    (re.compile(r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\."), lambda m: f"{m[1]}.{_OLD[m[2]]}."),
    (re.compile(r"(samplers\.0)\.Conv2d_0\."), lambda m: f"{m[1]}.conv."),
    (re.compile(r"^time_proj\.W$"), lambda m: "time_proj.weight"),
)


class Layout(NamedTuple):
    """A class of published networks.

    builder: the name of our builder. arguments: (config, arrays) -> its named arguments. rules: (arguments, config) -> the rules.
    """
    builder: str
    arguments: Callable[[Mapping[str, Any], Mapping[str, Any]], Dict[str, Any]]
    rules: Callable[[Mapping[str, Any], Mapping[str, Any]], List[Rule]]
    names: Callable = dict  # the arrays' names in older files -> those of the rules


LAYOUTS = {
    "AutoencoderKL": Layout("kl", maps_autoencoder.kl_arguments, maps_autoencoder.autoencoder_rules),
    "VQModel": Layout("vq", maps_autoencoder.vq_arguments, maps_autoencoder.autoencoder_rules),
    "UNet2DModel": Layout("unet_of_levels", maps_unet.unet2d_arguments, maps_unet.unet_rules),
    "UNet2DConditionModel": Layout("unet_of_levels", maps_unet.condition_arguments, maps_unet.unet_rules),
    "DiTTransformer2DModel": Layout("dit", maps_dit.dit_arguments, maps_dit.dit_rules),
    "Transformer2DModel": Layout("dit", maps_dit.dit_arguments, maps_dit.dit_rules),
    "CLIPTextModel": Layout("clip_text", maps_clip.clip_text_arguments, maps_clip.clip_text_rules, maps_clip.today),
    "LDMBertModel": Layout("bert_text", maps_bert.bert_arguments, maps_bert.bert_rules, maps_bert.without_words),
}
MODEL_TYPES = {"clip_text_model": "CLIPTextModel", "ldmbert": "LDMBertModel"}  # how the configs of text towers name their class


def read_config(directory: str) -> Dict[str, Any]:
    """The config.json of a component.

    Raises:
      UserError: when there is none, or it is no JSON object.
    """
    path = os.path.join(paths.expand(directory), "config.json")
    config = _json(path, f"{directory!r} is no component of a published checkpoint (no config.json); give a directory such as "
                         f"CHECKPOINT/unet")
    if not isinstance(config, dict):
        raise UserError(f"cannot read {path}: not a JSON object")
    return config


def _json(path: str, missing: str) -> Any:
    try:
        return json.loads(paths.read_text(path))
    except FileNotFoundError:
        raise UserError(missing) from None
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}") from e


def find_weights(directory: str, variant: Optional[str] = None) -> str:
    """The path of the file of weights in a component's directory, or of the index of several.

    variant None is the file without one or, where there is none, the only one of another precision.

    Raises:
      UserError: when there is no such file, or several that may stand in for it.
    """
    directory = paths.expand(directory)
    names = paths.listdir(directory) if paths.isdir(directory) else []
    found = {}  # variant -> path, the better kind of file first
    for stem in STEMS:
        for suffix in ("safetensors", "bin"):
            for file in fnmatch.filter(names, f"{stem}*.{suffix}*"):
                name = file[len(stem):]
                match = re.fullmatch(rf"(?:\.([\w-]+))?\.{suffix}(?:\.index(?:\.([\w-]+))?\.json)?", name)
                if match and not re.search(r"\d-of-\d", name):
                    found.setdefault(match[1] or match[2], os.path.join(directory, file))
    if variant in found:
        return found[variant]
    known = f"it has {', '.join(os.path.basename(p) for p in found.values())}" if found else "it has none"
    if variant is not None:
        raise UserError(f"{directory!r} has no weights of the variant {variant!r}; {known}")
    others = [v for v in found if v in PRECISIONS]
    if len(others) != 1:
        raise UserError(f"{directory!r} has no {STEMS[0]}.safetensors or the like; {known}" +
                        ("; choose one with variant=" if others else "; download the component's weights"))
    return found[others[0]]


def open_weights(directory: str, variant: Optional[str] = None) -> Dict[str, Any]:
    """The arrays of a component by today's names. Those of safetensors files are not read yet, see `stored`.

    Raises:
      UserError: for what cannot be found or read, and for an index that names a file elsewhere or does not fit its files.
    """
    path = find_weights(directory, variant)
    return renamed(_open_index(path) if path.endswith(".json") else _open_file(path), path)


def _open_file(path: str) -> Dict[str, Any]:
    return open_safetensors(path) if path.endswith(".safetensors") else open_arrays(path)


def _open_index(path: str) -> Dict[str, Any]:
    index = _json(path, f"no file {path!r}")
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"cannot read {path}: it has no weight_map from names to files")
    for name in where.values():
        if name != os.path.basename(name) or "\\" in name or not name.endswith((".safetensors", ".bin")):
            raise UserError(f"{path} names the file {name!r}; an index may only name files of weights in its own directory")
    arrays = {}
    for name in sorted(set(where.values())):
        part = _open_file(os.path.join(os.path.dirname(path), name))
        wanted = {array for array, file in where.items() if file == name}
        if wanted != set(part):
            wrong = sorted(wanted ^ set(part))
            raise UserError(f"{path} does not fit {name}: {len(wrong)} arrays are in only one of them, such as {wrong[0]!r}")
        arrays.update(part)
    return arrays


def renamed(arrays: Mapping[str, Any], path: str) -> Dict[str, Any]:
    """The arrays under today's names; one that older files have twice is there once."""
    out = {}
    for name, array in arrays.items():
        new = name
        for pattern, replacement in RENAMED:
            new = pattern.sub(replacement, new)
        if new in out and not np.array_equal(np.asarray(out[new]), np.asarray(array)):
            raise UserError(f"{path} has two different arrays for {new!r}, one under the older name; keep the right one")
        out[new] = array
    return out
