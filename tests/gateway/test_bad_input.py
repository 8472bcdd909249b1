"""Bad input gets a precise error at once, and a neighbour in the same batch is untouched.

Each row: a request, the status, which field the details name, and what the message must say.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from rillgate_proto.v1 import control_pb2
from rillgate_proto.v1 import inference_pb2 as pb
from rillgate_server.config.groups import BatcherConfig
from tests.gateway.stack import (
    PATIENCE_S,
    Stack,
    expected_tokens,
    generate,
    read,
    request,
    running_stack,
    served_model,
    with_config,
)

VOCABULARY = served_model().spec.vocab_size
CONTEXT = served_model().spec.max_context_tokens
VERSION = served_model().spec.version_digest
NAN = float("nan")
INVALID = grpc.StatusCode.INVALID_ARGUMENT
METHOD = "/rillgate.v1.Inference/Generate"


def continued(**fields: object) -> pb.GenerateRequest:
    """Build a request with a continuation that is right but for `fields`."""
    message = request(continuation__model_version=VERSION)
    for name, value in fields.items():
        if name == "choices":
            assert isinstance(value, list)
            message.continuation.choices.extend(value)
        else:
            setattr(message.continuation, name, value)
    return message


def chat(*roles: str) -> pb.GenerateRequest:
    """Build a conversation of these roles."""
    message = request()
    message.chat.messages.extend(pb.ChatMessage(role=role, content="hi") for role in roles)
    if not roles:
        message.chat.SetInParent()
    return message


def without_input() -> pb.GenerateRequest:
    """Build a request that says nothing."""
    message = request()
    message.ClearField("prompt")
    return message


@dataclass(frozen=True)
class Row:
    """One bad request."""

    message: pb.GenerateRequest
    field: str
    says: tuple[str, ...]
    """The value and the limit."""
    code: grpc.StatusCode = INVALID


ROWS = {
    "unknown model": Row(
        request(model="gpt"), "gpt", ("'gpt' is not served", "demo"), grpc.StatusCode.NOT_FOUND
    ),
    "unknown version": Row(
        request(model="demo@abc"), "abc", ("'abc'", VERSION), grpc.StatusCode.NOT_FOUND
    ),
    "long model name": Row(request(model="m" * 300), "model", ("300 bytes", "256")),
    "no input": Row(without_input(), "input", ("unset", "prompt, chat, token_ids")),
    "empty prompt": Row(request(prompt=""), "prompt", ("empty", "at least one token")),
    "empty chat": Row(chat(), "chat.messages", ("empty", "1 to 4096")),
    "role order": Row(chat("user", "user"), "chat.messages", ("alternate",)),
    "system message late": Row(chat("user", "system"), "chat.messages", ("first message",)),
    "unknown role": Row(chat("robot"), "chat.messages", ("roles",)),
    "empty role": Row(chat(""), "chat.messages[0].role", ("0 bytes", "1 to 64")),
    "long prompt": Row(
        request(tokens=[1] * (CONTEXT + 5)),
        "token_ids.ids",
        (f"{CONTEXT + 5} tokens", f"at most {CONTEXT - 1}", f"the context holds {CONTEXT}"),
    ),
    "long text": Row(request(prompt="x" * 9000), "prompt", ("900", f"holds {CONTEXT}")),
    "huge text": Row(
        request(prompt="word " * 600_000), "prompt", ("at least 375000 tokens", f"holds {CONTEXT}")
    ),
    "token outside the vocabulary": Row(
        request(tokens=[1, 2, VOCABULARY]),
        "token_ids.ids[2]",
        (f"is {VOCABULARY}", f"below {VOCABULARY}"),
    ),
    "max_tokens 0": Row(request(stopping__max_tokens=0), "stopping.max_tokens", ("is 0", "1 to")),
    "max_tokens too large": Row(
        request(tokens=[1, 2, 3], stopping__max_tokens=CONTEXT),
        "stopping.max_tokens",
        (f"is {CONTEXT}", f"1 to {CONTEXT - 3}"),
    ),
    "min_tokens over max_tokens": Row(
        request(stopping__min_tokens=9), "stopping.min_tokens", ("is 9", "at most max_tokens, 8")
    ),
    "too many stop strings": Row(
        request(stopping__stop_strings=["x"] * 17), "stopping.stop_strings", ("17", "at most 16")
    ),
    "empty stop string": Row(
        request(stopping__stop_strings=["x", ""]), "stopping.stop_strings[1]", ("0 bytes", "1 to")
    ),
    "long stop string": Row(
        request(stopping__stop_strings=["x" * 257]), "stopping.stop_strings[0]", ("257", "256")
    ),
    "too many stop ids": Row(
        request(stopping__stop_token_ids=[1] * 65), "stopping.stop_token_ids", ("65", "64")
    ),
    "stop id outside": Row(
        request(stopping__stop_token_ids=[VOCABULARY]), "stopping.stop_token_ids[0]", ("below",)
    ),
    "temperature below": Row(
        request(sampling__temperature=-0.5), "sampling.temperature", ("is -0.5", "0.0, 100.0")
    ),
    "temperature above": Row(
        request(sampling__temperature=101), "sampling.temperature", ("is 101.0", "100.0")
    ),
    "temperature NaN": Row(
        request(sampling__temperature=NAN), "sampling.temperature", ("is nan", "100.0")
    ),
    "temperature infinite": Row(
        request(sampling__temperature=float("inf")), "sampling.temperature", ("is inf", "100.0")
    ),
    "top_p 0": Row(request(sampling__top_p=0), "sampling.top_p", ("is 0.0", "(0.0, 1.0]")),
    "top_p above": Row(request(sampling__top_p=1.1), "sampling.top_p", ("is 1.1", "1.0]")),
    "top_p NaN": Row(request(sampling__top_p=NAN), "sampling.top_p", ("is nan", "1.0]")),
    "top_k above": Row(
        request(sampling__top_k=VOCABULARY + 1), "sampling.top_k", (f"[0, {VOCABULARY}]",)
    ),
    "min_p above": Row(request(sampling__min_p=1.5), "sampling.min_p", ("is 1.5", "1.0]")),
    "repetition 0": Row(
        request(sampling__repetition_penalty=0), "sampling.repetition_penalty", ("(0.0, 100.0]",)
    ),
    "presence above": Row(
        request(sampling__presence_penalty=2.5), "sampling.presence_penalty", ("[-2.0, 2.0]",)
    ),
    "frequency NaN": Row(
        request(sampling__frequency_penalty=NAN), "sampling.frequency_penalty", ("is nan",)
    ),
    "bias too large": Row(
        request(sampling__logit_bias={5: 101.0}), "sampling.logit_bias[5]", ("100.0",)
    ),
    "bias outside the vocabulary": Row(
        request(sampling__logit_bias={VOCABULARY: 1.0}), "sampling.logit_bias", (f"{VOCABULARY}",)
    ),
    "n 0": Row(request(sampling__n=0), "sampling.n", ("is 0", "1 to 64")),
    "n too large": Row(request(sampling__n=65), "sampling.n", ("is 65", "1 to 64")),
    "logprobs above": Row(request(response__logprobs=21), "response.logprobs", ("21", "20")),
    "prompt logprobs above": Row(
        request(response__prompt_logprobs=21), "response.prompt_logprobs", ("21", "20")
    ),
    "continued from another version": Row(
        continued(model_version="old"), "old", ("'old'", VERSION), grpc.StatusCode.NOT_FOUND
    ),
    "continued from another prompt": Row(
        continued(prompt_digest=b"\x01\x02"),
        "continuation.prompt_digest",
        ("0102",),
        grpc.StatusCode.FAILED_PRECONDITION,
    ),
    "continued with another seed": Row(
        request(sampling__seed=2, continuation__model_version=VERSION, continuation__seed=3),
        "continuation.seed",
        ("is 3", "gives 2"),
        grpc.StatusCode.FAILED_PRECONDITION,
    ),
    "continued choice outside n": Row(
        continued(choices=[pb.ContinuedChoice(index=1)]),
        "continuation.choices[0].index",
        ("is 1", "below n, which is 1"),
    ),
    "continued choice twice": Row(
        continued(choices=[pb.ContinuedChoice(), pb.ContinuedChoice()]),
        "continuation.choices[1].index",
        ("once",),
    ),
    "continued with too many tokens": Row(
        continued(choices=[pb.ContinuedChoice(token_ids=[1] * 9)]),
        "continuation.choices[0].token_ids",
        ("9 tokens", "at most max_tokens, 8"),
    ),
    "continued with a token outside": Row(
        continued(choices=[pb.ContinuedChoice(token_ids=[1, VOCABULARY])]),
        "continuation.choices[0].token_ids[1]",
        (f"below {VOCABULARY}",),
    ),
    "continued at a time before 1970": Row(
        continued(template_time_ms=-1), "continuation.template_time_ms", ("is -1", "0 to 2534")
    ),
    "continued at a time after 9999": Row(
        continued(template_time_ms=253_402_300_800_000),
        "continuation.template_time_ms",
        ("is 253402300800000", "0 to 253402300799999"),
    ),
    "continued with a long id": Row(
        continued(request_id="r" * 129), "continuation.request_id", ("129 bytes", "128")
    ),
}


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    """A server for one test."""
    async with running_stack() as it:
        yield it


async def refusal(call: "asyncio.Future[Any]") -> tuple[grpc.aio.AioRpcError, status_pb2.Status]:
    """Wait for the error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None, f"no details: {caught.value!r}"
    return caught.value, status


def named_field(status: status_pb2.Status) -> str:
    """Return what the first detail names."""
    for detail in status.details:
        for kind in (
            error_details_pb2.BadRequest,
            error_details_pb2.PreconditionFailure,
            error_details_pb2.ResourceInfo,
        ):
            found = kind()
            if detail.Unpack(found):
                if isinstance(found, error_details_pb2.BadRequest):
                    return str(found.field_violations[0].field)
                if isinstance(found, error_details_pb2.PreconditionFailure):
                    return str(found.violations[0].subject)
                return str(found.resource_name)
    raise AssertionError(f"no detail names anything: {status}")


async def test_every_bad_request_is_refused_while_a_neighbour_runs_on_untouched(
    stack: Stack,
) -> None:
    """Each row gives its status, names its field, says its numbers; the neighbour gets its tokens.

    The neighbour is half way through its answer all the time, and no step runs: so each refusal
    comes from before the batch.
    """
    prompt = [1, 2, 3]
    stack.pace.hold()
    neighbour = asyncio.create_task(
        generate(stack, request(tokens=prompt, stopping__max_tokens=20))
    )
    stack.pace.allow(5)
    wrong = []
    for name, row in ROWS.items():
        error, status = await refusal(
            asyncio.ensure_future(read(stack.inference.Generate(row.message, timeout=PATIENCE_S)))
        )
        said = error.details() or ""
        if (
            error.code() is not row.code
            or status.code != row.code.value[0]
            or named_field(status) != row.field
            or not all(part in said for part in row.says)
        ):
            wrong.append(f"{name}: {error.code()} {named_field(status)!r} {said!r}")
    assert not wrong, "\n".join(wrong)
    assert not neighbour.done()
    stack.pace.open()
    assert (await neighbour).token_ids() == expected_tokens(stack, prompt, 20)


@pytest.mark.parametrize(
    ("data", "field", "says"),
    [
        (b"\x12\x04a\xff\xfe\xfd", "prompt", "4 bytes that are no UTF-8 from byte 1 on"),
        (
            pb.GenerateRequest(chat=chat("user", "world").chat)
            .SerializeToString()
            .replace(b"world", b"\xe4\xb8\xe4\xb8\x96"),
            "chat.messages[1].role",
            "5 bytes that are no UTF-8 from byte 0 on",
        ),
        (
            request(stopping__stop_strings=["ok", "stop"])
            .SerializeToString()
            .replace(b"stop", b"st\xc3("),
            "stopping.stop_strings[1]",
            "from byte 2 on",
        ),
        (b"\x12\x20abc", "request", "5 bytes that are no message (field 2 ends 29 bytes too soon)"),
        (b"\xff\xff\xff", "request", "3 bytes that are no message (a number at byte 0 has no end)"),
    ],
    ids=["prompt", "nested", "repeated", "truncated", "garbage"],
)
async def test_bytes_that_are_no_message_are_the_callers_error(
    stack: Stack, data: bytes, field: str, says: str
) -> None:
    """They give INVALID_ARGUMENT that names the field, not INTERNAL."""
    raw: Any = stack.channel.unary_stream(METHOD)
    error, status = await refusal(asyncio.ensure_future(read(raw(data))))
    assert error.code() is INVALID
    assert named_field(status) == field
    assert says in (error.details() or "")
    assert "valid UTF-8" in (error.details() or "")


async def test_a_message_over_the_size_limit_is_refused_with_both_sizes() -> None:
    """gRPC itself refuses it before it is read; the server goes on."""
    async with running_stack(with_config(max_message_bytes=10_000)) as stack:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(stack, request(prompt="x" * 20_000))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "10000" in (caught.value.details() or "")
        assert (await generate(stack, request())).finished().usage.completion_tokens == 8


async def test_the_details_of_an_error_fit_into_trailers_however_long_the_input(
    stack: Stack,
) -> None:
    """Values are cut, so that a status stays below 4 KiB and arrives."""
    message = request(model="demo@" + "v" * 200, sampling__temperature=NAN)
    _, status = await refusal(asyncio.ensure_future(generate(stack, message)))
    assert status.ByteSize() <= 4096
    message = chat(*["user" * 10] * 500)
    error, status = await refusal(asyncio.ensure_future(generate(stack, message)))
    assert error.code() is INVALID
    assert status.ByteSize() <= 4096


async def test_bad_input_of_the_other_methods_is_refused(stack: Stack) -> None:
    """Tokenize, Detokenize and Complete check as Generate does."""
    for call, field in (
        (stack.inference.Tokenize(pb.TokenizeRequest(model="gpt", prompt="x")), "gpt"),
        (stack.inference.Tokenize(pb.TokenizeRequest()), "input"),
        (stack.inference.Detokenize(pb.DetokenizeRequest(token_ids=[VOCABULARY])), "token_ids[0]"),
        (stack.inference.Complete(pb.CompleteRequest()), "input"),
    ):
        _, status = await refusal(call)
        assert named_field(status) == field


async def test_a_row_that_fails_in_the_engine_ends_its_request_alone() -> None:
    """NaN logits give INTERNAL without the engine's words; neighbours get every token."""
    marked = 77

    def fail_rows(row: object, context: object) -> str | None:
        assert isinstance(context, list)
        return "secret detail" if context[0] == marked and len(context) > 5 else None

    async with running_stack(fail_rows=fail_rows) as stack:
        healthy = asyncio.create_task(generate(stack, request(tokens=[1, 2, 3])))
        error, _ = await refusal(
            asyncio.ensure_future(generate(stack, request(tokens=[marked, 2, 3])))
        )
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in (error.details() or "")
        assert (await healthy).token_ids() == expected_tokens(stack, [1, 2, 3], 8)


async def test_a_full_queue_refuses_with_the_time_to_come_again() -> None:
    """RESOURCE_EXHAUSTED with RetryInfo and the numbers; who is queued is served."""
    batcher = BatcherConfig(max_running=1, max_waiting_requests=1)
    async with running_stack(batcher=batcher) as stack:
        stack.pace.hold()
        calls = [
            asyncio.create_task(generate(stack, request(tokens=[i, 2, 3]))) for i in range(1, 6)
        ]
        async with asyncio.timeout(PATIENCE_S):
            while len(stack.replica.engine.requests) < len(calls):
                await stack.control.GetStatus(control_pb2.GetStatusRequest())
        stack.pace.open()
        await asyncio.wait(calls, timeout=PATIENCE_S)
        refused = [call for call in calls if call.exception() is not None]
        # One ran, one waited; how many came before the first began to run is a race.
        assert 2 <= len(refused) <= 4
        for call in refused:
            error, status = await refusal(call)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "1" in (error.details() or ""), "the limit"
            retry = error_details_pb2.RetryInfo()
            assert any(detail.Unpack(retry) for detail in status.details)
            assert retry.retry_delay.ToTimedelta().total_seconds() > 0
        for call in set(calls).difference(refused):
            assert call.result().finished().usage.completion_tokens == 8
