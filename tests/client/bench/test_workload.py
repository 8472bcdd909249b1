"""What a benchmark sends, decided before anything is sent."""

import itertools
from pathlib import Path

import pytest

from rillgate.bench.workload import (
    BenchRequest,
    RandomPrompts,
    load_dataset,
    poisson_arrivals,
)
from rillgate.types import ChatMessage


def _source(nonce: str) -> RandomPrompts:
    return RandomPrompts(
        vocab_size=50,
        num_prompt_tokens=40,
        num_output_tokens=7,
        nonce=nonce,
        excluded_token_ids=frozenset({3, 4}),
    )


def test_random_prompts_have_the_length_asked_and_only_allowed_tokens() -> None:
    """Every id is below the vocabulary and none ends a sequence."""
    requests = _source("a").requests(100, "1")
    assert {len(request.prompt) for request in requests} == {40}
    tokens = {token for request in requests for token in request.prompt}
    assert tokens == set(range(50)) - {3, 4}
    assert all(request.max_tokens == 7 and request.ignore_eos for request in requests)


def test_no_two_series_runs_or_requests_share_a_first_block() -> None:
    """Sixteen first tokens, one cache block, never repeat: not in a series, run or nonce."""
    prompts = [
        request.prompt
        for nonce in ("a", "b")
        for series in ("1", "4")
        for request in _source(nonce).requests(50, series)
    ]
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 200
    assert _source("a").requests(5, "1") == _source("a").requests(5, "1")


def test_arrivals_are_poisson_with_the_rate_asked() -> None:
    """Gaps have the mean and the spread of an exponential law; a seed gives them again."""
    arrivals = poisson_arrivals(10.0, 5000, seed=1)
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert arrivals[0] == 0.0
    assert mean == pytest.approx(0.1, rel=0.06)
    assert variance == pytest.approx(mean**2, rel=0.15)
    assert poisson_arrivals(10.0, 5000, seed=1) == arrivals
    assert poisson_arrivals(10.0, 5000, seed=2) != arrivals


def test_a_dataset_gives_texts_conversations_and_ids(tmp_path: Path) -> None:
    """One request a line, empty lines passed over, max_tokens where the line has it."""
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"prompt": "hi", "max_tokens": 3}\n\n'
        '{"messages": [{"role": "user", "content": "ü"}]}\n{"token_ids": [1, 2]}\n'
    )
    assert load_dataset(path, 9, ignore_eos=False) == [
        BenchRequest("hi", 3, False),
        BenchRequest([ChatMessage("user", "ü")], 9, False),
        BenchRequest([1, 2], 9, False),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"prompt": 3}',
        '{"prompt": "x", "max_tokens": "3"}',
        '{"messages": [{"role": "user"}]}',
        '{"token_ids": ["a"]}',
    ],
)
def test_a_broken_line_of_a_dataset_is_named(line: str, tmp_path: Path) -> None:
    """The error has the file, the line's number and what is allowed."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: .*allowed"):
        load_dataset(path, 9, ignore_eos=True)


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    """Nothing to send is an error, not an empty report."""
    path = tmp_path / "data.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="no request"):
        load_dataset(path, 9, ignore_eos=True)
