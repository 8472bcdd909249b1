"""The device's sampler and the host's, side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import SlotStart
from rillgate_server.worker.gpu.device_sampler import DeviceSampler, Draw
from rillgate_server.worker.sampler import SampledToken, sample
from rillgate_server.worker.slot_sampling import SlotSampling


class TwinSamplers:
    """Both, with the same slots. State: `device`, and the host's slots (`host`)."""

    def __init__(
        self, vocab_size: int, device: DeviceSampler | None = None, part_len: int = 32
    ) -> None:
        """Start without slots, on a GPU where there is one."""
        self.vocab_size = vocab_size
        self.place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device = device or DeviceSampler(vocab_size, self.place, 2, part_len)
        self.host: dict[int, SlotSampling] = {}

    def start(
        self,
        slot: int,
        params: SamplingParams,
        prompt: Sequence[int] = (1, 2, 3),
        generated: Sequence[int] = (),
    ) -> None:
        """Start a slot on both; its number is its choice, too."""
        tokens = (*prompt, *generated)
        start = SlotStart(slot, tokens, len(prompt), (), params, slot)
        self.device.start(start)
        self.host[slot] = SlotSampling.start(start, self.vocab_size)
        self.device.check_integrity()

    def end(self, slot: int) -> None:
        """End a slot on both."""
        self.device.end(slot)
        del self.host[slot]
        self.device.check_integrity()

    def step(self, logits: Tensor, slots: Sequence[int]) -> list[SampledToken]:
        """Draw on both, note the tokens, prove that they are the same, and return the device's."""
        draws = [Draw(slot, self.host[slot].num_generated) for slot in slots]
        expected = sample(logits, [self.host[slot] for slot in slots])
        got = self.device.sample(logits.to(self.place), draws).to_host()
        if self.place.type == "cuda":
            torch.cuda.synchronize()
        tokens = got.read()
        assert [it.token_id for it in tokens] == [it.token_id for it in expected]
        last_tokens = self.device.last_tokens[list(slots)].tolist()
        for slot, token, last in zip(slots, expected, last_tokens, strict=True):
            assert last == (-1 if token.token_id is None else token.token_id)
            if token.token_id is not None:
                self.host[slot].append(token.token_id)
        return tokens
