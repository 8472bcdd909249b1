"""The doors of a replica: who is let in over TCP, and who is not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from rillgate_proto.v1 import engine_pb2, engine_pb2_grpc
from rillgate_server.config.groups import LinkConfig, ReplicaConfig
from rillgate_server.errors import ConfigError, NoReplica
from rillgate_server.gateway.replica_link import ReplicaLink
from rillgate_server.replica.doors import Doors, check_doors
from rillgate_server.service.link_door import link_channel
from tests.replica.engine_server import (
    DEADLINE_S,
    WELCOME,
    ScriptedEngine,
    make_service,
    make_submission,
    wait_until,
)
from tests.support.cable import Cable
from tests.support.link_tls import GATEWAY_TLS, REPLICA_TLS, link_tls

TOKEN = "a token of twenty-five bytes"
LISTEN = ReplicaConfig(listen="127.0.0.1:0")


@asynccontextmanager
async def open_door(
    link: LinkConfig, replica: ReplicaConfig = LISTEN, engine: ScriptedEngine | None = None
) -> AsyncIterator[Doors]:
    """Serve an engine that does nothing."""
    service = make_service()
    service.attach(engine or ScriptedEngine())
    doors = Doors(service, replica, link)
    await doors.open()
    try:
        yield doors
    finally:
        service.close()
        await doors.close(0)


@asynccontextmanager
async def linked(address: str, door: LinkConfig) -> AsyncIterator[ReplicaLink]:
    """Connect as a gateway does."""
    link = ReplicaLink(address, door=door)
    await link.start()
    try:
        yield link
    finally:
        await link.close()


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        (REPLICA_TLS, GATEWAY_TLS),
        (LinkConfig(token=TOKEN), LinkConfig(token=TOKEN)),
        (
            replace(REPLICA_TLS, token=TOKEN),
            replace(GATEWAY_TLS, token=TOKEN),
        ),
        (LinkConfig(insecure=True), LinkConfig()),
    ],
    ids=["certificates", "token", "both", "insecure"],
)
async def test_who_has_the_key_is_let_in(inside: LinkConfig, outside: LinkConfig) -> None:
    """The gateway's link is ready, and knows whom it speaks to."""
    async with open_door(inside) as doors, linked(doors.tcp_address, outside) as link:
        await link.wait_ready(DEADLINE_S)
        assert link.welcome == WELCOME


@pytest.mark.parametrize(
    ("inside", "outside", "says"),
    [
        (REPLICA_TLS, LinkConfig(), "UNAVAILABLE"),
        (REPLICA_TLS, link_tls("server", "server", "rillgate.test"), "UNAVAILABLE"),
        (REPLICA_TLS, link_tls("client", "client", "rillgate.test"), "UNAVAILABLE"),
        (LinkConfig(token=TOKEN), LinkConfig(), "set the same link.token on both sides"),
        (LinkConfig(token=TOKEN), LinkConfig(token=TOKEN + "."), "UNAUTHENTICATED"),
        (
            replace(REPLICA_TLS, token=TOKEN),
            GATEWAY_TLS,
            "UNAUTHENTICATED",
        ),
    ],
    ids=[
        *("no certificate", "another's certificate", "another replica's certificate"),
        *("no token", "another token", "a certificate alone"),
    ],
)
async def test_a_stranger_is_not_let_in(inside: LinkConfig, outside: LinkConfig, says: str) -> None:
    """The link never gets ready, and its reason helps the operator."""
    async with open_door(inside) as doors, linked(doors.tcp_address, outside) as link:
        with pytest.raises(NoReplica, match=says):
            await link.wait_ready(1.0)


@pytest.mark.parametrize("method", ["Run", "Watch", "FlushCache", "Drain"])
async def test_every_method_asks_for_the_token(method: str) -> None:
    """None of them answers a stranger anything but UNAUTHENTICATED."""
    async with (
        open_door(LinkConfig(token=TOKEN)) as doors,
        link_channel(doors.tcp_address, LinkConfig(), ()) as channel,
    ):
        stub = engine_pb2_grpc.EngineStub(channel)
        call = {
            "Run": lambda: stub.Run(),
            "Watch": lambda: stub.Watch(engine_pb2.WatchRequest()),
            "FlushCache": lambda: stub.FlushCache(engine_pb2.EngineFlushCacheRequest()),
            "Drain": lambda: stub.Drain(engine_pb2.EngineDrainRequest()),
        }[method]()
        async with asyncio.timeout(DEADLINE_S):
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_gateway_whose_host_vanished_leaves_no_request_behind() -> None:
    """Nothing tells of its end: the replica's own pings find out. The gateway knows sooner."""
    engine = ScriptedEngine()
    async with (
        open_door(LinkConfig(insecure=True), engine=engine) as doors,
        Cable(doors.tcp_address) as cable,
        linked(cable.address, LinkConfig()) as link,
    ):
        await link.wait_ready(DEADLINE_S)
        link.submit(make_submission())
        await engine.wait_until(lambda: len(engine.requests) == 1)
        cable.cut()
        await wait_until(lambda: not link.is_ready)
        await engine.wait_until(lambda: bool(engine.aborts))


async def test_both_doors_lead_to_the_same_replica(tmp_path: Path) -> None:
    """The socket asks for nothing: its mode has asked already."""
    socket = tmp_path / "replica.sock"
    async with open_door(LinkConfig(token=TOKEN), replace(LISTEN, socket=str(socket))) as doors:
        assert socket.stat().st_mode & 0o777 == 0o600
        for address, door in (
            (f"unix:{socket}", LinkConfig()),
            (doors.tcp_address, LinkConfig(token=TOKEN)),
        ):
            async with linked(address, door) as link:
                await link.wait_ready(DEADLINE_S)
    assert not socket.exists()


def test_a_door_is_never_open_by_accident(tmp_path: Path) -> None:
    """Without a lock it is refused, unless the operator says so; and so is no door at all."""
    with pytest.raises(ConfigError, match=r"replica.listen is .* nothing keeps strangers out"):
        check_doors(LISTEN, LinkConfig())
    check_doors(LISTEN, LinkConfig(insecure=True))
    check_doors(LISTEN, LinkConfig(token=TOKEN))
    with pytest.raises(ConfigError, match=r"replica.socket and replica.listen are empty"):
        check_doors(ReplicaConfig(), LinkConfig())


async def test_an_open_door_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    """Who starts an insecure replica reads what that means."""
    async with open_door(LinkConfig(insecure=True)):
        assert "past every quota" in caplog.text
    caplog.clear()
    async with open_door(LinkConfig(token=TOKEN)):
        assert not caplog.text


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), (b"no certificate", "holds no PEM; allowed: a PEM file")],
)
def test_a_file_that_is_no_certificate_is_named(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    """Before anything is loaded, with its setting and its path."""
    path = tmp_path / "authority.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"link.tls_authority") as caught:
        check_doors(LISTEN, replace(REPLICA_TLS, tls_authority=str(path)))
    assert says in str(caught.value)


async def test_a_port_in_use_is_refused() -> None:
    """gRPC would share it otherwise, and each replica would get half of the connections."""
    async with open_door(LinkConfig(token=TOKEN)) as doors:
        taken = replace(LISTEN, listen=doors.tcp_address)
        with pytest.raises(ConfigError, match=r"replica.listen is .* cannot be bound"):
            Doors(make_service(), taken, LinkConfig(token=TOKEN))
