"""LoRA adapters of systems and pipelines in files that diffusers and PEFT read: `load_lora`, `read_lora`, `save_lora`.

Nets go by the names of a system's parameters: "net" is what files call "unet" or "transformer", "text_encoder" and
"text_encoder_2" are text towers. So `pipeline.system.nets` and `pipeline.params` fit as they are.
"""
import collections
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

from ldm_jax.models.dit import DiT
from ldm_jax.models.lora import Lora
from ldm_jax.models.unet import UNet
from ldm_jax.published import CONFIGS, arguments_of
from ldm_jax.types import PyTree, UserError, lookup
from ldm_jax.weights import adapters as published
from ldm_jax.weights import original_unet
from ldm_jax.weights.lora import Pair, read_pairs, write_pairs
from ldm_jax.weights.rules import flatten

TOWERS = ("text_encoder", "text_encoder_2")
KINDS = {UNet: "unet", DiT: "transformer"}


def load_lora(path: str, nets: Mapping[str, Any], params: Mapping[str, PyTree], *, strength: float = 1.0,
              only: Optional[Sequence[str]] = None, configs: Mapping[str, Mapping[str, Any]] = {}) -> Dict[str, PyTree]:
    """The parameters with the adapters of a file in them: W + strength (alpha / r) B A, in W's dtype.

    Args:
      path: of the file, or of the directory of a pytorch_lora_weights.safetensors.
      nets, params: name -> net and name -> its parameters; those without a place in such files are left alone.
      strength: what the adapters' part is multiplied by.
      only: names of the nets that are to be changed, where a file has adapters of others too.
      configs: name -> the config.json of the published net, where `save_net` would write another one.

    Raises:
      UserError: for a file that cannot be read or has anything that does not fit the nets.
    """
    modules, pairs = _read(path, nets, params, only, configs)
    return {**params, **{name: published.add(params[name], pairs[name], modules[name], strength) for name in pairs}}


def read_lora(path: str, nets: Mapping[str, Any], params: Mapping[str, PyTree], *, only: Optional[Sequence[str]] = None,
              configs: Mapping[str, Mapping[str, Any]] = {}) -> Lora:
    """The adapters of a file by themselves, to be merged at any strength or trained further; arguments as `load_lora`'s.

    Args:
      params: their shapes suffice.

    Raises:
      UserError: as `load_lora`, and for modules that share a parameter of ours with others.
    """
    modules, pairs = _read(path, nets, params, only, configs)
    ours = {name: published.to_ours(pairs[name], modules[name]) for name in pairs}
    return Lora({name: tree for name, (tree, _) in ours.items()}, {name: scale for name, (_, scale) in ours.items()})


def save_lora(path: str, nets: Mapping[str, Any], params: Mapping[str, PyTree], lora: Lora, *,
              configs: Mapping[str, Mapping[str, Any]] = {}) -> None:
    """Write adapters as a file that diffusers' load_lora_weights opens; arguments as `load_lora`'s.

    Args:
      path: of the file, or of the directory that gets a pytorch_lora_weights.safetensors.

    Raises:
      UserError: for nets and kernels without a published counterpart.
    """
    modules = _modules({name: lookup(nets, name, "net") for name in lora.adapters}, params, configs)
    pairs = {}
    for name, tree in lora.adapters.items():
        scale = lora.scale[name] if isinstance(lora.scale, Mapping) else lora.scale
        rows = lookup(modules, name, "net with a place in such files")
        pairs[_called(name, nets[name])] = published.to_published(tree, scale, rows)
    write_pairs(path, pairs)


def _called(name: str, net: Any) -> Optional[str]:
    """What files call a net; None where they have no place for it."""
    kind = type(getattr(net, "module", None))
    return KINDS.get(kind) if name == "net" else name if name in TOWERS and kind in CONFIGS else None


def _modules(nets, params, configs, reading: bool = False) -> Dict[str, Mapping[str, published.Module]]:
    """name -> the published modules of each net that has a place in files; for reading, under all names that they have there."""
    found = {}
    for name, net in nets.items():
        if _called(name, net):
            (config_of, rules_of), tree = CONFIGS[type(net.module)], lookup(params, name, "net with parameters")
            arguments = arguments_of(net, tree)
            config = configs[name] if name in configs else config_of(arguments)
            found[name] = published.modules_of(rules_of(arguments, config), tree)
            if reading and isinstance(net.module, UNet):
                found[name] = {**_original(arguments, tree), **found[name]}
    return found


def _original(arguments: Mapping[str, Any], params: PyTree) -> Dict[str, published.Module]:
    """The modules of a U-Net of Stable Diffusion's kind by the names of its first publication, which XL's adapters go by."""
    middle, levels = arguments["middle"] or {}, [*arguments["down"], *arguments["up"]]
    if middle.get("blocks") != 2 or middle["attention"] != "cross" or any(
            level["attention"] == "self" or level["resample"] in ("block", "skip") for level in levels):
        return {}
    paths = flatten(params)
    return published.modules_of([rule for rule in original_unet.unet_rules(arguments) if set(rule.paths) <= set(paths)], params)


def _read(path, nets, params, only, configs) -> Tuple[Dict[str, Any], Dict[str, Dict[str, Pair]]]:
    """(name -> modules, name -> pairs)."""
    for name in only or ():
        if not _called(name, lookup(nets, name, "net")):
            raise UserError(f"{name!r} can have no LoRA adapters in files; 'net' and text towers can")
    names = {_called(name, net): name for name, net in nets.items() if _called(name, net)}
    modules = _modules({name: nets[name] for name in names.values()}, params, configs, reading=True)
    shapes = {called: {module: row.shape for module, row in modules[name].items()} for called, name in names.items()}
    pairs = read_pairs(path, shapes, None if only is None else [_called(name, nets[name]) for name in only])
    pairs = {names[called]: found for called, found in pairs.items()}
    for name, found in pairs.items():
        places = collections.Counter((modules[name][module].rule.ours, modules[name][module].number) for module in found)
        twice = [module for module in found if places[modules[name][module].rule.ours, modules[name][module].number] > 1]
        if twice:
            raise UserError(f"{path!r} has adapters for {twice[0]!r} under two names; keep one of them")
    return modules, pairs
