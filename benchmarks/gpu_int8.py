"""INT8 on an NVIDIA GPU: one decode step of a 7B network in bf16, int8 and bitsandbytes' int8.

`python -m benchmarks.gpu_int8` writes `results/gpu_int8.json`. Random weights in Qwen2.5-7B's
shape, made on the device; contexts of 512 tokens; the whole network with its cache and the argmax
of the logits, called from Python as the worker calls it. `bnb-int8` where bitsandbytes is there.
Beside it the products alone, over the bytes of their weights: what of the bandwidth they reach.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.results_file import write_results
from rillgate_server.core.model_spec import KVLayout
from rillgate_server.worker.attention.base import AttentionStep, PackedRow, PackedStep
from rillgate_server.worker.attention.sdpa import SdpaAttention
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.network.transformers_network import (
    ATTENTION_NAME,
    TransformersNetwork,
    layer_cache_shapes,
    rotary_modules,
)
from rillgate_server.worker.quantization.int8_triton import TritonInt8Linear, linear_int8_triton

QWEN_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
BATCHES = (1, 8, 32, 128, 256)
CONTEXT_TOKENS = 512
BLOCK_TOKENS = 16
SHAPES = {"qkv": (3584, 4608), "o": (3584, 3584), "gate_up": (3584, 37888), "down": (18944, 3584)}
"""(inputs, channels) of a layer's products, joined."""
NUM_REPEATS = 7

CUDA = torch.device("cuda", 0)
MakeLinear = Callable[[nn.Linear], nn.Module]


def to_int8(linear: nn.Linear) -> nn.Module:
    """Make a layer of ours."""
    layer = TritonInt8Linear(linear.weight)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.float(), requires_grad=False)
    return layer


def to_bnb(linear: nn.Linear) -> nn.Module:
    """Make a layer of bitsandbytes'."""
    import bitsandbytes  # noqa: PLC0415 - optional

    has_bias = linear.bias is not None
    layer = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, has_bias, has_fp16_weights=False, threshold=6.0
    )
    layer.weight = bitsandbytes.nn.Int8Params(
        linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False
    )
    if has_bias:
        layer.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    moved: nn.Module = layer.to(CUDA)
    return moved


METHODS: dict[str, MakeLinear | None] = {"bf16": None, "int8": to_int8, "bnb-int8": to_bnb}


def make_network(make: MakeLinear | None, num_layers: int) -> TransformersNetwork:
    """Build a random network whose decoder's linear layers are `make`'s."""
    config = AutoConfig.for_model(**QWEN_7B | {"num_hidden_layers": num_layers})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=ATTENTION_NAME
        )
    for name, module in list(model.named_modules()):
        for parameter, value in list(module._parameters.items()):
            if value is not None:
                random = torch.empty(value.shape, dtype=torch.bfloat16, device=CUDA).normal_(
                    0, 0.02
                )
                setattr(module, parameter, nn.Parameter(random, requires_grad=False))
        if make is not None and type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, make(module))
    for parent, name, module in rotary_modules(model):
        with CUDA:
            setattr(parent, name, type(module)(config=config))
    return TransformersNetwork(model.eval())


def decode_step(
    network: TransformersNetwork, storage: KVStorage, batch: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return one step of `batch` rows at the end of their contexts: all of it, and the device's
    part alone, which a CUDA graph can hold."""
    attention = SdpaAttention(storage, torch.bfloat16)
    per_row = CONTEXT_TOKENS // BLOCK_TOKENS
    tables = torch.arange(batch * per_row).view(batch, per_row)
    start = CONTEXT_TOKENS - 1
    step = PackedStep(
        torch.arange(batch),
        torch.full((batch,), start),
        (tables[:, -1].clone(), torch.full((batch,), start % BLOCK_TOKENS)),
        tuple(PackedRow(i, start, 1, tables[i]) for i in range(batch)),
    )

    def compute(on_device: PackedStep, prepared: AttentionStep) -> Tensor:
        hidden = network.hidden(on_device.token_ids, on_device.positions, prepared)
        logits = network.logits(hidden)
        assert logits is not None
        return logits.argmax(dim=-1)

    def run() -> None:
        on_device = step.on(CUDA)
        compute(on_device, attention.prepare(on_device)).cpu()

    fixed = step.on(CUDA)
    prepared = attention.prepare(fixed)

    def run_on_device() -> None:
        compute(fixed, prepared)

    return run, run_on_device


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """Put it into a CUDA graph."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds(run: Callable[[], object], num_calls: int) -> float:
    """Return the time of one call, on the device's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(num_calls):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / num_calls


def samples_of(run: Callable[[], object], num_calls: int = 5) -> list[float]:
    """Warm up and take samples of one call's seconds."""
    for _ in range(3):
        run()
    return [seconds(run, num_calls) for _ in range(NUM_REPEATS)]


def read_bytes_per_s() -> float:
    """Measure what the device reads: 4 GiB summed, best of several."""
    data = torch.ones(1 << 30, dtype=torch.float32, device=CUDA)
    return max(data.nbytes / s for s in samples_of(lambda: data.sum(), 3))


def step_row(
    what: str, batch: int, weight_bytes: int, samples: list[float]
) -> dict[str, Any]:  # Any: JSON
    """Say what a step took."""
    step_s = statistics.median(samples)
    print(what, round(step_s * 1000, 2), "ms", flush=True)
    return {
        "what": what,
        "step_ms": round(step_s * 1000, 3),
        "tokens_per_s": round(batch / step_s, 1),
        "weight_bytes": weight_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "samples": samples,
    }


def network_rows(num_layers: int) -> list[dict[str, Any]]:  # Any: JSON
    """Measure each method's step at each batch size."""
    rows = []
    config = AutoConfig.for_model(**QWEN_7B | {"num_hidden_layers": num_layers})
    layout = KVLayout.build(BLOCK_TOKENS, "bfloat16", layer_cache_shapes(config))
    for method, make in METHODS.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            network = make_network(make, num_layers)
        except ImportError as error:
            print(f"{method}: left out: {error}", flush=True)
            continue
        weight_bytes = torch.cuda.memory_allocated()
        num_blocks = max(BATCHES) * CONTEXT_TOKENS // BLOCK_TOKENS
        storage = KVStorage(layout, num_blocks, device=CUDA)
        for batch in BATCHES:
            run, run_on_device = decode_step(network, storage, batch)
            ways = {f"{method}, {batch} rows": run}
            if method != "bnb-int8":  # it waits for the device in the middle of a layer
                ways[f"{method} in a CUDA graph, {batch} rows"] = captured(run_on_device)
            for what, way in ways.items():
                rows.append(step_row(what, batch, weight_bytes, samples_of(way)))
        del network, storage
    return rows


def product_rows(bytes_per_s: float) -> list[dict[str, Any]]:  # Any: JSON
    """Measure the layers' products alone."""
    rows = []
    for name, (num_inputs, num_channels) in SHAPES.items():
        weight = torch.randn(num_channels, num_inputs, device=CUDA).bfloat16()
        copies = max(1, (256 << 20) // weight.nbytes)  # more than the caches hold
        weights = [weight.clone() for _ in range(copies)]
        layers = [TritonInt8Linear(it) for it in weights]
        for batch in (*BATCHES, 4096):
            x = torch.randn(batch, num_inputs, device=CUDA).bfloat16()

            def bf16(weights: list[Tensor] = weights, x: Tensor = x) -> None:
                for it in weights:
                    nn.functional.linear(x, it)

            def int8(layers: list[TritonInt8Linear] = layers, x: Tensor = x) -> None:
                for it in layers:
                    linear_int8_triton(x, it.weight, it.scales, None)

            for kind, run, size in (("bf16", bf16, 2), ("int8", int8, 1)):
                graph = torch.cuda.CUDAGraph()
                run()
                with torch.cuda.graph(graph):
                    run()
                samples = [s / copies for s in samples_of(graph.replay)]
                best = statistics.median(samples)
                rows.append(
                    {
                        "what": f"{name} alone, {kind}, {batch} rows",
                        "us": round(best * 1e6, 1),
                        "bandwidth_fraction": round(weight.numel() * size / best / bytes_per_s, 3),
                        "operations_per_s": 2 * weight.numel() * batch / best,
                        "samples": samples,
                    }
                )
                print(*list(rows[-1].values())[:4], flush=True)
    return rows


@torch.inference_mode()
def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=QWEN_7B["num_hidden_layers"])
    arguments = parser.parse_args()
    bytes_per_s = read_bytes_per_s()
    print(f"reads {bytes_per_s / 1e12:.2f} TB/s", flush=True)
    rows: list[dict[str, Any]] = [
        {"what": "read bandwidth", "bytes_per_s": bytes_per_s, "samples": [bytes_per_s]}
    ]
    rows += network_rows(arguments.layers)
    steps = {str(row["what"]): row["step_ms"] for row in rows if "step_ms" in row}
    ratios = {
        f"gpu_int8_over_{label}_decode_{batch}": steps[f"{other}, {batch} rows"]
        / steps[f"{ours}, {batch} rows"]
        for other, ours, label in (
            ("bf16", "int8", "bf16"),
            ("bf16 in a CUDA graph", "int8 in a CUDA graph", "bf16_in_graphs"),
            ("bnb-int8", "int8", "bnb"),
        )
        for batch in BATCHES
        if f"{other}, {batch} rows" in steps
    }
    rows += product_rows(bytes_per_s)
    packages = ("torch", "triton", "transformers", "bitsandbytes")
    print(write_results("gpu_int8", "python -m benchmarks.gpu_int8", rows, ratios, packages))


if __name__ == "__main__":
    main()
