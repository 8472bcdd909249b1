"""The chained hash of a full cache block: the same bytes on every machine (contracts, section 4).

    h[-1] = H(lp(model_version_digest) + lp(adapter) + lp(kv_dtype) + u32le(block_size))
    h[i]  = H(h[i-1] + salt + u32le(token ids of block i))
    H     = blake2b, 16 bytes, person "rillgate-kv-1";  lp = u32le length, then the bytes

Never Python's `hash()`: it differs from process to process. A chain over 32k tokens takes about
0.8 ms.
"""

import struct
from collections.abc import Iterator, Sequence
from hashlib import blake2b

HASH_SCHEME = "blake2b-16/1"
"""What replicas announce; gateways compare it."""

_DIGEST_BYTES = 16
_PERSON = b"rillgate-kv-1"
_EMPTY = blake2b(digest_size=_DIGEST_BYTES, person=_PERSON)
"""Copied, never updated: a copy takes two thirds of the time of a new one with its keywords."""


def _length_prefixed(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data


def root_hash(
    model_version_digest: str, kv_dtype: str, block_size_tokens: int, adapter: str = ""
) -> bytes:
    """Return h[-1], which everything that shares blocks must share (16 bytes)."""
    data = (
        _length_prefixed(model_version_digest)
        + _length_prefixed(adapter)
        + _length_prefixed(kv_dtype)
        + struct.pack("<I", block_size_tokens)
    )
    return blake2b(data, digest_size=_DIGEST_BYTES, person=_PERSON).digest()


def block_hash(parent: bytes, salt: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the hash (16 bytes) of one full block that follows `parent`; `salt` has 16 bytes."""
    return next(chained_hashes(parent, (salt,), token_ids))


def chained_hashes(
    parent: bytes, salts: Sequence[bytes], token_ids: Sequence[int]
) -> Iterator[bytes]:
    """Iterate over the hashes of full blocks that follow `parent`, one per salt.

    The tokens are packed once: packing block by block takes longer than hashing.
    """
    data = struct.pack(f"<{len(token_ids)}I", *token_ids)
    num_bytes = len(data) // len(salts)
    for i, salt in enumerate(salts):
        block = data[i * num_bytes : (i + 1) * num_bytes]
        hashed = _EMPTY.copy()
        hashed.update(parent + salt + block)
        parent = hashed.digest()
        yield parent
