"""Compiles a tokenizer's decoder into one table: token id to the bytes that it stands for.

Owns the meaning of `decoder` in tokenizer.json for the kinds that decoder-only models use. Does not
know streams, reasoning or stop strings.

Decoding a token list is then joining bytes and reading them as UTF-8, which makes it a function
that can be cut anywhere. tokenizers' own DecodeStream was rejected: it decodes a window of tokens
twice per step and gives up with an error where a byte run turns out to be no UTF-8.

    ByteLevel                        every character is one byte (GPT-2, Qwen, Llama 3, DeepSeek)
    Replace, ByteFallback, Fuse, Strip   text, with single bytes spelt <0xE4> (Llama 2, Mistral)
    Metaspace                        text, ▁ is a space, and the first token's ▁ is nothing
    none                             words, joined by spaces

The text equals tokenizers' `decode` but for one case: a run of <0x…> tokens that is not UTF-8 as
a whole. There `decode` turns the whole run into U+FFFD, characters that a stream has shown long ago
included; here the characters stand and only the broken bytes are replaced.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from rillgate_server.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = " "

Json = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class TokenPieces:
    """What each token id adds to the text, as bytes."""

    pieces: tuple[bytes, ...]
    """Indexed by token id; ids that the tokenizer lacks add nothing, as do those past the end."""
    first_pieces: Mapping[int, bytes]
    """Ids that add something else when they are the first to add anything."""
    num_stripped_spaces: int
    """Spaces dropped at the very start of the text, if they are there."""

    def without(self, token_ids: frozenset[int]) -> "TokenPieces":
        """Return a table in which these ids add nothing."""
        pieces = list(self.pieces)
        for token_id in token_ids:
            if 0 <= token_id < len(pieces):
                pieces[token_id] = b""
        return replace(self, pieces=tuple(pieces))

    @classmethod
    def compile(cls, decoder: Json | None, tokens: Mapping[int, str]) -> "TokenPieces":
        """Build the table from tokenizer.json's `decoder` and {token id: token}.

        Raises CheckpointError for a decoder whose text depends on more than the tokens' bytes.
        """
        plan = _DecoderPlan.of(decoder)
        pieces = [b""] * (max(tokens, default=-1) + 1)
        first_pieces: dict[int, bytes] = {}
        for token_id, token in tokens.items():
            pieces[token_id] = plan.piece(token)
            if plan.first_drops is not None and plan.first_drops in token:
                first_pieces[token_id] = plan.piece(token.replace(plan.first_drops, ""))
        return cls(tuple(pieces), first_pieces, plan.num_stripped_spaces)


@dataclass(frozen=True, slots=True)
class _DecoderPlan:
    """A decoder, taken apart."""

    text_steps: tuple[Callable[[str], str], ...] = ()
    """Applied to a token's text, in order."""
    is_byte_level: bool = False
    has_byte_fallback: bool = False
    first_drops: str | None = None
    """A character that the first token loses."""
    num_stripped_spaces: int = 0

    @classmethod
    def of(cls, decoder: Json | None) -> "_DecoderPlan":
        if decoder is None:
            # Joined by spaces: each token brings one, and the first is taken back.
            return cls(text_steps=(_prefix_space,), num_stripped_spaces=1)
        plan, is_fused = cls(), False
        for part in _parts(decoder):
            plan = plan._with(part, is_fused)
            is_fused = is_fused or part.get("type") in ("Fuse", "ByteLevel")
        return plan

    def _with(self, part: Json, is_fused: bool) -> "_DecoderPlan":
        """Return the plan with one more decoder behind it; `is_fused`: it sees the whole text."""
        kind = part.get("type")
        if kind == "Fuse" or (kind == "ByteFallback" and not is_fused):
            return self if kind == "Fuse" else replace(self, has_byte_fallback=True)
        if kind == "ByteLevel" and not (is_fused or self.text_steps):
            return replace(self, is_byte_level=True)
        if kind == "Metaspace" and not is_fused:
            mark = str(part.get("replacement", "▁"))
            drops = part.get("prepend_scheme", "always") != "never"
            return replace(
                self,
                text_steps=(*self.text_steps, lambda text: text.replace(mark, _SPACE)),
                first_drops=mark if drops and not self.text_steps else None,
            )
        if kind == "Replace" and not is_fused:
            old, new = _replacement(part)
            return replace(self, text_steps=(*self.text_steps, lambda text: text.replace(old, new)))
        if kind == "Strip" and is_fused and part.get("content") == _SPACE and not part.get("stop"):
            start = part.get("start", 0)
            if isinstance(start, int):
                return replace(self, num_stripped_spaces=self.num_stripped_spaces + start)
        raise _unsupported(part)

    def piece(self, token: str) -> bytes:
        """Return the bytes of one token."""
        if self.is_byte_level:
            return _byte_level_bytes(token)
        for step in self.text_steps:
            token = step(token)
        if self.has_byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        return token.encode()


def _parts(decoder: Json) -> list[Json]:
    """Return a decoder's parts in order, sequences flattened."""
    if decoder.get("type") != "Sequence":
        return [decoder]
    inner = decoder.get("decoders")
    if not isinstance(inner, list):
        raise _unsupported(decoder)
    return [part for one in inner for part in _parts(one)]


def _replacement(part: Json) -> tuple[str, str]:
    """Return (old, new) of a Replace decoder of a plain string."""
    pattern, content = part.get("pattern"), part.get("content")
    if isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
        return pattern["String"], str(content)
    raise _unsupported(part)


def _unsupported(part: Json) -> CheckpointError:
    return CheckpointError(
        f"tokenizer.json: the decoder {str(dict(part))[:200]} is not supported; supported: "
        "ByteLevel, Metaspace, none, and sequences of Replace (of a string), ByteFallback, Fuse, "
        "Strip (of leading spaces, after Fuse)"
    )


def _prefix_space(token: str) -> str:
    return _SPACE + token


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's spelling of the bytes: printable Latin-1 as itself, the rest from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTE_ALPHABET = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    """Return a byte-level token's bytes; with other characters in it (added tokens) it is text."""
    try:
        return bytes(map(_BYTE_ALPHABET.__getitem__, token))
    except KeyError:
        return token.encode()
