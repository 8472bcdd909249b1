"""A checkpoint's text side as the gateway uses it: prompts, chats, defaults and refusals."""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rillgate_server.errors import InvalidRequest
from rillgate_server.gateway.text.chat_template import ChatTurn
from rillgate_server.gateway.text.model_text import ModelText
from tests.gateway.text.checkpoints import DEMO

load = cache(ModelText.load)

CONVERSATION = [
    ChatTurn("system", "Be brief."),
    ChatTurn("user", "What is 1 + 2?"),
    ChatTurn("assistant", "<think>\nWe add.\n</think>\n\n3"),
    ChatTurn("user", "And 2 + 2?"),
]


@pytest.fixture
def copied_demo(tmp_path: Path) -> Path:
    """Return a copy of the bundled model's text files, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        shutil.copy(DEMO / name, tmp_path)
    return tmp_path


def test_a_chat_gets_the_ids_that_transformers_gives_it() -> None:
    """Rendered with the bundled template, and no special tokens added a second time."""
    reference = AutoTokenizer.from_pretrained(DEMO)
    messages = [{"role": turn.role, "content": turn.content} for turn in CONVERSATION]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    ids = load(DEMO).encode_chat(CONVERSATION, template_time_ms=0)
    assert ids == expected
    assert ids.count(256) == 1


def test_a_prompt_is_encoded_and_decoded_back() -> None:
    """With the beginning-of-sentence token, which decoding leaves out unless asked."""
    ids = load(DEMO).encode_prompt("1 + 2 天")
    assert ids[0] == 256
    assert load(DEMO).decode(ids, keep_special_tokens=False) == "1 + 2 天"
    kept = load(DEMO).decode(ids, keep_special_tokens=True)
    assert kept == "<｜begin▁of▁sentence｜>1 + 2 天"


def test_an_empty_prompt_is_refused() -> None:
    """Even where the tokenizer would add a token of its own."""
    with pytest.raises(InvalidRequest, match="prompt is empty; allowed: text of at least one"):
        load(DEMO).encode_prompt("")


def test_a_chat_without_a_template_says_what_to_use_instead(copied_demo: Path) -> None:
    """The field is the whole chat."""
    (copied_demo / "chat_template.jinja").unlink()
    model_text = ModelText.load(copied_demo)
    assert not model_text.has_chat_template
    assert load(DEMO).has_chat_template
    with pytest.raises(
        InvalidRequest,
        match=r"chat is 4 messages; allowed: prompt or token_ids \(this checkpoint has no chat",
    ):
        model_text.encode_chat(CONVERSATION, template_time_ms=0)


def test_a_chat_that_is_no_unicode_is_refused() -> None:
    """In a content, and in a role."""
    for turn in (ChatTurn("user", "\ud800"), ChatTurn("\ud800", "a")):
        with pytest.raises(InvalidRequest, match=r"chat\.messages"):
            load(DEMO).encode_chat([turn], template_time_ms=0)


def test_a_chat_that_renders_to_nothing_is_refused(copied_demo: Path) -> None:
    """A prompt needs a token."""
    (copied_demo / "chat_template.jinja").write_text("{{ '' }}")
    with pytest.raises(InvalidRequest, match="rendered to nothing"):
        ModelText.load(copied_demo).encode_chat(CONVERSATION, template_time_ms=0)


@pytest.mark.parametrize("token_id", [264, 10**9, -1])
def test_decoding_an_id_outside_the_vocabulary_is_refused(token_id: int) -> None:
    """The message says which id and where."""
    with pytest.raises(
        InvalidRequest, match=rf"token_ids\[1\] is {token_id}; allowed: token ids below 264"
    ):
        load(DEMO).decode([65, token_id], keep_special_tokens=False)


def test_ids_that_only_the_model_has_decode_to_nothing(copied_demo: Path) -> None:
    """Output heads are padded to round sizes; such ids are inside the vocabulary."""
    config = json.loads((copied_demo / "config.json").read_text()) | {"vocab_size": 320}
    (copied_demo / "config.json").write_text(json.dumps(config))
    assert ModelText.load(copied_demo).decode([65, 319, 66], keep_special_tokens=True) == "AB"


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([256, 259, 65, 260, 262, 10], True),
        ([256, 259, 65, 260, 262], True),
        ([256, 259, 65, 260, 262, 10, 79, 75], True),
        ([256, 259, 65, 260, 262, 10, 79, 263, 10], False),
        ([256, 259, 65, 262, 65, 260], False),
        ([256, 259, 65], False),
        ([256, 65, 262, 65], True),
        ([], False),
    ],
)
def test_an_answer_starts_in_reasoning_where_the_turn_leaves_the_tag_open(
    token_ids: list[int], expected: bool
) -> None:
    """Also behind the reasoning's first words; but not for a tag in the user's message."""
    assert load(DEMO).starts_in_reasoning(token_ids) is expected


def test_a_tokenizer_without_the_tag_starts_in_reasoning_where_the_text_ends_so(
    checkpoint_dirs: dict[str, Path],
) -> None:
    """There the tag is several ordinary tokens."""
    model_text = load(checkpoint_dirs["llama3"])
    for prompt, expected in (
        ("Think.<think>\n", True),
        ("x" * 500 + "<think> \n\n", True),
        ("Think.<think>\nOK", False),
        ("Think.", False),
    ):
        ids = model_text.encode_prompt(prompt)
        assert model_text.starts_in_reasoning(ids) is expected


def test_the_tags_are_text_even_where_they_are_special_tokens(copied_demo: Path) -> None:
    """Else the reasoning could not be told from the answer."""
    content = (
        (copied_demo / "tokenizer.json").read_text().replace('"special": false', '"special": true')
    )
    (copied_demo / "tokenizer.json").write_text(content)
    model_text = ModelText.load(copied_demo)
    assert model_text.decode([262, 65, 263, 257], keep_special_tokens=False) == "<think>A</think>"
    assert model_text.starts_in_reasoning([256, 262, 10])


def test_the_bundled_model_is_greedy_by_default() -> None:
    """As its generation_config.json says."""
    assert load(DEMO).generation_defaults.temperature == 0.0
    assert load(DEMO).vocab_size == 264
    assert len(load(DEMO).tokenizer_digest) == 64


def test_the_text_side_brings_neither_torch_nor_transformers() -> None:
    """Not even through what it imports: the gateway is small and starts at once."""
    code = (
        "import sys, rillgate_server.gateway.text.model_text as _\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert outcome.stdout.strip() == "[]"
