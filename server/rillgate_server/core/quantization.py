"""How a model's weights are held: the method, and which layers it is for.

Read by gateway and replica alike, so that both name the same version. Does not know tensors (the
methods are worker.quantization's) nor which layers a model has.
"""

import hashlib
from dataclasses import dataclass
from fnmatch import fnmatchcase

from rillgate_server.config.groups import ModelConfig
from rillgate_server.core.model_spec import NO_QUANTIZATION

EMBEDDINGS, HEAD = "embeddings", "head"
"""What `model.quantization_include` may name."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """A method and its layers: the decoder's linear ones, the experts' among them."""

    method: str = NO_QUANTIZATION
    """`none` or `int8`."""
    exclude: tuple[str, ...] = ()
    """Patterns (fnmatch, case counts) of names of layers that stay as they are."""
    include: tuple[str, ...] = ()
    """Of EMBEDDINGS and HEAD, which otherwise stay as they are."""

    @classmethod
    def of(cls, config: ModelConfig) -> "Quantization":
        """Read the settings."""
        return cls(config.quantization, config.quantization_exclude, config.quantization_include)

    @property
    def version(self) -> str:
        """Name it behind a version's digest: `int8`, with other layers `int8-` and a digest."""
        if self.method == NO_QUANTIZATION or not (self.exclude or self.include):
            return self.method
        lists = (sorted(set(self.exclude)), sorted(set(self.include)))
        digest = hashlib.sha256(repr(lists).encode()).hexdigest()
        return f"{self.method}-{digest[:16]}"

    def excludes(self, layer: str) -> bool:
        """Whether a pattern matches a layer's name."""
        return any(fnmatchcase(layer, pattern) for pattern in self.exclude)


AS_THEY_ARE = Quantization()
