"""Requests: every option goes where the protocol has it, and nothing is dropped in silence."""

from typing import Any, cast

import pytest

from rillgate._convert_request import generate_request, tokenize_request
from rillgate.errors import InvalidRequestError
from rillgate.types import (
    ChatMessage,
    Continuation,
    ContinuedChoice,
    FinishReason,
    GenerateOptions,
    Messages,
    Priority,
    Prompt,
    Speculation,
)
from rillgate_proto.v1 import inference_pb2 as pb

# A value for every option but those that need more than one field to check.
_VALUES = {
    "max_tokens": ("stopping", 5),
    "min_tokens": ("stopping", 2),
    "ignore_eos": ("stopping", True),
    "stop_token_ids": ("stopping", [3, 4]),
    "temperature": ("sampling", 0.5),
    "top_p": ("sampling", 0.25),
    "top_k": ("sampling", 7),
    "min_p": ("sampling", 0.125),
    "repetition_penalty": ("sampling", 1.5),
    "presence_penalty": ("sampling", -1.0),
    "frequency_penalty": ("sampling", 2.0),
    "logit_bias": ("sampling", {5: -1.5}),
    "seed": ("sampling", 2**64 - 1),
    "n": ("sampling", 3),
    "logprobs": ("response", 0),
    "prompt_logprobs": ("response", 20),
}


@pytest.mark.parametrize("name", _VALUES)
def test_an_option_fills_its_field_and_no_other(name: str) -> None:
    """One option set is one field set; a zero counts as set."""
    group, value = _VALUES[name]
    request = generate_request("p", cast(GenerateOptions, {name: value}))
    fields = {f.name: v for f, v in request.ListFields() if f.name not in {"prompt", group}}
    assert fields == {}
    ((field, got),) = getattr(request, group).ListFields()
    assert field.name == name
    assert (dict(got) if isinstance(value, dict) else got) == value


def test_every_option_is_known_to_these_tests() -> None:
    """An option that is added gets its test."""
    special = {"model", "stop", "priority", "speculation", "continuation", "timeout_s"}
    assert set(GenerateOptions.__annotations__) == set(_VALUES) | special


def test_no_option_sets_no_field() -> None:
    """What is not asked for stays unset, so that the model's own defaults hold."""
    assert [field.name for field, _ in generate_request("p", {}).ListFields()] == ["prompt"]


def test_stop_takes_one_text_or_several() -> None:
    """A single text is one stop string, not one per letter."""
    assert generate_request("p", {"stop": "END"}).stopping.stop_strings == ["END"]
    assert generate_request("p", {"stop": ["a", "b"]}).stopping.stop_strings == ["a", "b"]


@pytest.mark.parametrize("priority", [Priority.LOW, "low"])
def test_a_priority_is_a_value_or_its_name(priority: Any) -> None:
    """Both are sent as the class; no priority sets no field."""
    assert generate_request("p", {"priority": priority}).priority == pb.PRIORITY_LOW


@pytest.mark.parametrize("method", Speculation)
def test_a_kind_of_speculation_is_a_value_or_its_name(method: Speculation) -> None:
    """Each is sent as itself; none sets no field."""
    name = f"SPECULATION_{method.name}"
    for given in (method, method.value):
        sent = generate_request("p", cast(GenerateOptions, {"speculation": given})).speculation
        assert pb.Speculation.Name(sent) == name


def test_a_misspelt_option_is_an_error_with_a_hint() -> None:
    """`max_token` raises and names `max_tokens`."""
    with pytest.raises(TypeError, match="'max_token'; did you mean 'max_tokens'"):
        generate_request("p", {"max_token": 3})  # type: ignore[typeddict-unknown-key]


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("text", "prompt"),
        ("", "prompt"),
        ([1, 2], "token_ids"),
        ((1, 2), "token_ids"),
        ([], "token_ids"),
        ([{"role": "user", "content": "hi"}], "chat"),
        ([ChatMessage("user", "hi")], "chat"),
    ],
)
def test_the_prompts_type_chooses_the_input(prompt: Prompt, kind: str) -> None:
    """Text, ids and conversations are told apart; the server refuses empty ones."""
    assert generate_request(prompt, {}).WhichOneof("input") == kind


def test_a_conversation_keeps_its_order_and_both_forms_of_message() -> None:
    """Mappings and ChatMessage can be mixed."""
    conversation: Messages = [ChatMessage("system", "s"), {"content": "c", "role": "user"}]
    request = generate_request(conversation, {})
    pairs = [(message.role, message.content) for message in request.chat.messages]
    assert pairs == [("system", "s"), ("user", "c")]
    assert tokenize_request([ChatMessage("user", "x")], "").chat.messages[0].content == "x"


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "u", "content": "c", "name": "n"}])
def test_a_message_with_other_keys_is_an_error(message: dict[str, str]) -> None:
    """A key that would be dropped is refused."""
    with pytest.raises(TypeError, match="'role' and 'content'"):
        generate_request([message], {})


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("a\ud800", {}, "prompt"),
        ([{"role": "user", "content": "\udfff"}], {}, "chat.messages[0]"),
        ([-1], {}, "token_ids"),
        ([2**32], {}, "token_ids"),
        ("p", {"seed": -1}, "sampling.seed"),
        ("p", {"seed": 2**64}, "sampling.seed"),
        ("p", {"max_tokens": -1}, "stopping.max_tokens"),
        ("p", {"stop": ["\ud800"]}, "stopping.stop_strings"),
        ("p", {"stop_token_ids": [-5]}, "stopping.stop_token_ids"),
        ("p", {"logit_bias": {-1: 0.5}}, "sampling.logit_bias"),
        ("p", {"model": "\ud800"}, "model"),
        ("p", {"priority": "urgent"}, "priority"),
        ("p", {"speculation": "wild"}, "speculation"),
    ],
)
def test_what_the_wire_cannot_carry_is_an_invalid_request(
    prompt: Prompt,
    options: Any,
    field: str,  # Any: wrong on purpose
) -> None:
    """The error is the one the server would give, and names the field."""
    with pytest.raises(InvalidRequestError) as caught:
        generate_request(prompt, options)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_a_continuation_is_sent_whole() -> None:
    """Everything that Started gave goes back, finished choices marked."""
    continuation = Continuation(
        request_id="r",
        model_version="v",
        seed=2**63,
        prompt_digest=b"\x01" * 16,
        template_time_ms=-5,
        choices=(
            ContinuedChoice(0, (1, 2), None),
            ContinuedChoice(1, (3,), FinishReason.STOP_STRING),
        ),
    )
    assert generate_request("p", {"continuation": continuation}).continuation == pb.Continuation(
        request_id="r",
        model_version="v",
        seed=2**63,
        prompt_digest=b"\x01" * 16,
        template_time_ms=-5,
        choices=[
            pb.ContinuedChoice(index=0, token_ids=[1, 2]),
            pb.ContinuedChoice(index=1, token_ids=[3], finish_reason=pb.FINISH_REASON_STOP_STRING),
        ],
    )
