"""A real Engine server on a real Unix socket, in the test's own process.

The engine behind it is any EngineHandle: `ScriptedEngine` says exactly what a test tells it to.
"""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import grpc

from rillgate_proto.v1 import engine_pb2_grpc
from rillgate_server.core.clock import SystemClock
from rillgate_server.core.load import EngineLoad, FlushedBlocks
from rillgate_server.core.model_spec import ModelSpec
from rillgate_server.core.pending_output import StepEntry
from rillgate_server.core.request import Request
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.submission import Submission
from rillgate_server.core.welcome import Welcome
from rillgate_server.gateway.replica_stream import ReplicaStream
from rillgate_server.replica.engine_service import EngineService, ServiceLimits
from rillgate_server.service.convert_engine import MAX_MESSAGE_BYTES

DEADLINE_S = 10.0
"""For what takes milliseconds; the machine may be busy."""

SPEC = ModelSpec(
    name="fake",
    version_digest="ab" * 32,
    tokenizer_digest="cd" * 32,
    architecture="FakeForCausalLM",
    vocab_size=1000,
    max_context_tokens=4096,
    eos_token_ids=(999,),
    dtype="float32",
)
WELCOME = Welcome(
    replica_id="replica-0",
    incarnation=7,
    model=SPEC.name,
    model_version_digest=SPEC.version_digest,
    tokenizer_digest=SPEC.tokenizer_digest,
    vocab_size=SPEC.vocab_size,
    max_context_tokens=SPEC.max_context_tokens,
    block_size_tokens=16,
    hash_scheme="blake2b-16/1",
    kv_dtype="float32",
    max_running=64,
)


class ScriptedEngine:
    """Records commands; a test plays the steps by calling the service's `on_event` itself."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.aborts: list[tuple[int, tuple[int, ...]]] = []
        self.flushes: list[Future[FlushedBlocks]] = []
        self.watch_ids: list[int] = []
        self.is_draining = False
        self._changed = asyncio.Event()

    def submit(self, request: Request) -> None:
        """Record it."""
        self.requests.append(request)
        self._changed.set()

    def abort(self, request_id: int, choice_indices: tuple[int, ...] = ()) -> None:
        """Record it."""
        self.aborts.append((request_id, choice_indices))
        self._changed.set()

    def flush_cache(self) -> Future[FlushedBlocks]:
        """Record it; the test completes the future."""
        flushed: Future[FlushedBlocks] = Future()
        self.flushes.append(flushed)
        self._changed.set()
        return flushed

    def watch_blocks(self, watch_id: int) -> None:
        """Record it; the test sends the snapshot."""
        self.watch_ids.append(watch_id)
        self._changed.set()

    def unwatch_blocks(self, watch_id: int) -> None:
        """Record it."""
        self.watch_ids.remove(watch_id)
        self._changed.set()

    def drain(self, *, undo: bool = False) -> None:
        """Record it."""
        self.is_draining = not undo

    def load(self) -> EngineLoad:
        """Count what is here."""
        return EngineLoad(num_running=len(self.requests))

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a command after which `condition` holds."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


@contextlib.contextmanager
def socket_directory() -> Iterator[Path]:
    """Yield a directory whose name is short enough for a socket's path."""
    with tempfile.TemporaryDirectory(prefix="rillgate-") as name:
        yield Path(name)


def make_server(service: EngineService, socket: Path) -> grpc.aio.Server:
    """Build a server of the Engine service at `socket`."""
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        )
    )
    engine_pb2_grpc.add_EngineServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{socket}")
    return server


@contextlib.asynccontextmanager
async def serving(service: EngineService, socket: Path) -> AsyncIterator[grpc.aio.Server]:
    """Serve while the block runs."""
    server = make_server(service, socket)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(None)


def make_service(**options: object) -> EngineService:
    """Build a service for SPEC; the caller attaches an engine."""
    welcome = options.pop("welcome", WELCOME)
    limits = ServiceLimits(**options)  # type: ignore[arg-type]
    return EngineService(SPEC.eos_token_ids, welcome, SystemClock(), limits)  # type: ignore[arg-type]


def make_submission(*prompt: int, **fields: object) -> Submission:
    """Build a submission that needs no thought."""
    values: dict[str, object] = {
        "request_id": "r",
        "prompt_token_ids": prompt or (1, 2, 3),
        "sampling": SamplingParams(seed=1),
        "max_tokens": 8,
    }
    return Submission(**(values | fields))  # type: ignore[arg-type]


async def next_events(stream: ReplicaStream) -> list[StepEntry]:
    """Read, within the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        return await stream.next_events()


async def read_all(stream: ReplicaStream) -> list[StepEntry]:
    """Read everything until the request is over."""
    events: list[StepEntry] = []
    while batch := await next_events(stream):
        events.extend(batch)
    return events


async def wait_for(task: "asyncio.Task[None]") -> None:
    """Wait within the deadline."""
    await asyncio.wait_for(task, DEADLINE_S)


async def wait_until(condition: Callable[[], bool]) -> None:
    """Poll what no event tells, within the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.01)
