"""Turns token ids into text as they come, never half a character.

Owns the bytes of an unfinished character. Does not know stop strings, reasoning or requests.

E(ids), the text after the ids were pushed, is defined on their list alone:

    bytes(ids)  the ids' pieces joined (token_pieces)
    E(ids)      bytes(ids) read as UTF-8, less a tail that is a proper beginning of a character,
                what cannot be UTF-8 replaced by U+FFFD (one per maximal part, as the Unicode
                standard recommends and Python and Rust do), less the decoder's leading spaces
    finish()    the tail, as one U+FFFD

So E(ids) is a prefix of E(ids + more), pushes may be grouped in any way, and E(all) + finish() is
what decoding all ids at once gives. Linear time.
"""

import codecs
from collections.abc import Sequence

from rillgate_server.gateway.text.token_pieces import TokenPieces

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one growing list of token ids."""

    # Mutable state: _utf8 (bytes of an unfinished character), _has_begun (some id added bytes),
    # _num_spaces_to_strip (left of the decoder's leading spaces).

    def __init__(self, pieces: TokenPieces) -> None:
        """Begin with no ids."""
        self._pieces = pieces.pieces
        self._first_pieces = pieces.first_pieces
        self._utf8 = _new_utf8_decoder(errors="replace")
        self._has_begun = False
        self._num_spaces_to_strip = pieces.num_stripped_spaces

    def __repr__(self) -> str:
        """Show the held bytes."""
        return f"Detokenizer(held={self._utf8.getstate()[0]!r}, has_begun={self._has_begun})"

    def push(self, token_ids: Sequence[int]) -> str:
        """Append ids (not negative); return E(all) minus E(before)."""
        pieces = self._pieces
        num_pieces = len(pieces)
        if not self._has_begun and self._first_pieces:
            data = self._join_from_start(token_ids)
        else:
            data = b"".join([pieces[i] if i < num_pieces else b"" for i in token_ids])
        return self._stripped(self._utf8.decode(data))

    def finish(self) -> str:
        """Return what was held back; nothing may be pushed after it."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def copy(self) -> "Detokenizer":
        """Return an independent detokenizer in the same state."""
        twin = object.__new__(Detokenizer)
        twin._pieces = self._pieces
        twin._first_pieces = self._first_pieces
        twin._utf8 = _new_utf8_decoder(errors="replace")
        twin._utf8.setstate(self._utf8.getstate())
        twin._has_begun = self._has_begun
        twin._num_spaces_to_strip = self._num_spaces_to_strip
        return twin

    def _join_from_start(self, token_ids: Sequence[int]) -> bytes:
        """Join pieces, with the first id that adds anything in its other form."""
        parts: list[bytes] = []
        for token_id in token_ids:
            piece = self._pieces[token_id] if token_id < len(self._pieces) else b""
            if piece and not self._has_begun:
                self._has_begun = True
                piece = self._first_pieces.get(token_id, piece)
            parts.append(piece)
        return b"".join(parts)

    def _stripped(self, text: str) -> str:
        """Drop what is left to drop of the text's leading spaces."""
        if not self._num_spaces_to_strip or not text:
            return text
        num_leading = len(text) - len(text.lstrip(" "))
        num_stripped = min(num_leading, self._num_spaces_to_strip)
        # A first character that is no space ends the stripping for good.
        is_over = num_leading < len(text)
        self._num_spaces_to_strip = 0 if is_over else self._num_spaces_to_strip - num_stripped
        return text[num_stripped:]


def decode(pieces: TokenPieces, token_ids: Sequence[int]) -> str:
    """Return the whole text of a list of ids at once."""
    detokenizer = Detokenizer(pieces)
    return detokenizer.push(token_ids) + detokenizer.finish()
