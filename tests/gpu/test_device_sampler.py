"""Drawing on a GPU: the host sampler's tokens at a real vocabulary's size, and nobody waits."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import SlotStart
from rillgate_server.worker.gpu.device_sampler import DeviceSampler, Draw
from tests.support.twin_samplers import TwinSamplers

VOCAB_SIZE = 152_064
SETTINGS: tuple[dict[str, Any], ...] = (  # Any: keyword arguments of different types
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
    {"top_k": 500},
    {"top_p": 0.95},
    {"min_p": 0.05, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"logit_bias": ((5, 20.0),), "min_tokens": 2, "banned_until_min_tokens": (5,)},
    {"top_p": 0.9, "num_logprobs": 5},
)


@pytest.fixture
def no_waiting(cuda: torch.device) -> Iterator[None]:
    """Make torch raise where it would wait for the GPU."""
    DeviceSampler(VOCAB_SIZE, cuda).warm_up(torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_tokens_are_those_of_the_host_sampler(dtype: torch.dtype, cuda: torch.device) -> None:
    """Every kind of row in one batch, over a few steps; more rows than take one turn."""
    sampler = DeviceSampler(VOCAB_SIZE, cuda, max_scratch_bytes=16 << 20)
    twins = TwinSamplers(VOCAB_SIZE, sampler)
    num_slots = 4 * len(SETTINGS)
    for slot in range(num_slots):
        params = SamplingParams(seed=slot * 2**60, **SETTINGS[slot % len(SETTINGS)])
        twins.start(slot, params)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        logits = torch.randn(num_slots, VOCAB_SIZE, generator=generator) * 2.5
        twins.step(logits.to(dtype), range(num_slots))


@pytest.mark.usefixtures("no_waiting")
def test_nothing_waits_for_the_gpu(cuda: torch.device) -> None:
    """Starts, draws of every kind, log-probabilities and their copies to the host."""
    sampler = DeviceSampler(VOCAB_SIZE, cuda, num_slots=2)
    draws = []
    for slot, options in enumerate(SETTINGS):
        params = SamplingParams(seed=slot, **options)
        sampler.start(SlotStart(slot, (1, 2, 3), 2, (), params, 0))
        draws.append(Draw(slot, 1))
    logits = torch.randn(len(draws), VOCAB_SIZE, device=cuda).bfloat16()
    copies = sampler.sample(logits, draws).to_host()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert all(token.token_id is not None for token in copies.read())
