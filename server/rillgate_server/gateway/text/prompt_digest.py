"""The digest of a prompt's token ids, which a continuation carries (contracts, section 3)."""

import struct
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_BYTES = 16


def prompt_digest(token_ids: Sequence[int]) -> bytes:
    """Return blake2b, 16 bytes, of the ids as little-endian 32-bit words: the same everywhere."""
    words = struct.pack(f"<{len(token_ids)}I", *token_ids)
    return blake2b(words, digest_size=DIGEST_BYTES).digest()
