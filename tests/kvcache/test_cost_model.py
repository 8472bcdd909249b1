"""The cost model against known costs, noise and accidents."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from rillgate_server.core.load import FittedCosts
from rillgate_server.core.step import CopyDirection
from rillgate_server.kvcache.cost_model import CostModel, StepWork

LOAD, STORE = CopyDirection.HOST_TO_DEVICE, CopyDirection.DEVICE_TO_HOST


@dataclass(frozen=True, slots=True)
class TrueCosts:
    """What steps really take."""

    step_s: float = 4e-3
    token_s: float = 1e-4
    context_s: float = 2e-8
    row_s: float = 3e-4
    row_context_s: float = 4e-7

    def of(self, work: StepWork) -> float:
        """Return the seconds of one step."""
        return sum(
            cost * size
            for cost, size in zip(
                (self.step_s, self.token_s, self.context_s, self.row_s, self.row_context_s),
                sizes_of(work),
                strict=True,
            )
        )


def sizes_of(work: StepWork) -> tuple[int, ...]:
    """List what each cost is multiplied by."""
    return (
        1,
        work.num_prefill_tokens,
        work.num_prefill_context,
        work.num_decode_rows,
        work.num_decode_context,
    )


def prefill(start: int, num_tokens: int, rows: Sequence[int] = ()) -> StepWork:
    """One chunk beside rows of the given contexts."""
    context = sum(position + 1 for position in range(start, start + num_tokens))
    return StepWork(num_tokens, context, len(rows), sum(rows))


def decode(*contexts: int) -> StepWork:
    """A step of one row per context."""
    return StepWork(0, 0, len(contexts), sum(contexts))


def random_work(draw: random.Random) -> StepWork:
    """A step as traffic has them: half with a chunk, half without."""
    if draw.random() < 0.5:
        rows = [draw.randrange(100, 3000) for _ in range(draw.randrange(16))]
        return prefill(draw.randrange(2500), draw.choice([512, draw.randrange(16, 512)]), rows)
    return decode(*(draw.randrange(100, 3000) for _ in range(draw.randrange(1, 32))))


def batch_least_squares(samples: Sequence[tuple[StepWork, float]]) -> list[float]:
    """Fit all samples at once, errors relative, by Gaussian elimination."""
    rows = [[size / seconds for size in (*sizes_of(work), seconds)] for work, seconds in samples]
    n = 5
    matrix = [[sum(row[i] * row[j] for row in rows) for j in range(n + 1)] for i in range(n)]
    for i in range(n):
        for k in range(n):
            if k != i:
                factor = matrix[k][i] / matrix[i][i]
                matrix[k] = [a - factor * b for a, b in zip(matrix[k], matrix[i], strict=True)]
    return [matrix[i][n] / matrix[i][i] for i in range(n)]


def as_list(costs: FittedCosts) -> list[float]:
    """List the costs of steps in the order of `sizes_of`."""
    return [
        costs.step_s,
        costs.prefill_token_s,
        costs.prefill_context_s,
        costs.decode_row_s,
        costs.decode_context_s,
    ]


def fed(model: CostModel, truth: TrueCosts, num_steps: int, noise: float, seed: int) -> CostModel:
    """Feed random traffic."""
    draw = random.Random(seed)
    for _ in range(num_steps):
        work = random_work(draw)
        model.step_done(work, truth.of(work) * draw.lognormvariate(0.0, noise))
    return model


def test_an_unmeasured_model_predicts_nothing() -> None:
    """Zero means unmeasured, everywhere."""
    model = CostModel()
    assert model.prefill_s(0, 1000) == model.decode_step_s(8, 8000) == 0.0
    assert model.load_s(1 << 20) == model.store_s(1 << 20) == 0.0
    assert model.prefill_tokens_per_s == model.recent_decode_step_s == 0.0
    assert model.fitted() == FittedCosts()


def test_what_cannot_be_a_measurement_is_left_out() -> None:
    """A virtual clock that stands still, a step of copies alone, a copy of which nothing came."""
    model = CostModel()
    model.step_done(decode(100), 0.0)
    model.step_done(StepWork(), 1.0)
    model.copy_done(LOAD, 0, 1.0)
    model.copy_done(LOAD, 1 << 20, 0.0)
    assert model.fitted() == FittedCosts()


def test_decode_steps_alone_say_nothing_of_prefill() -> None:
    """Else a first hit would be judged by a number that nobody measured."""
    model = CostModel()
    model.step_done(decode(100), 0.01)
    assert model.prefill_s(0, 1000) == 0.0
    assert model.decode_step_s(1, 100) == pytest.approx(0.01)


@pytest.mark.parametrize("seed", range(5))
def test_exact_costs_are_found(seed: int) -> None:
    """Without noise, each cost that traffic can tell from the others."""
    truth = TrueCosts()
    found = as_list(fed(CostModel(), truth, 4000, 0.0, seed).fitted())
    expected = [truth.step_s, truth.token_s, truth.context_s, truth.row_s, truth.row_context_s]
    assert found == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("seed", range(5))
def test_predictions_are_those_of_a_batch_fit(seed: int) -> None:
    """Online and forgetting, it comes close to a fit of the last steps all at once."""
    draw = random.Random(seed)
    truth, model = TrueCosts(), CostModel()
    samples: list[tuple[StepWork, float]] = []
    for _ in range(1500):
        work = random_work(draw)
        samples.append((work, truth.of(work) * draw.lognormvariate(0.0, 0.1)))
        model.step_done(*samples[-1])
    online, batch = as_list(model.fitted()), batch_least_squares(samples[-300:])
    for _ in range(100):
        sizes = sizes_of(random_work(draw))
        one, other = (
            sum(map(float.__mul__, costs, map(float, sizes))) for costs in (online, batch)
        )
        assert one == pytest.approx(other, rel=0.08)


def test_costs_are_never_negative() -> None:
    """Heavy noise over few steps would give an unbounded fit some."""
    draw = random.Random(3)
    model = CostModel()
    for _ in range(500):
        work = random_work(draw)
        model.step_done(work, TrueCosts().of(work) * draw.lognormvariate(0.0, 0.7))
        model.copy_done(LOAD, draw.randrange(1, 1 << 24), draw.lognormvariate(-6.0, 1.0))
        costs = model.fitted()
        assert min(*as_list(costs), costs.load_latency_s, costs.load_bytes_per_s) >= 0.0


def test_prefill_is_predicted_with_its_context_and_its_steps() -> None:
    """Three chunks of the largest size of late, each with the fixed cost of a step."""
    truth = TrueCosts()
    model = fed(CostModel(), truth, 4000, 0.0, seed=1)
    chunks = sum(truth.of(prefill(1000 + 512 * i, 512)) for i in range(3))
    assert model.prefill_s(1000, 3 * 512) == pytest.approx(chunks, rel=0.05)
    small = truth.of(prefill(1000, 16))
    assert model.prefill_s(1000, 16) == pytest.approx(small, rel=0.05)
    assert model.prefill_s(1000, 0) == 0.0
    assert model.prefill_tokens_per_s == pytest.approx(512 / truth.of(prefill(1250, 512)), rel=0.1)


def test_a_change_of_speed_is_followed() -> None:
    """Three times slower, then as fast as before: each within 100 steps of either kind."""
    model = fed(CostModel(), TrueCosts(), 1000, 0.1, seed=1)
    slow = TrueCosts(12e-3, 3e-4, 6e-8, 9e-4, 12e-7)
    for truth in (slow, TrueCosts()):
        fed(model, truth, 200, 0.1, seed=2)
        for start in (0, 2000):
            expected = truth.of(prefill(start, 512))
            assert model.prefill_s(start, 512) == pytest.approx(expected, rel=0.25)
        assert model.decode_step_s(8, 8000) == pytest.approx(
            truth.of(decode(*[1000] * 8)), rel=0.25
        )


def test_one_late_step_changes_nothing() -> None:
    """A step during which the thread was not scheduled, of either kind; and a late copy."""
    model = fed(CostModel(), TrueCosts(), 500, 0.02, seed=1)
    for _ in range(30):
        model.copy_done(LOAD, 1 << 20, 1e-3)
    before = model.fitted()
    model.step_done(prefill(0, 512), 5.0)
    model.step_done(decode(1000, 1000), 5.0)
    model.copy_done(LOAD, 1 << 20, 5.0)
    assert model.fitted() == before


def test_a_late_first_step_is_outgrown() -> None:
    """The first one warms caches up: fifty times too long must be forgotten within ten."""
    model = CostModel()
    work = prefill(0, 512)
    model.step_done(work, 50 * TrueCosts().of(work))
    for _ in range(10):
        model.step_done(work, TrueCosts().of(work))
    assert model.prefill_s(0, 512) == pytest.approx(TrueCosts().of(work), rel=0.05)


def test_equal_decode_steps_do_not_unlearn_the_rest() -> None:
    """Thousands of them say nothing of prefill, nor of what a row or a longer context adds."""
    truth = TrueCosts()
    model = fed(CostModel(), truth, 3000, 0.05, seed=1)
    known = model.prefill_s(500, 1000), model.decode_step_s(32, 64000), model.decode_step_s(1, 100)
    draw = random.Random(2)
    work = decode(*[1000] * 8)
    for _ in range(20_000):
        model.step_done(work, truth.of(work) * draw.lognormvariate(0.0, 0.05))
    now = model.prefill_s(500, 1000), model.decode_step_s(32, 64000), model.decode_step_s(1, 100)
    assert now == pytest.approx(known, rel=0.15)
    assert model.decode_step_s(8, 8000) == pytest.approx(truth.of(work), rel=0.03)


def test_equal_chunks_do_not_unlearn_decoding() -> None:
    """The same the other way round."""
    truth = TrueCosts()
    model = fed(CostModel(), truth, 3000, 0.05, seed=1)
    known = model.decode_step_s(8, 8000)
    draw = random.Random(2)
    work = prefill(0, 512)
    for _ in range(20_000):
        model.step_done(work, truth.of(work) * draw.lognormvariate(0.0, 0.05))
    assert model.decode_step_s(8, 8000) == pytest.approx(known, rel=0.1)
    assert model.prefill_s(0, 512) == pytest.approx(truth.of(work), rel=0.03)


def test_recent_decode_steps_are_averaged() -> None:
    """The first counts whole, later ones move the average; steps with prefill do not."""
    model = CostModel()
    model.step_done(decode(100), 0.05)
    assert model.recent_decode_step_s == 0.05
    model.step_done(prefill(0, 100), 0.5)
    assert model.recent_decode_step_s == 0.05
    for _ in range(50):
        model.step_done(decode(100), 0.08)
    assert model.recent_decode_step_s == pytest.approx(0.08, rel=1e-3)


def test_latency_and_bandwidth_of_copies_are_told_apart() -> None:
    """From copies of several sizes, for each direction alone."""
    draw = random.Random(1)
    model = CostModel()
    for _ in range(200):
        num_bytes = draw.randrange(1, 64) << 18
        model.copy_done(LOAD, num_bytes, 2e-4 + num_bytes / 8e9)
        model.copy_done(STORE, num_bytes, 1e-4 + num_bytes / 4e9)
    costs = model.fitted()
    found = costs.load_latency_s, costs.load_bytes_per_s
    assert found == pytest.approx((2e-4, 8e9), rel=0.02)
    assert (costs.store_latency_s, costs.store_bytes_per_s) == pytest.approx((1e-4, 4e9), rel=0.02)
    assert model.load_s(1 << 24) == pytest.approx(2e-4 + (1 << 24) / 8e9, rel=0.01)
    assert model.store_s(1 << 24) == pytest.approx(1e-4 + (1 << 24) / 4e9, rel=0.01)
    assert model.load_s(0) == 0.0


def test_a_first_load_is_predicted_from_stores() -> None:
    """Both go over one bus; the first load that is measured ends that. Not the other way round."""
    model = CostModel()
    model.copy_done(STORE, 1 << 20, 1e-3)
    assert model.load_s(1 << 21) == pytest.approx(2e-3)
    assert model.fitted().load_bytes_per_s == 0.0
    model.copy_done(LOAD, 1 << 20, 5e-3)
    assert model.load_s(1 << 21) == pytest.approx(1e-2)
    assert model.store_s(1 << 21) == pytest.approx(2e-3)
    unstored = CostModel()
    unstored.copy_done(LOAD, 1 << 20, 5e-3)
    assert unstored.store_s(1 << 21) == 0.0


def test_the_longest_step_is_predicted_once_both_kinds_were_measured() -> None:
    """Until then it is 0: who waits for a step must not take a guess for a limit."""
    model, costs, draw = CostModel(), TrueCosts(), random.Random(1)
    longest = StepWork(2048, 2048 * 4096, 64, 64 * 4096)
    for _ in range(50):
        work = prefill(draw.randrange(2000), draw.randint(1, 500))
        model.step_done(work, costs.of(work))
    assert model.step_s(longest) == 0.0
    for _ in range(50):
        work = decode(*(draw.randrange(4000) for _ in range(draw.randint(1, 64))))
        model.step_done(work, costs.of(work))
    assert model.step_s(longest) == pytest.approx(costs.of(longest), rel=0.1)


@pytest.mark.parametrize("factor", [0.05, 0.3, 1.8, 3.0, 20.0])
@pytest.mark.parametrize("num_sizes", [1, 32])
def test_a_throttled_copy_shows_within_twenty(factor: float, num_sizes: int) -> None:
    """Slower or faster, even if all copies are of one size and nothing tells latency apart."""
    draw = random.Random(1)
    model = CostModel()

    def copy(speed: float) -> None:
        num_bytes = (32 - draw.randrange(num_sizes)) << 18
        seconds = (1e-4 + num_bytes / 4e9) * speed
        model.copy_done(LOAD, num_bytes, seconds * draw.lognormvariate(0.0, 0.05))

    for _ in range(100):
        copy(1.0)
    for _ in range(20):
        copy(factor)
    truth = (1e-4 + (32 << 18) / 4e9) * factor
    assert model.load_s(32 << 18) == pytest.approx(truth, rel=0.25)
