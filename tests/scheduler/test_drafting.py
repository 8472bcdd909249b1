"""Drafts are made where they pay: by the source's record and by what the batch costs."""

import pytest

from rillgate_server.config.groups import SpeculationConfig
from rillgate_server.core.request import Speculation
from rillgate_server.kvcache.cost_model import CostModel, StepWork
from rillgate_server.scheduler.drafting import Acceptance, BatchCost, ChoiceDrafts, Drafter

LOOPING = [7, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2]


def measured(step_s: float, row_s: float) -> CostModel:
    """Make costs that were measured at batches of 1 to 16 rows."""
    costs = CostModel()
    for i in range(200):
        num_rows = 1 + i % 16
        costs.step_done(StepWork(0, 0, num_rows, 0), step_s + row_s * num_rows)
    return costs


def drafter_of(costs: CostModel, method: str = "auto", draft_model: str = "") -> Drafter:
    """Make a drafter with at most five drafts."""
    return Drafter(SpeculationConfig(method, 5, draft_model), costs)


def opened(drafter: Drafter, asked: Speculation | None = None) -> ChoiceDrafts:
    """Open a choice that has drafts."""
    drafts = drafter.open(asked)
    assert drafts is not None
    return drafts


ONE = BatchCost(1, 0)


def test_a_request_overrides_the_server() -> None:
    """Off gives nothing at all, unset what the server is set to."""
    drafter = drafter_of(CostModel(), "prompt-lookup")
    assert drafter.open(Speculation.OFF) is None
    assert opened(drafter).method is Speculation.PROMPT_LOOKUP
    assert opened(drafter, Speculation.AUTO).method is Speculation.AUTO
    assert drafter_of(CostModel(), "off").open(None) is None


def test_prompt_lookup_drafts_whatever_it_costs() -> None:
    """Who asks for it by name gets it, up to the limits."""
    drafter = drafter_of(measured(1e-6, 1.0), "prompt-lookup")
    drafts = opened(drafter)
    for _ in range(50):
        drafter.note(drafts, 5, 0)
    assert drafter.choose(drafts, LOOPING, 100, ONE) == (3, 4, 1, 2, 3)
    assert drafter.choose(drafts, LOOPING, 2, ONE) == (3, 4)
    assert drafter.choose(drafts, LOOPING, 0, ONE) == ()


def test_auto_drafts_much_where_one_stream_runs_and_nothing_in_a_batch_that_is_dear() -> None:
    """A token more costs a twentieth of a step alone, and as much as a token in a full batch."""
    drafter = drafter_of(measured(0.04, 0.002))
    assert len(drafter.choose(opened(drafter), LOOPING, 100, ONE)) == 5
    assert len(drafter.choose(opened(drafter), LOOPING, 100, BatchCost(16, 0))) in (2, 3)
    dear = drafter_of(measured(1e-4, 0.02))
    drafts = opened(dear)
    num_drafted = 0
    for _ in range(300):
        made = dear.choose(drafts, LOOPING, 100, BatchCost(16, 0))
        dear.note(drafts, len(made), 0)
        num_drafted += len(made)
    assert num_drafted <= 5


def test_auto_gives_up_on_what_is_never_accepted_and_tries_it_rarely() -> None:
    """Wrong drafts cost less than 3 % of the steps; right ones bring all of them back."""
    costs = measured(0.03, 0.002)
    drafter = drafter_of(costs)
    drafts = opened(drafter)
    num_steps, num_drafted = 2000, 0
    for _ in range(num_steps):
        made = drafter.choose(drafts, LOOPING, 100, ONE)
        drafter.note(drafts, len(made), 0)
        num_drafted += len(made)
    assert 0 < num_drafted * costs.fitted().decode_row_s < 0.03 * num_steps * 0.032
    for _ in range(600):
        made = drafter.choose(drafts, LOOPING, 100, ONE)
        drafter.note(drafts, len(made), len(made))
    assert len(drafter.choose(drafts, LOOPING, 100, ONE)) == 5


def test_auto_takes_the_draft_models_proposals_where_the_prompt_has_nothing() -> None:
    """And asks for more of them while they pay."""
    drafter = drafter_of(measured(0.04, 0.002), draft_model="a model")
    drafts = opened(drafter)
    drafts.proposals = (8, 8, 8)
    assert drafter.choose(drafts, [1, 2, 3, 4], 100, ONE) == (8, 8, 8)
    assert drafts.is_from_model
    assert drafter.num_proposals(drafts, 100, ONE) == 5
    drafter.note_proposals(5, 5.0)
    assert drafter.num_proposals(drafts, 100, ONE) == 0


def test_without_a_draft_model_nobody_asks_for_proposals() -> None:
    """Nor does a choice that only looks up its prompt."""
    without = drafter_of(CostModel())
    assert without.num_proposals(opened(without), 100, ONE) == 0
    lookup = drafter_of(CostModel(), "prompt-lookup", "a model")
    assert lookup.num_proposals(opened(lookup), 100, ONE) == 0


def test_drafts_are_counted() -> None:
    """For status and load."""
    drafter = drafter_of(CostModel())
    drafts = opened(drafter)
    drafter.note(drafts, 5, 2)
    drafter.note(drafts, 0, 0)
    assert (drafter.num_drafted_tokens, drafter.num_accepted_tokens) == (5, 2)


@pytest.mark.parametrize(("num_accepted", "expected"), [(0, 0.0), (5, 1.0)])
def test_the_rate_tends_to_what_happens(num_accepted: int, expected: float) -> None:
    """Whatever a choice is taken to have seen at first."""
    acceptance = Acceptance()
    for _ in range(100):
        acceptance.note(5, num_accepted)
    assert acceptance.rate == pytest.approx(expected, abs=0.01)


def test_drafts_behind_a_wrong_one_say_nothing() -> None:
    """Of five drafts of which two are right, three were tried."""
    acceptance = Acceptance()
    for _ in range(200):
        acceptance.note(5, 2)
    assert acceptance.rate == pytest.approx(2 / 3, abs=0.01)
