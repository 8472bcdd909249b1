"""What a stream's messages add up to, and what of the protocol is checked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rillgate._accumulate import Accumulator
from rillgate.errors import ProtocolError
from rillgate.types import Continuation, ContinuedChoice, FinishReason
from rillgate_proto.v1 import inference_pb2 as pb

_STARTED = pb.Started(request_id="r", model_version="v", seed=7, prompt_digest=b"d" * 16)


def _output(offset: int, *token_ids: int, index: int = 0) -> pb.Output:
    return pb.Output(
        choice_index=index,
        token_offset=offset,
        token_ids=token_ids,
        text="".join(f"<{token_id}>" for token_id in token_ids),
        reasoning_text="r",
    )


def _finished(index: int = 0, reason: pb.FinishReason = pb.FINISH_REASON_STOP) -> pb.Finished:
    return pb.Finished(choice_index=index, reason=reason, usage=pb.Usage(completion_tokens=9))


def _message(*outputs: pb.Output, finished: tuple[pb.Finished, ...] = ()) -> pb.GenerateResponse:
    return pb.GenerateResponse(outputs=outputs, finished=finished)


def _started(num_choices: int = 1, continuation: Continuation | None = None) -> Accumulator:
    accumulator = Accumulator(num_choices, continuation)
    assert accumulator.push(pb.GenerateResponse(started=_STARTED)) == []
    return accumulator


@given(cuts=st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_the_whole_is_the_same_however_the_messages_are_cut(cuts: list[int]) -> None:
    """Tokens and text do not depend on how many came in each message."""
    accumulator = _started()
    offset = 0
    for size in cuts:
        accumulator.push(_message(_output(offset, *range(offset, offset + size))))
        offset += size
    accumulator.push(_message(finished=(_finished(),)))
    generation = accumulator.generation()
    assert generation.token_ids == tuple(range(offset))
    assert generation.text == "".join(f"<{token_id}>" for token_id in range(offset))


def test_a_choices_last_chunk_carries_its_end() -> None:
    """Output and end in one message are one chunk; an end alone is a chunk without tokens."""
    accumulator = _started(2)
    chunks = accumulator.push(
        _message(_output(0, 5), _output(0, 6, index=1), finished=(_finished(1),))
    )
    assert [(c.choice_index, c.token_ids, c.finish_reason) for c in chunks] == [
        (0, (5,), None),
        (1, (6,), FinishReason.STOP),
    ]
    (last,) = accumulator.push(_message(finished=(_finished(0, pb.FINISH_REASON_LENGTH),)))
    assert (last.token_ids, last.token_offset, last.finish_reason) == ((), 1, FinishReason.LENGTH)
    assert last.usage is not None
    assert [choice.token_ids for choice in accumulator.generation().choices] == [(5,), (6,)]


def test_a_long_prompts_logprobs_come_in_pieces() -> None:
    """Later messages add to what the first brought."""
    accumulator = _started()
    for token_ids in ((4, 5), (6,)):
        logprobs = [pb.TokenLogprobs(token_id=token_id) for token_id in token_ids]
        accumulator.push(pb.GenerateResponse(prompt_logprobs=logprobs))
    accumulator.push(_message(_output(0, 7), finished=(_finished(),)))
    assert [it.token_id for it in accumulator.generation().prompt_logprobs] == [4, 5, 6]


@pytest.mark.parametrize("offset", [0, 2], ids=["repeat", "gap"])
def test_a_gap_or_a_repeat_of_tokens_is_noticed(offset: int) -> None:
    """Tokens that do not follow the last ones break the stream."""
    accumulator = _started()
    accumulator.push(_message(_output(0, 5)))
    with pytest.raises(ProtocolError, match="after 1 tokens"):
        accumulator.push(_message(_output(offset, 6)))


@pytest.mark.parametrize(
    "message",
    [
        _message(_output(1, 6)),
        _message(_output(0, 6, index=1)),
        _message(finished=(_finished(),)),
        _message(finished=(_finished(1),)),
    ],
    ids=["tokens after the end", "tokens of no choice", "a second end", "the end of no choice"],
)
def test_what_follows_a_choices_end_is_noticed(message: pb.GenerateResponse) -> None:
    """Nothing may come for a choice that is not open."""
    accumulator = _started()
    accumulator.push(_message(_output(0, 5), finished=(_finished(),)))
    with pytest.raises(ProtocolError, match="not open"):
        accumulator.push(message)


def test_a_stream_must_begin_with_started_and_end_every_choice() -> None:
    """Both ends of the stream are checked."""
    with pytest.raises(ProtocolError, match="first message"):
        Accumulator(1, None).push(_message(_output(0, 5)))
    with pytest.raises(ProtocolError, match="before it started"):
        Accumulator(1, None).generation()
    accumulator = _started(2)
    accumulator.push(_message(finished=(_finished(0),)))
    with pytest.raises(ProtocolError, match="choice 1 did not"):
        accumulator.generation()


def test_a_reason_that_a_newer_server_invents_is_an_end_all_the_same() -> None:
    """An enum value this client does not know is UNKNOWN, not an error."""
    accumulator = _started()
    message = pb.GenerateResponse.FromString(
        _message(_output(0, 5)).SerializeToString() + b"\x1a\x02\x10\x63"  # finished, reason 99
    )
    (chunk,) = accumulator.push(message)
    assert chunk.finish_reason is FinishReason.UNKNOWN
    assert accumulator.generation().finish_reason is FinishReason.UNKNOWN


def test_a_continuation_counts_on_from_the_given_tokens() -> None:
    """Offsets start after what was given; the result holds the new, the next continuation all."""
    assert Accumulator(1, None).continuation() is None
    first = _started(2)
    first.push(_message(_output(0, 5, 6), _output(0, 8, index=1), finished=(_finished(1),)))
    given_so_far = first.continuation()
    assert given_so_far == Continuation(
        request_id="r",
        model_version="v",
        seed=7,
        prompt_digest=b"d" * 16,
        template_time_ms=0,
        choices=(
            ContinuedChoice(0, (5, 6), None),
            ContinuedChoice(1, (8,), FinishReason.STOP),
        ),
    )
    second = _started(2, given_so_far)
    second.push(_message(_output(2, 7), finished=(_finished(),)))
    assert [(c.index, c.token_ids) for c in second.generation().choices] == [(0, (7,))]
    after = second.continuation()
    assert after is not None
    assert [choice.token_ids for choice in after.choices] == [(5, 6, 7), (8,)]
    with pytest.raises(ProtocolError):
        _started(2, given_so_far).push(_message(_output(0, 5)))
