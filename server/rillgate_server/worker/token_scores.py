"""Log-probabilities of given tokens: computed where the logits are, read when they have arrived."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rillgate_server.core.step import TokenLogprobs


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Of one token per position, and of the likeliest ones there."""

    token_ids: Sequence[int]
    logprobs: Tensor
    """[num_positions], float32."""
    top_ids: Tensor
    """[num_positions, num_top], int64, best first."""
    top_logprobs: Tensor
    """The same, float32."""

    @classmethod
    def of(cls, logits: Tensor, token_ids: Sequence[int], num_top: int) -> "TokenScores":
        """Compute them. logits: [num_positions, vocab_size], raw; token_ids: one per position."""
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        ids = on_device(token_ids, logits.device)
        chosen = logprobs.gather(1, ids[:, None])[:, 0]
        top = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
        return cls(token_ids, chosen, top.indices, top.values)

    def to_host(self) -> "TokenScores":
        """Begin to copy them to the host; they may be read when the device is past that."""
        return TokenScores(
            self.token_ids,
            copy_to_host(self.logprobs),
            copy_to_host(self.top_ids),
            copy_to_host(self.top_logprobs),
        )

    def read(self) -> list[TokenLogprobs]:
        """Return them, of tensors on the host."""
        return [
            TokenLogprobs(token_id, logprob, tuple(zip(top_ids, top_logprobs, strict=True)))
            for token_id, logprob, top_ids, top_logprobs in zip(
                self.token_ids,
                self.logprobs.tolist(),
                self.top_ids.tolist(),
                self.top_logprobs.tolist(),
                strict=True,
            )
        ]


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Copy integers to a device, without waiting for what it is at. [len(values)], int64."""
    staged = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return staged.to(device, non_blocking=True)


def copy_to_host(tensor: Tensor) -> Tensor:
    """Begin to copy a tensor to the host, into memory that the device writes by itself."""
    if tensor.is_cpu:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
