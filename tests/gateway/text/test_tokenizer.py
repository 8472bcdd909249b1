"""Ids against what transformers' AutoTokenizer gives for the same folder."""

import json
import shutil
from functools import cache
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rillgate_server.errors import CheckpointError, InvalidRequest
from rillgate_server.gateway.text.tokenizer import TextTokenizer, TokenizerFiles
from tests.gateway.text.checkpoints import CORPUS, DEMO

TRAINED = ("qwen2", "llama3", "llama2", "unigram", "word")

texts = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(
            ["<think>", "</think>", "<s>", "</s>", "<|im_end|>", "<|eot_id|>", " ", "  ", "\n"]
            + [word for line in CORPUS for word in line.split(" ")]
        ),
        max_size=12,
    ).map("".join),
)


@cache
def load(folder: Path) -> TextTokenizer:
    """Load a folder's tokenizer once."""
    return TextTokenizer(TokenizerFiles.read(folder))


@cache
def load_reference(folder: Path) -> PreTrainedTokenizerFast:
    """Load the same folder with transformers."""
    return AutoTokenizer.from_pretrained(folder)


@cache
def load_from_file_alone(folder: Path) -> PreTrainedTokenizerFast:
    """Load the folder with the class that takes tokenizer.json as it is."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("kind", TRAINED)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=texts)
@example(text=" leading and trailing ")
@example(text="a <think>b</think> c</s> d <s>")
@example(text="e\u0301 \u1100\u1161")
def test_a_prompt_gets_the_ids_that_transformers_gives_it(
    checkpoint_dirs: dict[str, Path], kind: str, text: str
) -> None:
    """With special tokens as for a plain prompt, and without as for a rendered chat."""
    folder = checkpoint_dirs[kind]
    reference = load_reference(folder)
    ours = load(folder)
    assert ours.encode(text, add_special_tokens=True) == reference(text).input_ids
    assert (
        ours.encode(text, add_special_tokens=False)
        == reference(text, add_special_tokens=False).input_ids
    )


@settings(max_examples=150, deadline=None)
@given(text=texts)
@example(text="What is 1 + 2? <think>\n</think>")
def test_the_bundled_tokenizer_follows_its_file_and_transformers(text: str) -> None:
    """The file says every byte is a token; AutoTokenizer would put Qwen2's NFC before that."""
    ours = load(DEMO).encode(text, add_special_tokens=True)
    assert ours == load_from_file_alone(DEMO)(text).input_ids
    if text.isascii():
        assert ours == load_reference(DEMO)(text).input_ids


def test_special_tokens_come_from_the_config_and_the_older_map(
    checkpoint_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """A token that the config names is special, whether tokenizer.json says so or lacks it."""
    folder = tmp_path / "llama3"
    shutil.copytree(checkpoint_dirs["llama3"], folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"pad_token": "<|new_pad|>", "extra_special_tokens": ["<|tool|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    special_map = {"unk_token": {"content": "<|none|>", "lstrip": True}}
    (folder / "special_tokens_map.json").write_text(json.dumps(special_map))
    ours, reference = load(folder), load_reference(folder)
    assert ours.special_tokens == reference.special_tokens_map
    assert ours.special_token_ids == frozenset(reference.all_special_ids) | {
        reference.convert_tokens_to_ids("<|start_header_id|>"),
        reference.convert_tokens_to_ids("<|end_header_id|>"),
    }
    text = "a<|new_pad|>b  <|none|> <|tool|>"
    assert ours.encode(text, add_special_tokens=True) == reference(text).input_ids


def test_the_digest_is_of_the_file_itself() -> None:
    """What replicas and gateways compare."""
    expected = sha256((DEMO / "tokenizer.json").read_bytes()).hexdigest()
    assert load(DEMO).digest == expected


def test_text_that_is_no_unicode_is_refused() -> None:
    """A lone surrogate has no UTF-8; the message says where it is."""
    with pytest.raises(InvalidRequest, match="at character 1"):
        load(DEMO).encode("a\ud800", add_special_tokens=True)


@pytest.mark.parametrize("content", [None, "", "{", '{"version": "1.0"}', "\x00\xff", "[]"])
def test_a_missing_or_broken_tokenizer_file_is_named(tmp_path: Path, content: str | None) -> None:
    """The operator reads which file it is."""
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        TextTokenizer(TokenizerFiles.read(tmp_path))


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_a_broken_tokenizer_config_is_named(tmp_path: Path, content: str) -> None:
    """A config that is there must be readable."""
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        TokenizerFiles.read(tmp_path)


def test_a_template_is_read_from_its_file_a_string_or_a_named_list(tmp_path: Path) -> None:
    """The file wins over the config; of several in the config, `default` counts."""
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert TokenizerFiles.read(tmp_path).chat_template == "one"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert TokenizerFiles.read(tmp_path).chat_template == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert TokenizerFiles.read(tmp_path).chat_template == "three"
    config.write_text("{}")
    (tmp_path / "chat_template.jinja").unlink()
    assert TokenizerFiles.read(tmp_path).chat_template is None
