"""How large the questions are: shapes of models, batches, prompts, users.

Owns two sizes: FULL, which is asked of a GPU, and TINY, which runs through the same code on a CPU
in seconds. Standard library alone: whoever only plans parts reads it, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen2 network's sizes."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    is_tied: bool
    """Whether the output head is the embedding."""

    @property
    def head_dim(self) -> int:
        """Of queries, keys and values."""
        return self.hidden_size // self.num_heads

    @property
    def kv_size(self) -> int:
        """Elements of a token's keys in a layer; as many are values."""
        return self.head_dim * self.num_kv_heads

    def config(self, max_context_tokens: int) -> dict[str, Any]:
        """Return what transformers calls it; Any: its parameters."""
        return {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.is_tied,
            "max_position_embeddings": max_context_tokens,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }


@dataclass(frozen=True, slots=True)
class Scale:
    """One size of all questions."""

    name: str
    large: Shape
    small: Shape
    batches: tuple[int, int, int]
    """Rows of the decode steps; the last two are also how many requests run at once."""
    decode_tokens: tuple[int, int, int]
    """Steps that are measured at each of them: enough seconds for the device's energy counter."""
    context_tokens: int
    prefill_prompts: int
    prefill_tokens: int
    request_prompt_tokens: int
    request_output_tokens: int
    users: int
    user_prompt_tokens: int
    user_output_tokens: int
    think_s: float
    """A user's pause between an answer and the next request, on average."""
    ramp_s: float
    """Until the users' steady state: they start one after another in its first half."""
    steady_s: float
    clients: int
    """Processes that send: one could not take the tokens of 256 streams as fast as they come."""
    max_step_tokens: int
    max_prefill_chunk_tokens: int
    max_context_tokens: int
    read_bytes: int
    """Of the array that read bandwidth is measured with: far larger than any cache."""
    matrix: int
    """Rows and columns of the products that the rate is measured with."""

    def settings(self, quantization: str = "none") -> dict[str, dict[str, str]]:
        """Return the settings that are served and measured: group -> field -> text.

        There is no host tier: to pin one takes a good part of the time that the check has.
        """
        return {
            "batcher": {
                "max_running": str(max(self.batches[-1], self.users)),
                "max_step_tokens": str(self.max_step_tokens),
                "max_prefill_chunk_tokens": str(self.max_prefill_chunk_tokens),
            },
            "cache": {"host_memory": "0"},
            "model": {
                "quantization": quantization,
                "max_context_tokens": str(self.max_context_tokens),
            },
        }


def as_flags(settings: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return settings as the flags of `rillgate serve`."""
    flags = []
    for group, fields in settings.items():
        for field, value in fields.items():
            flags += ["--set", f"{group}.{field}={value}"]
    return flags


QWEN_7B = Shape("7b", 3584, 28, 28, 4, 18944, 152_064, is_tied=False)
"""Qwen2.5-7B's."""
QWEN_05B = Shape("0.5b", 896, 24, 14, 2, 4864, 151_936, is_tied=True)
"""Qwen2.5-0.5B's."""

FULL = Scale(
    name="full",
    large=QWEN_7B,
    small=QWEN_05B,
    batches=(1, 64, 256),
    decode_tokens=(256, 128, 96),
    context_tokens=1024,
    prefill_prompts=8,
    prefill_tokens=4096,
    request_prompt_tokens=512,
    request_output_tokens=256,
    users=200,
    user_prompt_tokens=256,
    user_output_tokens=128,
    think_s=1.0,
    ramp_s=8.0,
    steady_s=15.0,
    clients=4,
    max_step_tokens=8192,
    max_prefill_chunk_tokens=4096,
    max_context_tokens=8192,
    read_bytes=4 << 30,
    matrix=8192,
)

TINY = Scale(
    name="tiny",
    large=Shape("tiny", 64, 2, 4, 2, 128, 512, is_tied=False),
    small=Shape("tiny-tied", 64, 2, 4, 2, 128, 512, is_tied=True),
    batches=(1, 2, 4),
    decode_tokens=(6, 5, 4),
    context_tokens=24,
    prefill_prompts=2,
    prefill_tokens=40,
    request_prompt_tokens=12,
    request_output_tokens=6,
    users=3,
    user_prompt_tokens=8,
    user_output_tokens=20,
    think_s=0.02,
    ramp_s=0.0,
    steady_s=1.0,
    clients=2,
    max_step_tokens=64,
    max_prefill_chunk_tokens=32,
    max_context_tokens=128,
    read_bytes=1 << 20,
    matrix=64,
)

SCALES = {scale.name: scale for scale in (FULL, TINY)}
