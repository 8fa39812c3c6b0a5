"""Published components: `load_net` builds the net that a config.json describes and reads its weights; `save_net` writes both."""
import dataclasses
import json
import os
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import jax
import ml_dtypes
import numpy as np

from ldm_jax import paths
from ldm_jax.models.autoencoder import FirstStage, kl, vq
from ldm_jax.models.bert import bert_text
from ldm_jax.models.clip import ClipText, clip_text
from ldm_jax.models.dit import MLPS, DiT, dit
from ldm_jax.models.layers import num_groups
from ldm_jax.models.unet import UNet, unet_of_levels
from ldm_jax.types import PyTree, UserError, lookup
from ldm_jax.weights import configs, layouts, maps_autoencoder, maps_clip, maps_dit, maps_unet, rules
from ldm_jax.weights.stored import write_safetensors

BUILDERS = {"unet_of_levels": unet_of_levels, "dit": dit, "kl": kl, "vq": vq, "clip_text": clip_text,
            "bert_text": bert_text}
PARAM_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def load_net(directory: str, *, dtype: str = "float32", param_dtype: str = "float32", variant: Optional[str] = None,
             place: Optional[Callable[[str, Tuple[int, ...], Any], Any]] = None, **options: Any) -> Tuple[Any, PyTree]:
    """One component of a published checkpoint, such as CHECKPOINT/unet, as (net, params).

    A U-Net or transformer is a `Net`, whose time t is that of 1000 steps, t = (k + 1) / 1000 for the published step k; one with
    Fourier features takes its noise level as t. A first stage is an `Autoencoder`, which carries the scale of its latents; a text
    encoder is a `TextTower`.

    Args:
      dtype: of the computation, "float32" or "bfloat16".
      param_dtype: of the parameters: "float32", "bfloat16" or "float16".
      variant: of the files, such as "fp16"; by default the file without one or, where there is none, the only one that there is.
      place: (path, shape, dtype) -> a Sharding; each array then goes straight to its devices, piece by piece.
      options: arguments of the net's builder that the config does not state, such as image_shape, timesteps, attention_impl.

    Raises:
      UserError: for what cannot be read, options of the config that are not supported, and weights that do not fit it.
    """
    config = layouts.read_config(directory)
    kind = config.get("_class_name", layouts.MODEL_TYPES.get(config.get("model_type")))
    layout = lookup(layouts.LAYOUTS, kind, "class of published net")
    builder = BUILDERS[layout.builder]
    arrays = layout.names(layouts.open_weights(directory, variant))
    arguments = {**layout.arguments(config, arrays), **options}
    try:
        net = builder(**arguments, dtype=dtype)
    except TypeError as e:
        raise UserError(f"{e}; choose from the arguments of {builder.__module__}.{builder.__name__}") from e
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    params = rules.load(layout.rules(arguments, config), arrays, shapes, dtype=lookup(PARAM_DTYPES, param_dtype, "param_dtype"),
                        place=place, what=f"the weights in {directory!r}")
    return net, params


CLASSES = "_classes"  # our entry of model_index.json, which diffusers leaves alone: how many classes are real, the next being null


@dataclasses.dataclass(frozen=True)
class Published:
    """What a published directory holds beside its weights, as `exporting.save_pretrained` writes it.

    Attributes:
      kind: the pipeline's class.
      components: the system's net by name -> the component that it is.
      copied: component -> (directory whose small files it consists of, its entry in model_index.json), such as a tokeniser.
      configs: component -> the config of a scheduler.
      entries: the other entries of model_index.json.
    """
    kind: str
    components: Mapping[str, str]
    copied: Mapping[str, Tuple[str, Any]] = dataclasses.field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    entries: Mapping[str, Any] = dataclasses.field(default_factory=dict)


CONFIGS = {UNet: (configs.unet_config, maps_unet.unet_rules), DiT: (configs.dit_config, maps_dit.dit_rules),
           FirstStage: (configs.autoencoder_config, maps_autoencoder.autoencoder_rules),
           ClipText: (maps_clip.clip_text_config, maps_clip.clip_text_rules)}


def save_net(directory: str, net: Any, params: PyTree) -> None:
    """Write a net as a component that diffusers (for a text tower, transformers) opens: config.json and a safetensors file.

    A U-Net becomes a UNet2DModel or, where it takes a context or the like, a UNet2DConditionModel; a transformer a
    DiTTransformer2DModel; a first stage an AutoencoderKL or a VQModel. The null class of a U-Net is its last class there.

    Raises:
      UserError: for a net that has no counterpart, with what it has and they cannot say, and for parameters of another net.
    """
    config_of, rules_of = lookup({kind.__name__: row for kind, row in CONFIGS.items()}, type(net.module).__name__,
                                 "kind of net to export")
    arguments = arguments_of(net, params)
    config = config_of(arguments)
    arrays = rules.save(rules_of(arguments, config), params)
    directory = paths.expand(directory)
    paths.makedirs(directory)
    stem = "model" if isinstance(net.module, ClipText) else "diffusion_pytorch_model"
    write_safetensors(os.path.join(directory, f"{stem}.safetensors"), arrays)
    paths.write_text(os.path.join(directory, "config.json"), json.dumps(config, indent=2, sort_keys=True))


def arguments_of(net: Any, params: PyTree) -> Dict[str, Any]:
    """The arguments with which `unet_of_levels`, `dit` or `first_stage` builds a net like this one."""
    m, fields = net.module, {}
    if isinstance(m, ClipText):
        return net.arguments
    if isinstance(m, UNet):
        fields = dict(
            width=m.width, down=[dataclasses.asdict(level) for level in m.down], up=[dataclasses.asdict(level) for level in m.up],
            middle=m.middle and dataclasses.asdict(m.middle), time=dataclasses.asdict(m.time),
            inputs=dataclasses.asdict(m.inputs), scale_shift=m.scale_shift, act=m.act, end_act=m.end_act, kernels=m.kernels,
            norm_eps=m.eps, upcast=m.upcast, dropout=m.dropout, norm_groups=_groups(m.groups, params))
    elif isinstance(m, DiT):
        block = dict(m.block)
        same = ("num_heads", "norm", "mlp", "rotary", "qk_norm", "qkv_bias", "norm_2", "upcast", "dropout", "registers")
        gain = 2 / 3 if MLPS[block["mlp"]][0] else 1
        fields = dict({key: block[key] for key in same}, patch=m.patch, width=m.width, depth=m.depth, time_shift=m.time_shift,
                      mlp_ratio=round(block["mlp_width"] / m.width / gain, 6), positions=_positions(m, net.image_shape),
                      embedders="shared" if m.shared else "each", scan_layers=m.scan_layers)
    else:
        coder = dict(m.coder)
        heights = [net.image_shape[0] >> i for i in range(len(coder["channels"]))]
        attends = [tuple(h for h, attend in zip(heights, way) if attend) for way in m.attend]
        return dict(image_shape=net.image_shape, factor=net.factor, channels=coder["channels"], act=coder["act"],
                    num_res_blocks=coder["num_res_blocks"], attention=attends[0], up_attention=attends[1],
                    mid_attention=m.attend[0][-1], out_channels=m.image_channels, latent_channels=m.latent_channels,
                    inner_channels=m.inner_channels, codes=m.codes, quant=m.quant, scale=net.scale, shift=net.shift,
                    norm_groups=_groups(coder["groups"], params))
    return dict(fields, image_shape=net.image_shape, out_channels=net.out_channels, class_kind=net.class_kind,
                num_classes=net.num_classes, context_dim=net.context_dim, vector_dim=net.vector_dim,
                concat_channels=net.concat_channels, time_scale=net.time_scale, timesteps=net.timesteps)


def _groups(groups: Optional[int], params: PyTree) -> int:
    """The one number of groups that all group norms have.

    Raises:
      UserError: where they have several, as norm_groups=None gives narrow nets.
    """
    if groups:
        return groups
    widths = {a.shape[0] for path, a in rules.flatten(params).items()
              if path.endswith("/scale") and not ("attention" in path and "/block_" in path)}
    found = sorted({num_groups(width) for width in widths})
    if len(found) > 1:
        raise UserError(f"the layers of this net are normalised in {found} groups, and published nets have one number for all; "
                        f"train with norm_groups={found[0]} to export it")
    return found[0]


def _positions(module: Any, image_shape: Tuple[int, ...]) -> Tuple[int, float]:
    """(base, scale) of positions, which are those of the image's own size where nothing is said."""
    base, scale = module.positions
    return (base or image_shape[0] // module.patch, scale if base else 1.0)
