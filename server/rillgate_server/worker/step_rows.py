"""What rows of a plan mean for a step's tensors, and what a step means as a result.

Owns positions in the packed step, and the result in plain types. Does not know tensors' contents,
slots, or when anything is computed.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from rillgate_server.core.step import (
    FailedRow,
    RowPlan,
    StepResult,
    StepTimes,
    TokenLogprobs,
)
from rillgate_server.worker.sampler import SampledToken

Proposals = tuple[tuple[int, ...], ...]
PromptLogprobs = tuple[tuple[int, tuple[TokenLogprobs, ...]], ...]


def sampled_positions(rows: Sequence[RowPlan]) -> list[int]:
    """Return where in the packed step each sampling row's last known token and its drafts lie."""
    found: list[int] = []
    end = 0
    for row in rows:
        end += row.num_tokens
        if row.samples:
            found.extend(range(end - 1 - len(row.draft_token_ids), end))
    return found


def draft_positions(rows: Sequence[RowPlan]) -> list[int]:
    """Return where in the packed step the drafts lie."""
    found: list[int] = []
    end = 0
    for row in rows:
        end += row.num_tokens
        found.extend(range(end - len(row.draft_token_ids), end))
    return found


def prompt_rows(rows: Sequence[RowPlan], hidden: Tensor) -> Iterator[tuple[RowPlan, Tensor]]:
    """Give the rows that ask for their prompt's log-probabilities, with their states.

    hidden: [num_tokens, hidden_size], of all rows.
    """
    end = 0
    for row in rows:
        end += row.num_tokens
        if row.prompt_logprobs:
            yield row, hidden[end - row.num_tokens : end]


def make_result(
    step_id: int,
    rows: Sequence[RowPlan],
    sampled: Sequence[Sequence[SampledToken]],
    prompt_logprobs: PromptLogprobs,
    times: StepTimes,
) -> StepResult:
    """Say in plain types what sampling rows have drawn."""
    logprobs = tuple(
        tuple(token.logprobs for token in tokens if token.logprobs is not None)
        for tokens in sampled
    )
    return StepResult(
        step_id=step_id,
        token_ids=tuple(
            tuple(token.token_id for token in tokens if token.token_id is not None)
            for tokens in sampled
        ),
        logprobs=logprobs if any(logprobs) else (),
        prompt_logprobs=prompt_logprobs,
        failed_rows=tuple(
            FailedRow(row.slot, "the model gave a NaN or no finite logit")
            for row, tokens in zip(rows, sampled, strict=True)
            if not tokens
        ),
        times=times,
    )
