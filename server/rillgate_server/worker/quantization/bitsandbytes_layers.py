"""bitsandbytes' layers: LLM.int8() (Dettmers et al., 2022) and NF4 (QLoRA, Dettmers et al., 2023).

Its functions compute; here are the modules around them. LLM.int8() takes the columns in which any
row of the step has an outlier out of the integer product, so a neighbour may change a token of
another request. NF4 holds weights in four bits, with a scale per 64 of them, and computes in the
activations' type.

Imported only where a setting asks for it: bitsandbytes is an extra.
"""

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from torch import Tensor, nn
from torch.nn import functional as F

NF4_BLOCK = 64
"""Weights that share a scale, counted along the rows."""
_MOST = 127


class BnbInt8Linear(nn.Module):
    """`nn.Linear` by LLM.int8(). State: none."""

    def __init__(self, weight: Tensor, threshold: float, channels: Tensor | None = None) -> None:
        """Quantise `weight`, which is not kept; activations over `threshold` are outliers.

        channels: the whole ones that it is cut out of, as in `int8.quantize_weight`.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if channels is None:
            self.weight, self.scales, _ = functional.int8_vectorwise_quant(weight.half())
        else:
            self.scales = (
                channels.to(weight.dtype).half().abs().amax(dim=-1).to(weight.device).float()
            )
            inverse = (_MOST / self.scales)[:, None].nan_to_num_(
                posinf=0.0
            )  # of a channel of zeros
            self.weight = (weight.half() * inverse).round_().to(torch.int8)
        """[out_features, in_features], int8, and [out_features], float32: its largest element."""
        self._threshold = threshold
        self.bias: nn.Parameter | None = None
        """[out_features], float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b. x: [..., in_features]; the result in x's type."""
        state = bnb.MatmulLtState()
        state.CB, state.SCB, state.threshold = self.weight, self.scales, self._threshold
        state.has_fp16_weights = state.is_training = False
        rows = x.flatten(0, -2).half()  # what it computes in
        y: Tensor = bnb.matmul(rows, self.weight, state=state).float()
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        """Show the shape, as nn.Linear does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bnb-int8"


class BnbNf4Linear(nn.Module):
    """`nn.Linear` with its weight in NF4. State: none."""

    def __init__(self, weight: Tensor) -> None:
        """Quantise `weight`, which is not kept."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self._state = functional.quantize_4bit(
            weight, blocksize=NF4_BLOCK, quant_type="nf4"
        )
        """[out_features * in_features / 2, 1], uint8: two weights each."""
        self.scales: Tensor = self._state.absmax
        """[out_features * in_features / NF4_BLOCK], float32."""
        self.bias: nn.Parameter | None = None
        """[out_features], float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b. x: [..., in_features]; the result in x's type."""
        rows = x.flatten(0, -2)
        self._state.dtype = x.dtype  # in which it hands the weights to the product
        y: Tensor
        if self.in_features % NF4_BLOCK:
            y = F.linear(rows, self.plain_weight())  # see `plain_nf4`
        else:
            y = bnb.matmul_4bit(rows, self.weight.t(), quant_state=self._state)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def plain_weight(self) -> Tensor:
        """Return the weight as it is computed with. [out_features, in_features]."""
        return plain_nf4(self.weight, self._state)

    def extra_repr(self) -> str:
        """Show the shape, as nn.Linear does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bnb-nf4"


def plain_nf4(weight: Tensor, state: functional.QuantState) -> Tensor:
    """Return what stored weights stand for, in the state's shape and type.

    As one long row: for CPUs bitsandbytes (0.50.2) takes each row to begin a block, which is wrong
    where rows are no whole blocks.
    """
    shape = state.shape
    state.shape = torch.Size([1, shape.numel()])
    try:
        plain: Tensor = functional.dequantize_4bit(weight.view(-1, 1), state)
    finally:
        state.shape = shape
    return plain.view(shape)


def supports(device: torch.device) -> bool:
    """Whether bitsandbytes says that it has kernels for a kind of device."""
    return device.type in bnb.supported_torch_devices
