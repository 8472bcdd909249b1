"""A small model that proposes what the large one may say next; greedy, and never trusted.

Owns its cache, and how far it is in each slot. Does not know whether a proposal is used or was
right: what it proposes never changes a token, so it may know little, but may not fail.

Its cache has the large one's blocks: block b of the one holds the keys and values of the tokens
that block b of the other holds, so that slots, prefix hits and preemption need nothing of their
own. What it has not computed there (it is lazy, and copies between the tiers pass it by) it
computes before it proposes, some tokens per step. A stamp per full block says for which tokens,
with all before them, it has.

    tokens of a slot   | stamped blocks | computed since | to catch up .. last | proposed
                       0                               num_seen               len
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rillgate_server.core.model_spec import ModelSpec
from rillgate_server.core.step import RowPlan, StepPlan
from rillgate_server.errors import ConfigError
from rillgate_server.worker.attention.base import AttentionBackend
from rillgate_server.worker.input_batch import InputBatch, TokenRun, pack_runs
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.network.base import Network
from rillgate_server.worker.sampler import SampledToken
from rillgate_server.worker.step_rows import Proposals

_CATCH_UP_TOKENS = 512
"""In one step, over all slots: what a long prompt adds to the step of everybody beside it."""


@dataclass(frozen=True, slots=True)
class DraftSize:
    """What bounds a draft model's tokens and positions."""

    vocab_size: int
    """Its own."""
    num_tokens: int
    """Ids that may be proposed: those of both models."""
    max_context_tokens: int

    @classmethod
    def of(cls, draft: ModelSpec, target: ModelSpec) -> "DraftSize":
        """Compare both models, which `check_draft_model` has found to belong together."""
        num_tokens = min(draft.vocab_size, target.vocab_size)
        return cls(draft.vocab_size, num_tokens, draft.max_context_tokens)


@dataclass(slots=True)
class _Progress:
    """How far the model is in one slot."""

    num_seen: int = 0
    """Tokens at the beginning that its cache holds."""
    ahead: list[int] = field(default_factory=list)
    """Proposed behind the tokens of that time; all but the last are in the cache."""
    stamps: list[int] = field(default_factory=list)
    """Of the slot's full blocks, as far as they were asked for."""
    num_stamped: int = 0
    """Blocks at the beginning that bear their stamp."""


@dataclass(slots=True)
class _Going:
    """A slot for which proposals are being made."""

    at: int
    """In the answer."""
    slot: int
    num_left: int
    """Proposals still to be made."""
    run: TokenRun


class DraftModel:
    """Proposes tokens for slots of an InputBatch.

    State: the storage, `_stamps` of its blocks, `_progress` of the slots that asked.
    """

    def __init__(
        self, network: Network, attention: AttentionBackend, storage: KVStorage, size: DraftSize
    ) -> None:
        """Use `network` over `storage`, which has as many blocks as the large model's."""
        self._network = network
        self._attention = attention
        self._storage = storage
        self._size = size
        self._block_size = storage.layout.block_size_tokens
        self._stamps: dict[int, int] = {}  # block -> of the tokens that it holds
        self._progress: dict[int, _Progress] = {}  # slot -> how far it is

    def __repr__(self) -> str:
        """Show how much it knows."""
        return f"DraftModel(slots={len(self._progress)}, stamped={len(self._stamps)})"

    def begin(self, plan: StepPlan, filled_anew: Sequence[int]) -> None:
        """Forget slots that end, and blocks that other tokens will be in."""
        for slot in (*plan.ended_slots, *(start.slot for start in plan.starts)):
            self._progress.pop(slot, None)
        for block in filled_anew:
            self._stamps.pop(block, None)
        self._storage.clear(list(filled_anew))

    def propose(
        self, batch: InputBatch, wanted: Sequence[tuple[int, int]]
    ) -> tuple[tuple[tuple[int, ...], ...], float]:
        """Return proposals behind all tokens of each (slot, most tokens), and the seconds taken.

        Fewer than asked for, or none, where it has to catch up, or blocks or its context end.
        """
        begin = time.perf_counter()
        found: list[list[int]] = [[] for _ in wanted]
        going = self._catch_up(batch, wanted)
        while going:
            tokens = self._next_tokens(going)
            for it, token in zip(going, tokens, strict=True):
                found[it.at].append(token)
                self._progress[it.slot].ahead.append(token)
                it.num_left -= 1
                end = it.run.start + len(it.run.token_ids)
                it.run = TokenRun(end, [token], it.run.block_table)
            going = [it for it in going if it.num_left > 0]
        return tuple(map(tuple, found)), time.perf_counter() - begin

    def _catch_up(self, batch: InputBatch, wanted: Sequence[tuple[int, int]]) -> list[_Going]:
        """Compute what slots have not seen; return those whose last token is still to be computed,
        which gives the first proposal."""
        budget = _CATCH_UP_TOKENS
        ready: list[_Going] = []
        behind: list[TokenRun] = []
        for at, (slot, num_tokens) in enumerate(wanted):
            state, table = batch.slot(slot), batch.block_table(slot)
            num_known = len(state.token_ids)
            room = min(state.num_blocks * self._block_size, self._size.max_context_tokens)
            num_left = min(num_tokens, room - num_known + 1)
            if num_left <= 0:
                continue
            progress = self._synchronised(slot, state.token_ids, table)
            end = min(num_known, progress.num_seen + max(0, budget))
            budget -= end - progress.num_seen
            run = TokenRun(progress.num_seen, state.token_ids[progress.num_seen : end], table)
            if end == num_known:
                ready.append(_Going(at, slot, num_left, run))
            elif run.token_ids:
                behind.append(run)
            progress.num_seen = end
            self._stamp(progress, state.token_ids, table)
        if behind:
            self._hidden(behind)
        return ready

    def _synchronised(self, slot: int, token_ids: list[int], table: Tensor) -> _Progress:
        """Return how far it is in a slot that may have new tokens, or be new."""
        progress = self._progress.get(slot)
        if progress is None:
            progress = self._progress[slot] = _Progress()
            self._extend_stamps(progress, token_ids, (len(token_ids) - 1) // self._block_size)
            for block, stamp in zip(table.tolist(), progress.stamps, strict=False):
                if self._stamps.get(block) != stamp:
                    break
                progress.num_stamped += 1
            progress.num_seen = progress.num_stamped * self._block_size
        for token in progress.ahead[:-1]:
            if progress.num_seen >= len(token_ids) - 1 or token_ids[progress.num_seen] != token:
                break
            progress.num_seen += 1
        progress.ahead = []
        return progress

    def _stamp(self, progress: _Progress, token_ids: list[int], table: Tensor) -> None:
        """Note which tokens the blocks hold that are full now."""
        num_full = progress.num_seen // self._block_size
        self._extend_stamps(progress, token_ids, num_full)
        for index in range(progress.num_stamped, num_full):
            self._stamps[int(table[index])] = progress.stamps[index]
        progress.num_stamped = num_full

    def _extend_stamps(self, progress: _Progress, token_ids: list[int], num_blocks: int) -> None:
        """Python's own hashes: they stay in this process, and a wrong one costs a proposal."""
        size, stamps = self._block_size, progress.stamps
        for index in range(len(stamps), num_blocks):
            before = stamps[-1] if stamps else 0
            stamps.append(hash((before, *token_ids[index * size : (index + 1) * size])))

    def _next_tokens(self, going: Sequence[_Going]) -> list[int]:
        """Compute each slot's run, and return the likeliest token behind it."""
        runs = [it.run for it in going]
        ends = torch.tensor([len(run.token_ids) for run in runs]).cumsum(0) - 1
        hidden = self._hidden(runs)
        logits = self._network.logits(hidden[ends.to(hidden.device)])
        assert logits is not None, "a draft model is not split"
        token_ids: list[int] = logits[:, : self._size.num_tokens].argmax(dim=-1).tolist()
        return token_ids

    def _hidden(self, runs: Sequence[TokenRun]) -> Tensor:
        step = pack_runs(runs, self._block_size).on(self._storage.bytes.device)
        token_ids = step.token_ids.clamp(max=self._size.vocab_size - 1)
        return self._network.hidden(token_ids, step.positions, self._attention.prepare(step))


def propose_behind(
    draft_model: DraftModel | None,
    batch: InputBatch,
    rows: Sequence[RowPlan],
    sampled: Sequence[Sequence[SampledToken]],
) -> tuple[Proposals, float]:
    """Ask for what rows of a plan want behind what they have sampled, if there is a draft model.

    Returns one entry per row, or none where no row wants any; and the seconds it took.
    """
    if draft_model is None or not any(row.num_proposals for row in rows):
        return (), 0.0
    wanted = [
        (row.slot, row.num_proposals if tokens else 0)
        for row, tokens in zip(rows, sampled, strict=True)
    ]
    return draft_model.propose(batch, wanted)


def check_draft_model(draft: ModelSpec, target: ModelSpec) -> None:
    """Raise ConfigError unless both have the same tokens.

    Those of one tokenizer do, though the rows of their output heads may be padded differently.
    """
    digests = {draft.tokenizer_digest, target.tokenizer_digest}
    if len(digests - {""}) > 1:
        raise ConfigError(
            f"speculation.draft_model {draft.name} has another tokenizer than {target.name}; "
            "allowed: a checkpoint with the same tokenizer.json"
        )
    if "" in digests and draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"speculation.draft_model {draft.name} has {draft.vocab_size} tokens; allowed: "
            f"{target.vocab_size}, as {target.name} has (they have no tokenizer.json to compare)"
        )
