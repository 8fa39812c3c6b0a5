"""The directory of a published checkpoint: its index, its components, its scheduler."""
import dataclasses
import os
from typing import Any, Callable, Dict, Iterable, Mapping, Optional, Tuple

from ldm_jax import paths
from ldm_jax.data.text import load_tokenizer
from ldm_jax.published import CLASSES, Published, load_net
from ldm_jax.types import PyTree, UserError
from ldm_jax.weights.schedulers import Sampling, read_scheduler

WORDS = {"bert": "tokenizer"}  # a text tower's tokeniser, where the two are not named alike
PLACES = {"net": ("unet", "transformer"), "autoencoder": ("vae", "vqvae")}  # the components that a net of ours may be


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint's directory, its index, how its components are read, and the size (H, W) of the pictures, None for its own.

    training: what it is trained with on from here, see `weights.schedulers.Sampling`.
    """
    directory: str
    index: Mapping[str, Any]
    options: Mapping[str, Any]
    size: Optional[Tuple[int, int]] = None
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether the index names a component; it may name one as left out, too."""
        return bool(self.index.get(name)) and None not in self.index[name]

    def place(self, name: str) -> str:
        """The directory of a component: its own, or the checkpoint's where there is none."""
        own = os.path.join(self.directory, name)
        return own if paths.isdir(own) else self.directory

    def net(self, name: str, **options: Any) -> Tuple[Any, PyTree]:
        return load_net(self.place(name), **self.options, **options)

    def text(self, *names: str) -> Tuple[Dict[str, Any], Dict[str, PyTree], Dict[str, Callable]]:
        """(towers, parameters, tokenisers) by the towers' names, for "text_encoder" and the like."""
        found = {name: self.net(name) for name in names}
        words = {name: WORDS.get(name) or name.replace("text_encoder", "tokenizer") for name in names}
        tokenizers = {name: load_tokenizer(self.place(part), (self.index.get(part) or (None, None))[1]) for name, part in words.items()}
        for name, (tower, _) in found.items():
            largest = max(tokenizers[name].vocab.values())
            if largest >= tower.vocab_size:
                raise UserError(f"the tokeniser beside {name!r} has ids up to {largest} and that takes those below "
                                f"{tower.vocab_size}; give the files of one model")
        return {name: net for name, (net, _) in found.items()}, {name: params for name, (_, params) in found.items()}, tokenizers

    def sampling(self) -> Sampling:
        """What its scheduler says."""
        return dataclasses.replace(read_scheduler(self.place("scheduler")), training=self.training)

    def published(self, kind: str, nets: Iterable[str]) -> Published:
        """What the directory holds beside the weights of `nets`; what judges or marks finished pictures is left out."""
        components = {name: next(part for part in PLACES.get(name, (name,)) if self.has(part)) for name in nets if name != "latent"}
        parts = [name for name in self.index if isinstance(self.index[name], (list, tuple)) and len(self.index[name]) == 2]
        copied = {name: (self.place(name), self.index[name]) for name in parts
                  if self.has(name) and name.split("_")[0] == "tokenizer" or name.endswith("scheduler")}
        left_out = {name: (None, None) for name in parts if name not in (*components.values(), *copied)}
        entries = {name: value for name, value in self.index.items() if name not in parts and (name == CLASSES or name[0] != "_")}
        return Published(kind, components, copied, entries={**entries, **left_out})
