"""Greedy generation for many prompts at once, for evaluation.

Owns the loop and its left padding. Knows nothing of tasks. It is deliberately plain: transformers'
network and cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, Qwen2ForCausalLM

from tools.train_demo.examples import MARK_IDS
from tools.train_demo.tokenizer import EOS, PAD


def _left_pad(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), MARK_IDS[PAD])
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


@torch.inference_mode()
def generate_greedily(
    network: Qwen2ForCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Continue each prompt up to its end mark (not returned) or by `max_new_tokens`.

    Each token is the argmax of the logits, the lowest id on ties.
    """
    ids, mask = _left_pad(prompts)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=network.config)
    outputs: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # row of the batch -> prompt; finished rows leave the batch
    for _ in range(max_new_tokens):
        logits = network(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits
        chosen = logits[:, -1].argmax(-1)
        alive = chosen != MARK_IDS[EOS]
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if token != MARK_IDS[EOS]:
                outputs[row].append(token)
        if not alive.all():
            kept = alive.nonzero()[:, 0]
            if not len(kept):
                break
            rows = [rows[i] for i in kept.tolist()]
            cache.batch_select_indices(kept)
            chosen, mask, positions = chosen[kept], mask[kept], positions[kept]
        ids = chosen[:, None]
        mask = torch.cat([mask, torch.ones((len(rows), 1), dtype=torch.long)], dim=1)
        positions = positions[:, -1:] + 1
    return outputs
