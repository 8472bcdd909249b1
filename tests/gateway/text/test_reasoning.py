"""Reasoning and answer against a split of the whole text, in any cut."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rillgate_server.gateway.text.reasoning import ReasoningSplitter, SplitText
from tests.gateway.text.references import split_whole

pieces_of_text = st.lists(
    st.one_of(
        st.sampled_from(
            ["<think>", "</think>", "<", "</", "<th", "think>", ">", "</think", "\n", "\n\n", " "]
        ),
        st.text(alphabet="ab \n<", max_size=4),
    ),
    max_size=10,
)


def run(pieces: list[str], *, starts_in_reasoning: bool) -> SplitText:
    """Push pieces, then finish."""
    splitter = ReasoningSplitter(starts_in_reasoning=starts_in_reasoning)
    settled = [*map(splitter.push, pieces), splitter.finish()]
    return SplitText(
        "".join(one.reasoning_text for one in settled), "".join(one.answer_text for one in settled)
    )


@settings(max_examples=600, deadline=None)
@given(pieces=pieces_of_text, starts_in_reasoning=st.booleans())
@example(pieces=["\n", "</thi", "nk>\n", "\n", "a"], starts_in_reasoning=True)
@example(pieces=["a\n", "\n<", "/think>"], starts_in_reasoning=True)
@example(pieces=["a\n", "\n<", "/thing"], starts_in_reasoning=True)
@example(pieces=[" \n<thi"], starts_in_reasoning=False)
def test_any_cut_gives_the_texts_of_the_whole(pieces: list[str], starts_in_reasoning: bool) -> None:
    """Tags, halves of tags and newlines fall anywhere."""
    text = "".join(pieces)
    expected = split_whole(text, starts_in_reasoning=starts_in_reasoning)
    assert run(pieces, starts_in_reasoning=starts_in_reasoning) == expected
    assert run(list(text), starts_in_reasoning=starts_in_reasoning) == expected


@settings(max_examples=300, deadline=None)
@given(pieces=pieces_of_text, starts_in_reasoning=st.booleans(), more=st.text("<think>/\na"))
def test_what_is_shown_stands_whatever_comes(
    pieces: list[str], starts_in_reasoning: bool, more: str
) -> None:
    """The texts so far are beginnings of the texts of every continuation."""
    splitter = ReasoningSplitter(starts_in_reasoning=starts_in_reasoning)
    shown = [splitter.push(piece) for piece in pieces]
    final = split_whole("".join(pieces) + more, starts_in_reasoning=starts_in_reasoning)
    assert final.reasoning_text.startswith("".join(one.reasoning_text for one in shown))
    assert final.answer_text.startswith("".join(one.answer_text for one in shown))


@pytest.mark.parametrize(
    ("text", "starts_in_reasoning", "reasoning", "answer"),
    [
        ("We add.\n</think>\n\n3", True, "We add.", "3"),
        ("\n<think>\nWe add.\n</think>\n\n3", False, "We add.", "3"),
        ("<think>\n\n</think>\n\n3", False, "", "3"),
        ("<think>\nagain</think>3", True, "again", "3"),
        ("3 is the answer.\n", False, "", "3 is the answer.\n"),
        ("\n 3", False, "", "\n 3"),
        ("We never stop\n", True, "We never stop\n", ""),
        ("Use <think> tags", False, "", "Use <think> tags"),
        ("a</think>b</think>c <think>d", True, "a", "b</think>c <think>d"),
        ("  indented\n</think>\n  code", True, "  indented", "  code"),
        ("a\n\nb\n\n\n</think>c\n", True, "a\n\nb", "c\n"),
    ],
)
def test_answers_as_models_give_them(
    text: str, starts_in_reasoning: bool, reasoning: str, answer: str
) -> None:
    """R1 behind a template that opens the tag, older templates, and models that do not reason."""
    for pieces in ([text], list(text)):
        split = run(pieces, starts_in_reasoning=starts_in_reasoning)
        assert split == SplitText(reasoning, answer)


def test_plain_text_is_never_withheld() -> None:
    """Only what may be a tag, or newlines before one, waits."""
    splitter = ReasoningSplitter(starts_in_reasoning=True)
    assert splitter.push("a") == SplitText("a", "")
    assert splitter.push("b\n") == SplitText("b", "")
    assert splitter.push("c <") == SplitText("\nc ", "")
    assert splitter.push("/b> d") == SplitText("</b> d", "")
    assert splitter.push("</think>\n") == SplitText("", "")
    assert splitter.push("e\n") == SplitText("", "e\n")
    assert splitter.push("<") == SplitText("", "<")
