"""Random checkpoints in a real network's shape, filled on the device and written in shards.

Once per working directory: a checkpoint that is whole (its marker is written last) is used again.
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.gpu.rows import Row
from benchmarks.gpu.scale import Scale, Shape
from benchmarks.random_checkpoint import make_tokenizer
from rillgate_server.worker.compute_device import find_device

_STD = 0.02
"""Of the weights, as networks of this kind are initialised."""
_SHARD_BYTES = 1 << 30
_THREADS = 4
"""Shards that are written at a time."""
_MARKER = "complete"

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor's name -> shape."""


def measure(work_dir: Path, scale: Scale) -> Iterator[Row]:
    """Write both checkpoints, unless they are there; say how long it took."""
    for shape in (scale.large, scale.small):
        begin_s = time.perf_counter()
        directory = make_checkpoint(work_dir / shape.name, shape, scale.max_context_tokens)
        files = list(directory.glob("*.safetensors"))
        seconds = time.perf_counter() - begin_s
        yield {
            "what": "checkpoint",
            "shape": shape.name,
            "files": len(files),
            "bytes": sum(path.stat().st_size for path in files),
            "seconds": round(seconds, 2),
            "samples": [seconds],
        }


def make_checkpoint(directory: Path, shape: Shape, max_context_tokens: int) -> Path:
    """Write a random bf16 Qwen2 checkpoint of a shape, and return where."""
    if (directory / _MARKER).exists():
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    config = Qwen2Config(**shape.config(max_context_tokens))
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.dtype = torch.bfloat16
    config.architectures = [type(network).__name__]
    config.save_pretrained(directory)
    left_out = {"lm_head.weight"} if shape.is_tied else set()
    tensors = {
        name: tuple(tensor.shape)
        for name, tensor in network.state_dict().items()
        if name not in left_out
    }
    _write_shards(directory, shards_of(tensors, _SHARD_BYTES))
    make_tokenizer(shape.vocab_size).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"})
    )
    (directory / _MARKER).touch()
    return directory


def shards_of(tensors: Shapes, shard_bytes: int) -> list[Shapes]:
    """Cut the tensors, in their order, into shards of about so many bytes; none is empty."""
    shards: list[Shapes] = []
    open_shard: dict[str, tuple[int, ...]] = {}
    room = 0
    for name, shape in tensors.items():
        num_bytes = torch.Size(shape).numel() * torch.bfloat16.itemsize
        if not shards or num_bytes > room:
            open_shard, room = {}, shard_bytes
            shards.append(open_shard)
        open_shard[name] = shape
        room -= num_bytes
    return shards


def _write_shards(directory: Path, shards: list[Shapes]) -> None:
    names = [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]
    device = find_device()
    with ThreadPoolExecutor(_THREADS) as pool:
        list(
            pool.map(
                lambda place: _write_shard(directory / names[place], shards[place], place, device),
                range(len(shards)),
            )
        )
    index = {
        "metadata": {},
        "weight_map": {
            name: file for file, shard in zip(names, shards, strict=True) for name in shard
        },
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@torch.inference_mode()
def _write_shard(path: Path, shapes: Shapes, seed: int, device: torch.device) -> None:
    """Fill one shard's tensors, norms with ones, and write them."""
    generator = torch.Generator(device=device).manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, _STD, generator=generator)
        tensors[name] = tensor.cpu()
    save_file(tensors, path, metadata={"format": "pt"})
