"""The contract E (contracts, section 3): what a caller has depends on its tokens alone.

Any cut, any grouping of tokens into events and messages, any number of failovers inside the gateway
and of resumptions by the client give the same text, reasoning, log-probabilities, usage and finish
reason. Over the whole way without sockets, with random tokens: half characters, halves of stop
strings and reasoning tags are everywhere in them.
"""

import functools
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rillgate.types import FinishReason
from rillgate_proto.v1 import inference_pb2 as pb
from rillgate_server.gateway.generation import Generation
from tests.end_to_end.faulty_gateway import FAULTS, faulty
from tests.gateway.path_without_sockets import SEED, Breaks, Script, interesting_ids, play
from tests.gateway.stack import request, served_model

MAX_TOKENS = 40
_SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@functools.cache
def ids() -> Sequence[int]:
    """The tokens that answers are made of."""
    return interesting_ids("abthe <>/ink.")


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    """Draw a request and what the engine makes of it."""
    num_choices = draw(st.integers(1, 3))
    max_tokens = draw(st.integers(1, MAX_TOKENS))
    min_tokens = draw(st.one_of(st.just(0), st.integers(0, max_tokens)))
    eos = served_model().spec.eos_token_ids
    tokens = []
    for _ in range(num_choices):
        made = draw(st.lists(st.sampled_from(ids()), min_size=max_tokens, max_size=max_tokens))
        # The engine bans what would end a choice before min_tokens.
        tokens.append(
            tuple(
                ids()[0] if index < min_tokens and it in eos else it
                for index, it in enumerate(made)
            )
        )
    stops = draw(st.lists(st.text("abthe <>k.", min_size=1, max_size=4), max_size=3))
    message = request(
        tokens=draw(st.lists(st.sampled_from(ids()), min_size=2, max_size=6)),
        sampling__n=num_choices,
        sampling__seed=SEED,
        sampling__temperature=1,
        sampling__presence_penalty=0.5,
        stopping__max_tokens=max_tokens,
        stopping__min_tokens=min_tokens,
        stopping__ignore_eos=draw(st.booleans()),
        stopping__stop_strings=stops,
    )
    if draw(st.booleans()):
        message.response.logprobs = draw(st.integers(0, 2))
    if draw(st.booleans()):
        message.response.prompt_logprobs = 1
    return Script(message, tuple(tokens))


@st.composite
def some_breaks(draw: st.DrawFn) -> Breaks:
    """Draw where the way breaks; at most twenty times, so that every answer ends."""
    left = [20]
    kinds = draw(st.sampled_from([("failover",), ("cut",), ("failover", "cut")]))
    rate = draw(st.integers(1, 6))

    def after_event() -> str:
        if not left[0] or draw(st.integers(0, rate)):
            return ""
        left[0] -= 1
        return draw(st.sampled_from(kinds))

    return Breaks(
        group_size=lambda: draw(st.integers(1, 5)),
        after_event=after_event,
        num_lost_messages=lambda: draw(st.integers(0, 3)),
    )


@_SETTINGS
@given(script=scripts(), breaks=some_breaks())
def test_an_answer_is_the_same_however_it_came(script: Script, breaks: Breaks) -> None:
    """Compared with the same tokens in one piece, over a way that does not break."""
    whole, broken = play(script), play(script, breaks)
    assert broken.facts == whole.facts
    assert broken.joined_chunks == whole.joined_chunks
    for choice in whole.heard.choices:
        made = script.tokens[choice.index]
        assert choice.token_ids == made[: len(choice.token_ids)]
        if choice.finish_reason is not FinishReason.STOP_STRING:
            assert len(choice.token_ids) == script.end_of(choice.index)[0]


def _withholding_script() -> Script:
    """An answer that is full of the beginnings of a stop string, which never comes."""
    pieces = served_model().text.pieces.pieces
    a, b = pieces.index(b"a"), pieces.index(b"b")
    message = request(
        tokens=[a, b, a],
        sampling__n=1,
        sampling__seed=SEED,
        stopping__max_tokens=12,
        stopping__ignore_eos=True,
        stopping__stop_strings=["ab@", "ba@"],
    )
    return Script(message, ((a, b) * 6,))


def _one_break(kind: str, place: int, num_lost_messages: int = 0) -> Breaks:
    events = iter([*[""] * place, kind])
    return Breaks(
        group_size=lambda: 1,
        after_event=lambda: next(events, ""),
        num_lost_messages=lambda: num_lost_messages,
    )


def test_the_script_for_the_faults_is_right_without_one() -> None:
    """One failover in the middle of a withheld stop string changes nothing."""
    script = _withholding_script()
    outcome = play(script, _one_break("failover", 4))
    assert outcome.num_failovers == 1
    assert outcome.facts == play(script).facts


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str) -> None:
    """A token dropped or repeated after the failover, or withheld text lost, is a difference."""
    script = _withholding_script()
    broken: type[Generation] = faulty(fault)
    assert play(script, _one_break("failover", 4), broken).facts != play(script).facts


def test_prompt_logprobs_come_once_wherever_the_break_is() -> None:
    """Before them, after them, between them and the first token; by failover and by cut."""
    message = request(tokens=ids()[:5], sampling__n=2, sampling__seed=SEED, stopping__max_tokens=4)
    message.response.prompt_logprobs = 0
    script = Script(message, (tuple(ids()[:4]), tuple(ids()[4:8])))
    whole = play(script)
    assert len(whole.heard.prompt_logprobs) == 4
    for kind in ("failover", "cut"):
        for place in range(6):
            for num_lost in range(3):
                broken = play(script, _one_break(kind, place, num_lost))
                assert broken.facts == whole.facts
                assert broken.joined_chunks == whole.joined_chunks


def test_the_stop_reason_of_the_message_is_kept() -> None:
    """The facts that are compared hold the reason and the string."""
    script = _withholding_script()
    message = pb.GenerateRequest()
    message.CopyFrom(script.request)
    message.stopping.stop_strings.append("bab")
    (choice,) = play(Script(message, script.tokens)).heard.choices
    assert (choice.finish_reason, choice.stop_string) == (FinishReason.STOP_STRING, "bab")
    assert choice.text == "a"
