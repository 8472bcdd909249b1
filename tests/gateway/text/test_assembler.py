"""The whole way from ids to what a caller reads: any cut, grouping and number of resumes."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rillgate_server.gateway.text.assembler import TextAssembler, TextDelta
from rillgate_server.gateway.text.detokenizer import decode
from rillgate_server.gateway.text.model_text import ModelText
from tests.gateway.text.checkpoints import DEMO
from tests.gateway.text.references import split_whole

load = cache(ModelText.load)
OPEN_PROMPT = (256, 259, 65, 260, 262, 10)
"""`…<｜Assistant｜><think>\\n`"""
PLAIN_PROMPT = (256, 65)
EOS = 257

unchecked = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

fragments = st.sampled_from(
    [
        "<think>",
        "</think>",
        "</thi",
        "<",
        "\n",
        "\n\n",
        "EN",
        "END",
        "D",
        "E",
        "天",
        "é",
        "a b",
        "🦊",
    ]
)
stop_lists = st.lists(
    st.sampled_from(["END", "E", "D\n", "天", "</think>", "\n\n", "a bEN", "ND"]), max_size=3
)


@dataclass(frozen=True)
class Request:
    """What E is a function of, beside the ids."""

    prompt: tuple[int, ...]
    stop_strings: tuple[str, ...]
    min_tokens: int

    def assembler(self, model_text: ModelText) -> TextAssembler:
        """Begin a choice."""
        return TextAssembler(model_text, self.prompt, self.stop_strings, self.min_tokens)


requests = st.builds(
    Request,
    prompt=st.sampled_from([OPEN_PROMPT, PLAIN_PROMPT]),
    stop_strings=stop_lists.map(tuple),
    min_tokens=st.integers(0, 8),
)


def joined(deltas: list[TextDelta]) -> TextDelta:
    """Add deltas up, as a caller does, up to the one that ends the choice."""
    text = reasoning_text = ""
    num_tokens = 0
    for delta in deltas:
        text += delta.text
        reasoning_text += delta.reasoning_text
        num_tokens += delta.num_tokens_used
        if delta.stop_string is not None:
            break
    stop_string = next((one.stop_string for one in deltas if one.stop_string is not None), None)
    return TextDelta(text, reasoning_text, num_tokens, stop_string)


def ids_of(data: st.DataObject, model_text: ModelText) -> list[int]:
    """Draw ids: of text with tags and stop strings in it, with broken bytes between."""
    text = "".join(data.draw(st.lists(fragments, max_size=8)))
    ids = model_text.encode_prompt("x" + text)
    for place, byte in data.draw(
        st.lists(
            st.tuples(st.integers(0, 40), st.integers(0, model_text.vocab_size - 1)), max_size=2
        )
    ):
        ids.insert(place, byte)
    return ids


def cut(ids: list[int], places: list[int]) -> list[list[int]]:
    """Cut a list at places, taken modulo its length."""
    cuts = sorted({place % (len(ids) + 1) for place in places})
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@pytest.mark.parametrize("kind", ["demo", "qwen2"])
@unchecked
@given(data=st.data(), request_=requests)
def test_any_grouping_gives_the_same_text_at_every_id(
    checkpoint_dirs: dict[str, Path], kind: str, data: st.DataObject, request_: Request
) -> None:
    """One by one, all at once, and in random groups: text, reasoning, stop string and count."""
    model_text = load(checkpoint_dirs[kind])
    ids = ids_of(data, model_text)
    one_by_one = request_.assembler(model_text)
    so_far = [TextDelta("", "", 0)]
    for end, token_id in enumerate(ids, start=1):
        so_far.append(one_by_one.push([token_id]))
        assert request_.assembler(model_text).push(ids[:end]) == joined(so_far)
    groups = cut(ids, data.draw(st.lists(st.integers(0, 60), max_size=5)))
    grouped = request_.assembler(model_text)
    deltas = [grouped.push(group) for group in groups]
    assert joined([*deltas, grouped.finish()]) == joined([*so_far, one_by_one.finish()])


@pytest.mark.parametrize("kind", ["demo", "qwen2"])
@unchecked
@given(data=st.data(), request_=requests)
def test_a_resumed_choice_gives_what_an_unbroken_one_gives(
    checkpoint_dirs: dict[str, Path], kind: str, data: st.DataObject, request_: Request
) -> None:
    """At each break the ids so far are replayed to a new assembler, and their delta is dropped."""
    model_text = load(checkpoint_dirs[kind])
    ids = ids_of(data, model_text)
    unbroken = request_.assembler(model_text)
    whole = joined([unbroken.push(ids), unbroken.finish()])
    received: list[TextDelta] = []
    assembler, given_ids = request_.assembler(model_text), list[int]()
    for group in cut(ids, data.draw(st.lists(st.integers(0, 60), max_size=5))):
        assembler = request_.assembler(model_text)
        assembler.push(given_ids)
        received.append(assembler.push(group))
        given_ids += group
        if received[-1].stop_string is not None:
            break
    assert joined([*received, assembler.finish()]) == whole


@unchecked
@given(data=st.data(), request_=requests)
@example(data=None, request_=Request(PLAIN_PROMPT, ("END",), 0))
def test_the_whole_is_decode_cut_at_the_first_match_and_split(
    data: st.DataObject | None, request_: Request
) -> None:
    """Against a search over the text of every beginning of the ids."""
    model_text = load(DEMO)
    ids = list(b"a E\xe5\xa4\xa9 END b") if data is None else ids_of(data, model_text)
    text, num_tokens, stop_string = _reference(model_text, ids, request_)
    assembler = request_.assembler(model_text)
    whole = joined([assembler.push(ids), assembler.finish()])
    assert (whole.num_tokens_used, whole.stop_string) == (num_tokens, stop_string)
    split = split_whole(text, starts_in_reasoning=request_.prompt == OPEN_PROMPT)
    assert (whole.reasoning_text, whole.text) == (split.reasoning_text, split.answer_text)


def _begins_a_character(tail: bytes) -> bool:
    """Say whether some bytes make one character of the tail."""
    for fill in b"\x80\x8f\x90\x9f\xa0\xbf":
        for num_more in (1, 2, 3):
            try:
                if len((tail + bytes([fill] * num_more)).decode()) == 1:
                    return True
            except UnicodeDecodeError:
                continue
    return False


def _reference(
    model_text: ModelText, ids: list[int], request: Request
) -> tuple[str, int, str | None]:
    """Return (text before the match, tokens up to it, the match), trying one more token a time."""
    seen_characters = 0
    for num_tokens in range(1, len(ids) + 1):
        data = b"".join(model_text.pieces.pieces[token_id] for token_id in ids[:num_tokens])
        num_held = max(
            n for n in range(min(len(data), 3) + 1) if n == 0 or _begins_a_character(data[-n:])
        )
        shown = data[: len(data) - num_held].decode(errors="replace")
        for end in range(seen_characters + 1, len(shown) + 1):
            matches = [stop for stop in request.stop_strings if shown[:end].endswith(stop)]
            if matches and num_tokens >= request.min_tokens:
                longest = max(matches, key=len)
                return shown[: end - len(longest)], num_tokens, longest
        seen_characters = len(shown)
    return decode(model_text.pieces, ids), len(ids), None


def test_a_stop_string_over_several_tokens_never_leaks_its_beginning() -> None:
    """Every byte is a token here; the E waits, and so does EN."""
    assembler = TextAssembler(load(DEMO), PLAIN_PROMPT, ["END"])
    deltas = [assembler.push([byte]) for byte in b"abENEND z"]
    assert [one.text for one in deltas] == ["a", "b", "", "", "EN", "", "", "", ""]
    assert [one.num_tokens_used for one in deltas] == [1] * 7 + [0, 0]
    assert deltas[6].stop_string == "END"
    assert assembler.finish() == TextDelta("", "", 0, "END")


def test_a_match_before_min_tokens_is_text() -> None:
    """With min_tokens 4, the match that the third token completes does not count."""
    assert TextAssembler(load(DEMO), PLAIN_PROMPT, ["b"], 4).push(list(b"abbb")) == TextDelta(
        "abb", "", 4, "b"
    )
    assert TextAssembler(load(DEMO), PLAIN_PROMPT, ["b"], 3).push(list(b"abbb")) == TextDelta(
        "ab", "", 3, "b"
    )


def test_stop_strings_are_looked_for_in_the_reasoning_and_its_tags() -> None:
    """A stop string in the reasoning ends the choice without an answer; a tag can be one."""
    ids = [*b"so 3\n", 263, *b"\n\n3"]
    assert TextAssembler(load(DEMO), OPEN_PROMPT, ["3"]).push(ids) == TextDelta("", "so ", 4, "3")
    by_tag = TextAssembler(load(DEMO), OPEN_PROMPT, ["</think>"])
    assert by_tag.push(ids) == TextDelta("", "so 3\n", 6, "</think>")


def test_reasoning_and_answer_come_apart() -> None:
    """The prompt opened the tag; the model's special tokens give no text."""
    assembler = TextAssembler(load(DEMO), OPEN_PROMPT)
    assert assembler.push(list(b"1+2\n")) == TextDelta("", "1+2", 4)
    assert assembler.push([263, 10, 10, 51, EOS]) == TextDelta("3", "", 5)
    assert assembler.finish() == TextDelta("", "", 0)


def test_silent_ids_give_no_text() -> None:
    """As a request's own stop ids; they count as tokens."""
    assembler = TextAssembler(load(DEMO), PLAIN_PROMPT, ["bc"], silent_token_ids=frozenset(b"x"))
    assert assembler.push(list(b"axbxcx")) == TextDelta("a", "", 5, "bc")


def test_an_unfinished_character_is_shown_as_replaced_at_the_end() -> None:
    """What was withheld for a stop string comes before it."""
    assembler = TextAssembler(load(DEMO), PLAIN_PROMPT, ["END"])
    assert assembler.push([*b"aEN", 0xE5]) == TextDelta("a", "", 4)
    assert assembler.finish() == TextDelta("EN\ufffd", "", 0)
