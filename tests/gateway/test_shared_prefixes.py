"""Declared prefixes: which of a prompt's tokens all tenants share."""

import logging
from pathlib import Path

import pytest

from rillgate_server.config.settings import bundled_model_dir
from rillgate_server.errors import ConfigError
from rillgate_server.gateway.shared_prefixes import SharedPrefixes
from rillgate_server.gateway.text.chat_template import ChatTurn
from rillgate_server.gateway.text.model_text import ModelText
from tests.gateway.stack import served_model

SYSTEM = "You are a careful assistant of the Rill company. Think first, then answer in one line."
TIME_MS = 1_700_000_000_000


@pytest.fixture
def text() -> ModelText:
    """The bundled model's text side."""
    return served_model().text


def declared(tmp_path: Path, model_text: ModelText, *texts: str) -> SharedPrefixes:
    """Declare texts by files."""
    paths = []
    for number, content in enumerate(texts):
        path = tmp_path / f"{number}.txt"
        path.write_text(content, encoding="utf-8")
        paths.append(str(path))
    return SharedPrefixes.load(paths, model_text, TIME_MS)


def chat(model_text: ModelText, system: str, question: str) -> tuple[int, ...]:
    """Encode a conversation."""
    turns = [ChatTurn("system", system), ChatTurn("user", question)]
    return tuple(model_text.encode_chat(turns, TIME_MS))


@pytest.mark.parametrize(
    "question", ["a", "b", "What is 12 + 30?", "  spaces first", "\nlines", "Ünïcode", "0", "ab"]
)
@pytest.mark.parametrize("final", ["", "\n"])
def test_every_chat_with_the_system_message_begins_with_it(
    question: str, final: str, text: ModelText, tmp_path: Path
) -> None:
    """Whatever is asked; with and without the newline that editors put at a file's end."""
    prefixes = declared(tmp_path, text, SYSTEM + "\n")
    prompt = chat(text, SYSTEM + final, question)
    num_shared = prefixes.num_shared_tokens(prompt)
    assert text.decode(prompt[:num_shared], True).count(SYSTEM) == 1
    assert num_shared >= len(text.encode_prompt(SYSTEM)) - 2
    assert num_shared < len(prompt)


@pytest.mark.parametrize("following", ["a", "\nUser: hi", " then", "9", "."])
def test_a_plain_prompt_that_begins_with_the_text_shares_it(
    following: str, text: ModelText, tmp_path: Path
) -> None:
    """All of it but what may merge with what follows."""
    prefixes = declared(tmp_path, text, SYSTEM)
    prompt = tuple(text.encode_prompt(SYSTEM + following))
    num_shared = prefixes.num_shared_tokens(prompt)
    assert SYSTEM.startswith(text.decode(prompt[:num_shared], False))
    assert num_shared >= len(text.encode_prompt(SYSTEM)) - 2


@pytest.mark.parametrize(
    "prompt",
    ["something else", "", SYSTEM[:-9], "x" + SYSTEM, SYSTEM.replace("careful", "careless")],
)
def test_other_prompts_share_nothing(prompt: str, text: ModelText, tmp_path: Path) -> None:
    """Nor does one that is cut short of it, or differs in one word."""
    prefixes = declared(tmp_path, text, SYSTEM)
    for ids in (chat(text, prompt, "What?"), tuple(text.encode_prompt(prompt + " What?"))):
        assert prefixes.num_shared_tokens(ids) == 0


def test_the_longest_of_several_counts(text: ModelText, tmp_path: Path) -> None:
    """A declared text may begin with another one."""
    longer = SYSTEM + " Never say please."
    prompt = tuple(text.encode_prompt(longer + " And so on"))
    both = declared(tmp_path, text, SYSTEM, longer).num_shared_tokens(prompt)
    assert both == declared(tmp_path, text, longer).num_shared_tokens(prompt)
    assert both > declared(tmp_path, text, SYSTEM).num_shared_tokens(prompt) > 0


def test_how_much_is_shared_is_said_and_too_little_aloud(
    text: ModelText, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing else would tell an operator that a declaration has no effect."""
    with caplog.at_level(logging.INFO):
        declared(tmp_path, text, SYSTEM)
        declared(tmp_path, text, "Hi")
    (long, short) = caplog.records
    assert long.levelno == logging.INFO
    assert "0.txt: prompts with it share their first " in long.getMessage()
    assert short.levelno == logging.WARNING


def test_nothing_declared_is_nothing_shared(text: ModelText) -> None:
    """An empty declaration does not match the beginning of every prompt."""
    assert SharedPrefixes().num_shared_tokens((1, 2, 3)) == 0
    assert SharedPrefixes.load((), text, TIME_MS).num_shared_tokens((1, 2, 3)) == 0


@pytest.mark.parametrize(
    ("content", "says"), [(None, "No such file"), (b" \n", "is empty"), (b"\xff\xfe", "UTF-8")]
)
def test_a_file_that_cannot_be_used_is_named(
    content: bytes | None, says: str, text: ModelText, tmp_path: Path
) -> None:
    """The operator reads which file, and why."""
    path = tmp_path / "shared.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"shared\.txt.*{says}"):
        SharedPrefixes.load([str(path)], text, TIME_MS)


def test_a_template_without_system_messages_is_said_at_the_start(tmp_path: Path) -> None:
    """A prefix that no prompt can have is an operator's mistake, not silence."""
    path = tmp_path / "shared.txt"
    path.write_text(SYSTEM)
    with pytest.raises(ConfigError, match=r"shared\.txt: .*no system here"):
        SharedPrefixes.load([str(path)], refusing_model_text(tmp_path), TIME_MS)


def refusing_model_text(tmp_path: Path) -> ModelText:
    """Load the bundled model's text side with a template that refuses system messages."""
    source = bundled_model_dir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    )
    return ModelText.load(tmp_path)
