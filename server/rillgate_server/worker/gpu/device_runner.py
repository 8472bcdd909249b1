"""One step on a GPU: handed over, and its result fetched once it is there.

Owns the order of a step's work, as worker.model_runner does where each step is waited for: copies
begun, slots, packing, network, sampling, what the tokens mean for the slots. Does not know requests
or scheduling, nor how anything is computed.

    this thread   begin k | begin k+1 | finish k | begin k+2 | finish k+1 ...
    the device            | step k ............. | step k+1 ..........

Nothing between `begin` and `finish` waits for the device. The token that a slot draws in step k
is put by the device where step k+1 reads it, and comes to the host with `finish`. Steps with drafts
are the exception: what is drawn decides how many of them hold, so there `begin` waits.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from rillgate_server.core.step import RowPlan, StepPlan, StepResult, StepTimes
from rillgate_server.core.step_codec import SampledTokens
from rillgate_server.worker.attention.triton_paged import TritonPagedAttention
from rillgate_server.worker.draft_model import DraftModel, propose_behind
from rillgate_server.worker.gpu.cuda_graphs import DecodeGraphs
from rillgate_server.worker.gpu.device_sampler import DeviceSampler, Draw, HostSample
from rillgate_server.worker.gpu.device_time import Mark
from rillgate_server.worker.gpu.split_step import hidden_in_parts
from rillgate_server.worker.gpu.step_arrays import StepArrays, fill_unknown
from rillgate_server.worker.input_batch import InputBatch
from rillgate_server.worker.kv_transfer import COPY_WAIT_S, KVTransfer
from rillgate_server.worker.network.base import Network
from rillgate_server.worker.sampler import SampledToken
from rillgate_server.worker.step_rows import (
    PromptLogprobs,
    make_result,
    prompt_rows,
    sampled_positions,
)
from rillgate_server.worker.token_scores import TokenScores, on_device


@dataclass(slots=True)
class _Begun:
    """A plan that was handed over."""

    plan: StepPlan
    began: Mark
    computed: Mark
    ended: Mark
    drawn: list[list[SampledToken]] | None = None
    """Per sampling row, where `begin` has waited for them."""
    sample: HostSample | None = None
    """One token per sampling row, on its way to the host."""
    scores: list[tuple[int, list[TokenScores]]] = field(default_factory=list)
    """(slot, of its prompt's positions), on their way to the host."""

    @property
    def sampling_rows(self) -> list[RowPlan]:
        """Whose tokens are drawn on this rank."""
        is_here = self.drawn is not None or self.sample is not None
        return [row for row in self.plan.rows if row.samples] if is_here else []


class DeviceRunner:
    """Carries out plans, in order, on one thread.

    State: the slots (`_batch`, and of drawing `_sampler`), the copies in flight (`_transfer`), the
    plans that were handed over (`_begun`), and when the last of those finished ended (`_ended`).
    """

    def __init__(
        self,
        network: Network,
        attention: TritonPagedAttention,
        transfer: KVTransfer,
        sampler: DeviceSampler,
        graphs: DecodeGraphs | None = None,
        draft_model: DraftModel | None = None,
    ) -> None:
        """Run `network` with `attention`, whose storage is the device tier of `transfer`.

        `graphs`: of decode steps; None: all are launched layer by layer. `draft_model`: as in
        ModelRunner.
        """
        self._network = network
        self._attention = attention
        self._transfer = transfer
        self._sampler = sampler
        self._graphs = graphs
        self._draft_model = draft_model
        self._device = attention.device
        storage = attention.storage
        self._batch = InputBatch(
            storage.layout.block_size_tokens, storage.num_blocks, sampler.vocab_size, draws=False
        )
        self._begun: deque[_Begun] = deque()
        self._ended: Mark | None = None

    def __repr__(self) -> str:
        """Show the state."""
        return f"DeviceRunner({self._batch}, begun={len(self._begun)}, {self._transfer})"

    @torch.inference_mode()
    def begin(self, plan: StepPlan) -> None:
        """Hand one plan over. Raises EngineFailure for a plan that contradicts the slots.

        Its copies begin before anything can raise, and are reported by whichever plan is finished
        after them.
        """
        for job in plan.copies:
            self._transfer.begin(job)
        self._begun.append(self._begin(plan))

    @torch.inference_mode()
    def finish(self) -> StepResult:
        """Wait for the plan that was handed over first, and return what came of it."""
        begun = self._begun.popleft()
        begun.ended.wait()
        rows = begun.sampling_rows
        sampled = self._take_sampled(begun)
        prompt_logprobs: PromptLogprobs = tuple(
            (slot, tuple(entry for part in parts for entry in part.read()))
            for slot, parts in begun.scores
        )
        proposals, draft_s = propose_behind(self._draft_model, self._batch, rows, sampled)
        times = StepTimes(
            begun.computed.seconds_since(begun.began),
            begun.ended.seconds_since(begun.computed),
            draft_s,
            0.0 if self._ended is None else begun.began.seconds_since(self._ended),
        )
        self._ended = begun.ended
        result = make_result(begun.plan.step_id, rows, sampled, prompt_logprobs, times)
        if not begun.plan.rows:
            self._transfer.wait_any(COPY_WAIT_S)
        return replace(
            result,
            proposals=proposals if any(proposals) else (),
            finished_copies=self._transfer.take_finished(),
        )

    def execute(self, plan: StepPlan) -> StepResult:
        """Carry out one plan, with none in flight."""
        assert not self._begun, self
        self.begin(plan)
        return self.finish()

    @torch.inference_mode()
    def note_sampled(self, sampled: SampledTokens) -> None:
        """Note tokens that another rank sampled after this one's last plan."""
        for slot, token_id in sampled:
            self._batch.slot(slot).append(token_id)

    def close(self) -> None:
        """End the copies."""
        self._transfer.close()

    # -- handing over -----------------------------------------------------------------------------

    def _begin(self, plan: StepPlan) -> _Begun:
        filled_anew = self._batch.apply(plan)
        for slot in plan.ended_slots:
            self._sampler.end(slot)
        for start in plan.starts:
            self._sampler.start(start)
        if self._draft_model is not None:
            self._draft_model.begin(plan, filled_anew)
        arrays = self._batch.arrays(plan.rows) if plan.rows else None
        began = Mark(self._device)  # what the host does before it counts as the device's idle time
        if arrays is None:
            return _Begun(plan, began, began, began)
        hidden = hidden_in_parts(self._network, self._hidden, arrays)
        begun = _Begun(plan, began, Mark(self._device), began)
        self._draw(begun, hidden)
        begun.scores = self._prompt_scores(plan.rows, hidden)
        begun.ended = Mark(self._device)
        return begun

    def _hidden(self, arrays: StepArrays) -> Tensor:
        """Launch all layers. Returns [num_tokens, hidden_size]."""
        last_tokens = self._sampler.last_tokens
        if self._graphs is not None:
            hidden = self._graphs.run(arrays, last_tokens)
            if hidden is not None:
                return hidden
        fields = arrays.fields_on(self._device)
        fill_unknown(fields, last_tokens)
        runs = arrays.offset, arrays.start, arrays.num_tokens
        step = self._attention.prepare_runs(runs, arrays.tables, (fields[2], fields[3]))
        return self._network.hidden(fields[0], fields[1], step)

    def _draw(self, begun: _Begun, hidden: Tensor) -> None:
        """Draw each sampling row's token; with drafts, as many as hold and one more."""
        rows = [row for row in begun.plan.rows if row.samples]
        if not rows:
            return
        at = sampled_positions(begun.plan.rows)
        if len(at) < len(hidden):
            hidden = hidden[on_device(at, self._device)]
        logits = self._network.logits(hidden)
        if logits is None:
            return
        if any(row.draft_token_ids for row in rows):
            begun.drawn = self._draw_in_rounds(rows, logits)
            return
        draws = [self._draw_of(row, 0) for row in rows]
        begun.sample = self._sampler.sample(logits, draws).to_host()
        for row in rows:
            self._batch.slot(row.slot).num_pending += 1

    def _draw_of(self, row: RowPlan, num_drafts: int) -> Draw:
        """Say what is drawn behind a row's last known token and some of its drafts."""
        num_before = row.start + row.num_tokens - len(row.draft_token_ids) + num_drafts
        return Draw(row.slot, num_before - self._batch.slot(row.slot).num_prompt_tokens)

    def _draw_in_rounds(self, rows: Sequence[RowPlan], logits: Tensor) -> list[list[SampledToken]]:
        """Draw each row's tokens and note them in its slot; see ModelRunner, which does the same.

        logits: [num_positions, vocab_size], each row's last known token and drafts, in order.
        """
        # Drafts wait for their slot's result: else the tokens noted here would come before it.
        assert not any(self._batch.slot(row.slot).num_pending for row in rows), rows
        drawn: list[list[SampledToken]] = [[] for _ in rows]
        firsts = list(accumulate((1 + len(row.draft_token_ids) for row in rows), initial=0))
        going, done = list(range(len(rows))), 0
        while going:
            at = on_device([firsts[i] + done for i in going], self._device)
            draws = [self._draw_of(rows[i], done) for i in going]
            sample = self._sampler.sample(logits[at], draws).to_host()
            Mark(self._device).wait()
            tokens = sample.read()
            for i, token in zip(going, tokens, strict=True):
                if token.token_id is not None:
                    self._batch.slot(rows[i].slot).append(token.token_id)
                    drawn[i].append(token)
            going = [
                i
                for i, token in zip(going, tokens, strict=True)
                if rows[i].draft_token_ids[done : done + 1] == (token.token_id,)
            ]
            done += 1
        return drawn

    def _prompt_scores(
        self, rows: Sequence[RowPlan], hidden: Tensor
    ) -> list[tuple[int, list[TokenScores]]]:
        """Compute the log-probabilities of prompt tokens that rows ask for; see ModelRunner."""
        found: list[tuple[int, list[TokenScores]]] = []
        for row, own in prompt_rows(rows, hidden):
            slot = self._batch.slot(row.slot)
            num_top = slot.sampling.params.num_prompt_logprobs or 0
            parts = []
            for states, token_ids in slot.prompt_parts(row, own):
                logits = self._network.logits(states)
                if logits is not None:
                    parts.append(TokenScores.of(logits, token_ids, num_top).to_host())
            found.append((row.slot, parts))
        return found

    # -- fetching ---------------------------------------------------------------------------------

    def _take_sampled(self, begun: _Begun) -> list[list[SampledToken]]:
        """Return each sampling row's tokens, and note in its slot those that were pending."""
        if begun.sample is None:
            return begun.drawn or []
        sampled: list[list[SampledToken]] = []
        for row, token in zip(begun.sampling_rows, begun.sample.read(), strict=True):
            slot = self._batch.slot(row.slot)
            slot.num_pending -= 1
            sampled.append([] if token.token_id is None else [token])
            if token.token_id is not None:
                slot.append(token.token_id)
        return sampled
