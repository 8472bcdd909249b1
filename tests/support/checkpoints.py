"""Random checkpoints of the five architectures, made by transformers' own code.

Small, untied and with large weights: a random tied model at the default initialisation repeats
its last token whatever the context, and would let any fault of the cache pass.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SIZE = 211

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}

KINDS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 13,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "mistral": {"model_type": "mistral", "sliding_window": 10, "head_dim": 16},
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "routed_scaling_factor": 1.5,
    },
}
"""name -> what its config changes. Windows are shorter than the tests' contexts; DeepSeek-V3 has a
dense layer, routed experts, and values that are narrower than its keys."""


def make_checkpoint(
    path: Path,
    kind: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **changes: Any,
) -> Path:
    """Write a random checkpoint of one of KINDS to `path`; `changes` go into its config."""
    settings = _COMMON | KINDS[kind] | changes
    config = AutoConfig.for_model(**settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        _randomise_vectors(model)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path


def edit_config(path: Path, **changes: Any) -> None:
    """Change a written checkpoint's config.json; None removes a key."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    file.write_text(json.dumps(config))


def stack_experts(path: Path) -> None:
    """Rewrite a written checkpoint of DeepSeek-V3 with its experts stacked."""
    tensors = load_file(path / "model.safetensors")
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {
            kind: torch.stack([tensors.pop(f"{prefix}.{e}.{kind}_proj.weight") for e in range(8)])
            for kind in ("gate", "up", "down")
        }
        tensors[f"{prefix}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        tensors[f"{prefix}.down_proj"] = parts["down"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _randomise_vectors(model: nn.Module) -> None:
    """Give biases and norms values that matter; fresh models have zeros and ones."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.ndim == 1 and "inv_freq" not in name:
            tensor.add_(0.2 * torch.randn(tensor.shape))
