"""The device sampler's launches with the shapes of a real vocabulary, to be compiled for a GPU."""

import torch

from rillgate_server.worker.gpu.device_sampler import DeviceSampler

VOCAB_SIZE = 152_064


def launch_all() -> None:
    """Launch each kernel in each of its variants, for logits of each type."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        DeviceSampler(VOCAB_SIZE, torch.device("cpu")).warm_up(dtype)
