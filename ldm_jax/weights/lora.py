"""Files of LoRA adapters: low-rank matrices for the modules of published nets, under the names that several programs give them.

A module X of the net that a checkpoint calls C ("unet", "transformer", "text_encoder", "text_encoder_2") has two arrays, and
X.weight + scale up down in the place of X.weight; down is [r, in] or [r, in, kh, kw], up [out, r] or [out, r, 1, 1].

    C.X.lora_A.weight                      C.X.lora_B.weight                     PEFT, and diffusers of today
    C.X.lora.down.weight                   C.X.lora.up.weight                    diffusers before; towers: lora_linear_layer.down
    C.Y.processor.to_q_lora.down.weight    C.Y.processor.to_q_lora.up.weight     diffusers at first, of the attention Y
    lora_unet_X_.lora_down.weight          lora_unet_X_.lora_up.weight           kohya's sd-scripts: X_ is X with _ for each dot

In the last, lora_te_, lora_te1_ and lora_te2_ stand for text towers, and the U-Net's modules may have the names of its first
publication. A file for one net may leave C away, or begin with base_model.model. as PEFT's own do. scale is alpha / r; alpha is
an array X.alpha, or in the settings of PEFT that a file carries (JSON, "lora_adapter_metadata" in the header or adapter_config.json
beside it: r, lora_alpha, rank_pattern, alpha_pattern), or r.
"""
import collections
import json
import math
import os
import re
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ldm_jax import paths
from ldm_jax.types import UserError
from ldm_jax.weights.files import open_arrays
from ldm_jax.weights.rules import FLOATS, listed
from ldm_jax.weights.stored import read_metadata, write_safetensors

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.bin", "adapter_model.bin")
SETTINGS, CONFIG = "lora_adapter_metadata", "adapter_config.json"
PREFIXES = {  # what begins a name -> the net
    "unet.": "unet", "lora_unet_": "unet", "transformer.": "transformer", "text_encoder.": "text_encoder",
    "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "text_encoder_2.": "text_encoder_2", "lora_te2_": "text_encoder_2"}
ENDS = {  # what ends a name -> which of the two it is
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_down.weight": "down", ".lora_up.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up", ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up", "_lora.down.weight": "down", "_lora.up.weight": "up", ".alpha": "alpha"}
PROBLEMS = ("that fit no module", "that are there twice", "of nets that were not given", "with only one of the two",
            "of shapes that do not fit", "of another rank than the file says")
TOWER = "text_model."  # begins the names of a tower's modules in files of all but the newest releases
_OLD = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}  # of towers at first
OTHER = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "alora_invocation_tokens", "arrow_config",
         "monteclora_config", "kasa_config", "velora_config", "target_parameters", "trainable_token_indices", "fan_in_fan_out")
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # values of init_lora_weights that leave the net as published


class Pair(NamedTuple):
    """The adapter of one published module: what is added to its weight is scale up down."""
    down: Any
    up: Any
    scale: float


def find_file(path: str) -> str:
    """The file of adapters at `path`, which may be the directory that holds it.

    Raises:
      UserError: when there is none.
    """
    path = paths.expand(path)
    if not paths.isdir(path):
        return path
    for name in FILES:
        if paths.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    raise UserError(f"{path!r} has no file of LoRA adapters such as {FILES[0]}; give the path of the file")


def read_pairs(path: str, nets: Mapping[str, Mapping[str, Tuple[int, ...]]],
               only: Optional[Sequence[str]] = None) -> Dict[str, Dict[str, Pair]]:
    """The adapters in a file: net -> module -> Pair, whose arrays numpy.asarray reads.

    Args:
      path: of the file, .safetensors or torch's .bin, or of its directory.
      nets: "unet" and the like -> module -> the shape of its published weight.
      only: the nets whose adapters are wanted; the file's others are then left alone.

    Raises:
      UserError: for a file that cannot be read, and for names, shapes, ranks and settings that do not fit; one error lists them.
    """
    path, wanted = find_file(path), list(nets if only is None else only)
    arrays = open_arrays(path)
    problems, settings, pairs = {kind: [] for kind in PROBLEMS}, _settings(path), {}
    for net, modules in _sorted(arrays, nets, wanted, only is None, problems).items():
        said = _of_net(settings, net, len(wanted) == 1)
        _refuse(path, said)
        for module, parts in modules.items():
            if not {"down", "up"} <= set(parts):
                problems["with only one of the two"].append(f"{net}.{module}")
                continue
            shape, down, up = nets[net][module], parts["down"], parts["up"]
            rank = _setting(said.get("rank_pattern"), said.get("r"), module)
            if not _fits(shape, down, up):
                sizes = f"{tuple(up.shape)} x {tuple(down.shape)} for {tuple(shape)}"
                problems["of shapes that do not fit"].append(f"{net}.{module} {sizes}")
            elif rank not in (None, down.shape[0]):
                problems["of another rank than the file says"].append(f"{net}.{module} {down.shape[0]} instead of {rank}")
            else:
                pairs.setdefault(net, {})[module] = Pair(down, up, _scale(parts, said, module))
    if any(problems.values()):
        found = "; ".join(f"{listed(sorted(names))} {kind}" for kind, names in problems.items() if names)
        raise UserError(f"the LoRA adapters in {path!r} do not fit {', '.join(sorted(nets))}: {found}. Give the nets that the "
                        f"file was made for; plain LoRA of matrices and convolutions is supported")
    if not pairs:
        raise UserError(f"{path!r} holds no LoRA adapters of {', '.join(sorted(wanted))}")
    return pairs


def _sorted(arrays: Mapping[str, Any], nets: Mapping[str, Any], wanted: Sequence[str], all_of_them: bool,
            problems: Mapping[str, List[str]]) -> Dict[str, Dict[str, Dict[str, Any]]]:
    """net -> module -> {"down": array, "up": array, "alpha": array}, of the nets that are wanted."""
    aliases, found = {net: _aliases(modules) for net, modules in nets.items()}, {}
    for name, array in arrays.items():
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        net = PREFIXES[prefix] if prefix else wanted[0] if len(wanted) == 1 else None
        rest = name.removeprefix(prefix or "base_model.model.")
        end = max((end for end in ENDS if rest.endswith(end)), key=len, default=None)
        module = aliases.get(net, {}).get(rest[:-len(end)].replace(".processor.", ".")) if end else None
        if net is not None and net not in wanted:
            problems["of nets that were not given"] += [name] if all_of_them else []
        elif module is None:
            problems["that fit no module"].append(name)
        else:
            parts = found.setdefault(net, {}).setdefault(module, {})
            if ENDS[end] in parts:
                problems["that are there twice"].append(name)
            parts[ENDS[end]] = array
    return found


def _scale(parts: Mapping[str, Any], said: Mapping[str, Any], module: str) -> float:
    """alpha / r, or alpha / sqrt(r) where the settings say so (Kalajdzievski 2023, "A rank stabilization scaling factor")."""
    r, alpha = parts["down"].shape[0], _setting(said.get("alpha_pattern"), said.get("lora_alpha"), module)
    if "alpha" in parts:
        alpha = float(np.asarray(parts["alpha"]).reshape(-1)[0])
    return 1.0 if alpha is None else alpha / (math.sqrt(r) if said.get("use_rslora") else r)


def _aliases(modules: Mapping[str, Any]) -> Dict[str, str]:
    """Every name that files have for a module -> the module."""
    aliases = {}
    for module in modules:
        old = module.removesuffix(".0") if module.endswith(".to_out.0") else module
        if module.startswith(TOWER) and module.rpartition(".")[2] in _OLD:
            parent, _, last = module.rpartition(".")
            old = f"{parent}.{_OLD[last]}"
        for alias in (module, old, module.replace(".", "_")):
            aliases[alias] = aliases[alias.removeprefix(TOWER)] = module
    return aliases


def _fits(shape: Sequence[int], down: Any, up: Any) -> bool:
    """Whether up down has the shape of a published weight, 1x1 kernels aside."""
    plain = lambda sizes: tuple(sizes[:2]) if all(n == 1 for n in sizes[2:]) else tuple(sizes)
    if not {np.dtype(down.dtype), np.dtype(up.dtype)} <= set(FLOATS) or min(len(down.shape), len(up.shape)) < 2:
        return False
    r = down.shape[0]
    return r > 0 and plain(up.shape) == (shape[0], r) and plain(down.shape) == (r, *plain(shape)[1:])


def _settings(path: str) -> Dict[str, Any]:
    """What a file, or the config beside it, says of its adapters."""
    beside = os.path.join(os.path.dirname(path), CONFIG)
    try:
        text = read_metadata(path).get(SETTINGS) if path.endswith(".safetensors") else None
        if text is None and os.path.basename(path).startswith("adapter_model.") and paths.isfile(beside):
            text = paths.read_text(beside)
        settings = json.loads(text or "{}")
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read the settings of the LoRA adapters in {path!r}: {e}") from e
    if not isinstance(settings, dict):
        raise UserError(f"cannot read the settings of the LoRA adapters in {path!r}: no JSON object")
    return settings


def _of_net(settings: Mapping[str, Any], net: str, alone: bool) -> Dict[str, Any]:
    """The settings of one net, which a file for one net alone may have without its name."""
    own = {key[len(net) + 1:]: value for key, value in settings.items() if key.startswith(f"{net}.")}
    return own or ({key: value for key, value in settings.items() if "." not in key} if alone else {})


def _refuse(path: str, said: Mapping[str, Any]) -> None:
    other = [f"{key}={said[key]!r}" for key in OTHER if said.get(key)]
    if said.get("init_lora_weights") not in STARTS:
        other.append(f"init_lora_weights={said['init_lora_weights']!r}")
    if other:
        raise UserError(f"the adapters in {path!r} are not plain LoRA ({', '.join(other)}), which alone is supported")


def _setting(patterns: Optional[Mapping[str, Any]], default: Any, module: str) -> Any:
    """The value of the first of PEFT's patterns that ends the module's name, which may be without its "text_model."."""
    for pattern, value in (patterns or {}).items():
        try:
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in (module, module.removeprefix(TOWER))):
                return value
        except re.error as e:
            raise UserError(f"the pattern {pattern!r} of LoRA adapters is no regular expression: {e}") from None
    return default


def write_pairs(path: str, nets: Mapping[str, Mapping[str, Pair]]) -> None:
    """Write net -> module -> Pair under the names of PEFT, with the ranks and alphas of PEFT in the header.

    Args:
      path: of the file, or of a directory, which then gets a pytorch_lora_weights.safetensors.
    """
    path = paths.expand(path)
    path = path if path.endswith(".safetensors") else os.path.join(path, FILES[0])
    arrays, settings = {}, {}
    for net, pairs in nets.items():
        short = {module: module.removeprefix(TOWER) for module in pairs}  # fits the names of all releases as an end
        ranks = {module: pair.down.shape[0] for module, pair in pairs.items()}
        alphas = {module: _number(pair.scale * ranks[module]) for module, pair in pairs.items()}
        said = {"target_modules": sorted(short.values())}
        for values, key, patterns in ((ranks, "r", "rank_pattern"), (alphas, "lora_alpha", "alpha_pattern")):
            said[key] = collections.Counter(values.values()).most_common(1)[0][0]
            said[patterns] = {short[m] if short[m] != m else f"^{m}": v for m, v in values.items() if v != said[key]}
        settings.update({f"{net}.{key}": value for key, value in said.items()})
        for module, pair in pairs.items():
            arrays[f"{net}.{module}.lora_A.weight"], arrays[f"{net}.{module}.lora_B.weight"] = pair.down, pair.up
    paths.makedirs(os.path.dirname(path) or ".")
    write_safetensors(path, arrays, {SETTINGS: json.dumps(settings, indent=2, sort_keys=True)})


def _number(alpha: float) -> Any:
    """alpha without the rounding of alpha / r, an int where it is whole."""
    alpha = float(f"{alpha:.12g}")
    return int(alpha) if alpha.is_integer() else alpha
