"""The directory of a published checkpoint: its index, its components, its scheduler."""
import dataclasses
import os
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

from ldm_jax.data.text import load_tokenizer
from ldm_jax.published import load_net
from ldm_jax.types import PyTree
from ldm_jax.weights.schedulers import Sampling, read_scheduler


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint's directory, its index, how its components are read, and the size (H, W) of the pictures, None for its own."""
    directory: str
    index: Mapping[str, Any]
    options: Mapping[str, Any]
    size: Optional[Tuple[int, int]] = None

    def has(self, name: str) -> bool:
        """Whether the index names a component; it may name one as left out, too."""
        return bool(self.index.get(name)) and None not in self.index[name]

    def place(self, name: str) -> str:
        """The directory of a component: its own, or the checkpoint's where there is none."""
        own = os.path.join(self.directory, name)
        return own if os.path.isdir(own) else self.directory

    def net(self, name: str, **options: Any) -> Tuple[Any, PyTree]:
        return load_net(self.place(name), **self.options, **options)

    def text(self, *names: str) -> Tuple[Dict[str, Any], Dict[str, PyTree], Dict[str, Callable]]:
        """(towers, parameters, tokenisers) by the towers' names, for "text_encoder" and the like."""
        read = {"dtype": self.options["dtype"], "variant": self.options["variant"]}
        found = {name: load_net(self.place(name), **read) for name in names}
        tokenizers = {name: load_tokenizer(self.place(name.replace("text_encoder", "tokenizer"))) for name in names}
        return {name: net for name, (net, _) in found.items()}, {name: params for name, (_, params) in found.items()}, tokenizers

    def sampling(self) -> Sampling:
        """What its scheduler says."""
        return read_scheduler(self.place("scheduler"))
