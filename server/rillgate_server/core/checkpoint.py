"""A checkpoint's files, read without torch: what it is, whether it is whole, which version it is.

Owns the checks that need no weights: the files are there, the safetensors are as long as their
headers say, the architecture is one that we serve. Gateway and replica both read ModelSpec from
here, so they cannot disagree. Does not load weights (worker.model_loader does), and does not know
tokens or templates.

File format: https://huggingface.co/docs/safetensors (u64le header length, JSON header, data).
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rillgate_server.core.model_spec import ModelSpec
from rillgate_server.errors import CheckpointError

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MistralForCausalLM",
    "DeepseekV3ForCausalLM",
)
"""What the equality tests cover."""

_WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "I8": "int8",
    "U8": "uint8",
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_NUM_SAMPLES = 64  # per file; 64 page-sized reads take about 1 ms from the page cache
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies, as its file's header says."""

    file: Path
    dtype: str
    """As torch spells it (`bfloat16`); the header's own word for types that we do not know."""
    shape: tuple[int, ...]
    num_bytes: int


def read_model_spec(
    model_dir: Path, name: str | None = None, *, needs_tokenizer: bool = False
) -> ModelSpec:
    """Read what everybody but the worker needs to know; costs a few milliseconds per GB.

    `name` defaults to the directory's. `dtype` is the checkpoint's own; the worker may compute in
    another. Raises CheckpointError that names what is missing, truncated or unknown.
    """
    config = read_config(model_dir)
    files = weight_files(model_dir)
    headers = [_read_header(path) for path in files]
    tokenizer = model_dir / "tokenizer.json"
    if needs_tokenizer and not tokenizer.is_file():
        raise CheckpointError(f"{model_dir} has no tokenizer.json")
    return ModelSpec(
        name=name or model_dir.resolve().name,
        version_digest=_version_digest(model_dir, files),
        tokenizer_digest=_file_digest(tokenizer) if tokenizer.is_file() else "",
        architecture=_architecture(model_dir, config),
        vocab_size=_positive_int(model_dir, config, "vocab_size"),
        max_context_tokens=_positive_int(model_dir, config, "max_position_embeddings"),
        eos_token_ids=_eos_token_ids(model_dir, config),
        dtype=_checkpoint_dtype(config, headers),
    )


def read_config(model_dir: Path) -> dict[str, Any]:
    """Read config.json; values are JSON's own, hence Any."""
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir} is not a directory")
    return _read_json(model_dir / "config.json")


def weight_files(model_dir: Path) -> tuple[Path, ...]:
    """List the safetensors files in a fixed order; raise CheckpointError when one is missing."""
    if (model_dir / _INDEX_FILE).is_file():
        weight_map = _read_json(model_dir / _INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{model_dir / _INDEX_FILE} has no weight_map")
        names = sorted(set(map(str, weight_map.values())))
        missing = [name for name in names if not (model_dir / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{model_dir} lacks {len(missing)} of the {len(names)} weight files that "
                f"{_INDEX_FILE} names: {', '.join(missing[:5])}"
            )
        return tuple(model_dir / name for name in names)
    if (model_dir / _WEIGHTS_FILE).is_file():
        return (model_dir / _WEIGHTS_FILE,)
    raise CheckpointError(
        f"{model_dir} has neither {_WEIGHTS_FILE} nor {_INDEX_FILE} (only safetensors are read)"
    )


def read_tensor_entries(model_dir: Path) -> dict[str, TensorEntry]:
    """Map tensor name -> entry over all weight files, after checking that each file is whole."""
    entries: dict[str, TensorEntry] = {}
    for path in weight_files(model_dir):
        for name, entry in _read_header(path).items():
            if name in entries:
                raise CheckpointError(f"tensor {name} is in {entries[name].file} and in {path}")
            entries[name] = entry
    return entries


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """Read one file's header and check it against the file's size."""
    with path.open("rb") as file:
        header_bytes = _header_bytes(path, file)
    file_bytes = path.stat().st_size
    try:
        header = json.loads(header_bytes)
        header.pop("__metadata__", None)
        entries = {
            name: TensorEntry(
                path,
                _DTYPE_NAMES.get(item["dtype"], item["dtype"]),
                tuple(item["shape"]),
                item["data_offsets"][1] - item["data_offsets"][0],
            )
            for name, item in header.items()
        }
        data_bytes = max((item["data_offsets"][1] for item in header.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path} has a broken safetensors header: {error}") from error
    needed_bytes = 8 + len(header_bytes) + data_bytes
    if file_bytes < needed_bytes:
        raise CheckpointError(
            f"{path} is truncated: its header describes {needed_bytes} bytes, "
            f"the file has {file_bytes}"
        )
    return entries


def _header_bytes(path: Path, file: BinaryIO) -> bytes:
    """Read the JSON header; `file` stands at its start."""
    prefix = file.read(8)
    file_bytes = path.stat().st_size
    if len(prefix) < 8:
        raise CheckpointError(f"{path} is truncated: it has {file_bytes} bytes, a header needs 8")
    (num_bytes,) = struct.unpack("<Q", prefix)
    if num_bytes > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} is no safetensors file: its header claims {num_bytes} bytes, "
            f"the limit is {_MAX_HEADER_BYTES}"
        )
    header = file.read(num_bytes)
    if len(header) < num_bytes:
        raise CheckpointError(
            f"{path} is truncated: its header needs {8 + num_bytes} bytes, "
            f"the file has {file_bytes}"
        )
    return header


def _version_digest(model_dir: Path, files: tuple[Path, ...]) -> str:
    """Name the version: sha256 over what decides the model's output.

    That is config.json, generation_config.json (where there is one), and of every weight file its
    name, size, header and 64 samples of 4 KiB at even distances. Reading all of the data would
    take minutes for a large model; training changes every tensor a little, so samples see it. A
    hand-made change of a few bytes between the samples is missed: whoever patches weights so
    should touch config.json, too.
    """
    digest = hashlib.sha256(b"rillgate-checkpoint-1")

    def add(part: bytes) -> None:
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)

    for name in ("config.json", "generation_config.json"):
        path = model_dir / name
        add(path.read_bytes() if path.is_file() else b"")
    for path in files:
        size = path.stat().st_size
        add(path.name.encode())
        add(struct.pack("<Q", size))
        with path.open("rb", buffering=0) as file:
            header = _header_bytes(path, file)
            add(header)
            first, last = 8 + len(header), max(8 + len(header), size - _SAMPLE_BYTES)
            for i in range(_NUM_SAMPLES):
                file.seek(first + (last - first) * i // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    """Return the sha256 of a whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _architecture(model_dir: Path, config: dict[str, Any]) -> str:
    named = config.get("architectures") or []
    for architecture in named:
        if architecture in SUPPORTED_ARCHITECTURES:
            return str(architecture)
    raise CheckpointError(
        f"{model_dir} has the architecture {', '.join(map(str, named)) or '(none named)'}; "
        f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
    )


def _positive_int(model_dir: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise CheckpointError(
            f"{model_dir / 'config.json'}: {key} is {value!r}; allowed: a positive integer"
        )
    return value


def _eos_token_ids(model_dir: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """Take generation_config.json's, which chat models extend, before config.json's.

    Ids outside the vocabulary, which some exports carry over from another tokenizer, can never be
    sampled and are left out.
    """
    path = model_dir / "generation_config.json"
    found = _read_json(path).get("eos_token_id") if path.is_file() else None
    if found is None:
        found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    vocab_size = _positive_int(model_dir, config, "vocab_size")
    return tuple(int(i) for i in ids if i is not None and 0 <= int(i) < vocab_size)


def _checkpoint_dtype(config: dict[str, Any], headers: list[dict[str, TensorEntry]]) -> str:
    """Take config.json's word; without one, the type that holds most of the bytes."""
    named = config.get("dtype") or config.get("torch_dtype")
    if isinstance(named, str) and named != "auto":
        return named.removeprefix("torch.")
    num_bytes: dict[str, int] = {}  # dtype -> bytes
    for header in headers:
        for entry in header.values():
            if entry.dtype == "int8":  # quantised: what it was before is that of the others
                continue
            num_bytes[entry.dtype] = num_bytes.get(entry.dtype, 0) + entry.num_bytes
    return max(num_bytes, key=lambda dtype: num_bytes[dtype], default="float32")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content
