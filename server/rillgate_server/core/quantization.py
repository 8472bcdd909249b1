"""How a model's weights are held: the method, and which layers it is for.

Read by gateway and replica alike, so that both name the same version. Does not know tensors (the
methods are worker.quantization's) nor which layers a model has.

A checkpoint that holds its weights in INT8 says so in config.json as compressed-tensors does
(https://github.com/vllm-project/compressed-tensors): format "int-quantized", weights per channel,
activations per token at run time. Whether a layer is, its weight's type says, not the list there.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rillgate_server.config.groups import ModelConfig
from rillgate_server.core.checkpoint import read_config
from rillgate_server.core.model_spec import NO_QUANTIZATION
from rillgate_server.errors import CheckpointError, ConfigError

INT8 = "int8"
BNB_INT8, BNB_NF4 = "bnb-int8", "bnb-nf4"
_USUAL_THRESHOLD = 6.0
EMBEDDINGS, HEAD = "embeddings", "head"
"""What `model.quantization_include` may name."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """A method and its layers: the decoder's linear ones, the experts' among them."""

    method: str = NO_QUANTIZATION
    """A value of `model.quantization`."""
    exclude: tuple[str, ...] = ()
    """Patterns (fnmatch, case counts) of names of layers that stay as they are."""
    include: tuple[str, ...] = ()
    """Of EMBEDDINGS and HEAD, which otherwise stay as they are."""
    bnb_int8_threshold: float = _USUAL_THRESHOLD
    """Activations beyond it are outliers of bnb-int8."""
    is_stored: bool = False
    """The checkpoint holds its weights so, and which layers it is for."""

    @classmethod
    def of(cls, config: ModelConfig) -> "Quantization":
        """Read the settings."""
        return cls(
            config.quantization,
            config.quantization_exclude,
            config.quantization_include,
            config.bnb_int8_threshold,
        )

    @property
    def version(self) -> str:
        """Name it behind a version's digest: `int8`, with other layers `int8-` and a digest."""
        settings: tuple[object, ...] = (sorted(set(self.exclude)), sorted(set(self.include)))
        has_threshold = self.method == BNB_INT8 and self.bnb_int8_threshold != _USUAL_THRESHOLD
        if has_threshold:
            settings = (*settings, self.bnb_int8_threshold)
        if self.method == NO_QUANTIZATION or not (self.exclude or self.include or has_threshold):
            return self.method
        digest = hashlib.sha256(repr(settings).encode()).hexdigest()
        return f"{self.method}-{digest[:16]}"

    def excludes(self, layer: str) -> bool:
        """Whether a pattern matches a layer's name."""
        return any(fnmatchcase(layer, pattern) for pattern in self.exclude)


AS_THEY_ARE = Quantization()


def resolve_quantization(asked: Quantization, model_dir: Path) -> Quantization:
    """Return how a checkpoint's weights are held where the settings say `asked`.

    A quantised checkpoint decides by itself. Raises ConfigError for settings that contradict it,
    CheckpointError for one that is quantised in a way that is not known here.
    """
    stored = _stored_quantization(model_dir, read_config(model_dir).get("quantization_config"))
    if stored is None:
        return asked
    if asked.method not in (NO_QUANTIZATION, stored.method):
        raise ConfigError(
            f"model.quantization is {asked.method}, but the weights of {model_dir} are stored in "
            f"{stored.method}; allowed: none (as they are stored) or {stored.method}"
        )
    for name, given in (("exclude", asked.exclude), ("include", asked.include)):
        if given:
            raise ConfigError(
                f"model.quantization_{name} is {list(given)}, but the weights of {model_dir} are "
                "stored quantised; allowed: none of it, or a plain checkpoint"
            )
    return stored


_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_ACTIVATIONS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}


def describe_int8(ignored: list[str], has_embeddings: bool) -> dict[str, Any]:
    """Return config.json's `quantization_config` for weights in INT8 (JSON, hence Any)."""
    groups: dict[str, Any] = {
        "group_0": {
            "targets": ["Linear"],
            "weights": _WEIGHTS | {"dynamic": False},
            "input_activations": _ACTIVATIONS,
            "output_activations": None,
        }
    }
    if has_embeddings:
        of_embedding = {"targets": ["Embedding"], "input_activations": None}
        groups["group_1"] = groups["group_0"] | of_embedding
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def _stored_quantization(model_dir: Path, found: Any) -> Quantization | None:  # Any: JSON
    """Read config.json's `quantization_config`; None: the weights are plain."""
    if not found:
        return None

    def refuse(what: str, value: object, allowed: str) -> CheckpointError:
        return CheckpointError(
            f"{model_dir} is quantised with {what} {value!r}; allowed: {allowed}, or plain weights"
        )

    method = found.get("quant_method") if isinstance(found, dict) else found
    if method == "bitsandbytes":
        return _stored_by_bitsandbytes(found, refuse)
    if method != "compressed-tensors":
        raise refuse("quant_method", method, "compressed-tensors in 8-bit integers, bitsandbytes")
    if found.get("format") not in ("int-quantized", "naive-quantized"):
        raise refuse("format", found.get("format"), "int-quantized")
    if found.get("kv_cache_scheme"):
        raise refuse("kv_cache_scheme", found["kv_cache_scheme"], "none")
    for name, group in (found.get("config_groups") or {}).items():
        wanted = [("weights", _WEIGHTS), ("input_activations", _ACTIVATIONS)]
        for part, needed in wanted:
            scheme = group.get(part)
            if scheme is None and part != "weights" and group.get("targets") == ["Embedding"]:
                continue
            for key, value in needed.items():
                its = (scheme or {}).get(key)
                if its != value:
                    raise refuse(f"config_groups.{name}.{part}.{key}", its, repr(value))
    return Quantization(INT8, is_stored=True)


def _stored_by_bitsandbytes(
    found: dict[str, Any],  # JSON
    refuse: Callable[[str, object, str], CheckpointError],
) -> Quantization:
    """Read what transformers' BitsAndBytesConfig has written."""
    if found.get("load_in_8bit"):
        threshold = float(found.get("llm_int8_threshold", _USUAL_THRESHOLD))
        return Quantization(BNB_INT8, bnb_int8_threshold=threshold, is_stored=True)
    for key, needed in (
        ("load_in_4bit", True),
        ("bnb_4bit_quant_type", "nf4"),
        ("bnb_4bit_quant_storage", "uint8"),
    ):
        if found.get(key, "uint8" if key.endswith("storage") else None) != needed:
            raise refuse(f"bitsandbytes' {key}", found.get(key), repr(needed))
    return Quantization(BNB_NF4, is_stored=True)
