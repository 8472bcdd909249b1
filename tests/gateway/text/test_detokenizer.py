"""The text of growing id lists: against `decode`, in any grouping, never half a character."""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from rillgate_server.errors import CheckpointError
from rillgate_server.gateway.text.detokenizer import Detokenizer, decode
from rillgate_server.gateway.text.token_pieces import TokenPieces
from rillgate_server.gateway.text.tokenizer import TextTokenizer, TokenizerFiles
from tests.gateway.text.checkpoints import CORPUS

ALL_KINDS = ("demo", "qwen2", "llama3", "llama2", "unigram", "word")

unchecked = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@cache
def load(folder: Path) -> tuple[Tokenizer, TokenPieces]:
    """Return the library's tokenizer and our table without the special tokens."""
    tokenizer = TextTokenizer(TokenizerFiles.read(folder))
    pieces = tokenizer.all_pieces.without(tokenizer.special_token_ids)
    return Tokenizer.from_file(str(folder / "tokenizer.json")), pieces


def groups_of(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """Cut a list at the given places (taken modulo its length)."""
    places = sorted({cut % (len(ids) + 1) for cut in cuts})
    return [ids[a:b] for a, b in zip([0, *places], [*places, len(ids)], strict=True)]


def has_broken_byte_run(tokenizer: Tokenizer, ids: list[int]) -> bool:
    """Say whether a run of <0x…> tokens is not UTF-8: there `decode` replaces all of it."""
    run = b""
    for token_id in [*ids, -1]:
        token = tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if token and token.startswith("<0x"):
            run += bytes.fromhex(token[3:5])
        elif token not in ("<s>", "</s>", "<unk>"):  # decode leaves these out, so runs join
            if run.decode(errors="ignore").encode() != run:
                return True
            run = b""
    return False


@pytest.mark.parametrize("kind", ALL_KINDS)
@unchecked
@given(data=st.data())
def test_all_pushes_and_finish_give_what_decode_gives_at_once(
    checkpoint_dirs: dict[str, Path], kind: str, data: st.DataObject
) -> None:
    """Random ids, broken UTF-8, special ids and unknown ids among them, in random groups."""
    tokenizer, pieces = load(checkpoint_dirs[kind])
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 5), max_size=40))
    groups = groups_of(ids, data.draw(st.lists(st.integers(0, 100), max_size=6)))
    detokenizer = Detokenizer(pieces)
    text = "".join([detokenizer.push(group) for group in groups]) + detokenizer.finish()
    assert text == decode(pieces, ids)
    if kind != "llama2" or not has_broken_byte_run(tokenizer, ids):
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ALL_KINDS)
@unchecked
@given(data=st.data())
def test_the_text_so_far_depends_on_the_ids_alone(
    checkpoint_dirs: dict[str, Path], kind: str, data: st.DataObject
) -> None:
    """At each id, one at a time and all at once give the same text, and it only ever grows."""
    tokenizer, pieces = load(checkpoint_dirs[kind])
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=25))
    one_by_one, text = Detokenizer(pieces), ""
    for end, token_id in enumerate(ids, start=1):
        text += one_by_one.push([token_id])
        assert Detokenizer(pieces).push(ids[:end]) == text
        twin = one_by_one.copy()
        assert text + twin.finish() == decode(pieces, ids[:end])


@pytest.mark.parametrize("kind", ["demo", "qwen2", "llama3", "llama2"])
def test_a_character_of_several_tokens_comes_whole(
    checkpoint_dirs: dict[str, Path], kind: str
) -> None:
    """Nothing of 🦊 or 龘 shows before its last byte, and U+FFFD never does."""
    tokenizer, pieces = load(checkpoint_dirs[kind])
    text = "a 龘 b 🦊 ꙮ ý"
    detokenizer, shown = Detokenizer(pieces), ""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) > len(text)
    for token_id in ids:
        shown += detokenizer.push([token_id])
        assert text.startswith(shown)
    assert shown + detokenizer.finish() == text


@pytest.mark.parametrize("kind", ["qwen2", "llama3", "llama2"])
@pytest.mark.parametrize("text", CORPUS)
def test_real_text_comes_back(checkpoint_dirs: dict[str, Path], kind: str, text: str) -> None:
    """Encoding and decoding gives the text, leading spaces and all scripts included."""
    tokenizer, pieces = load(checkpoint_dirs[kind])
    assert decode(pieces, tokenizer.encode(text, add_special_tokens=False).ids) == text


@pytest.mark.parametrize(
    ("data", "shown", "rest"),
    [
        (b"\xe5\xa4", "", "\ufffd"),
        (b"\xe5\xa4A", "\ufffdA", ""),
        (b"\xffA\xc0\x80", "\ufffdA\ufffd\ufffd", ""),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd", ""),
        (b"\xf0\x9f\x91", "", "\ufffd"),
        (b"\xf4\x90\x80\x80", "\ufffd" * 4, ""),
        (b"\xe5\xa4\xa9\xe5", "天", "\ufffd"),
    ],
)
def test_only_a_tail_that_can_become_a_character_is_held(
    checkpoint_dirs: dict[str, Path], data: bytes, shown: str, rest: str
) -> None:
    """The bundled tokenizer's ids 0 to 255 are the bytes."""
    detokenizer = Detokenizer(load(checkpoint_dirs["demo"])[1])
    assert detokenizer.push(list(data)) == shown
    assert detokenizer.finish() == rest


def test_a_broken_byte_run_keeps_its_characters(checkpoint_dirs: dict[str, Path]) -> None:
    """Where `decode` turns 天 and the stray byte into U+FFFD, the stream has shown 天 already."""
    tokenizer, pieces = load(checkpoint_dirs["llama2"])
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[f"<0x{byte:02X}>"] for byte in b"\xe5\xa4\xa9\xff"]
    assert decode(pieces, ids) == "天\ufffd"
    assert tokenizer.decode(ids) == "\ufffd" * 4


@unchecked
@given(text=st.text(alphabet=" ab", max_size=8))
@example(text="   a")
def test_leading_spaces_are_stripped_over_several_pushes(
    checkpoint_dirs: dict[str, Path], text: str
) -> None:
    """A decoder that strips three spaces takes them from wherever the first ones come."""
    decoder = {
        "type": "Sequence",
        "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 3, "stop": 0}],
    }
    pieces = TokenPieces.compile(decoder, {0: " ", 1: "a", 2: "b", 3: ""})
    detokenizer = Detokenizer(pieces)
    shown = "".join(detokenizer.push([3, " ab".index(character)]) for character in text)
    num_leading = len(text) - len(text.lstrip(" "))
    assert shown == text[min(num_leading, 3) :]


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "CTC"},
        {"type": "Replace", "pattern": {"Regex": "x+"}, "content": ""},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]},
        {
            "type": "Sequence",
            "decoders": [
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 0, "stop": 1},
            ],
        },
        {"type": "Sequence"},
    ],
)
def test_a_decoder_of_another_kind_is_refused_at_load(decoder: dict[str, object]) -> None:
    """Better than text that is subtly wrong; the message shows the decoder and what there is."""
    with pytest.raises(CheckpointError, match="not supported; supported: ByteLevel"):
        TokenPieces.compile(decoder, {0: "a"})


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_follows_the_library(scheme: str) -> None:
    """The first token that says anything loses its ▁, unless the scheme is `never`."""
    tokens = {0: "▁a", 1: "▁", 2: "b▁c", 3: "▁▁d"}
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [[token, 0.0] for token in tokens.values()]}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}
    shout = {"type": "Replace", "pattern": {"String": "d"}, "content": "D!"}
    decoder = {"type": "Sequence", "decoders": [metaspace, shout]}
    tokenizer = Tokenizer.from_str(
        json.dumps({"version": "1.0", "added_tokens": [], "model": unigram, "decoder": decoder})
    )
    pieces = TokenPieces.compile(decoder, tokens)
    for ids in ([0], [1, 0], [2, 0], [3, 1, 2], [1], [99, 0, 0]):
        assert decode(pieces, ids) == tokenizer.decode(ids)
