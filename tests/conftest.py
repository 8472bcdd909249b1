"""What all tests share: Triton's kernels run in its interpreter where there is no GPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    from tests.support.triton_interpreter import repair_interpreter

    repair_interpreter()
