"""What a checkpoint's files say: the spec, the end-of-sequence ids, the version digest."""

import json
import shutil
import struct
from pathlib import Path

import pytest

from rillgate_server.core.checkpoint import read_model_spec, read_tensor_entries
from rillgate_server.errors import CheckpointError

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "eos_token_id": 7,
    "dtype": "bfloat16",
}


def write_checkpoint(path: Path, num_bytes: int = 60_000, **config: object) -> Path:
    """Write a checkpoint of one tensor, with bytes that differ from place to place."""
    path.mkdir()
    merged = {key: value for key, value in (CONFIG | config).items() if value is not None}
    (path / "config.json").write_text(json.dumps(merged))
    header = {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "F16", "shape": [num_bytes // 2], "data_offsets": [0, num_bytes]},
    }
    text = json.dumps(header).encode()
    data = b"".join(struct.pack("<I", i) for i in range(num_bytes // 4))
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_the_spec_says_what_the_files_say(tmp_path: Path) -> None:
    """Named after the directory unless told otherwise."""
    spec = read_model_spec(write_checkpoint(tmp_path / "little-model"))
    assert spec.name == "little-model"
    assert spec.architecture == "Qwen2ForCausalLM"
    assert (spec.vocab_size, spec.max_context_tokens) == (300, 64)
    assert spec.dtype == "bfloat16"
    assert spec.tokenizer_digest == ""
    assert read_model_spec(tmp_path / "little-model", "other").name == "other"


def test_a_missing_tokenizer_matters_only_where_one_is_needed(tmp_path: Path) -> None:
    """The replica sees token ids; the gateway needs text."""
    path = write_checkpoint(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        read_model_spec(path, needs_tokenizer=True)
    (path / "tokenizer.json").write_text("{}")
    digest = read_model_spec(path, needs_tokenizer=True).tokenizer_digest
    assert digest == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, 7, (7,)),
        ({"eos_token_id": [8, 9]}, 7, (8, 9)),
        ({"eos_token_id": 0}, 7, (0,)),
        ({"eos_token_id": [8, 300, -1]}, 7, (8,)),
        ({"temperature": 0.6}, [5, 6], (5, 6)),
        (None, None, ()),
    ],
)
def test_ends_of_sequence_come_from_the_generation_config_first(
    generation: dict[str, object] | None, config: object, expected: tuple[int, ...], tmp_path: Path
) -> None:
    """Chat models list more ends there than in config.json."""
    path = write_checkpoint(tmp_path / "model", eos_token_id=config)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    assert read_model_spec(path).eos_token_ids == expected


def test_without_a_stated_type_the_tensors_say_it(tmp_path: Path) -> None:
    """Old exports name none; `torch_dtype` is the older name."""
    assert read_model_spec(write_checkpoint(tmp_path / "a", dtype=None)).dtype == "float16"
    old = write_checkpoint(tmp_path / "b", dtype=None, torch_dtype="torch.float32")
    assert read_model_spec(old).dtype == "float32"


def test_the_digest_is_the_same_for_a_copy_elsewhere(tmp_path: Path) -> None:
    """And it is this one on every machine."""
    path = write_checkpoint(tmp_path / "model")
    shutil.copytree(path, tmp_path / "copy")
    digest = read_model_spec(path).version_digest
    assert read_model_spec(tmp_path / "copy").version_digest == digest
    assert digest == "46b19c7415bcb550fbf1acdbcfbd69b5ea7ed26ba65413a789a0e6dbc764f953"


@pytest.mark.parametrize("offset", [0, 30_000, 59_996])
def test_the_digest_changes_with_the_data(offset: int, tmp_path: Path) -> None:
    """At the beginning, in the middle, at the end."""
    path = write_checkpoint(tmp_path / "model")
    before = read_model_spec(path).version_digest
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) - 60_000 + offset] ^= 1
    file.write_bytes(data)
    assert read_model_spec(path).version_digest != before


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_the_digest_changes_with_the_settings(name: str, tmp_path: Path) -> None:
    """Both files decide what comes out."""
    path = write_checkpoint(tmp_path / "model")
    before = read_model_spec(path).version_digest
    (path / name).write_text(json.dumps(CONFIG | {"rope_theta": 5.0}))
    assert read_model_spec(path).version_digest != before


def test_the_digest_of_a_large_file_reads_little_of_it(tmp_path: Path) -> None:
    """A sparse gigabyte: its data is sampled, so a digest costs reads of a quarter megabyte."""
    path = write_checkpoint(tmp_path / "model")
    file = path / "model.safetensors"
    num_bytes = 1 << 30
    header = {"w": {"dtype": "F16", "shape": [num_bytes // 2], "data_offsets": [0, num_bytes]}}
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + num_bytes)
    before = read_model_spec(path).version_digest
    with file.open("r+b") as out:
        out.seek(8 + len(text) + num_bytes - 1)
        out.write(b"x")
    assert read_model_spec(path).version_digest != before
    assert file.stat().st_blocks * 512 < 1 << 20


def test_tensors_are_listed_with_type_shape_and_size(tmp_path: Path) -> None:
    """As torch spells the types."""
    entries = read_tensor_entries(write_checkpoint(tmp_path / "model"))
    assert list(entries) == ["w"]
    assert (entries["w"].dtype, entries["w"].shape) == ("float16", (30_000,))
    assert entries["w"].num_bytes == 60_000
