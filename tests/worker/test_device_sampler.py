"""Drawing on the device, here in Triton's interpreter: the host sampler's tokens, one for one."""

from random import Random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from rillgate_server.core.random_draw import uniform
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import SlotStart
from rillgate_server.worker.gpu import sampling_kernels
from rillgate_server.worker.gpu.device_sampler import DeviceSampler, Draw
from rillgate_server.worker.gpu.sampling_tables import COUNT_SHIFT, MAX_COUNT, SamplingTables
from rillgate_server.worker.sampler import sample
from rillgate_server.worker.slot_sampling import SlotSampling
from tests.support.gpu_compile import MAX_SHARED_BYTES, compile_launches
from tests.support.twin_samplers import TwinSamplers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

SETTINGS: dict[str, dict[str, Any]] = {  # Any: keyword arguments of different types
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 2},
    "top_k_of_more_than_the_parts": {"top_k": 9},
    "top_k_one": {"top_k": 1},
    "top_k_all": {"top_k": 61},
    "top_p": {"top_p": 0.7},
    "tiny_top_p": {"top_p": 1e-9},
    "large_top_p": {"top_p": 0.9999999},
    "min_p": {"min_p": 0.2},
    "top_p_of_top_k": {"top_k": 12, "top_p": 0.8, "temperature": 0.7},
    "top_k_and_min_p": {"top_k": 30, "min_p": 0.01},
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.8},
    "bias": {"logit_bias": ((3, 5.0), (7, -100.0), (60, 2.5))},
    "min_tokens": {"min_tokens": 3, "banned_until_min_tokens": (0, 1, 2)},
    "banned_and_biased": {
        "min_tokens": 3,
        "banned_until_min_tokens": (5, 5, 6),
        "logit_bias": ((5, 50.0),),
    },
    "greedy": {"temperature": 0.0},
    "greedy_penalised": {"temperature": 0.0, "repetition_penalty": 3.0},
    "greedy_filtered": {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
    "all": {
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logit_bias": ((11, 2.0),),
        "min_tokens": 9,
        "banned_until_min_tokens": (4,),
    },
}


FILTERS: tuple[dict[str, Any], ...] = (  # Any: as in SETTINGS
    {},
    {"top_k": 9},
    {"top_p": 0.9},
    {"top_k": 9, "top_p": 0.5},
)


def random_logits(num_rows: int, vocab_size: int, seed: int) -> Tensor:
    """Return float32 logits spread about as a model's."""
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_draws_the_token_of_the_host_sampler(name: str) -> None:
    """In float32 and bfloat16, from what the slot has said and from what it goes on to say."""
    twins = TwinSamplers(61)
    for slot in range(8):
        history = random_logits(1, 12, slot)[0].abs().mul(7).long().clamp(max=60).tolist()
        params = SamplingParams(seed=slot * 2**61 + 5, **SETTINGS[name])
        twins.start(slot, params, history[:6], history[6 : 6 + slot % 4])
    for step, dtype in enumerate((torch.float32, torch.bfloat16)):
        twins.step(random_logits(8, 61, step).to(dtype), range(8))


def random_params(random: Random, vocab_size: int) -> SamplingParams:
    """Return a mixture of all parameters, most of them at their defaults."""

    def sometimes(value: Any, default: Any) -> Any:  # Any: of whatever field
        return value if random.random() < 0.35 else default

    return SamplingParams(
        seed=random.getrandbits(64),
        temperature=random.choice((0.0, 1.0, 1.0, 0.6, 1.4, 0.05)),
        top_p=sometimes(random.uniform(0.05, 1.0), 1.0),
        top_k=sometimes(random.randint(1, vocab_size), 0),
        min_p=sometimes(random.uniform(0.0, 0.5), 0.0),
        repetition_penalty=sometimes(random.uniform(0.5, 2.0), 1.0),
        presence_penalty=sometimes(random.uniform(-2.0, 2.0), 0.0),
        frequency_penalty=sometimes(random.uniform(-2.0, 2.0), 0.0),
        logit_bias=sometimes(
            tuple((random.randrange(vocab_size), random.uniform(-5, 5)) for _ in range(5)), ()
        ),
        min_tokens=sometimes(random.randint(1, 5), 0),
        banned_until_min_tokens=tuple(random.sample(range(vocab_size), 3)),
        num_logprobs=sometimes(random.randint(0, 5), None),
    )


@pytest.mark.parametrize("seed", range(4))
def test_slots_that_come_and_go_draw_the_tokens_of_the_host_sampler(seed: int) -> None:
    """Rows of entries pass from one slot to the next, and the tables grow."""
    random = Random(seed)
    twins = TwinSamplers(300, part_len=64)
    for step in range(8):
        for slot in random.sample(range(10), 4):
            if slot in twins.host and len(twins.host) > 1 and random.random() < 0.5:
                twins.end(slot)
            else:  # of a slot that has not ended, too
                generated = [random.randrange(300) for _ in range(random.randrange(6))]
                prompt = [random.randrange(300) for _ in range(5)]
                twins.start(slot, random_params(random, 300), prompt, generated)
        slots = random.sample(sorted(twins.host), random.randint(1, min(5, len(twins.host))))
        logits = random_logits(len(slots), 300, seed * 100 + step)
        twins.step(logits if step % 2 else logits.half(), slots)


@pytest.mark.parametrize("step", [1.0, 4.0, 100.0])
def test_equal_logits_stand_or_fall_together(step: float) -> None:
    """Coarse logits, with thresholds in the middle of many equal ones; all equal at the end."""
    settings: tuple[dict[str, Any], ...] = (  # Any: as in SETTINGS
        {"top_k": 3},
        {"top_k": 25},
        {"top_p": 0.5},
        {"top_k": 25, "top_p": 0.6},
        {"min_p": 0.3},
        {"temperature": 0.0},
        {"temperature": 0.0, "logit_bias": ((60, 0.0),)},
    )
    twins = TwinSamplers(61)
    for slot, options in enumerate(settings):
        twins.start(slot, SamplingParams(seed=slot, **options))
    for seed in range(3):
        logits = (random_logits(len(settings), 61, seed) / step).round() * step
        twins.step(logits, range(len(settings)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_row_fails_alone(dtype: torch.dtype) -> None:
    """NaN, plus infinity, nothing finite, or all banned; drawn, filtered and greedy."""
    all_banned: dict[str, Any] = {
        "min_tokens": 1,
        "banned_until_min_tokens": tuple(range(61)),
    }  # Any: same
    settings: tuple[dict[str, Any], ...] = (  # Any: as in SETTINGS
        {},
        {"top_k": 5, "top_p": 0.9, "frequency_penalty": 1.0},
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.5},
    )
    twins = TwinSamplers(61)
    for slot in range(16):
        twins.start(slot, SamplingParams(seed=slot, **settings[slot // 4]))
    twins.start(16, SamplingParams(seed=0, **all_banned))
    twins.start(17, SamplingParams(seed=0, temperature=0.0, **all_banned))
    twins.start(18, SamplingParams(seed=18))
    logits = random_logits(19, 61, 0).to(dtype)
    logits[0:16:4, 40] = torch.nan
    logits[1:16:4, 3] = torch.inf
    logits[2:16:4] = -torch.inf
    logits[3:16:4, ::2] = -torch.inf  # sound
    tokens = twins.step(logits, range(19))
    sound = [slot for slot, token in enumerate(tokens) if token.token_id is not None]
    assert sound == [3, 7, 11, 15, 18]
    twins.step(random_logits(19, 61, 1).to(dtype), range(19))


@pytest.mark.parametrize("temperature", [1e-45, 1e-308, 5e-324])
def test_the_lowest_temperatures_take_the_likeliest_token(temperature: float) -> None:
    """All other weights are zero, and filters look for more tokens than have any."""
    twins = TwinSamplers(61)
    for slot, options in enumerate(FILTERS):
        twins.start(slot, SamplingParams(seed=slot, temperature=temperature, **options))
    logits = random_logits(4, 61, 3)
    tokens = twins.step(logits, range(4))
    assert [token.token_id for token in tokens] == logits.argmax(dim=-1).tolist()


def test_parts_of_the_real_size_draw_the_tokens_of_the_host_sampler() -> None:
    """With more candidates than a filter's pass takes; wide, narrow and far-off thresholds."""
    settings: tuple[dict[str, Any], ...] = (  # Any: as in SETTINGS
        {},
        {"top_k": 1000},
        {"top_k": 3},
        {"top_p": 0.999},
        {"top_p": 0.3, "temperature": 2.0},
        {"top_k": 4000, "top_p": 0.99, "min_p": 1e-6},
        {"min_p": 1e-9},
    )
    sampler = DeviceSampler(6000, DEVICE)
    twins = TwinSamplers(6000, sampler)
    for slot, options in enumerate(settings):
        twins.start(slot, SamplingParams(seed=slot, **options))
    twins.step(random_logits(len(settings), 6000, 4), range(len(settings)))


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    """Filtered rows that take turns draw what they draw alone, and in another order."""
    few = DeviceSampler(61, DEVICE, part_len=32, max_scratch_bytes=2 * 64 * 8)
    together, alone = TwinSamplers(61, few), TwinSamplers(61)
    for slot in range(7):
        options: dict[str, Any] = {"top_p": 0.8} if slot % 3 else {}  # Any: as in SETTINGS
        for twins in (together, alone):
            twins.start(slot, SamplingParams(seed=slot, num_logprobs=slot % 2 or None, **options))
    logits = random_logits(7, 61, 5)
    order = [6, 2, 0, 4, 1, 5, 3]
    tokens = together.step(logits[order], order)
    assert tokens == [alone.step(logits[slot, None], [slot])[0] for slot in order]


def test_banned_tokens_come_once_enough_are_said() -> None:
    """The first drawn tokens cannot be what the logits want; the one after is."""
    twins = TwinSamplers(61)
    params = SamplingParams(seed=1, min_tokens=3, banned_until_min_tokens=(17, 18))
    twins.start(0, params, generated=(5,))
    logits = torch.zeros(1, 61)
    logits[0, 17] = 50.0
    tokens = [twins.step(logits, [0])[0].token_id for _ in range(3)]
    assert [token == 17 for token in tokens] == [False, False, True]


def test_logprobs_are_those_of_the_host_sampler() -> None:
    """Of the rows that asked, each as many as it asked for; none of a row that is broken."""
    logits = random_logits(6, 61, 6)
    logits[4, 0] = torch.nan
    sampler = DeviceSampler(61, DEVICE, part_len=32)
    slots = []
    for slot, num_logprobs in enumerate((3, None, 0, 20, 5, None)):
        params = SamplingParams(slot, temperature=0.5, top_k=7, num_logprobs=num_logprobs)
        start = SlotStart(slot, (1,), 1, (), params, 0)
        sampler.start(start)
        slots.append(SlotSampling.start(start, 61))
    sampled = sampler.sample(logits.to(DEVICE), [Draw(slot, 0) for slot in range(6)]).to_host()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    for got, expected in zip(sampled.read(), sample(logits, slots), strict=True):
        assert (got.logprobs is None) == (expected.logprobs is None)
        if got.logprobs is not None and expected.logprobs is not None:
            assert got.logprobs.token_id == got.token_id == expected.token_id
            assert got.logprobs.logprob == pytest.approx(expected.logprobs.logprob, abs=1e-5)
            assert [i for i, _ in got.logprobs.top] == [i for i, _ in expected.logprobs.top]
            values = [value for _, value in expected.logprobs.top]
            assert [value for _, value in got.logprobs.top] == pytest.approx(values, abs=1e-5)


def test_logits_are_read_where_they_lie_and_are_not_changed() -> None:
    """Rows may lie apart, as of a head that computes more columns than there are tokens."""
    wide = random_logits(3, 80, 7)
    before = wide.clone()
    twins = TwinSamplers(61)
    for slot in range(3):
        twins.start(slot, SamplingParams(seed=slot, top_p=0.9, repetition_penalty=2.0))
    twins.step(wide[:, :61], range(3))
    assert torch.equal(wide, before)


def test_last_tokens_stay_when_there_is_room_for_more_slots() -> None:
    """And a slot that starts anew has none."""
    twins = TwinSamplers(61)
    twins.start(1, SamplingParams(seed=1, repetition_penalty=1.2))
    [token] = twins.step(random_logits(1, 61, 8), [1])
    twins.start(40, SamplingParams(seed=2))
    assert len(twins.device.last_tokens) > 40
    assert twins.device.last_tokens[[1, 40]].tolist() == [token.token_id, -1]
    twins.step(random_logits(2, 61, 9), [40, 1])
    twins.start(1, SamplingParams(seed=1))
    assert int(twins.device.last_tokens[1]) == -1


def test_a_call_without_rows_gives_none() -> None:
    """Nothing is launched."""
    sampled = DeviceSampler(61, DEVICE).sample(torch.zeros(0, 61, device=DEVICE), [])
    assert sampled.to_host().read() == []


def test_a_token_that_was_said_too_often_is_counted_no_further() -> None:
    """An entry has eighteen bits for it; the next token's entry stays whole."""
    tables = SamplingTables(61, DEVICE, 2)
    params = SamplingParams(seed=1, temperature=0.0, frequency_penalty=-1.0)
    start = SlotStart(0, (1,) + (7,) * (MAX_COUNT + 3), 1, (), params, 0)
    tables.start(start)
    assert int(tables.entries[0, 7]) >> COUNT_SHIFT == MAX_COUNT
    sampler = DeviceSampler(61, DEVICE, part_len=32)
    sampler.start(start)
    for _ in range(2):
        sampled = sampler.sample(torch.zeros(1, 61, device=DEVICE), [Draw(0, MAX_COUNT)])
        assert sampled.token_ids.tolist() == [7]


@triton.jit
def _write_uniforms(seeds, choices, positions, numbers):  # type: ignore[no-untyped-def]
    """Write one number per program."""
    at = tl.program_id(0)
    seed, choice = tl.load(seeds + at), tl.load(choices + at)
    number = sampling_kernels.uniform(seed, choice, tl.load(positions + at))
    tl.store(numbers + at, number)


def test_the_uniform_numbers_have_the_bits_of_the_contract() -> None:
    """For seeds of 64 bits, which the tables hold with a sign."""
    random = Random(0)
    cases = [(2**64 - 1, 63, 2**31 - 1), (0, 0, 0), (2**63, 1, 1), (2**32 - 1, 0, 7)]
    cases += [
        (random.getrandbits(64), random.randrange(64), random.randrange(10**6)) for _ in range(40)
    ]
    signed = [seed - (1 << 64 if seed >= 1 << 63 else 0) for seed, _, _ in cases]
    numbers = torch.empty(len(cases), dtype=torch.float64, device=DEVICE)
    _write_uniforms[(len(cases),)](
        torch.tensor(signed, device=DEVICE),
        torch.tensor([choice for _, choice, _ in cases], dtype=torch.int32, device=DEVICE),
        torch.tensor([position for _, _, position in cases], dtype=torch.int32, device=DEVICE),
        numbers,
        enable_fp_fusion=False,
    )
    assert numbers.tolist() == [uniform(*case) for case in cases]


def test_the_kernels_compile_for_a_gpu() -> None:
    """With a vocabulary of 152,064, in each type of logits."""
    compiled = compile_launches("tests.support.sampler_launches:launch_all")
    names = {kernel.name for kernel in compiled}
    assert names == {"find_best", "weigh", "choose_filter", "pick"}
    for kernel in compiled:
        assert kernel.shared_bytes <= MAX_SHARED_BYTES, kernel
        assert kernel.spilled_bytes == 0, kernel
