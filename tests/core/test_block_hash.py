"""The block hash: test vectors, and what it must depend on."""

from rillgate_server.core.block_hash import block_hash, root_hash

SALT = bytes(range(16))


def test_the_chain_gives_the_committed_vectors() -> None:
    """The same bytes on every machine and in every release of this scheme."""
    root = root_hash("model-digest", "bfloat16", 4)
    first = block_hash(root, bytes(16), (1, 2, 3, 4))
    second = block_hash(first, SALT, (5, 6, 7, 2**32 - 1))
    assert [h.hex() for h in (root, first, second)] == [
        "57daf6610e7f7f2a9a0dd4b8082b67b9",
        "3d548b457894988c1c38ac23c7366ce0",
        "dd1031ff89d388c4b2c80987af790d44",
    ]


def test_every_input_changes_the_hash() -> None:
    """Version, adapter, cache type, block size, parent, salt and tokens each separate blocks."""
    roots = {
        root_hash("a", "float32", 16),
        root_hash("b", "float32", 16),
        root_hash("a", "int8", 16),
        root_hash("a", "float32", 32),
        root_hash("a", "float32", 16, adapter="x"),
    }
    assert len(roots) == 5
    root = root_hash("a", "float32", 2)
    hashes = {
        block_hash(root, bytes(16), (1, 2)),
        block_hash(root, SALT, (1, 2)),
        block_hash(root, bytes(16), (2, 1)),
        block_hash(block_hash(root, bytes(16), (0, 0)), bytes(16), (1, 2)),
    }
    assert len(hashes) == 4


def test_length_prefixes_keep_neighbouring_texts_apart() -> None:
    """("ab", "c") and ("a", "bc") are different roots."""
    assert root_hash("ab", "c", 16) != root_hash("a", "bc", 16)
