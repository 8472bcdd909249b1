"""One choice of a request while the scheduler has it, and what a request's choices share.

Owns the states and the arithmetic of positions. Does not decide anything: the scheduler does.

    WAITING ─────────────▶ RUNNING ──▶ ENDED     HELD: waits until the first choice has computed
      ▲  ▲ │                ▲ │                  the prompt, to start as a prefix hit
      │  │ └──▶ LOADING ────┘ │                  LOADING: has a slot and blocks, some of which are
      │  │         │ failed   │ preempted        on the way from the host tier; is in no plan
      │  └─────────┴──────────┘
    HELD

    token_ids    prompt ........ | given ........ | sampled here ......
    positions    0 ............. num_computed ............. len(token_ids)
                 | in the cache  | to compute (num_remaining) |

While plans that name it are open, more is on its way: positions that they compute, and tokens that
they sample and nobody knows yet. The next row begins at num_planned.

    positions    0 ............. num_computed .... num_planned .... len(token_ids) + num_pending
                 | in the cache  | in open plans   | to plan (num_unplanned) |
"""

from enum import Enum, auto

from rillgate_server.core.request import ChoiceStart, Request
from rillgate_server.core.step import ChoiceFinished, RowPlan, TokenLogprobs
from rillgate_server.kvcache.block_table import BlockTable
from rillgate_server.scheduler.drafting import ChoiceDrafts


class SequenceState(Enum):
    """Where a choice is."""

    HELD = auto()
    WAITING = auto()
    LOADING = auto()
    RUNNING = auto()
    ENDED = auto()


class Sequence:
    """The tokens, blocks and slot of one choice.

    State: the fields; the scheduler alone changes them.
    """

    __slots__ = (
        "choice_index",
        "drafts",
        "group",
        "is_charged",
        "num_computed",
        "num_host_tokens",
        "num_pending",
        "num_planned",
        "num_plans",
        "num_preemptions",
        "num_prompt_tokens",
        "order",
        "slot",
        "state",
        "table",
        "token_ids",
    )

    def __init__(self, group: "RequestGroup", choice: ChoiceStart, order: tuple[int, int]) -> None:
        """Start without anything computed. `order`: (number of the request, of the choice)."""
        request = group.request
        self.group = group
        self.choice_index = choice.index
        self.order = order
        self.token_ids = [*request.prompt_token_ids, *choice.generated_token_ids]
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_computed = 0
        self.num_host_tokens = 0
        """Found in the host tier when it started the last time."""
        self.table = BlockTable(request.cache_salt, request.num_shared_prefix_tokens)
        self.slot = -1
        """The worker's seat; -1 without one."""
        self.state = SequenceState.HELD
        self.num_plans = 0
        """Open plans that name its blocks."""
        self.num_planned = 0
        """Positions that are in the cache once the open plans are done."""
        self.num_pending = 0
        """Tokens that the open plans sample, drafts apart."""
        self.is_charged = False
        """Whether its tenant has paid for its input."""
        self.num_preemptions = 0
        self.drafts: ChoiceDrafts | None = None
        """Where its drafts come from; None without speculation."""

    def __repr__(self) -> str:
        return (
            f"Sequence({self.group.request.request_id}/{self.choice_index}, {self.state.name}, "
            f"tokens={len(self.token_ids)}, computed={self.num_computed}, slot={self.slot})"
        )

    @property
    def num_remaining(self) -> int:
        """Known tokens that are not in the cache."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_unplanned(self) -> int:
        """Tokens, known or pending, that no open plan computes either."""
        return len(self.token_ids) + self.num_pending - self.num_planned

    @property
    def can_decode(self) -> bool:
        """Whether its next row is one position that samples a token it may have.

        With as many pending tokens as it lacks it ends by length, whatever they are.
        """
        max_tokens = self.group.request.max_tokens
        return self.num_unplanned == 1 and self.num_generated + self.num_pending < max_tokens

    @property
    def num_generated(self) -> int:
        """Tokens of the choice from the original start."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_prompt_computed(self) -> bool:
        """Whether later choices would find the prompt."""
        return self.num_computed >= self.num_prompt_tokens

    @property
    def gathers_prompt_logprobs(self) -> bool:
        """Whether its rows must give the prompt's log-probabilities."""
        group = self.group
        return group.prompt_logprobs is not None and group.leader is self

    # -- positions --------------------------------------------------------------------------------

    def begin_at(self, num_computed: int) -> None:
        """Note how much of it is in the cache, while no plan names it."""
        assert not self.num_plans, self
        self.num_computed = self.num_planned = num_computed

    def plan_row(self, row: RowPlan) -> None:
        """Note that a plan with a row of it is open. Which drafts it computes is to be seen."""
        self.num_plans += 1
        self.num_planned = row.start + row.num_tokens - len(row.draft_token_ids)
        self.num_pending += row.samples

    def row_done(self, row: RowPlan) -> None:
        """Note that the oldest of its open plans is over, whatever came of it."""
        self.num_plans -= 1
        self.num_pending -= row.samples

    def take_computed(self, row: RowPlan, num_sampled: int) -> None:
        """Note that a row's tokens are in the cache, and those drafts that were sampled."""
        num_known = row.num_tokens - len(row.draft_token_ids)
        self.num_computed = row.start + num_known + max(0, num_sampled - 1)
        self.num_planned = max(self.num_planned, self.num_computed)


class RequestGroup:
    """A request and its choices that have not ended.

    State: the fields. `leader` computes the prompt; the others are HELD until it has.
    """

    __slots__ = ("early_finished", "held", "is_started", "leader", "prompt_logprobs", "request",
                 "sequences")  # fmt: skip

    def __init__(self, request: Request) -> None:
        """Start without choices."""
        self.request = request
        self.sequences: list[Sequence] = []
        self.held: list[Sequence] = []
        """In order; a part of `sequences`."""
        self.leader: Sequence | None = None
        self.is_started = False
        """Whether one of its choices has left the queue."""
        self.early_finished: list[ChoiceFinished] = []
        """Choices whose given tokens had ended them; told when the request starts."""
        self.prompt_logprobs: list[TokenLogprobs] | None = (
            None if request.sampling.num_prompt_logprobs is None else []
        )
        """What is gathered so far; None when nobody asked, or once they are told."""

    def __repr__(self) -> str:
        return f"RequestGroup({self.request.request_id}, {self.sequences})"

    @property
    def num_tokens(self) -> int:
        """Tokens that came with it: the prompt once, and what is to be replayed."""
        request = self.request
        return len(request.prompt_token_ids) + sum(
            len(choice.generated_token_ids) for choice in request.choices
        )
