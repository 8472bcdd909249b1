"""One step: a plan in, a result out.

Owns the order of a step's work: copies begun, slots, packing, network, sampling, what the tokens
mean for the slots, copies reported. Does not know requests or scheduling; holds no opinion on which
rows a step should have, nor on what is copied.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from rillgate_server.core.step import (
    FailedRow,
    RowPlan,
    StepPlan,
    StepResult,
    StepTimes,
    TokenLogprobs,
)
from rillgate_server.core.step_codec import SampledTokens
from rillgate_server.worker.attention.base import AttentionBackend
from rillgate_server.worker.compute_device import CPU, wait_for
from rillgate_server.worker.draft_model import DraftModel
from rillgate_server.worker.input_batch import InputBatch
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.kv_transfer import KVTransfer
from rillgate_server.worker.network.base import Network
from rillgate_server.worker.sampler import SampledToken, sample, token_logprobs

_LOGPROB_POSITIONS = 128
"""Prompt positions whose logits exist at a time: 128 x 150,000 float32 are 77 MB."""
_COPY_WAIT_S = 0.005
"""A plan without rows waits for a copy no longer than this: commands come in between plans."""


class ModelRunner:
    """Executes plans, one at a time, on one thread.

    State: the slots (`_batch`), the device tier (`_storage`), the copies in flight (`_transfer`).
    """

    def __init__(
        self,
        network: Network,
        attention: AttentionBackend,
        storage: KVStorage,
        transfer: KVTransfer,
        vocab_size: int,
        draft_model: DraftModel | None = None,
    ) -> None:
        """Run `network` with `attention` over `storage`, the device tier of `transfer`.

        `draft_model` makes the proposals that plans ask for; None: there are none.
        """
        self._network = network
        self._attention = attention
        self._storage = storage
        self._transfer = transfer
        self._draft_model = draft_model
        self._batch = InputBatch(storage.layout.block_size_tokens, storage.num_blocks, vocab_size)

    def __repr__(self) -> str:
        """Show the state."""
        return f"ModelRunner({self._batch}, {self._storage}, {self._transfer})"

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one plan. Raises EngineFailure for a plan that contradicts the slots.

        Its copies begin before anything can raise, and are reported by whichever plan is done
        after them.
        """
        for job in plan.copies:
            self._transfer.begin(job)
        result = self._compute(plan)
        if not plan.rows:
            self._transfer.wait_any(_COPY_WAIT_S)
        finished = self._transfer.take_finished()
        return replace(result, finished_copies=finished) if finished else result

    @torch.inference_mode()
    def note_sampled(self, sampled: SampledTokens) -> None:
        """Note tokens that another rank sampled after this one's last plan."""
        for slot, token_id in sampled:
            self._batch.slot(slot).append(token_id)

    def close(self) -> None:
        """End the copies."""
        self._transfer.close()

    def _compute(self, plan: StepPlan) -> StepResult:
        begin = time.perf_counter()
        filled_anew = self._batch.apply(plan)
        self._storage.clear(filled_anew)
        if self._draft_model is not None:
            self._draft_model.begin(plan, filled_anew)
        if not plan.rows:
            return StepResult(plan.step_id, ())
        device = self._storage.bytes.device
        hidden, rows = self._hidden(plan.rows)
        sampling_rows = [row for row in rows if row.samples]
        sampled_at = _sampled_positions(rows).to(device)
        logits = self._network.logits(hidden[sampled_at]) if sampling_rows else None
        if logits is not None:
            logits = logits.to(CPU)
        wait_for(device)
        computed = time.perf_counter()

        sampled = self._sample(sampling_rows, logits)
        if logits is None:
            sampling_rows = []
        prompt_logprobs = self._prompt_logprobs(rows, hidden)
        done = time.perf_counter()
        proposals, draft_s = self._propose(sampling_rows, sampled)
        times = StepTimes(computed - begin, done - computed, draft_s)
        result = _result(plan.step_id, sampling_rows, sampled, prompt_logprobs, times)
        return replace(result, proposals=proposals) if any(proposals) else result

    def _propose(
        self, rows: Sequence[RowPlan], sampled: Sequence[Sequence[SampledToken]]
    ) -> tuple[tuple[tuple[int, ...], ...], float]:
        """Ask the draft model for what rows want; one entry per row, and the seconds it took."""
        if self._draft_model is None or not any(row.num_proposals for row in rows):
            return (), 0.0
        wanted = [
            (row.slot, row.num_proposals if tokens else 0)
            for row, tokens in zip(rows, sampled, strict=True)
        ]
        return self._draft_model.propose(self._batch, wanted)

    def _sample(self, rows: Sequence[RowPlan], logits: Tensor | None) -> list[list[SampledToken]]:
        """Draw each row's tokens and note them in its slot; empty for a row that failed.

        logits: [num_positions, vocab_size], each row's last known token and drafts, in order. In
        rounds: a draft's position is drawn once the draft is known to be right, so that all that
        the sampler remembers of the slot is as it is without speculation.
        """
        if logits is None:  # no row samples, or rank 0 does
            return []
        sampled: list[list[SampledToken]] = [[] for _ in rows]
        firsts = list(accumulate((1 + len(row.draft_token_ids) for row in rows), initial=0))
        going = list(range(len(rows)))
        for done in range(1 + max(len(row.draft_token_ids) for row in rows)):
            slots = [self._batch.slot(rows[i].slot) for i in going]
            drawn_from = (
                logits if len(going) == len(logits) else logits[[firsts[i] + done for i in going]]
            )
            tokens = sample(drawn_from, [slot.sampling for slot in slots])
            for i, slot, token in zip(going, slots, tokens, strict=True):
                if token.token_id is not None:
                    slot.append(token.token_id)
                    sampled[i].append(token)
            going = [
                i
                for i, token in zip(going, tokens, strict=True)
                if rows[i].draft_token_ids[done : done + 1] == (token.token_id,)
            ]
            if not going:
                break
        return sampled

    def _hidden(self, rows: Sequence[RowPlan]) -> tuple[Tensor, Sequence[RowPlan]]:
        """Compute all rows' tokens; return their states and the rows that were computed.

        A draft without a finite state (of a token that breaks the model) lies behind its slot's
        tokens, masked but multiplied: its own row would be lost by a guess. It is zeroed, and the
        step computed again without drafts.
        """
        step = self._batch.pack(rows).on(self._storage.bytes.device)
        hidden = self._network.hidden(step.token_ids, step.positions, self._attention.prepare(step))
        drafts = _draft_positions(rows).to(hidden.device)
        if not len(drafts) or torch.isfinite(hidden[drafts]).all():
            return hidden, rows
        blocks, offsets = step.slot_mapping
        self._storage.clear_tokens((blocks[drafts], offsets[drafts]))
        return self._hidden([_without_drafts(row) for row in rows])

    def _prompt_logprobs(
        self, rows: Sequence[RowPlan], hidden: Tensor
    ) -> tuple[tuple[int, tuple[TokenLogprobs, ...]], ...]:
        """Give each asking row's (slot, log-probabilities of the prompt tokens that follow).

        The logits at position p speak of the token at p + 1: a chunk covers what its own positions
        predict, so the chunk that ends at p needs the first token of the next one, and the last
        prompt position speaks of no prompt token.
        """
        found = []
        offset = 0
        for row in rows:
            if row.prompt_logprobs:
                own = hidden[offset : offset + row.num_tokens]
                found.append((row.slot, self._row_prompt_logprobs(row, own)))
            offset += row.num_tokens
        return tuple(found)

    def _row_prompt_logprobs(self, row: RowPlan, hidden: Tensor) -> tuple[TokenLogprobs, ...]:
        slot = self._batch.slot(row.slot)
        end = min(row.start + row.num_tokens + 1, slot.num_prompt_tokens)
        following = slot.token_ids[row.start + 1 : end]
        num_top = slot.sampling.params.num_prompt_logprobs or 0
        logprobs: list[TokenLogprobs] = []
        for i in range(0, len(following), _LOGPROB_POSITIONS):
            token_ids = following[i : i + _LOGPROB_POSITIONS]
            logits = self._network.logits(hidden[i : i + len(token_ids)])
            if logits is not None:
                logprobs.extend(token_logprobs(logits.to(CPU), token_ids, num_top))
        return tuple(logprobs)


def _draft_positions(rows: Sequence[RowPlan]) -> Tensor:
    """Return where in the packed step the drafts lie. [num_drafts], int64."""
    found: list[int] = []
    end = 0
    for row in rows:
        end += row.num_tokens
        found.extend(range(end - len(row.draft_token_ids), end))
    return torch.tensor(found, dtype=torch.int64)


def _without_drafts(row: RowPlan) -> RowPlan:
    num_known = row.num_tokens - len(row.draft_token_ids)
    return replace(row, num_tokens=num_known, draft_token_ids=())


def _sampled_positions(rows: Sequence[RowPlan]) -> Tensor:
    """Return where in the packed step each sampling row's last known token and its drafts lie.
    [num_positions], int64."""
    found: list[int] = []
    end = 0
    for row in rows:
        end += row.num_tokens
        if row.samples:
            found.extend(range(end - 1 - len(row.draft_token_ids), end))
    return torch.tensor(found, dtype=torch.int64)


def _result(
    step_id: int,
    rows: Sequence[RowPlan],
    sampled: Sequence[Sequence[SampledToken]],
    prompt_logprobs: tuple[tuple[int, tuple[TokenLogprobs, ...]], ...],
    times: StepTimes,
) -> StepResult:
    """Say it in plain types."""
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
