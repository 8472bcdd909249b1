"""The bytes and operations that shares of the machine's limits are taken of."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.shapes import SHAPES


def _parameters(shape: str) -> dict[str, torch.nn.Parameter]:
    config = Qwen2Config(**SHAPES[shape].sizes, tie_word_embeddings=False)
    with torch.device("meta"):
        return dict(Qwen2ForCausalLM(config).named_parameters())


def test_read_bytes_are_those_of_the_networks_matrices_and_scales() -> None:
    """Counted again from transformers' parameters: layers, scales, head, and no embedding."""
    for name, shape in SHAPES.items():
        matrices = {key: it for key, it in _parameters(name).items() if it.dim() == 2}
        layers = [it for key, it in matrices.items() if ".layers." in key]
        head = matrices["lm_head.weight"].numel() * 2
        elements = sum(it.numel() for it in layers)
        channels = sum(len(it) for it in layers)
        assert shape.read_bytes("bf16", 0) == elements * 2 + head
        assert shape.read_bytes("int8", 0) == elements + channels * 4 + head
        assert shape.stored_bytes("bf16") == sum(it.numel() * 2 for it in matrices.values())
        assert shape.prefill_ops_per_token() == 2 * elements


def test_cache_bytes_are_keys_and_values_of_all_layers_in_bf16() -> None:
    """Two key/value heads of 64 in 24 layers: 12,288 bytes a token."""
    shape = SHAPES["05b"]
    assert shape.read_bytes("bf16", 10) - shape.read_bytes("bf16", 0) == 10 * 24 * 2 * 2 * 64 * 2
