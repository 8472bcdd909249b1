"""Tenants: whose salt a prompt's blocks carry, and that nothing but the gateway decides it."""

import asyncio
import hashlib
import hmac
from typing import Any

import pytest

from rillgate_proto.v1 import control_pb2
from rillgate_server.core.request import DEFAULT_TENANT, NO_SALT, Tenant
from rillgate_server.gateway.prompt import ServedModel
from rillgate_server.gateway.shared_prefixes import SharedPrefixes
from rillgate_server.gateway.tenancy import Tenancy, cache_salt
from tests.gateway.stack import (
    PATIENCE_S,
    Stack,
    expected_tokens,
    generate,
    request,
    running_stack,
    served_model,
    with_config,
)

SECRET = "a secret of tests"
PROMPT = list(range(1, 41))
"""Five blocks; a hit never covers the last token, so four are found again."""


class Callers:
    """Says on whose account the next calls run: today's stand-in for the front door."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, context: Any) -> Tenant:
        """Say the tenant of the moment."""
        return Tenant(self.name)


@pytest.mark.parametrize(
    ("tenant", "salt"),
    [
        # printf %s TENANT | openssl dgst -sha256 -hmac 0123456789abcdef
        ("", "496dc93fa2d26eae500ec0bc37a12270"),
        ("acme", "42dd7a21e34198f45c8767fa1dc9c386"),
        ("Zoë", "9261a0845cecbbfbaa1b4fe3948d77ba"),
    ],
)
def test_salts_are_the_committed_vectors(tenant: str, salt: str) -> None:
    """The same at every gateway and in every version: cached blocks outlive both."""
    assert cache_salt("0123456789abcdef", tenant).hex() == salt


def test_a_salt_is_half_of_the_hmac() -> None:
    """As the contracts say, computed another way."""
    mac = hmac.new(SECRET.encode(), b"acme", hashlib.sha256).digest()
    assert cache_salt(SECRET, "acme") == mac[:16]
    assert len(cache_salt(SECRET, "acme")) == len(NO_SALT)


def test_the_secret_is_shown_to_nobody() -> None:
    """Neither by what holds it nor by the settings that brought it."""
    assert SECRET not in repr(Tenancy(SECRET))
    assert SECRET not in repr(with_config(cluster_secret=SECRET))


async def cached_tokens(stack: Stack, tokens: list[int]) -> int:
    """Ask, check the answer, and return how much of the prompt was found."""
    answer = await generate(stack, request(tokens=tokens))
    assert answer.token_ids() == expected_tokens(stack, tokens, 8)
    return answer.started.num_cached_tokens


async def test_two_tenants_with_one_prompt_share_nothing() -> None:
    """Each finds what it left itself, and nothing of the other."""
    caller = Callers("a")
    async with running_stack(tenant_of=caller) as stack:
        assert await cached_tokens(stack, PROMPT) == 0
        assert await cached_tokens(stack, PROMPT) == 32
        caller.name = "b"
        assert await cached_tokens(stack, PROMPT) == 0
        assert await cached_tokens(stack, PROMPT) == 32
        names = [it.tenant.name for it in stack.replica.engine.requests]
        assert names == ["a", "a", "b", "b"]


async def test_tenants_share_a_declared_prefix_and_nothing_behind_it() -> None:
    """Blocks wholly inside it are found by all; the block that its end cuts is not."""
    shared = SharedPrefixes([tuple(PROMPT[:20])])
    served = ServedModel(served_model().spec, served_model().text, shared)
    caller = Callers("a")
    async with running_stack(tenant_of=caller, served=served) as stack:
        assert await cached_tokens(stack, PROMPT) == 0
        caller.name = "b"
        assert await cached_tokens(stack, PROMPT) == 16
        assert [it.num_shared_prefix_tokens for it in stack.replica.engine.requests] == [20, 20]
        assert await cached_tokens(stack, [9, *PROMPT]) == 0
        assert stack.replica.engine.requests[-1].num_shared_prefix_tokens == 0


async def test_no_caller_chooses_its_tenant() -> None:
    """Metadata that looks like an identity changes nothing: all are the default tenant."""
    async with running_stack(with_config(cluster_secret=SECRET)) as stack:
        for name in ("tenant", "x-tenant", "x-rillgate-tenant"):
            call = stack.inference.Generate(request(tokens=PROMPT), metadata=((name, "b"),))
            async for _ in call:
                pass
        seen = {(it.tenant, it.cache_salt) for it in stack.replica.engine.requests}
        assert seen == {(DEFAULT_TENANT, cache_salt(SECRET, ""))}


async def test_without_a_secret_each_gateway_makes_its_own() -> None:
    """A salt of zeros, or one that anybody could compute, would be none."""
    salts = set()
    for _ in range(2):
        async with running_stack() as stack:
            await generate(stack, request(tokens=PROMPT))
            salts.add(stack.replica.engine.requests[0].cache_salt)
    assert len(salts) == 2
    assert salts.isdisjoint({NO_SALT, cache_salt("", "")})


async def test_the_status_tells_the_queue_of_each_tenant() -> None:
    """Operators see who waits, by class."""
    async with running_stack(tenant_of=Callers("acme")) as stack:
        stack.pace.hold()
        message = request(tokens=PROMPT, stopping__max_tokens=500)
        calls = [stack.inference.Generate(message) for _ in range(20)]
        async with asyncio.timeout(PATIENCE_S):
            while len(stack.replica.engine.requests) < len(calls):
                await stack.control.GetStatus(control_pb2.GetStatusRequest())
            while True:
                stack.pace.allow(1)  # loads are gathered now and then, between two steps
                status = await stack.control.GetStatus(control_pb2.GetStatusRequest())
                if queues := status.replicas[0].queues:
                    break
        assert {queue.tenant for queue in queues} == {"acme"}
        assert 1 <= sum(queue.num_requests for queue in queues) <= 20
        for call in calls:
            call.cancel()
