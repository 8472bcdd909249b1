"""What a step must read and compute, from the network's shape alone: the arithmetic of the limits.

Counted are the weights, the cache that attention reads, the products of the weights, and the two
products of attention (queries with keys, weights with values), a multiplication and an addition as
two operations. Left out is what is a thousandth of these: activations, norms, rotary angles,
sampling, the rows of the embedding.
"""

from dataclasses import dataclass

from benchmarks.gpu.scale import Shape

_CACHE_BYTES = 2
"""Of an element of the cache, bf16."""
_HEAD_BYTES = 2
"""Of an element of the output head, of norms and of biases: bf16 in every precision."""
_LAYER_BYTES = {"none": 2, "int8": 1}
"""Of an element of a layer's matrices, by model.quantization."""
_SCALE_BYTES = {"none": 0, "int8": 4}
"""Of the scale of an output channel."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a step, or a run of them, does at least."""

    read_bytes: float
    operations: float

    def seconds(self, read_bytes_per_s: float, operations_per_s: float) -> float:
        """Return the least time at these limits: the larger of the two, as both overlap."""
        return max(self.read_bytes / read_bytes_per_s, self.operations / operations_per_s)


def matrix_elements(shape: Shape) -> int:
    """Return the weights of the layers' matrices."""
    hidden = shape.hidden_size
    per_layer = 2 * hidden * hidden + 2 * hidden * shape.kv_size
    return shape.num_layers * (per_layer + 3 * hidden * shape.intermediate_size)


def head_elements(shape: Shape) -> int:
    """Return the weights of the output head, which a tied embedding is, too."""
    return shape.hidden_size * shape.vocab_size


def num_channels(shape: Shape) -> int:
    """Return the output channels of the layers' matrices, each of which has a scale in INT8."""
    per_layer = 3 * shape.hidden_size + 2 * shape.kv_size + 2 * shape.intermediate_size
    return shape.num_layers * per_layer


def vector_elements(shape: Shape) -> int:
    """Return norms, and the biases of queries, keys and values."""
    per_layer = 3 * shape.hidden_size + 2 * shape.kv_size
    return shape.num_layers * per_layer + shape.hidden_size


def weight_bytes(shape: Shape, quantization: str = "none") -> int:
    """Return what a step reads of the weights."""
    return (
        matrix_elements(shape) * _LAYER_BYTES[quantization]
        + num_channels(shape) * _SCALE_BYTES[quantization]
        + (head_elements(shape) + vector_elements(shape)) * _HEAD_BYTES
    )


def cache_bytes_per_token(shape: Shape) -> int:
    """Return the keys and values of one token in all layers."""
    return 2 * shape.num_layers * shape.kv_size * _CACHE_BYTES


def attention_operations(shape: Shape, num_pairs: float) -> float:
    """Return the operations of so many pairs of a query's token and a key's, in all layers."""
    return 4.0 * shape.num_layers * shape.hidden_size * num_pairs


def decode_work(
    shape: Shape, batch: int, context_tokens: float, quantization: str = "none"
) -> Work:
    """Return a decode step's, of `batch` rows that attend to `context_tokens` in all."""
    products = 2.0 * (matrix_elements(shape) + head_elements(shape)) * batch
    return Work(
        weight_bytes(shape, quantization) + context_tokens * cache_bytes_per_token(shape),
        products + attention_operations(shape, context_tokens),
    )


def prefill_work(shape: Shape, num_prompts: int, prompt_tokens: int) -> Work:
    """Return that of whole prompts, each of which gets one token.

    The head computes one row a prompt. Bytes are those of one pass over the weights.
    """
    products = 2.0 * matrix_elements(shape) * num_prompts * prompt_tokens
    head = 2.0 * head_elements(shape) * num_prompts
    num_pairs = num_prompts * prompt_tokens * (prompt_tokens + 1) / 2
    return Work(weight_bytes(shape), products + head + attention_operations(shape, num_pairs))
