"""W8A8: weights in INT8 with a scale per output channel, activations with a scale per token.

    W = w * s_w      s_w = max|W| / 127 of a channel      w = round(W / s_w)
    x = q * s_x      s_x = max|x| / 127 of a token        q = round(x * (127 / max|x|))
    y = (sum_k q w) * s_x * s_w + b                       the sum in integers, the rest in float32

(Dettmers et al., LLM.int8(), 2022, call it vector-wise; here without outliers.) The integers are
exact, and all else is of one token and one channel: neither the batch nor the kernel changes a bit.
`linear_int8` says it in torch, and is what computes where there are no kernels.

Owns the arithmetic and the layer. Does not know which layers of a model are quantised, nor files.
"""

import torch
from torch import Tensor, nn

from rillgate_server.worker.kernels.library import Kernels, Linear

_MOST = 127
"""-128 stays unused: a weight and its negative are kept alike."""
_PART_ELEMENTS = 1 << 20
"""Of a weight that are quantised at a time: their float32 values are 4 MB."""


def quantize_weight(weight: Tensor, channels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return [out_features, in_features], int8, and [out_features], float32, of a weight.

    channels: the whole ones that `weight` is cut out of, [out_features, more], for whose scales; in
    any type, on any device. None: it is whole itself.
    """
    whole = torch.empty_like(weight, dtype=torch.int8)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    width = weight.shape[1] if channels is None else channels.shape[1]
    channels_at_once = max(1, _PART_ELEMENTS // width)
    for first in range(0, len(weight), channels_at_once):
        part = slice(first, first + channels_at_once)
        exact = weight[part].to(torch.float32, copy=True)
        seen = exact if channels is None else channels[part].to(weight.dtype).float()
        scales[part] = seen.abs().amax(dim=-1) / _MOST
        exact /= scales[part, None]
        exact.round_().nan_to_num_(nan=0.0)  # a channel of zeros: 0 / 0
        whole[part] = exact.clamp_(-_MOST, _MOST)
    return whole, scales


def linear_int8(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b as above. x: [num_rows, in_features]; bias: [out_features], float32.

    A row with what is not finite gives NaN.
    """
    exact = x.float()
    most = exact.abs().amax(dim=-1, keepdim=True)
    inverse = torch.full_like(most, _MOST) / most
    inverse = inverse.where(torch.isfinite(inverse), torch.zeros_like(inverse))
    whole = (exact * inverse).round_().nan_to_num_(nan=0.0).to(torch.int8)
    row_scales = (most / _MOST).where(torch.isfinite(most), torch.nan)
    y = torch._int_mm(whole, weight.T).float() * row_scales * scales
    return (y if bias is None else y + bias).to(x.dtype)


class Int8Linear(nn.Module):
    """`nn.Linear` with its weight in INT8. State: whether it is packed for the kernels."""

    def __init__(
        self,
        weight: Tensor,
        kernels: Kernels | None,
        scales: Tensor | None = None,
        channels: Tensor | None = None,
    ) -> None:
        """Quantise `weight`, a cut of `channels` (see `quantize_weight`), or take one in INT8 with
        its `scales`, [out_features], float32.

        None of them is kept.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._kernels = kernels
        self._is_packed = False
        if scales is None:
            self.weight, self.scales = quantize_weight(weight, channels)
        else:
            self.weight, self.scales = weight.clone(), scales.clone()
        """[out_features, in_features], int8, or packed."""
        self.bias: nn.Parameter | None = None
        """[out_features], float32."""

    def pack(self) -> None:
        """Put the weight into the kernels' layout, where there are kernels; whoever joins layers
        first wants them plain."""
        if self._kernels is not None and not self._is_packed:
            self.weight = self._kernels.pack_int8(self.weight)
            self._is_packed = True

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b. x: [..., in_features]; the result in x's type."""
        rows = x.flatten(0, -2)
        if self._kernels is None or not self._is_packed:
            y = linear_int8(rows, self.weight, self.scales, self.bias)
        else:
            size = self.out_features, self.in_features
            y = self._kernels.linear(Linear.of(self.weight, self.scales, self.bias, size), rows)
        return y.view(*x.shape[:-1], -1)

    def rows(self, indices: Tensor) -> Tensor:
        """Return rows of the weight, as exact as they are kept. [len(indices), in_features],
        float32."""
        if self._kernels is None or not self._is_packed:
            found = self.weight[indices]
        else:
            found = self._kernels.unpack_int8_rows(self.weight, indices, self.in_features)
        return found * self.scales[indices, None]

    def plain_weight(self) -> Tensor:
        """Return the weight unpacked. [out_features, in_features], int8."""
        if self._kernels is None or not self._is_packed:
            return self.weight
        return self._kernels.unpack_int8(self.weight, self.out_features, self.in_features)

    def extra_repr(self) -> str:
        """Show the shape, as nn.Linear does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"


def pack_int8_layers(network: nn.Module) -> None:
    """Pack each, one by one: the peak is one layer more."""
    for module in network.modules():
        if isinstance(module, Int8Linear):
            module.pack()
