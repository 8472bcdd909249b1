"""Which of a prompt's first tokens the operator declared shared between tenants.

Owns the declared texts as token sequences: blocks wholly inside one carry no salt, so that all
tenants find them in the cache. Does not know requests or salts.

A text is a system message. What every prompt with it begins with is found by asking: the chat
template renders it with different questions behind it, and the tokens before the first difference
are shared. The same with different texts behind it as a plain prompt. So a token that would merge
with what follows is never taken for shared. With a template that prints the date, prompts of the
next day begin differently: they are right, and share nothing until the gateway starts again.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from rillgate_server.errors import ConfigError, InvalidRequest
from rillgate_server.gateway.text.chat_template import ChatTurn
from rillgate_server.gateway.text.model_text import ModelText

_log = logging.getLogger(__name__)

_QUESTIONS = ("a", "What?\nb")
_FEW_TOKENS = 16
"""A block's, by default."""
_FOLLOWING = ("a", " b", "\nc", "1")
"""Behind a plain prompt: a letter, a word, a line, a digit merge with different last characters."""


class SharedPrefixes:
    """The declared prefixes' token sequences. Immutable."""

    def __init__(self, sequences: Sequence[tuple[int, ...]] = ()) -> None:
        """Take the sequences, none of them empty."""
        self._longest_first = sorted(set(sequences), key=len, reverse=True)

    def __repr__(self) -> str:
        return f"SharedPrefixes(lengths={[len(it) for it in self._longest_first]})"

    @classmethod
    def load(
        cls, paths: Sequence[str], model_text: ModelText, template_time_ms: int
    ) -> "SharedPrefixes":
        """Read the files and encode them; raises ConfigError that names the file."""
        sequences: list[tuple[int, ...]] = []
        for path in paths:
            text = _read(path)
            own: list[tuple[int, ...]] = []
            try:
                # Editors end a file with a newline that callers may or may not send.
                for variant in {text, text.removesuffix("\n")}:
                    own += _sequences(variant, model_text, template_time_ms)
            except InvalidRequest as error:
                raise ConfigError(f"gateway.shared_prefixes: {path}: {error}") from error
            longest = max(map(len, own))
            # Less than a block is never found: nothing else would say that it is not.
            level = logging.INFO if longest >= _FEW_TOKENS else logging.WARNING
            _log.log(level, "%s: prompts with it share their first %d tokens", path, longest)
            sequences += own
        return cls([sequence for sequence in sequences if sequence])

    def num_shared_tokens(self, prompt_token_ids: tuple[int, ...]) -> int:
        """Return the length of the longest declared prefix that the prompt begins with, or 0."""
        for sequence in self._longest_first:
            if prompt_token_ids[: len(sequence)] == sequence:
                return len(sequence)
        return 0


def _read(path: str) -> str:
    """Return a file's text, which must not be empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"gateway.shared_prefixes: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"gateway.shared_prefixes: {path} is no UTF-8 text: {error}") from error
    if not text.strip():
        raise ConfigError(f"gateway.shared_prefixes: {path} is empty; allowed: a system message")
    return text


def _sequences(text: str, model_text: ModelText, template_time_ms: int) -> list[tuple[int, ...]]:
    """Return what prompts with this system message begin with, as chats and as plain text."""
    plain = [model_text.encode_prompt(text + following) for following in _FOLLOWING]
    if not model_text.has_chat_template:
        return [_common_start(plain)]
    chats = [
        model_text.encode_chat(
            [ChatTurn("system", text), ChatTurn("user", question)], template_time_ms
        )
        for question in _QUESTIONS
    ]
    return [_common_start(plain), _common_start(chats)]


def _common_start(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return what all begin with."""
    shared: list[int] = []
    for token_id, *others in zip(*sequences, strict=False):
        if any(other != token_id for other in others):
            break
        shared.append(token_id)
    return tuple(shared)
