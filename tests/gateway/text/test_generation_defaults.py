"""A checkpoint's own sampling values, and the ones that nobody could ask for."""

import pytest

from rillgate_server.errors import CheckpointError
from rillgate_server.gateway.text.generation_defaults import GenerationDefaults


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, GenerationDefaults(1.0, 1.0, 0, 0.0, 1.0)),
        ({"do_sample": False, "temperature": 0.6}, GenerationDefaults(temperature=0.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1},
            GenerationDefaults(0.6, 0.95, 20, 0.1, 1.0),
        ),
        ({"top_k": 1000}, GenerationDefaults(top_k=100)),
        ({"temperature": None, "repetition_penalty": 1.05}, GenerationDefaults(1, 1, 0, 0, 1.05)),
    ],
)
def test_generation_defaults_are_the_checkpoints_own(
    config: dict[str, object], expected: GenerationDefaults
) -> None:
    """What it leaves unset, or null, changes nothing; do_sample false is greedy."""
    assert GenerationDefaults.of(config, vocab_size=100) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_p", 1.5),
        ("top_p", 0),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", float("inf")),
        ("min_p", "0.1"),
        ("repetition_penalty", 0),
        ("top_k", True),
    ],
)
def test_a_default_that_nobody_could_ask_for_is_the_operators_error(
    name: str, value: object
) -> None:
    """Found at load, with its name and limits."""
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: .*{name} is "):
        GenerationDefaults.of({name: value}, vocab_size=100)
