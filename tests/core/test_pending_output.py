"""Outputs that wait merge without losing, repeating or reordering anything."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rillgate_server.core.pending_output import (
    MAX_TAKEN_PROMPT_POSITIONS,
    PendingOutput,
    StepEntry,
    entries_of,
)
from rillgate_server.core.request import FinishReason
from rillgate_server.core.step import (
    ChoiceFinished,
    ChoiceTokens,
    PromptLogprobs,
    RequestFailed,
    RequestStarted,
    TokenLogprobs,
)


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 1), st.integers(1, 4)), max_size=30),
    st.sets(st.integers(0, 30)),
)
def test_any_taking_gives_every_token_once_and_in_order(
    steps: list[tuple[int, int, int]], takes: set[int]
) -> None:
    """Whenever somebody takes, each choice's tokens join up to what was added."""
    pending = PendingOutput()
    added: dict[tuple[int, int], list[int]] = {}
    taken: dict[tuple[int, int], list[int]] = {}

    def take() -> None:
        output = pending.take()
        keys = [(it.request_id, it.choice_index) for it in output.tokens]
        assert len(set(keys)) == len(keys), "one entry per choice"
        for entry in output.tokens:
            so_far = taken.setdefault((entry.request_id, entry.choice_index), [])
            assert entry.token_offset == len(so_far)
            assert [it.token_id for it in entry.logprobs] == list(entry.token_ids)
            so_far.extend(entry.token_ids)

    for step_id, (request_id, choice, num_tokens) in enumerate(steps):
        so_far = added.setdefault((request_id, choice), [])
        token_ids = tuple(range(step_id * 10, step_id * 10 + num_tokens))
        logprobs = tuple(TokenLogprobs(token_id, -1.0) for token_id in token_ids)
        pending.add(step_id, ChoiceTokens(request_id, choice, len(so_far), token_ids, logprobs))
        so_far.extend(token_ids)
        if step_id in takes:
            take()
    take()
    assert taken == added
    assert not pending
    assert pending.num_tokens == 0


def test_the_entries_come_in_the_promised_order() -> None:
    """For one request: started, its prompt, tokens, the end."""
    pending = PendingOutput()
    entries: list[StepEntry] = [
        RequestStarted(1, 0.0, 0),
        PromptLogprobs(1, ()),
        ChoiceTokens(1, 0, 0, (5,)),
        ChoiceFinished(1, 0, FinishReason.STOP, 1),
        RequestFailed(2, "no"),
    ]
    for entry in reversed(entries):
        pending.add(9, entry)
    output = pending.take()
    assert output.step_id == 9
    assert list(entries_of(output)) == entries


def test_long_prompts_log_probabilities_leave_in_parts_before_the_rest() -> None:
    """What is too much for one message goes ahead; the request's end comes with the last part."""
    pending = PendingOutput()
    half = (TokenLogprobs(1, -1.0),) * (MAX_TAKEN_PROMPT_POSITIONS // 2 + 1)
    for request_id in (1, 2, 3):
        pending.add(1, PromptLogprobs(request_id, half))
        pending.add(1, ChoiceFinished(request_id, 0, FinishReason.LENGTH, 1))
    parts = []
    while pending:
        parts.append(pending.take())
    assert [[it.request_id for it in part.prompt_logprobs] for part in parts] == [[1], [2], [3]]
    assert [len(part.finished) for part in parts] == [0, 0, 3]
