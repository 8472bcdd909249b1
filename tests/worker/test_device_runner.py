"""Steps that are handed over and fetched later give what steps that are waited for give.

Without a GPU Triton's kernels run in its interpreter, and graphs are launches made again.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import RowPlan, SlotStart, StepLimits, StepPlan, StepResult
from rillgate_server.worker.attention.base import AttentionStep
from rillgate_server.worker.attention.triton_paged import TritonPagedAttention
from rillgate_server.worker.gpu.assembly import capture_decode, capture_one_step
from rillgate_server.worker.gpu.device_runner import DeviceRunner
from rillgate_server.worker.gpu.device_sampler import DeviceSampler
from rillgate_server.worker.gpu.step_memory import compute_largest_step
from rillgate_server.worker.kv_tiers import reserve_tiers
from rillgate_server.worker.kv_transfer import KVTransfer
from rillgate_server.worker.model_loader import WeightStore, load_network
from rillgate_server.worker.network.base import Network
from rillgate_server.worker.network.gpu_decoder import GpuDecoder
from rillgate_server.worker.network.transformers_network import TransformersNetwork
from rillgate_server.worker.worker import Worker
from tests.support.checkpoints import VOCAB_SIZE
from tests.support.networks import PassingNetwork
from tests.support.planner import Executes, Job, Planner
from tests.support.worker_fixtures import BLOCK_SIZE, MakeCheckpoint, load_worker

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_BLOCKS = 100
LIMITS = StepLimits(max_running=5, max_step_tokens=64, max_context_tokens=200)
DRAWN = SamplingParams(seed=7, temperature=0.9, top_p=0.9, repetition_penalty=1.2)
GREEDY = SamplingParams(seed=0, temperature=0.0, num_logprobs=3)


def load(path: Path) -> PreTrainedModel:
    """Fill a network where it computes."""
    return load_network(path, torch.float32, store=WeightStore(DEVICE, 1 << 30))


def make_runner(worker: Worker, network: Network, *, uses_graphs: bool = False) -> DeviceRunner:
    """Make one over a cache of its own."""
    tiers = reserve_tiers(worker.layout, NUM_BLOCKS, 0, DEVICE)
    attention = TritonPagedAttention(tiers.device, network.num_heads, torch.float32)
    graphs = capture_decode(network, attention, LIMITS) if uses_graphs else None
    sampler = DeviceSampler(VOCAB_SIZE, DEVICE, 2)
    return DeviceRunner(network, attention, KVTransfer(tiers), sampler, graphs)


def jobs() -> list[Job]:
    """Make requests of several kinds, that enter one after another."""
    return [
        Job([5, 9, 3] * 4, 6, GREEDY),
        Job([17] * 3, 8, DRAWN, starts_at_step=1),
        Job(list(range(40, 61)), 4, GREEDY, starts_at_step=2, wants_prompt_logprobs=True),
        Job([8], 5, SamplingParams(seed=2**63 + 5, temperature=1.3, top_k=20), given=(4, 6)),
    ]


def run(executor: Executes, todo: Sequence[Job]) -> list[Job]:
    """Run jobs with small budgets."""
    Planner(NUM_BLOCKS, BLOCK_SIZE, step_tokens=24, chunk=9).run(executor, todo)
    return list(todo)


def assert_alike(got: Sequence[Job], expected: Sequence[Job]) -> None:
    """Compare tokens, and log-probabilities as near as another order of sums allows."""
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.tokens == theirs.tokens
        for name in ("logprobs", "prompt_logprobs"):
            for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
                assert a.token_id == b.token_id
                assert a.logprob == pytest.approx(b.logprob, abs=2e-4)
                assert [it for it, _ in a.top] == [it for it, _ in b.top]


@pytest.mark.parametrize("uses_graphs", [False, True])
@pytest.mark.parametrize("kind", ["qwen2-windows", "llama"])
def test_requests_get_the_tokens_of_the_other_runner(
    kind: str, uses_graphs: bool, checkpoint: MakeCheckpoint
) -> None:
    """Greedy, drawn, penalised, replayed, in chunks; with log-probabilities."""
    worker = load_worker(checkpoint(kind))
    expected = run(worker, jobs())
    model = load(checkpoint(kind))
    network = GpuDecoder(model) if uses_graphs else TransformersNetwork(model)
    got = run(make_runner(worker, network, uses_graphs=uses_graphs), jobs())
    assert_alike(got, expected)


def start(
    slot: int, tokens: Sequence[int], blocks: tuple[int, ...], of: SamplingParams
) -> SlotStart:
    """Set up a slot."""
    return SlotStart(slot, tuple(tokens), len(tokens), blocks, of, 0)


@pytest.mark.parametrize("uses_graphs", [False, True])
def test_a_plan_is_made_before_the_tokens_of_the_last_one_are_known(
    uses_graphs: bool, checkpoint: MakeCheckpoint
) -> None:
    """The token goes from step to step on the device."""
    worker = load_worker(checkpoint("llama"))
    todo = [Job([5, 9, 3], 5, DRAWN), Job([17, 2], 5, DRAWN)]
    expected = [it.tokens for it in run(worker, todo)]
    network = GpuDecoder(load(checkpoint("llama")))
    runner = make_runner(worker, network, uses_graphs=uses_graphs)
    prompts = (5, 9, 3), (17, 2)
    runner.begin(
        StepPlan(
            0,
            (start(0, prompts[0], (3, 4), DRAWN), start(1, prompts[1], (7, 8), DRAWN)),
            (RowPlan(0, 0, 3), RowPlan(1, 0, 2)),
        )
    )
    results: list[StepResult] = []
    for step in range(1, 5):
        runner.begin(StepPlan(step, (), (RowPlan(0, 2 + step, 1), RowPlan(1, 1 + step, 1))))
        results.append(runner.finish())
    results.append(runner.finish())
    assert [it.step_id for it in results] == list(range(5))
    assert [[it.token_ids[i][0] for it in results] for i in (0, 1)] == expected


def test_a_row_that_breaks_fails_alone_and_the_plan_after_it_is_harmless(
    checkpoint: MakeCheckpoint,
) -> None:
    """Its next row is under way already when that is known."""
    worker = load_worker(checkpoint("llama"))
    model = load(checkpoint("llama"))
    with torch.no_grad():
        model.get_input_embeddings().weight[13] = torch.nan
    runner = make_runner(worker, TransformersNetwork(model))
    runner.begin(
        StepPlan(
            0,
            (start(0, (5, 13), (3,), GREEDY), start(1, (17, 2), (7,), GREEDY)),
            (RowPlan(0, 0, 2), RowPlan(1, 0, 2)),
        )
    )
    runner.begin(StepPlan(1, (), (RowPlan(0, 2, 1), RowPlan(1, 2, 1))))
    first, second = runner.finish(), runner.finish()
    assert [it.slot for it in first.failed_rows] == [0]
    assert len(first.token_ids[1]) == len(second.token_ids[1]) == 1
    # Whoever has its place and blocks next reads nothing of it.
    alone = make_runner(worker, TransformersNetwork(load(checkpoint("llama"))))
    again = StepPlan(2, (start(0, (21, 4, 9), (3,), GREEDY),), (RowPlan(0, 0, 3),), (0, 1))
    assert runner.execute(again).token_ids == alone.execute(again).token_ids


class SmallMemory(PassingNetwork):
    """A network that has too little memory for more than some tokens."""

    def __init__(self, network: Network, max_tokens: int) -> None:
        """Run `network` where it fits."""
        super().__init__(network)
        self.max_tokens = max_tokens

    def hidden(self, tokens: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        """Raise where torch would."""
        if len(tokens) > self.max_tokens:
            raise torch.OutOfMemoryError(f"{len(tokens)} tokens")
        return super().hidden(tokens, positions, step)


def test_a_step_with_too_little_memory_is_computed_in_halves(checkpoint: MakeCheckpoint) -> None:
    """And gives the same; with too little for a token it raises."""
    worker = load_worker(checkpoint("llama"))
    expected = run(worker, jobs())
    network = TransformersNetwork(load(checkpoint("llama")))
    assert_alike(run(make_runner(worker, SmallMemory(network, 5)), jobs()), expected)
    with pytest.raises(torch.OutOfMemoryError):
        run(make_runner(worker, SmallMemory(network, 0)), jobs())
    split = SmallMemory(network, 5)
    split.is_split = True
    with pytest.raises(torch.OutOfMemoryError):
        run(make_runner(worker, split), jobs())


def test_the_largest_step_is_what_limits_allow(checkpoint: MakeCheckpoint) -> None:
    """Computed at the start to see how much memory it takes: full chunks, all rows drawn."""
    worker = load_worker(checkpoint("llama"))
    network = GpuDecoder(load(checkpoint("llama")))
    seen = Watched(network)
    limits = StepLimits(max_running=3, max_step_tokens=50, max_context_tokens=22)
    tiers = reserve_tiers(worker.layout, 14, 0, DEVICE)
    attention = TritonPagedAttention(tiers.device, network.num_heads, torch.float32)
    compute_largest_step(seen, attention, worker.spec, limits)
    assert (seen.num_tokens, seen.num_logits) == ([50], [3])


class Watched(PassingNetwork):
    """A network that notes what it computes."""

    def __init__(self, network: Network) -> None:
        """Note nothing yet."""
        super().__init__(network)
        self.num_tokens: list[int] = []
        self.num_logits: list[int] = []

    def hidden(self, tokens: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        """Note the tokens."""
        self.num_tokens.append(len(tokens))
        return super().hidden(tokens, positions, step)

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Note the rows."""
        self.num_logits.append(len(hidden))
        return super().logits(hidden)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_drafts_hold_as_far_as_they_are_what_is_drawn(
    sampling: SamplingParams, checkpoint: MakeCheckpoint
) -> None:
    """As without speculation, penalties included; beside a row without drafts."""
    worker = load_worker(checkpoint("llama"))
    todo = [Job([5, 9, 3], 7, sampling), Job([17, 2], 2, GREEDY)]
    expected, beside = (it.tokens for it in run(worker, todo))
    runner = make_runner(worker, TransformersNetwork(load(checkpoint("llama"))))
    first = StepPlan(
        0,
        (start(0, (5, 9, 3), (3, 4, 5), sampling), start(1, (17, 2), (7, 8), GREEDY)),
        (RowPlan(0, 0, 3), RowPlan(1, 0, 2)),
    )
    assert runner.execute(first).token_ids == ((expected[0],), (beside[0],))
    wrong = (expected[3] + 1) % VOCAB_SIZE
    drafts = (expected[1], expected[2], wrong, expected[4])
    rows = RowPlan(0, 3, 5, draft_token_ids=drafts), RowPlan(1, 2, 1)
    got = runner.execute(StepPlan(1, (), rows)).token_ids
    assert got == (tuple(expected[1:4]), (beside[1],))
    last = runner.execute(
        StepPlan(2, (), (RowPlan(0, 6, 3, draft_token_ids=tuple(expected[4:6])),))
    )
    assert last.token_ids == (tuple(expected[4:7]),)


def test_a_captured_step_can_be_computed_again_to_be_timed(checkpoint: MakeCheckpoint) -> None:
    """It is the whole step, of rows with contexts of their own; what cannot be captured is not."""
    worker = load_worker(checkpoint("llama"))
    network = GpuDecoder(load(checkpoint("llama")))
    tiers = reserve_tiers(worker.layout, 15, 0, DEVICE)
    attention = TritonPagedAttention(tiers.device, network.num_heads, torch.float32)
    again = capture_one_step(network, attention, 3, 17)
    assert again is not None
    first = again().clone()
    assert first.shape == (3, network.model.config.hidden_size)
    assert torch.equal(first[0], first[2])  # the same token over zeros
    tiers.device.layers[0].values.tokens[10] = 3.0
    assert not torch.equal(again()[2], first[2])
    assert torch.equal(again()[0], first[0])
    passing = TransformersNetwork(load(checkpoint("llama")))
    assert capture_one_step(passing, attention, 3, 17) is None
