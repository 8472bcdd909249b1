"""Linear layers whose bf16 weights lie the way oneDNN's matrix kernels read them, on CPUs.

`torch.nn.functional.linear` hands oneDNN a plain row-major weight, which it reads at a third of
the memory bandwidth at one row; packed once at load, the same product runs near the bandwidth.
There is one copy of the weights: packing replaces the plain one. The exception is a head that is
tied to the embedding, whose rows are still looked up in the plain weight: it is packed beside that
one while it is small, and stays plain otherwise.

Owns the packed weights. Does not know the network around them, nor quantisation.
"""

import torch
from torch import Tensor, nn

_PACKED_FOR_ROWS = 32
"""Rows that the packed layout is chosen for. Layouts asked for with 1 and with 32 rows showed no
difference in time at 1 to 512 rows."""
MAX_SECOND_COPY_BYTES = 300_000_000
"""Of a tied head's packed weight, half of what a replica may take beside weights and cache. At one
row the packed product took 57 ms and the plain one 136 (272 MB, one busy core); at 32 rows 252 and
283. Qwen2.5-0.5B's head is below this, that of 1.5B (467 MB) is not."""


class PackedLinear(nn.Module):
    """`nn.Linear` for inference, over a packed weight."""

    def __init__(self, linear: nn.Linear) -> None:
        """Pack `linear`'s weight; the caller drops `linear`."""
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        with torch.inference_mode():
            weight = linear.weight.detach()
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
            """Opaque, bf16, out_features * in_features elements, on the CPU."""
        bias: Tensor | None = linear.bias
        self.bias = None if bias is None else bias.detach()
        """[out_features], bf16, on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias. x: [..., in_features], bf16; result: [..., out_features]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y

    def extra_repr(self) -> str:
        """Show the shape, as nn.Linear does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, packed"


def pack_linear_layers(
    network: nn.Module, *, max_second_copy_bytes: int = MAX_SECOND_COPY_BYTES
) -> int:
    """Replace each bf16 `nn.Linear` on the CPU by a PackedLinear, one by one; return how many.

    Peak memory is the network's plus one layer's, or a tied head's where it has no more than
    `max_second_copy_bytes`. Does nothing where this build of torch or this
    CPU has no bf16 matrix kernels.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return 0
    looked_up = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    # Names, not modules: whoever holds a layer keeps its plain weight alive.
    names = [name for name, module in network.named_modules() if _is_packable(module)]
    num_packed = 0
    for name in names:
        linear = network.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if id(linear.weight) not in looked_up or linear.weight.nbytes <= max_second_copy_bytes:
            network.set_submodule(name, PackedLinear(linear))
            num_packed += 1
        del linear
    return num_packed


def _is_packable(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and module.weight.dtype == torch.bfloat16
        and module.weight.device.type == "cpu"
    )
