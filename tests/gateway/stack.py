"""A whole server in the test's process: gateway, Unix socket, engine loop; a fake executor below.

The tokenizer and the chat template are the bundled model's, the tokens a hash of their context, so
every answer can be said beforehand. `Pace` holds the engine between two steps, so that a test
decides what has happened when it acts.
"""

import asyncio
import contextlib
import functools
import itertools
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

from rillgate_proto.v1 import control_pb2_grpc, engine_pb2_grpc, inference_pb2_grpc
from rillgate_proto.v1 import inference_pb2 as pb
from rillgate_server.config.groups import BatcherConfig, CacheConfig, GatewayConfig
from rillgate_server.config.settings import bundled_model_dir
from rillgate_server.core.checkpoint import read_model_spec
from rillgate_server.core.clock import SystemClock
from rillgate_server.core.model_spec import CacheSizes, ModelSpec
from rillgate_server.core.request import Request
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import RowPlan, StepPlan
from rillgate_server.core.welcome import Welcome
from rillgate_server.engine.engine import Engine
from rillgate_server.engine.engine_loop import EngineLoop
from rillgate_server.engine.testing import FakeCopies, FakeExecutor, FakeModel
from rillgate_server.gateway.process import Gateway
from rillgate_server.gateway.prompt import ServedModel
from rillgate_server.gateway.tenancy import TenantOf, default_tenant
from rillgate_server.gateway.text.model_text import ModelText
from rillgate_server.replica.engine_service import EngineService, ServiceLimits
from rillgate_server.scheduler.scheduler import Scheduler

PATIENCE_S = 20.0
"""For what takes milliseconds; the machine may be busy."""
GATEWAY = GatewayConfig(listen="127.0.0.1:0", drain_grace_s=PATIENCE_S)
NUM_BLOCKS = 512
BATCHER = BatcherConfig(max_running=16, max_step_tokens=256, max_prefill_chunk_tokens=64)
CACHE = CacheConfig(block_size_tokens=8)
NO_HOST_TIER = FakeCopies()


@functools.cache
def served_model() -> ServedModel:
    """Read the bundled model's text side, once."""
    folder = bundled_model_dir()
    return ServedModel(read_model_spec(folder, needs_tokenizer=True), ModelText.load(folder))


class Pace:
    """Lets the engine's thread make steps: all at once, or as many as a test allows."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_allowed: int | None = None  # None: any number

    def hold(self) -> None:
        """Let no step begin any more."""
        with self._changed:
            self._num_allowed = 0

    def allow(self, num_steps: int) -> None:
        """Let this many more steps run."""
        with self._changed:
            assert self._num_allowed is not None, "hold() comes first"
            self._num_allowed += num_steps
            self._changed.notify()

    def open(self) -> None:
        """Let all run, one that waits included."""
        with self._changed:
            self._num_allowed = None
            self._changed.notify()

    def __call__(self, plan: StepPlan) -> None:
        """Wait for leave; on the engine's thread."""
        with self._changed:
            has_leave = self._changed.wait_for(lambda: self._num_allowed != 0, PATIENCE_S)
            assert has_leave, "no test let the step run"
            if self._num_allowed is not None:
                self._num_allowed -= 1


class RecordedEngine:
    """An engine handle that remembers what reached the engine."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self.requests: list[Request] = []
        self.flush_cache = loop.flush_cache
        self.watch_blocks = loop.watch_blocks
        self.unwatch_blocks = loop.unwatch_blocks
        self.drain = loop.drain
        self.load = loop.load
        self.aborts: list[tuple[int, ...]] = []
        self.has_aborted = asyncio.Event()

    def submit(self, request: Request) -> None:
        """Pass it on, and remember it."""
        self._loop.submit(request)
        self.requests.append(request)

    def abort(self, request_id: int, choice_indices: tuple[int, ...] = ()) -> None:
        """Pass it on, and remember the choices."""
        self._loop.abort(request_id, choice_indices)
        self.aborts.append(choice_indices)
        self.has_aborted.set()


@dataclass
class Replica:
    """The engine's side."""

    socket: Path
    server: grpc.aio.Server
    loop: EngineLoop
    scheduler: Scheduler
    executor: FakeExecutor
    pace: Pace
    engine: RecordedEngine
    replica_id: str

    @property
    def address(self) -> str:
        """Where gateways find it."""
        return f"unix:{self.socket}"

    @property
    def num_blocks_used(self) -> int:
        """Blocks that requests hold, after the latest step."""
        return self.loop.load().device.num_blocks_used

    async def wait_idle(self) -> None:
        """Wait until the engine has no request left."""
        assert await asyncio.to_thread(self.loop.wait_idle, PATIENCE_S), "requests are left"

    async def wait_aborted(self) -> None:
        """Wait until an abort has reached the engine."""
        await asyncio.wait_for(self.engine.has_aborted.wait(), PATIENCE_S)

    async def crash(self) -> None:
        """Cut every connection at once, as a killed process does."""
        await self.server.stop(None)


@dataclass
class Stack:
    """The server, and stubs that call it."""

    gateway: Gateway
    replica: Replica
    channel: grpc.aio.Channel
    inference: inference_pb2_grpc.InferenceStub
    control: control_pb2_grpc.ControlStub

    @property
    def pace(self) -> Pace:
        """The engine's pace."""
        return self.replica.pace


@contextlib.asynccontextmanager
async def running_replica(
    model: FakeModel | None = None,
    fail_rows: Callable[[RowPlan, Sequence[int]], str | None] | None = None,
    batcher: BatcherConfig = BATCHER,
    copies: FakeCopies = NO_HOST_TIER,
    at: Path | None = None,
) -> AsyncIterator[Replica]:
    """Serve a fake engine on a Unix socket, a new one or `at`, while the block runs."""
    spec, clock, pace = served_model().spec, SystemClock(), Pace()
    executor = FakeExecutor(
        NUM_BLOCKS,
        CACHE.block_size_tokens,
        model or FakeModel(spec.vocab_size),
        before_step=pace,
        fail_rows=fail_rows,
        copies=copies,
    )
    sizes = CacheSizes(NUM_BLOCKS, copies.block_bytes, spec.dtype, copies.num_host_blocks)
    engine = Engine(Scheduler(batcher, CACHE, spec, sizes), executor, clock)
    welcome = _welcome(spec)
    service = EngineService(spec.eos_token_ids, welcome, clock, ServiceLimits(load_interval_s=0.02))
    loop = EngineLoop(engine, clock, service.on_event)
    recorded = RecordedEngine(loop)
    service.attach(recorded)
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(service, server)
    with tempfile.TemporaryDirectory(prefix="rillgate-") as folder:
        socket = at or Path(folder) / "replica.sock"
        server.add_insecure_port(f"unix:{socket}")
        loop.start()
        await server.start()
        try:
            yield Replica(
                socket, server, loop, engine.scheduler, executor, pace, recorded, welcome.replica_id
            )
        finally:
            pace.open()
            await server.stop(None)
            assert loop.stop(PATIENCE_S)


@contextlib.asynccontextmanager
async def running_stack(
    config: GatewayConfig = GATEWAY,
    model: FakeModel | None = None,
    fail_rows: Callable[[RowPlan, Sequence[int]], str | None] | None = None,
    batcher: BatcherConfig = BATCHER,
    tenant_of: TenantOf = default_tenant,
    served: ServedModel | None = None,
) -> AsyncIterator[Stack]:
    """Serve while the block runs, and check at its end that no block is held."""
    async with running_replica(model, fail_rows, batcher) as replica:
        config = replace(config, replica_addresses=(f"unix:{replica.socket}",))
        gateway = Gateway(config, served or served_model(), SystemClock(), tenant_of)
        await gateway.start()
        try:
            await gateway.wait_ready(PATIENCE_S)
            async with open_channel(gateway.address) as channel:
                yield Stack(
                    gateway,
                    replica,
                    channel,
                    inference_pb2_grpc.InferenceStub(channel),
                    control_pb2_grpc.ControlStub(channel),
                )
            replica.pace.open()
            await replica.wait_idle()
            assert replica.num_blocks_used == 0
        finally:
            replica.pace.open()
            await gateway.stop()


def open_channel(address: str) -> grpc.aio.Channel:
    """Connect on a connection of its own, as another process would."""
    return grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),))


def request(*, tokens: Sequence[int] = (), **fields: object) -> pb.GenerateRequest:
    """Build a request: greedy, eight tokens, a short prompt, unless `fields` say otherwise."""
    message = pb.GenerateRequest()
    if tokens:
        message.token_ids.ids.extend(tokens)
    else:
        message.prompt = "hello"
    message.stopping.max_tokens = 8
    message.sampling.temperature = 0
    for path, value in fields.items():
        *parents, name = path.split("__")
        parent = functools.reduce(getattr, parents, message)
        if isinstance(value, list | tuple):
            getattr(parent, name).extend(value)
        elif isinstance(value, dict):
            getattr(parent, name).update(value)
        else:
            setattr(parent, name, value)
    return message


@dataclass
class Answer:
    """What a stream gave, joined; one entry per choice where there are several."""

    messages: list[pb.GenerateResponse]

    @property
    def started(self) -> pb.Started:
        """The first message's."""
        return self.messages[0].started

    def outputs(self, choice: int = 0) -> list[pb.Output]:
        """A choice's outputs, in order."""
        return [it for m in self.messages for it in m.outputs if it.choice_index == choice]

    def token_ids(self, choice: int = 0) -> list[int]:
        """A choice's token ids; checks that there is neither gap nor repeat."""
        ids: list[int] = []
        first: int | None = None
        for output in self.outputs(choice):
            first = output.token_offset if first is None else first
            assert output.token_offset - first == len(ids)
            ids += output.token_ids
        return ids

    def text(self, choice: int = 0) -> str:
        """A choice's text."""
        return "".join(output.text for output in self.outputs(choice))

    def reasoning_text(self, choice: int = 0) -> str:
        """A choice's reasoning."""
        return "".join(output.reasoning_text for output in self.outputs(choice))

    def logprobs(self, choice: int = 0) -> list[pb.TokenLogprobs]:
        """A choice's log-probabilities."""
        return [it for output in self.outputs(choice) for it in output.logprobs]

    def finished(self, choice: int = 0) -> pb.Finished:
        """A choice's end; there must be exactly one."""
        (end,) = (it for m in self.messages for it in m.finished if it.choice_index == choice)
        return end


async def read(call: "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]") -> Answer:
    """Read a stream to its end; raises what it ends with."""
    async with asyncio.timeout(PATIENCE_S):
        messages = []
        while isinstance(message := await call.read(), pb.GenerateResponse):
            messages.append(message)
        return Answer(messages)


def expected_tokens(stack: Stack, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Say what the fake engine answers greedily."""
    return greedy_tokens(stack.replica, prompt, num_tokens)


def greedy_tokens(replica: Replica, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Say what a fake engine answers greedily."""
    context = list(prompt)
    for _ in range(num_tokens):
        model = replica.executor.model
        context.append(model.next_token(context, len(prompt), SamplingParams(0, 0.0), 0))
    return context[len(prompt) :]


async def generate(stack: Stack, message: pb.GenerateRequest) -> Answer:
    """Call Generate and read it to its end."""
    return await read(stack.inference.Generate(message))


_incarnations = itertools.count(7)


def _welcome(spec: ModelSpec) -> Welcome:
    incarnation = next(_incarnations)
    return Welcome(
        replica_id=f"replica-{incarnation}",
        incarnation=incarnation,
        model=spec.name,
        model_version_digest=spec.version_digest,
        tokenizer_digest=spec.tokenizer_digest,
        vocab_size=spec.vocab_size,
        max_context_tokens=spec.max_context_tokens,
        block_size_tokens=CACHE.block_size_tokens,
        hash_scheme="blake2b-16/1",
        kv_dtype=spec.dtype,
        max_running=BATCHER.max_running,
    )


def with_config(**fields: object) -> GatewayConfig:
    """Return the tests' gateway settings with some changed."""
    return replace(GATEWAY, **fields)  # type: ignore[arg-type]
