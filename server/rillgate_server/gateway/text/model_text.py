"""A checkpoint's text side: prompts to ids, ids to text, and how it likes to be sampled.

Owns the putting together of a checkpoint's text files. Does not know weights, requests, streams.
"""

from collections.abc import Sequence
from pathlib import Path

from rillgate_server.errors import InvalidRequest
from rillgate_server.gateway.text.chat_template import ChatTemplate, ChatTurn
from rillgate_server.gateway.text.detokenizer import decode
from rillgate_server.gateway.text.generation_defaults import (
    GENERATION_FILE,
    GenerationDefaults,
)
from rillgate_server.gateway.text.reasoning import CLOSING_TAG, OPENING_TAG
from rillgate_server.gateway.text.token_pieces import TokenPieces
from rillgate_server.gateway.text.tokenizer import TextTokenizer, TokenizerFiles, read_json

_TAIL_TOKENS = 32
"""Tokens at a prompt's end that are searched for a <think> that is spelt in several tokens."""


class ModelText:
    """One checkpoint's text side. Immutable once loaded; any thread."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        chat_template: ChatTemplate | None,
        generation_defaults: GenerationDefaults,
        vocab_size: int,
    ) -> None:
        """Put the parts together; `vocab_size`: of the model, which may exceed the tokenizer's."""
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self.generation_defaults = generation_defaults
        self.vocab_size = vocab_size
        self._opening_id = tokenizer.token_id(OPENING_TAG)
        self._closing_id = tokenizer.token_id(CLOSING_TAG)
        # The tags are text even where they are special tokens: the reasoning is split by them.
        self._silent_ids = tokenizer.special_token_ids - {self._opening_id, self._closing_id}
        self._pieces = tokenizer.all_pieces.without(self._silent_ids)

    @classmethod
    def load(cls, model_dir: Path) -> "ModelText":
        """Read a checkpoint's text files; raises CheckpointError for missing or broken ones."""
        files = TokenizerFiles.read(model_dir)
        tokenizer = TextTokenizer(files)
        template = None
        if files.chat_template is not None:
            template = ChatTemplate(files.chat_template, tokenizer.special_tokens)
        vocab_size = read_json(model_dir / "config.json").get("vocab_size")
        if not isinstance(vocab_size, int):
            vocab_size = tokenizer.vocab_size
        defaults = GenerationDefaults.of(read_json(model_dir / GENERATION_FILE), vocab_size)
        return cls(tokenizer, template, defaults, vocab_size)

    @property
    def tokenizer_digest(self) -> str:
        """sha256 of tokenizer.json, in hex."""
        return self._tokenizer.digest

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can be called."""
        return self._chat_template is not None

    @property
    def pieces(self) -> TokenPieces:
        """The bytes behind each id, special tokens silent but for the reasoning's tags."""
        return self._pieces

    def encode_prompt(self, text: str) -> list[int]:
        """Return a prompt's ids, with the special tokens that the tokenizer adds.

        Raises InvalidRequest for a prompt without tokens of its own.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=True) if text else []
        if not ids:
            raise InvalidRequest.of("prompt", "empty", "text of at least one token")
        return ids

    def encode_chat(self, messages: Sequence[ChatTurn], template_time_ms: int) -> list[int]:
        """Return a conversation's ids, up to where the assistant's answer begins.

        The template writes the special tokens, so none are added. Raises InvalidRequest when the
        checkpoint has no template, and for what the template refuses.
        """
        if self._chat_template is None:
            raise InvalidRequest.of(
                "chat",
                f"{len(messages)} messages",
                "prompt or token_ids (this checkpoint has no chat template)",
            )
        text = self._chat_template.render(messages, template_time_ms)
        ids = self._tokenizer.encode(text, add_special_tokens=False, field="chat.messages")
        if not ids:
            raise InvalidRequest.of(
                "chat.messages", "rendered to nothing", "messages of at least one token"
            )
        return ids

    def decode(self, token_ids: Sequence[int], keep_special_tokens: bool) -> str:
        """Return the text of ids; raises InvalidRequest for one outside the vocabulary."""
        for index, token_id in enumerate(token_ids):
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest.of(
                    f"token_ids[{index}]", token_id, f"token ids below {self.vocab_size}"
                )
        return decode(
            self._tokenizer.all_pieces if keep_special_tokens else self._pieces, token_ids
        )

    def starts_in_reasoning(self, prompt_token_ids: Sequence[int]) -> bool:
        """Say whether the prompt's end leaves <think> open, so that the answer goes on reasoning.

        With a token for the tag: the turn under way (back to the last other special token) opens
        it and does not close it. A user's <think> lies before the assistant's mark, and so does
        not count. Without: the text ends with the tag, whitespace aside.
        """
        if self._opening_id is None:
            tail = decode(self._tokenizer.all_pieces, prompt_token_ids[-_TAIL_TOKENS:])
            return tail.rstrip().endswith(OPENING_TAG)
        for token_id in reversed(prompt_token_ids):
            if token_id == self._opening_id:
                return True
            if token_id == self._closing_id or token_id in self._silent_ids:
                return False
        return False
