"""Llama, Mistral, Qwen2 and Qwen3 on CPUs in three C++ calls a layer, with attention in between.

What transformers' modules compute, without their dispatch and with everything but attention fused
around the products (kernels/decoder.cpp). The residual stream is float32, and each row is computed
as if it were alone. Embedding, final norm and rotary angles stay torch's.

Of a split model each rank has its heads and its part of the MLP. The residual stream is whole on
all ranks: rank 0 adds to it, the others to zeros, and the sum over ranks, in float32, is the next.

Owns how a layer's weights are joined and packed. Does not know files nor how attention is computed,
nor how a model is split.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rillgate_server.worker.attention.base import AttentionStep
from rillgate_server.worker.collectives import Collectives
from rillgate_server.worker.huge_pages import HugePages
from rillgate_server.worker.kernels.library import Kernels, Layer, Linear, Shape
from rillgate_server.worker.network.base import join_logits
from rillgate_server.worker.packed_linear import MAX_SECOND_COPY_BYTES
from rillgate_server.worker.quantization.int8 import Int8Linear

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_HALF_PANEL = 32


def can_compute(model: PreTrainedModel) -> bool:
    """Whether a loaded model is one of these: linear layers in INT8 or bf16, SiLU between them, and
    rotary angles for every dimension of a head. Layers that are joined must be of one kind."""
    config = model.config
    decoder: Any = model.get_decoder()
    if config.model_type not in _MODEL_TYPES or config.hidden_act != "silu":
        return False
    if not all(map(_is_packable, decoder.layers)):
        return False
    # The kernel rotates whole heads.
    return bool(2 * len(decoder.rotary_emb.inv_freq) == decoder.layers[0].self_attn.head_dim)


def _is_packable(layer: Any) -> bool:  # a module of transformers
    attention, mlp = layer.self_attn, layer.mlp
    joined = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
    groups = (*joined, (attention.o_proj,), (mlp.down_proj,))
    return all(
        all(isinstance(it, Int8Linear) for it in group)
        or all(type(it) is nn.Linear and it.weight.dtype == torch.bfloat16 for it in group)
        for group in groups
    )


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a weight, as they are before packing."""

    weight: Tensor
    """[out_features, in_features], int8 or bfloat16."""
    scales: Tensor | None
    """[out_features], float32, of int8."""
    bias: Tensor
    """[out_features], float32."""

    @classmethod
    def of(cls, layer: nn.Module) -> "_Rows":
        """Read a layer."""
        if isinstance(layer, Int8Linear):
            weight, scales = layer.plain_weight(), layer.scales
        else:
            assert isinstance(layer, nn.Linear)
            weight, scales = layer.weight.detach(), None
        bias = layer.bias
        return cls(
            weight, scales, torch.zeros(len(weight)) if bias is None else bias.detach().float()
        )

    def joined(self, *others: "_Rows") -> "_Rows":
        """Put others' rows behind."""
        parts = (self, *others)
        scales = [part.scales for part in parts if part.scales is not None]
        return _Rows(
            torch.cat([part.weight for part in parts]),
            torch.cat(scales) if scales else None,
            torch.cat([part.bias for part in parts]),
        )

    def padded(self, multiple: int) -> "_Rows":
        """Fill up with rows of zeros."""
        missing = -len(self.weight) % multiple

        def fill(rows: Tensor) -> Tensor:
            return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])

        scales = None if self.scales is None else fill(self.scales)
        return _Rows(fill(self.weight), scales, fill(self.bias))

    def taken(self, order: Tensor) -> "_Rows":
        """Order rows anew."""
        scales = None if self.scales is None else self.scales[order]
        return _Rows(self.weight[order], scales, self.bias[order])


class _PackedLinear:
    """A weight in the form that the kernels read. State: none; keeps the tensors."""

    def __init__(self, rows: _Rows, kernels: Kernels, memory: HugePages) -> None:
        pack = kernels.pack_bf16 if rows.scales is None else kernels.pack_int8
        self._kept = pack(rows.weight, memory.take), rows.scales, rows.bias.contiguous()
        size = rows.weight.shape[0], rows.weight.shape[1]
        self.struct = Linear.of(*self._kept, size)


class _PackedLayer:
    """One layer's weights in the form that the kernels read. State: none; keeps its tensors."""

    def __init__(
        self,
        layer: Any,  # a module of transformers
        kernels: Kernels,
        memory: HugePages,
    ) -> None:
        self._kernels = kernels
        self._memory = memory
        self._kept: list[Tensor | _PackedLinear] = []
        attention, mlp = layer.self_attn, layer.mlp
        qkv = _Rows.of(attention.q_proj).joined(
            _Rows.of(attention.k_proj), _Rows.of(attention.v_proj)
        )
        gates, ups = (_Rows.of(it).padded(_HALF_PANEL) for it in (mlp.gate_proj, mlp.up_proj))
        # 32 gates and their 32 ups in each panel of 64 channels.
        order = torch.arange(2 * len(gates.weight)).view(2, -1, _HALF_PANEL).transpose(0, 1)
        self.struct = Layer(
            self._norm(layer.input_layernorm),
            self._linear(qkv),
            self._norm(getattr(attention, "q_norm", None)),
            self._norm(getattr(attention, "k_norm", None)),
            self._linear(_Rows.of(attention.o_proj)),
            self._norm(layer.post_attention_layernorm),
            self._linear(gates.joined(ups).taken(order.flatten())),
            self._linear(_Rows.of(mlp.down_proj)),
        )

    def _norm(self, norm: Any) -> int | None:  # a module of transformers, or None
        """Return the address of a norm's weight, float32."""
        if norm is None:
            return None
        weight = norm.weight.detach().float().contiguous()
        self._kept.append(weight)
        return int(weight.data_ptr())

    def _linear(self, rows: _Rows) -> Linear:
        packed = _PackedLinear(rows, self._kernels, self._memory)
        self._kept.append(packed)
        return packed.struct


class DenseDecoder:
    """A network of C++ layers (Network). State: none."""

    def __init__(
        self, model: PreTrainedModel, kernels: Kernels, collectives: Collectives | None = None
    ) -> None:
        """Take over a filled model for which `can_compute` holds; its layers are gone afterwards.

        `collectives` of a split one, whose embedding is connected already. One layer at a time is
        there twice.
        """
        self.model = model
        config = model.config
        decoder: Any = model.get_decoder()
        attention, mlp = decoder.layers[0].self_attn, decoder.layers[0].mlp
        self._kernels = kernels
        self._collectives = collectives
        self._decoder: Any = decoder
        self._scaling = float(attention.scaling)
        dim = attention.head_dim
        self._heads = (
            attention.q_proj.out_features // dim,
            attention.k_proj.out_features // dim,
            dim,
        )
        self._epsilon = float(config.rms_norm_eps)
        self._shape = Shape(
            config.hidden_size, *self._heads, mlp.down_proj.in_features, self._epsilon
        )
        memory = HugePages()
        self._layers: list[_PackedLayer] = []
        for i in range(len(decoder.layers)):
            self._layers.append(_PackedLayer(decoder.layers[i], kernels, memory))
            decoder.layers[i] = nn.Identity()
        decoder.layers = nn.ModuleList()
        self._head = self._packed_head(memory)

    @property
    def num_heads(self) -> int:
        """See Network."""
        return int(self._heads[0])

    @property
    def is_capturable(self) -> bool:
        """See Network; it computes on CPUs."""
        return False

    @property
    def is_split(self) -> bool:
        """See Network."""
        return self._collectives is not None

    def hidden(self, tokens: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        """Run all layers over a packed step (Network.hidden)."""
        dtype = self.model.dtype
        num_heads, num_kv_heads, head_dim = self._heads
        x = self._decoder.embed_tokens(tokens).float().contiguous()
        cosines, sines = (
            it[0].contiguous() for it in self._decoder.rotary_emb(x[None], positions[None])
        )
        query = torch.empty(num_heads, len(x), head_dim, dtype=dtype)
        key, value = (torch.empty(num_kv_heads, len(x), head_dim, dtype=dtype) for _ in range(2))
        shape = ctypes.byref(self._shape)
        for index, layer in enumerate(self._layers):
            of = ctypes.byref(layer.struct)
            self._kernels.into_attention(shape, of, x, (cosines, sines), (query, key, value))
            attended = step.attend(index, query, key, value, self._scaling)
            sums = self._begin_sums(x)
            self._kernels.add_attention(shape, of, attended.contiguous(), sums)
            x = self._summed(sums)
            sums = self._begin_sums(x)
            self._kernels.add_mlp(shape, of, x, sums)
            x = self._summed(sums)
        weight = self._decoder.norm.weight.float()
        normed = F.rms_norm(x, weight.shape, weight, self._epsilon)
        return normed.to(dtype)

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Apply the output head (Network.logits)."""
        logits: Tensor
        if self._head is not None:
            logits = self._kernels.linear(self._head.struct, hidden)
        else:
            logits = self.model.get_output_embeddings()(hidden)
        return join_logits(logits, self.model.config.vocab_size, self._collectives)

    def _begin_sums(self, x: Tensor) -> Tensor:
        """Return what this rank adds its part to: the residual stream itself, or zeros."""
        is_first = self._collectives is None or self._collectives.rank == 0
        return x if is_first else torch.zeros_like(x)

    def _summed(self, sums: Tensor) -> Tensor:
        """Return the residual stream with all ranks' parts."""
        return sums if self._collectives is None else self._collectives.all_reduce(sums)

    def _packed_head(self, memory: HugePages) -> "_PackedLinear | None":
        """Pack the output head, in bf16; beside an embedding that it is tied to, a small one."""
        head: Any = self.model.get_output_embeddings()
        if isinstance(head, Int8Linear):
            head.pack()
            return None
        is_tied = head.weight is getattr(self._decoder.embed_tokens, "weight", None)
        is_large = head.weight.nbytes > MAX_SECOND_COPY_BYTES
        if self.model.dtype != torch.bfloat16 or (is_tied and is_large):
            return None
        packed = _PackedLinear(_Rows.of(head), self._kernels, memory)
        if not is_tied:
            head.weight = nn.Parameter(head.weight.new_empty(0), requires_grad=False)
        return packed
