"""How a checkpoint likes to be sampled, for what a request leaves unset.

Owns the reading of generation_config.json's sampling values. Does not know their limits
(core.sampling_params has them), nor the stop ids in the same file (core.checkpoint reads those).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.errors import CheckpointError, InvalidRequest

GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """A checkpoint's own values, or the protocol's where it has none."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, config: Mapping[str, object], vocab_size: int) -> "GenerationDefaults":
        """Read the file's object; `do_sample` false means temperature 0.

        Raises CheckpointError for a value that no request could ask for.
        """
        is_greedy = config.get("do_sample") is False
        top_k = _number(config, "top_k", 0)
        if not float(top_k).is_integer():
            raise CheckpointError(f"{GENERATION_FILE}: top_k is {top_k}; allowed: whole numbers")
        sampling = SamplingParams(
            seed=0,
            temperature=0.0 if is_greedy else _number(config, "temperature", 1.0),
            top_p=_number(config, "top_p", 1.0),
            top_k=min(int(top_k), vocab_size),  # more than all is all
            min_p=_number(config, "min_p", 0.0),
            repetition_penalty=_number(config, "repetition_penalty", 1.0),
        )
        try:
            sampling.validate(vocab_size)
        except InvalidRequest as error:
            raise CheckpointError(f"{GENERATION_FILE}: {error}") from error
        return cls(
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.min_p,
            sampling.repetition_penalty,
        )


def _number(config: Mapping[str, object], name: str, default: float) -> float:
    """Return a number of the config, or the default where it is missing or null."""
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{GENERATION_FILE}: {name} is {value!r}; allowed: a number")
    return value
