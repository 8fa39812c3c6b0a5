"""The networks that are measured, each as a whole system: CASES. A new one is a row here, and one in `peer.PEERS` to be compared."""
import dataclasses
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import process
from ldm_jax.models.dit import dit
from ldm_jax.models.unet import UNETS, unet
from ldm_jax.systems import System, diffusion
from ldm_jax.systems.conditioners import class_label, sequence
from ldm_jax.systems.conditions import Space, needs

TOKENS, CLASSES = 77, 1000


@dataclasses.dataclass(frozen=True)
class Case:
    """A network that is measured.

    Attributes:
      net: (conditions that it needs, further options) -> Net.
      shape: of x0, which is trained on as uint8 pictures of as many channels.
      condition: None, "class" or "text".
      batch: (of training, of sampling) on CPU; accelerator: the same on an accelerator.
      train_on_cpu: whether two cores and 16 GB can be asked to train it.
      options: of the network where it is trained.
    """
    net: Callable[..., Any]
    shape: Tuple[int, int, int]
    condition: Optional[str]
    batch: Tuple[int, int]
    accelerator: Tuple[int, int]
    train_on_cpu: bool = True
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _dit(size: str):
    return lambda **options: dit((32, 32, 4), out_channels=4, size=size, patch=2, timesteps=1000, **options)


def _unet(name: str):
    return lambda **options: unet(**{**UNETS[name], **options})


def _digits(**options: Any):
    """That of configs/digits.py: on an accelerator its update takes hardly longer than starting it."""
    return unet((8, 8, 1), width=32, mults=(1, 2), num_res_blocks=1, attention=(4,), num_heads=4, dropout=0.1, norm_groups=8, **options)


_SCANNED = dict(scan_layers=True, remat="dots")
CASES = {
    "dit_s2": Case(_dit("S"), (32, 32, 4), "class", (8, 8), (512, 256)),
    "dit_b2": Case(_dit("B"), (32, 32, 4), "class", (4, 4), (256, 128)),
    "dit_xl2": Case(_dit("XL"), (32, 32, 4), "class", (1, 1), (128, 64), train_on_cpu=False, options=_SCANNED),
    "ddpm_cifar": Case(_unet("ddpm_cifar"), (32, 32, 3), None, (8, 8), (512, 512)),
    "digits": Case(_digits, (8, 8, 1), "class", (64, 64), (64, 256)),
    "sd_1": Case(_unet("sd_1"), (64, 64, 4), "text", (1, 1), (32, 8), train_on_cpu=False, options=dict(remat="dots")),
}
ON_CPU = ("dit_s2", "ddpm_cifar")  # what is measured there unless more is asked for


def system_of(case: Case, dtype: str, **options: Any) -> System:
    """The system: eps-prediction by the linear schedule."""
    space = Space(case.shape, case.shape, CLASSES, {"context": (TOKENS, 768)})
    made = {None: {}, "class": {"class": class_label}, "text": {"context": sequence}}[case.condition]
    conditioners = {name: make(space, **({"field": "context"} if name == "context" else {})) for name, make in made.items()}
    net = case.net(dtype=dtype, **needs(conditioners), **options)
    return diffusion(net, image_shape=case.shape, schedule=process.SCHEDULES["linear"](), parameterization="eps",
                     conditioners=conditioners)


def condition_of(case: Case, num: int) -> Any:
    """What `num` pictures are asked for with, as `Pipeline.sample` takes it."""
    rng = np.random.default_rng(0)
    if case.condition == "class":
        return rng.integers(0, CLASSES, num).astype(np.int32)
    return None if case.condition is None else {"context": rng.standard_normal((num, TOKENS, 768)).astype(np.float32)}


def batch_of(case: Case, num: int) -> Dict[str, jax.Array]:
    """A batch to train on."""
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (num, *case.shape), dtype=np.uint8)}
    cond = condition_of(case, num)
    batch.update({} if cond is None else cond if isinstance(cond, dict) else {"class": cond})
    return jax.tree.map(jnp.asarray, batch)
