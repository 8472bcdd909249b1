"""The device sampler's launches with the shapes of a real vocabulary, to be compiled for a GPU."""

import torch

from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import SlotStart
from rillgate_server.worker.device_sampler import DeviceSampler, Draw

VOCAB_SIZE = 152_064


def launch_all() -> None:
    """Draw greedily and with every filter, from logits of each type."""
    sampler = DeviceSampler(VOCAB_SIZE, torch.device("cpu"))
    settings = (
        SamplingParams(seed=1, temperature=0.0),
        SamplingParams(seed=1, top_k=20, top_p=0.9, min_p=0.1, repetition_penalty=1.1),
    )
    for slot, params in enumerate(settings):
        sampler.start(SlotStart(slot, (1, 2, 3), 3, (), params, 0))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits = torch.zeros(2, VOCAB_SIZE, dtype=dtype)
        sampler.sample(logits[:1], [Draw(0, 0)])
        sampler.sample(logits, [Draw(0, 1), Draw(1, 0)])
