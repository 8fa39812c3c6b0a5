"""`load_original(path, config)`: models published as one file in a layout of their own, wired into Pipelines.

A row of `weights.originals.ORIGINALS` names the config; what it says of the names and shapes in the file must be so.
"""
import dataclasses
from typing import Any, Mapping, Optional, Tuple, Union

from ldm_jax import paths
from ldm_jax.pipelines.original_file import File
from ldm_jax.pipelines.original_latent import ldm
from ldm_jax.pipelines.original_pixels import adm, adm_classifier, dit
from ldm_jax.sampling import Pipeline
from ldm_jax.types import UserError
from ldm_jax.weights import files, originals

SETTINGS = ("name", "steps", "guidance", "grid", "batch_size")
FAMILIES = {"adm": adm, "adm_classifier": adm_classifier, "dit": dit, "ldm": ldm}


def load_original(path: str, config: Union[str, Mapping[str, Any]], *, vae: Optional[str] = None, tokenizer: Optional[str] = None,
                  dtype: str = "float32", param_dtype: str = "float32", ema: Optional[bool] = None,
                  size: Optional[Tuple[int, int]] = None, **overrides: Any) -> Pipeline:
    """The Pipeline of a file in the layout in which its authors published it. Its arrays are read one at a time.

    A classifier of noisy images is a Pipeline too, to be given as classifier=... where a diffusion model samples. DiT is guided in
    all channels of its latents; the program of its paper, unless asked, leaves the last one alone.

    Args:
      path: .pt, .ckpt, .pth, .bin or .safetensors.
      config: a name in `weights.originals.ORIGINALS`; {"layout": name, ...} with what differs from it, by the names of the model's own
        program: the flags of guided-diffusion, the yaml's model.params of Rombach et al., the arguments of DiT's class; or the path
        of a whole yaml.
      vae: a first stage's directory, in diffusers' layout; in place of the one in the file, where there is one.
      tokenizer: the directory of the model's tokeniser (CLIP's; of LDM's text-to-image BERT's), where it is told a text.
      dtype, param_dtype: of the computation and the parameters, see `published.load_net`.
      ema: take the averaged weights. By default: where the yaml's use_ema is true and the file has them; DiT's always.
      size: (height, width) of the pictures, for U-Nets.
      overrides: in place of the sampler's settings: name, steps, guidance, grid, batch_size.

    Raises:
      UserError: for an unknown config, options that are not supported, a file that cannot be read, and names and shapes in it that are
        missing, left over or differ.
    """
    if extra := sorted(set(overrides) - set(SETTINGS)):
        known = ("vae", "tokenizer", "dtype", "param_dtype", "ema", "size", *SETTINGS)
        raise UserError(f"unknown override {extra[0]!r}; choose from: {', '.join(sorted(known))}")
    family, said = originals.original_config(config)
    path = paths.expand(path)
    file = File(path, files.open_arrays(path), dtype, param_dtype, ema, vae, tokenizer, size and tuple(size))
    pipeline = FAMILIES[family](file, {"_class_name": family, **said})
    return dataclasses.replace(pipeline, defaults={**pipeline.defaults, **overrides})
