"""The demo model's shape, and how it is written to and read from a folder.

Owns the Qwen2 configuration and the files that transformers and Rillgate load. Knows nothing of
tasks or training.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from tools.train_demo.tokenizer import (
    BOS,
    EOS,
    MAX_CONTEXT_TOKENS,
    PAD,
    build_tokenizer,
    save_tokenizer,
)

HIDDEN_SIZE = 192
NUM_LAYERS = 6
INTERMEDIATE_SIZE = 512
HEAD_SIZE = 32
NUM_KV_HEADS = 2


def build_config() -> Qwen2Config:
    """Return the demo model's configuration: Qwen2, 2.5 million parameters."""
    tokenizer = build_tokenizer()
    return Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        intermediate_size=INTERMEDIATE_SIZE,
        num_attention_heads=HIDDEN_SIZE // HEAD_SIZE,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=MAX_CONTEXT_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )


def build_network(seed: int) -> Qwen2ForCausalLM:
    """Return a freshly initialised fp32 network; the seed fixes every weight."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(build_config())


def save_model(network: Qwen2ForCausalLM, folder: Path) -> None:
    """Write config, generation config, bf16 weights, tokenizer and template into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    exported = Qwen2ForCausalLM(build_config())
    exported.load_state_dict(network.state_dict())
    exported = exported.to(torch.bfloat16)
    config = exported.config
    exported.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=False,
    )
    exported.save_pretrained(folder)
    # Older readers look for the flat key; newer ones read rope_parameters.
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields.setdefault("rope_theta", 10000.0)
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tokenizer(folder)
    (folder / "model.safetensors").chmod(0o644)


def load_model(folder: Path, dtype: torch.dtype) -> Qwen2ForCausalLM:
    """Read the model in `folder` with its weights as `dtype`, ready to generate."""
    network = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype)
    return network.eval()
