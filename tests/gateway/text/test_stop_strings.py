"""Stop strings against the obvious search, in any cut of the text."""

from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rillgate_server.gateway.text.stop_strings import StopAutomaton, StopMatcher

letters = st.text(alphabet="ab", min_size=1, max_size=5)


@dataclass(frozen=True)
class Found:
    """What a reader of the whole text would say."""

    text: str
    stop_string: str | None


def search(text: str, stop_strings: list[str], num_unarmed: int = 0) -> Found:
    """Try every end, and for each the match that starts first."""
    for end in range(num_unarmed + 1, len(text) + 1):
        matches = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            return Found(text[: end - len(longest)], longest)
    return Found(text, None)


def longest_possible_beginning(text: str, stop_strings: list[str]) -> int:
    """Return the length of the longest suffix that some stop string goes on from."""
    return max(
        (
            length
            for length in range(len(text) + 1)
            for stop in stop_strings
            if length < len(stop) and stop.startswith(text[len(text) - length :])
        ),
        default=0,
    )


def run(stop_strings: list[str], pieces: list[str]) -> Found:
    """Push pieces up to a match, then finish."""
    matcher = StopMatcher(StopAutomaton(stop_strings))
    text = ""
    for piece in pieces:
        scan = matcher.push(piece)
        text += scan.text
        if scan.stop_string is not None:
            return Found(text, scan.stop_string)
    return Found(text + matcher.finish(), None)


@settings(max_examples=400, deadline=None)
@given(
    stop_strings=st.lists(letters, min_size=1, max_size=4),
    pieces=st.lists(st.text(alphabet="abc", max_size=6), max_size=8),
)
@example(stop_strings=["abab", "b"], pieces=["aba", "b"])
@example(stop_strings=["bb", "abb"], pieces=["a", "b", "b"])
@example(stop_strings=["aab"], pieces=["aaaaab"])
def test_any_cut_finds_what_the_whole_text_holds(
    stop_strings: list[str], pieces: list[str]
) -> None:
    """The first to complete wins; of two that complete together, the longer."""
    assert run(stop_strings, pieces) == search("".join(pieces), stop_strings)


@settings(max_examples=300, deadline=None)
@given(
    stop_strings=st.lists(letters, min_size=1, max_size=4),
    text=st.text(alphabet="abc", max_size=20),
)
def test_just_what_may_begin_a_stop_string_is_withheld(stop_strings: list[str], text: str) -> None:
    """No character of a match gets out, and no other is kept back."""
    matcher = StopMatcher(StopAutomaton(stop_strings))
    shown = ""
    for end, character in enumerate(text, start=1):
        scan = matcher.push(character)
        shown += scan.text
        if scan.stop_string is not None:
            break
        num_withheld = longest_possible_beginning(text[:end], stop_strings)
        assert shown == text[: end - num_withheld]


@settings(max_examples=300, deadline=None)
@given(
    stop_strings=st.lists(letters, min_size=1, max_size=4),
    unarmed=st.text(alphabet="abc", max_size=10),
    armed=st.text(alphabet="abc", max_size=10),
)
@example(stop_strings=["aa"], unarmed="aa", armed="a")
def test_a_match_that_completes_unarmed_is_text(
    stop_strings: list[str], unarmed: str, armed: str
) -> None:
    """But its end may begin a match that completes armed."""
    matcher = StopMatcher(StopAutomaton(stop_strings))
    first = matcher.push(unarmed, is_armed=False)
    assert first.stop_string is None
    assert first.text == unarmed[: len(unarmed) - longest_possible_beginning(unarmed, stop_strings)]
    second = matcher.push(armed)
    text = first.text + second.text
    if second.stop_string is None:
        text += matcher.finish()
    assert Found(text, second.stop_string) == search(
        unarmed + armed, stop_strings, num_unarmed=len(unarmed)
    )


@pytest.mark.parametrize(
    ("stop_strings", "text", "kept", "stop_string"),
    [
        (["\n\nUser:"], "fine.\n\nUser: hi", "fine.", "\n\nUser:"),
        ([".", "..."], "so...", "so", "."),
        (["abcd", "bc"], "abcd", "a", "bc"),
        (["😀"], "a😀b", "a", "😀"),
        (["]", "^", "-"], "a-b]", "a", "-"),
        (["x"], "nothing", "nothing", None),
    ],
)
def test_stop_strings_as_people_write_them(
    stop_strings: list[str], text: str, kept: str, stop_string: str | None
) -> None:
    """Several of them, one inside another, and characters that mean something to a search."""
    assert run(stop_strings, list(text)) == Found(kept, stop_string)
    assert run(stop_strings, [text]) == Found(kept, stop_string)


def test_the_end_of_a_match_is_given_within_the_scanned_piece() -> None:
    """From it the assembler finds the token that completes the match."""
    matcher = StopMatcher(StopAutomaton(["END"]))
    assert matcher.push("the E").end == 0
    assert matcher.push("ND of it").end == 2
