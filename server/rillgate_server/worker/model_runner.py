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

from rillgate_server.core.step import RowPlan, StepPlan, StepResult, StepTimes, TokenLogprobs
from rillgate_server.core.step_codec import SampledTokens
from rillgate_server.worker.attention.base import AttentionBackend
from rillgate_server.worker.compute_device import CPU, wait_for
from rillgate_server.worker.draft_model import DraftModel, propose_behind
from rillgate_server.worker.input_batch import InputBatch
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.kv_transfer import COPY_WAIT_S, KVTransfer
from rillgate_server.worker.network.base import Network
from rillgate_server.worker.sampler import SampledToken, sample
from rillgate_server.worker.step_rows import (
    PromptLogprobs,
    draft_positions,
    make_result,
    prompt_rows,
    sampled_positions,
)
from rillgate_server.worker.token_scores import TokenScores


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
            self._transfer.wait_any(COPY_WAIT_S)
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
        sampled_at = torch.tensor(sampled_positions(rows), dtype=torch.int64, device=device)
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
        proposals, draft_s = propose_behind(self._draft_model, self._batch, sampling_rows, sampled)
        times = StepTimes(computed - begin, done - computed, draft_s)
        result = make_result(plan.step_id, sampling_rows, sampled, prompt_logprobs, times)
        return replace(result, proposals=proposals) if any(proposals) else result

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
        drafts = torch.tensor(draft_positions(rows), dtype=torch.int64, device=hidden.device)
        if not len(drafts) or torch.isfinite(hidden[drafts]).all():
            return hidden, rows
        blocks, offsets = step.slot_mapping
        self._storage.clear_tokens((blocks[drafts], offsets[drafts]))
        return self._hidden([_without_drafts(row) for row in rows])

    def _prompt_logprobs(self, rows: Sequence[RowPlan], hidden: Tensor) -> PromptLogprobs:
        """Give each asking row's (slot, log-probabilities of the prompt tokens that follow)."""
        found = []
        for row, own in prompt_rows(rows, hidden):
            slot = self._batch.slot(row.slot)
            num_top = slot.sampling.params.num_prompt_logprobs or 0
            logprobs: list[TokenLogprobs] = []
            for states, token_ids in slot.prompt_parts(row, own):
                logits = self._network.logits(states)
                if logits is not None:
                    logprobs.extend(TokenScores.of(logits.to(CPU), token_ids, num_top).read())
            found.append((row.slot, tuple(logprobs)))
        return tuple(found)


def _without_drafts(row: RowPlan) -> RowPlan:
    num_known = row.num_tokens - len(row.draft_token_ids)
    return replace(row, num_tokens=num_known, draft_token_ids=())
