"""Llama, Mistral, Qwen2 and Qwen3 on NVIDIA GPUs in nine calls a layer.

What transformers' modules compute, with one product for queries, keys and values, one for gate and
up, and one kernel of fused_kernels or rotary_kernel between two products:

    add_norm  qkv  rotate_and_store  attention  o  add_norm  gate_up  silu_mul  down

The residual stream has the model's type, as transformers has it. Nothing waits for the device or
looks at data, so a step over tensors that stay where they are can be captured into a CUDA graph,
with rows of padding in it (a block of -1).

Of a split model each rank has its heads and its part of the MLP; their products are summed over
ranks before they are added. (A bias of such a product is zeros on all ranks but the first.)

Owns how a layer's weights are joined. Does not know files, how attention is computed, nor how a
model is split. Imported only where there is Triton.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rillgate_server.worker.attention.base import AttentionStep, ReadingStep
from rillgate_server.worker.collectives import Collectives
from rillgate_server.worker.network.base import join_logits
from rillgate_server.worker.network.fused_kernels import add_norm, silu_mul
from rillgate_server.worker.network.rotary_kernel import HeadNorms, HeadShape, rotate_and_store
from rillgate_server.worker.quantization.int8_triton import TritonInt8Linear, linear_int8_triton

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def can_compute(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether a loaded model is one of these, for a CUDA device: linear layers as they are or in
    our INT8, those that are joined of one kind; SiLU between them; angles for whole heads.

    bitsandbytes' layers are not: transformers' modules call them.
    """
    config = model.config
    if device.type != "cuda" or model.dtype not in _DTYPES:
        return False
    if config.model_type not in _MODEL_TYPES or config.hidden_act != "silu":
        return False
    decoder: Any = model.get_decoder()
    is_whole = 2 * len(decoder.rotary_emb.inv_freq) == decoder.layers[0].self_attn.head_dim
    return is_whole and all(_is_joinable(layer, model.dtype) for layer in decoder.layers)


def _is_joinable(layer: Any, dtype: torch.dtype) -> bool:  # a module of transformers
    attention, mlp = layer.self_attn, layer.mlp
    joined = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
    groups = (*joined, (attention.o_proj,), (mlp.down_proj,))
    return all(
        all(isinstance(it, TritonInt8Linear) for it in group)
        or all(type(it) is nn.Linear and it.weight.dtype == dtype for it in group)
        for group in groups
    )


@dataclass(frozen=True, slots=True)
class _Linear:
    """One product."""

    weight: Tensor
    """[out_features, in_features], model dtype or int8."""
    scales: Tensor | None
    """[out_features], float32, of int8."""
    bias: Tensor | None
    """[out_features], model dtype, or float32 of int8."""

    @classmethod
    def joined(cls, layers: Sequence[Any]) -> "_Linear":
        """Put layers' outputs behind one another; a single one's tensors are taken, not copied."""
        weights = [layer.weight.detach() for layer in layers]
        is_int8 = isinstance(layers[0], TritonInt8Linear)
        scales = [layer.scales for layer in layers] if is_int8 else None
        bias = None
        if any(layer.bias is not None for layer in layers):
            bias = _cat([_bias_of(layer) for layer in layers])
        return cls(_cat(weights), None if scales is None else _cat(scales), bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T + b. x: [num_tokens, in_features], contiguous."""
        if self.scales is None:
            return F.linear(x, self.weight, self.bias)
        return linear_int8_triton(x, self.weight, self.scales, self.bias)


def _bias_of(layer: Any) -> Tensor:
    """Return a layer's bias, zeros where it has none."""
    if layer.bias is not None:
        found: Tensor = layer.bias.detach()
        return found
    dtype = torch.float32 if isinstance(layer, TritonInt8Linear) else layer.weight.dtype
    return torch.zeros(len(layer.weight), dtype=dtype, device=layer.weight.device)


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights."""

    input_norm: Tensor
    """[hidden_size], model dtype."""
    qkv: _Linear
    head_norms: HeadNorms | None
    o: _Linear
    mlp_norm: Tensor
    """[hidden_size], model dtype."""
    gate_up: _Linear
    down: _Linear

    @classmethod
    def of(cls, layer: Any, epsilon: float) -> "_Layer":  # a module of transformers
        """Take a layer over."""
        attention, mlp = layer.self_attn, layer.mlp
        norms = None
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
            norms = HeadNorms(query, key, epsilon)
        return cls(
            layer.input_layernorm.weight.detach(),
            _Linear.joined((attention.q_proj, attention.k_proj, attention.v_proj)),
            norms,
            _Linear.joined((attention.o_proj,)),
            layer.post_attention_layernorm.weight.detach(),
            _Linear.joined((mlp.gate_proj, mlp.up_proj)),
            _Linear.joined((mlp.down_proj,)),
        )


class GpuDecoder:
    """A network of fused layers (Network), whose steps' attention reads what its layers have
    stored (ReadingStep). State: none."""

    def __init__(self, model: PreTrainedModel, collectives: Collectives | None = None) -> None:
        """Take over a filled model for which `can_compute` holds; its layers are gone afterwards.

        `collectives` of a split one, whose embedding is connected already. One layer at a time is
        there twice.
        """
        self.model = model
        decoder: Any = model.get_decoder()
        attention = decoder.layers[0].self_attn
        self._collectives = collectives
        self._decoder = decoder
        self._scaling = float(attention.scaling)
        self._epsilon = float(model.config.rms_norm_eps)
        dim = attention.head_dim
        self._heads = HeadShape(
            attention.q_proj.out_features // dim, attention.k_proj.out_features // dim, dim
        )
        self._layers: list[_Layer] = []
        for i in range(len(decoder.layers)):
            self._layers.append(_Layer.of(decoder.layers[i], self._epsilon))
            decoder.layers[i] = nn.Identity()
            # torch would keep what the parts took, and none of it is large enough for the next
            # layer's joined weights: in the end the whole model would be there twice.
            torch.cuda.empty_cache()
        decoder.layers = nn.ModuleList()

    @property
    def num_heads(self) -> int:
        """See Network."""
        return self._heads.num_heads

    @property
    def is_capturable(self) -> bool:
        """See Network; Gloo's collectives wait for the device."""
        return self._collectives is None or self._collectives.is_on_device

    @property
    def is_split(self) -> bool:
        """See Network."""
        return self._collectives is not None

    def hidden(self, tokens: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        """Run all layers over a packed step, a ReadingStep (Network.hidden)."""
        reading = cast("ReadingStep", step)
        residual = self._decoder.embed_tokens(tokens)
        # Of what it is given it looks at type and device alone.
        like = residual.new_empty(0, dtype=torch.float32)
        cosines, sines = self._decoder.rotary_emb(like, positions[None])
        angles = cosines[0], sines[0]
        delta: Tensor | None = None
        for index, layer in enumerate(self._layers):
            normed = add_norm(residual, delta, layer.input_norm, self._epsilon)
            query = rotate_and_store(
                layer.qkv(normed),
                angles,
                self._heads,
                layer.head_norms,
                reading.slot_mapping,
                reading.cache(index),
            )
            attended = reading.read(index, query, self._scaling)
            delta = self._summed(layer.o(attended.flatten(1)))
            normed = add_norm(residual, delta, layer.mlp_norm, self._epsilon)
            delta = self._summed(layer.down(silu_mul(layer.gate_up(normed))))
        return add_norm(residual, delta, self._decoder.norm.weight, self._epsilon)

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Apply the output head (Network.logits)."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return join_logits(logits, self.model.config.vocab_size, self._collectives)

    def _summed(self, product: Tensor) -> Tensor:
        """Return a product with all ranks' parts."""
        return product if self._collectives is None else self._collectives.all_reduce(product)
