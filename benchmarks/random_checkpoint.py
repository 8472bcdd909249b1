"""Random checkpoints in the shape of real ones: speed does not depend on what weights say.

The tokenizer covers every byte and has as many tokens as the model, so that the gateway's work
on text is real, too.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Qwen2Config

QWEN_0_5B = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 32000,
}
"""Qwen2.5-0.5B, with a vocabulary of 32,000."""

QWEN_1_5B = {
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 32000,
}
"""Qwen2.5-1.5B, the same."""


def make_checkpoint(directory: Path, shape: dict[str, int], dtype: torch.dtype) -> Path:
    """Write a random Qwen2 checkpoint into `directory`, unless it is there; return it."""
    marker = directory / "model.safetensors"
    if marker.exists():
        return directory
    config = Qwen2Config(
        **shape,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=dtype)
    network.generation_config.do_sample = False
    network.save_pretrained(directory)
    make_tokenizer(shape["vocab_size"]).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"})
    )
    return directory


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Build a byte-level BPE tokenizer of exactly `vocab_size` tokens: bytes, then pairs, fours."""
    tokens = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = [chr(code) for code in range(33, 127)]
    merges: list[tuple[str, str]] = list(itertools.product(letters, letters))
    pairs = [a + b for a, b in merges]
    merges += itertools.islice(itertools.product(pairs, pairs), vocab_size)
    merges = merges[: vocab_size - len(tokens)]
    vocab = {token: i for i, token in enumerate([*tokens, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    assert tokenizer.get_vocab_size() == vocab_size
    return tokenizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="write a random checkpoint of Qwen2.5-0.5B's shape"
    )
    parser.add_argument("directory", type=Path)
    print(make_checkpoint(parser.parse_args().directory, QWEN_0_5B, torch.bfloat16))
