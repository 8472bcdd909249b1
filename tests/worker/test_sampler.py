"""The sampler against a slow, obvious reference, and what it promises about rows and draws."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rillgate_server.core.random_draw import uniform
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import SlotStart
from rillgate_server.worker.sampler import sample
from rillgate_server.worker.slot_sampling import SlotSampling
from rillgate_server.worker.token_scores import TokenScores

VOCAB_SIZE = 50


def slot_of(
    params: SamplingParams,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
    choice_index: int = 0,
    vocab_size: int = VOCAB_SIZE,
) -> SlotSampling:
    """Build the sampler's state of a slot with this history."""
    tokens = tuple(prompt) + tuple(generated)
    start = SlotStart(0, tokens, len(prompt), (), params, choice_index)
    return SlotSampling.start(start, vocab_size)


def reference_probabilities(
    logits: torch.Tensor, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]
) -> list[float]:
    """Follow the contract's order with Python floats, one token at a time."""
    x = [float(v) for v in logits]
    if len(generated) < params.min_tokens:
        for token in params.banned_until_min_tokens:
            x[token] = -math.inf
    for token, bias in params.logit_bias:
        x[token] += bias
    for token in set(prompt) | set(generated):
        factor = params.repetition_penalty
        x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
    for token, count in Counter(generated).items():
        x[token] -= params.presence_penalty + params.frequency_penalty * count
    if params.temperature == 0.0:
        best = x.index(max(x))
        return [1.0 if token == best else 0.0 for token in range(len(x))]
    top = max(x)
    p = [math.exp((v - top) / params.temperature) for v in x]
    if params.top_k:
        threshold = sorted(p, reverse=True)[min(params.top_k, len(p)) - 1]
        p = [v if v >= threshold else 0.0 for v in p]
    if params.top_p < 1.0:
        total, reached = sum(p), 0.0
        for v in sorted(p, reverse=True):
            reached += v
            if reached >= params.top_p * total:
                p = [w if w >= v else 0.0 for w in p]
                break
    if params.min_p:
        limit = params.min_p * max(p)
        p = [v if v >= limit else 0.0 for v in p]
    return p


def reference_token(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    generated: Sequence[int],
    choice_index: int,
) -> int:
    """Walk the vocabulary until the cumulative probability exceeds u * total."""
    p = reference_probabilities(logits, params, prompt, generated)
    target = uniform(params.seed, choice_index, len(generated)) * sum(p)
    reached = 0.0
    for token, v in enumerate(p):
        reached += v
        if reached > target:
            return token
    raise AssertionError("unreachable")


SETTINGS: dict[str, dict[str, Any]] = {  # Any: keyword arguments of different types
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_k_one": {"top_k": 1},
    "top_p": {"top_p": 0.7},
    "tiny_top_p": {"top_p": 1e-9},
    "min_p": {"min_p": 0.2},
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.8},
    "bias": {"logit_bias": ((3, 5.0), (7, -100.0))},
    "min_tokens": {"min_tokens": 10, "banned_until_min_tokens": (0, 1, 2)},
    "greedy": {"temperature": 0.0},
    "greedy_penalised": {"temperature": 0.0, "repetition_penalty": 3.0},
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


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_draws_the_token_of_the_obvious_reference(name: str) -> None:
    """Two hundred rows of random logits and histories, alone and in one batch."""
    generator = torch.Generator().manual_seed(len(name))
    logits = torch.randn(200, VOCAB_SIZE, generator=generator) * 3
    histories = torch.randint(VOCAB_SIZE, (200, 12), generator=generator).tolist()
    slots, expected = [], []
    for i, history in enumerate(histories):
        params = SamplingParams(seed=i * 2**33 + 5, **SETTINGS[name])
        prompt, generated = history[:6], history[6 : 6 + i % 7]
        slots.append(slot_of(params, prompt, generated, choice_index=i % 3))
        expected.append(reference_token(logits[i], params, prompt, generated, i % 3))
    assert [token.token_id for token in sample(logits, slots)] == expected
    alone = [sample(logits[i : i + 1], [slots[i]])[0].token_id for i in range(0, 200, 20)]
    assert alone == expected[::20]


def test_the_settings_above_really_change_tokens() -> None:
    """A setting that the sampler ignored would pass the comparison only if it changed nothing."""
    logits = torch.randn(200, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 3
    prompt, generated = list(range(10)), [3, 3, 4, 5]

    def tokens(options: dict[str, Any]) -> list[int | None]:  # Any: as in SETTINGS
        return [
            sample(logits[i : i + 1], [slot_of(SamplingParams(i, **options), prompt, generated)])[
                0
            ].token_id
            for i in range(200)
        ]

    plain = tokens({})
    for name, options in SETTINGS.items():
        if name != "plain":
            assert tokens(options) != plain, name


def test_a_large_nucleus_gives_the_same_threshold_as_a_full_sort() -> None:
    """The shortcut over the likeliest 1,024 falls back where they do not reach top_p."""
    vocab_size = 5000
    logits = torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(2)) * 0.1
    for i in range(40):
        params = SamplingParams(seed=i, top_p=0.95 if i % 2 else 0.1)
        [token] = sample(logits[i : i + 1], [slot_of(params, vocab_size=vocab_size)])
        assert token.token_id == reference_token(logits[i], params, [], [], 0)


def test_rows_of_a_large_vocabulary_draw_what_they_draw_alone() -> None:
    """Rows are worked on in parts; a broken and a greedy one between them move no other."""
    vocab_size = 100_000
    torch.manual_seed(5)
    logits = torch.randn(7, vocab_size)
    logits[2, 77] = torch.nan
    temperatures = (1.0, 1.0, 1.0, 0.0, 0.7, 1.0, 1.0)
    slots = [
        slot_of(SamplingParams(seed=i, temperature=t), vocab_size=vocab_size)
        for i, t in enumerate(temperatures)
    ]
    together = [token.token_id for token in sample(logits, slots)]
    alone = [sample(logits[i : i + 1], [slot])[0].token_id for i, slot in enumerate(slots)]
    assert together == alone
    assert len({*together}) == 7  # no row got another's
    assert together[2] is None


@pytest.mark.parametrize("temperature", [1e-45, 1e-308, 5e-324])
def test_the_lowest_temperatures_take_the_likeliest_token(temperature: float) -> None:
    """A quotient that overflows must not become a token outside the vocabulary."""
    torch.manual_seed(6)
    logits = torch.randn(1, VOCAB_SIZE) * 30
    (token,) = sample(logits, [slot_of(SamplingParams(seed=1, temperature=temperature))])
    assert token.token_id == int(logits.argmax())


def test_a_broken_row_fails_alone() -> None:
    """NaN, plus infinity or nothing finite: no token for that row; its neighbours draw theirs."""
    logits = torch.randn(5, VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    slots = [slot_of(SamplingParams(seed=i, temperature=float(i % 2))) for i in range(5)]
    whole = [token.token_id for token in sample(logits, slots)]
    logits[1, 7] = torch.nan
    logits[2] = -torch.inf
    logits[3, 0] = torch.inf
    broken = [token.token_id for token in sample(logits, slots)]
    assert broken == [whole[0], None, None, None, whole[4]]


def test_a_row_that_bans_leave_empty_fails_alone() -> None:
    """Banning the whole vocabulary is the request's own fault, not its neighbours'."""
    logits = torch.zeros(2, 3)
    params = SamplingParams(seed=1, min_tokens=1, banned_until_min_tokens=(0, 1, 2))
    slots = [slot_of(params, vocab_size=3), slot_of(SamplingParams(seed=1), vocab_size=3)]
    first, second = sample(logits, slots)
    assert first.token_id is None
    assert second.token_id is not None


def test_greedy_takes_the_lowest_id_on_ties() -> None:
    """Equal logits, with and without adjustments."""
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, [9, 4, 30]] = 2.0
    bias = SamplingParams(seed=0, temperature=0.0, logit_bias=((49, 1.0),))
    tokens = sample(logits, [slot_of(SamplingParams(seed=0, temperature=0.0)), slot_of(bias)])
    assert [token.token_id for token in tokens] == [4, 4]


def test_a_slot_that_appended_equals_one_that_replayed() -> None:
    """A continuation draws what the unbroken choice would have drawn."""
    params = SamplingParams(seed=5, repetition_penalty=1.5, frequency_penalty=0.7)
    grown = slot_of(params, prompt=(1, 2))
    for token_id in (3, 3, 9):
        grown.append(token_id)
    replayed = slot_of(params, prompt=(1, 2), generated=(3, 3, 9))
    logits = torch.randn(50, VOCAB_SIZE, generator=torch.Generator().manual_seed(4))
    for row in logits:
        assert sample(row[None], [grown]) == sample(row[None], [replayed])


def test_draws_follow_the_probabilities() -> None:
    """Ten thousand seeds over three tokens, within four standard errors."""
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    counts = Counter(
        sample(logits, [slot_of(SamplingParams(seed=seed), vocab_size=3)])[0].token_id
        for seed in range(10_000)
    )
    for token_id, probability in enumerate((0.5, 0.3, 0.2)):
        error = math.sqrt(probability * (1 - probability) * 10_000)
        assert abs(counts[token_id] - probability * 10_000) < 4 * error


def test_logprobs_are_of_the_raw_logits_and_best_first() -> None:
    """Penalties and temperature do not show in the returned log-probabilities."""
    logits = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(6))
    params = SamplingParams(seed=1, temperature=0.1, logit_bias=((8, 100.0),), num_logprobs=3)
    [token] = sample(logits, [slot_of(params)])
    expected = torch.log_softmax(logits[0], dim=-1)
    assert token.token_id == 8
    assert token.logprobs is not None
    assert token.logprobs.logprob == pytest.approx(float(expected[8]), abs=1e-6)
    ids = [token_id for token_id, _ in token.logprobs.top]
    assert ids == expected.topk(3).indices.tolist()


def test_token_logprobs_with_no_alternatives_gives_the_given_tokens_alone() -> None:
    """`num_top` 0 is allowed."""
    logits = torch.randn(4, VOCAB_SIZE)
    rows = TokenScores.of(logits, [1, 2, 3, 4], 0).read()
    assert [row.token_id for row in rows] == [1, 2, 3, 4]
    assert all(row.top == () for row in rows)
