"""Which drafts a decoding choice gets, and whether they pay.

Owns each choice's sources of drafts, how often they were right of late, and the counts. Does not
know plans, blocks or budgets: the plan former cuts what does not fit.

Under `auto` the j-th draft of a choice is made while

    rate ** j  >  cost of one more token in the step / (cost of the step / its tokens)

its chance to be accepted against the tokens that the whole batch could have had in that time. So in
a small batch, whose step costs much and a token more little, much is tried; in a large one little.
A choice whose drafts do not pay tries one now and then, more and more rarely while it is wrong.
"""

from collections.abc import Sequence as TokenIds
from dataclasses import dataclass

from rillgate_server.config.groups import SpeculationConfig
from rillgate_server.core.request import Speculation
from rillgate_server.kvcache.cost_model import CostModel
from rillgate_server.scheduler.prompt_lookup import PromptLookup

_FIRST_ACCEPTED, _FIRST_TRIED = 1.5, 2.0
"""What a new choice is taken to have seen: hopeful, and soon outweighed."""
_MEMORY = 0.9
"""Weight of a verified row after one more: about the last ten count."""
_MIN_TRIAL_STEPS, _MAX_TRIAL_STEPS = 8, 256
"""Between trials of drafts that did not pay: doubled each time they are wrong again. One token more
in 256 steps costs less than a hundredth, however dear it is."""
_AVERAGE_WEIGHT = 0.2
"""Of the newest step in the average time of the draft model: about the last ten count."""


class Acceptance:
    """How often drafts of one source are right. State: both sums, and the trials' pace."""

    __slots__ = ("_accepted", "_skipped", "_tried", "_wait")

    def __init__(self) -> None:
        """Start hopeful."""
        self._accepted, self._tried = _FIRST_ACCEPTED, _FIRST_TRIED
        self._skipped, self._wait = 0, _MIN_TRIAL_STEPS

    def __repr__(self) -> str:
        return f"Acceptance(rate={self.rate:.2f}, skipped={self._skipped}, wait={self._wait})"

    @property
    def rate(self) -> float:
        """The chance that a draft is right, if those before it were."""
        return self._accepted / self._tried

    def note(self, num_drafted: int, num_accepted: int) -> None:
        """Take in a row that was verified; what stood behind a wrong draft says nothing."""
        num_tried = min(num_drafted, num_accepted + 1)
        self._accepted = _MEMORY * self._accepted + num_accepted
        self._tried = _MEMORY * self._tried + num_tried
        self._skipped = 0
        wait = _MIN_TRIAL_STEPS // 2 if num_accepted else self._wait
        self._wait = min(_MAX_TRIAL_STEPS, 2 * wait)

    def num_paying(self, max_tokens: int, relative_cost: float) -> int:
        """Return how many drafts pay; `relative_cost`: of one, against a token of the batch."""
        num_tokens, chance = 0, self.rate
        while num_tokens < max_tokens and chance > relative_cost:
            num_tokens, chance = num_tokens + 1, chance * self.rate
        return num_tokens

    def is_trial_due(self) -> bool:
        """Count a step without drafts; say whether one is to be tried all the same."""
        self._skipped += 1
        if self._skipped < self._wait:
            return False
        self._skipped = 0
        return True


class ChoiceDrafts:
    """The drafts of one choice, from its first decode step on; survives a preemption.

    State: the fields.
    """

    __slots__ = ("by_lookup", "by_model", "is_from_model", "lookup", "method", "proposals")

    def __init__(self, method: Speculation) -> None:
        """Start without any seen."""
        self.method = method
        self.lookup = PromptLookup()
        self.by_lookup = Acceptance()
        self.by_model = Acceptance()
        self.proposals: tuple[int, ...] = ()
        """The draft model's, behind the tokens known now."""
        self.is_from_model = False
        """Whether the model made the drafts of the open plan."""

    def __repr__(self) -> str:
        return f"ChoiceDrafts({self.method.value}, lookup={self.by_lookup}, model={self.by_model})"


@dataclass(frozen=True, slots=True)
class BatchCost:
    """What a step's decode rows cost without drafts."""

    num_rows: int
    num_context: int
    """Tokens that they attend to, in sum."""


class Drafter:
    """Chooses drafts, and counts what became of them.

    State: the counts since the start, and the draft model's average time.
    """

    def __init__(self, config: SpeculationConfig, costs: CostModel) -> None:
        """Judge by `costs`, which the scheduler keeps up to date."""
        self.num_drafted_tokens = 0
        self.num_accepted_tokens = 0
        self._config = config
        self._costs = costs
        self._method = Speculation(config.method)
        self._proposal_s = 0.0  # of one token of the draft model, average of late; 0: unmeasured

    def __repr__(self) -> str:
        return (
            f"Drafter({self._method.value}, drafted={self.num_drafted_tokens}, "
            f"accepted={self.num_accepted_tokens})"
        )

    @property
    def has_draft_model(self) -> bool:
        """Whether a request may ask for one."""
        return bool(self._config.draft_model)

    @property
    def max_draft_tokens(self) -> int:
        """Most of a choice in one step."""
        return self._config.max_draft_tokens

    def open(self, asked: Speculation | None) -> ChoiceDrafts | None:
        """Return what a choice needs that asked so (None: nothing said); None for no drafts."""
        method = self._method if asked is None else asked
        return None if method is Speculation.OFF else ChoiceDrafts(method)

    def choose(
        self, drafts: ChoiceDrafts, token_ids: TokenIds[int], max_tokens: int, batch: BatchCost
    ) -> tuple[int, ...]:
        """Return the drafts that follow `token_ids` in the step that is being made."""
        limit = min(max_tokens, self._config.max_draft_tokens)
        if limit <= 0:
            return ()
        drafts.is_from_model = False
        if drafts.method is not Speculation.DRAFT_MODEL:
            found = drafts.lookup.propose(token_ids, limit)
            is_better = not drafts.proposals or drafts.by_lookup.rate >= drafts.by_model.rate
            if found and is_better:
                return found[: self._num_worth(drafts, drafts.by_lookup, limit, batch)]
        if drafts.method is Speculation.PROMPT_LOOKUP or not drafts.proposals:
            return ()
        drafts.is_from_model = True  # they are there: what they cost is spent
        return drafts.proposals[: self._num_worth(drafts, drafts.by_model, limit, batch)]

    def num_proposals(self, drafts: ChoiceDrafts, max_tokens: int, batch: BatchCost) -> int:
        """Return how many drafts the draft model shall make behind the step for the next one."""
        limit = min(max_tokens, self._config.max_draft_tokens)
        if limit <= 0 or not self.has_draft_model or drafts.method is Speculation.PROMPT_LOOKUP:
            return 0
        return self._num_worth(drafts, drafts.by_model, limit, batch, self._proposal_s)

    def note(self, drafts: ChoiceDrafts, num_drafted: int, num_accepted: int) -> None:
        """Take in what became of a choice's drafts."""
        if num_drafted:
            acceptance = drafts.by_model if drafts.is_from_model else drafts.by_lookup
            acceptance.note(num_drafted, num_accepted)
            self.num_drafted_tokens += num_drafted
            self.num_accepted_tokens += num_accepted

    def note_proposals(self, num_tokens: int, seconds: float) -> None:
        """Take in how long the draft model took for so many tokens."""
        if num_tokens and seconds > 0.0:
            per_token = seconds / num_tokens
            weight = _AVERAGE_WEIGHT if self._proposal_s else 1.0
            self._proposal_s += weight * (per_token - self._proposal_s)

    def _num_worth(
        self,
        drafts: ChoiceDrafts,
        acceptance: Acceptance,
        limit: int,
        batch: BatchCost,
        proposal_s: float = 0.0,
    ) -> int:
        """Return how many drafts to make: all, unless the choice leaves it to us."""
        if drafts.method is not Speculation.AUTO:
            return limit
        relative_cost = self._relative_cost(batch, proposal_s)
        num_tokens = acceptance.num_paying(limit, relative_cost)
        if num_tokens == 0 and relative_cost < 1.0 and acceptance.is_trial_due():
            return 1
        return num_tokens

    def _relative_cost(self, batch: BatchCost, proposal_s: float) -> float:
        """Return what a draft costs, in tokens that the batch makes in that time."""
        empty_s = self._costs.decode_step_s(0)
        step_s = self._costs.decode_step_s(batch.num_rows, batch.num_context)
        if step_s <= 0.0:
            return 0.0  # nothing is measured yet, and what is not tried never is
        draft_s = (step_s - empty_s) / batch.num_rows + proposal_s
        return draft_s * batch.num_rows / step_s
