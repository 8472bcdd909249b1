"""The gateway process: the public services over its replicas, from start to drained end.

Owns the order of starting and stopping. Does not know what the services do. Imports neither torch
nor transformers, directly or through others.

    start   bind (a port in use is an error at once), link to the replicas, serve
    ready   health follows them: one is connected, of this checkpoint, and heard from lately
    SIGTERM health NOT_SERVING, no new calls, open ones finish within the grace, end
"""

import asyncio
import contextlib
import logging
import secrets
import signal
from pathlib import Path

from rillgate_proto.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from rillgate_server.config.groups import GatewayConfig, LinkConfig
from rillgate_server.config.settings import Settings
from rillgate_server.core.checkpoint import read_model_spec
from rillgate_server.core.clock import Clock, SystemClock
from rillgate_server.core.model_spec import ModelSpec
from rillgate_server.core.quantization import Quantization, resolve_quantization
from rillgate_server.core.welcome import Welcome
from rillgate_server.gateway.control import ControlService
from rillgate_server.gateway.fleet import Fleet
from rillgate_server.gateway.inference import InferenceService
from rillgate_server.gateway.open_calls import OpenCalls
from rillgate_server.gateway.prompt import ServedModel, unix_time_ms
from rillgate_server.gateway.shared_prefixes import SharedPrefixes
from rillgate_server.gateway.tenancy import Tenancy, TenantOf, default_tenant
from rillgate_server.gateway.text.model_text import ModelText
from rillgate_server.service.interceptors import CallBorder
from rillgate_server.service.log_events import configure_logging
from rillgate_server.service.server import HealthBoard, add_introspection, bind, public_server

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
CONTROL = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name

HEALTH_INTERVAL_S = 0.1
"""Between two looks at the replica: half of the time between two of its Loads."""
LAST_WRITES_S = 0.5
"""For the last bytes of calls that are over, and for health watchers to hear NOT_SERVING."""

_log = logging.getLogger(__name__)

_NO_DOOR = LinkConfig()


class Gateway:
    """The public server over its replicas; made and used inside one asyncio loop."""

    def __init__(
        self,
        config: GatewayConfig,
        model: ServedModel,
        clock: Clock,
        tenant_of: TenantOf = default_tenant,
        door: LinkConfig = _NO_DOOR,
    ) -> None:
        """Build and bind; raises ConfigError when the port cannot be had, or for an address.

        `door`: how replicas that are reached over TCP let this gateway in.
        """
        self._config = config
        self._fleet = Fleet(config, _Refusal(model.spec), clock, door)
        self._open_calls = OpenCalls()
        self._server = public_server(config, (CallBorder((INFERENCE, CONTROL)),))
        tenancy = Tenancy(config.cluster_secret or secrets.token_hex(), tenant_of)
        inference = InferenceService(model, self._fleet, tenancy, self._open_calls, clock)
        inference_pb2_grpc.add_InferenceServicer_to_server(inference, self._server)
        control = ControlService(
            model.spec, self._fleet, self._open_calls, self.drain, clock, config
        )
        control_pb2_grpc.add_ControlServicer_to_server(control, self._server)
        self._health = HealthBoard.add_to(self._server, (INFERENCE, CONTROL, model.spec.name))
        add_introspection(self._server, (INFERENCE, CONTROL))
        self._health_feeder: asyncio.Task[None] | None = None
        host, _, _ = config.listen.rpartition(":")
        self.address = f"{host}:{bind(self._server, config.listen)}"
        """HOST:PORT with the port that was taken."""

    async def start(self) -> None:
        """Serve, and begin to connect to the replicas."""
        await self._health.set_serving(False)
        await self._fleet.start()
        await self._server.start()
        self._health_feeder = asyncio.create_task(self._feed_health())

    async def wait_ready(self, timeout_s: float | None) -> None:
        """Wait for a replica; raises NoReplica after `timeout_s`, if there is one."""
        await self._fleet.wait_ready(timeout_s)

    async def drain(self, grace_s: float) -> None:
        """Say NOT_SERVING, take no new calls, and wait at most `grace_s` for the open ones."""
        await self._health.drain()
        self._open_calls.drain()
        try:
            async with asyncio.timeout(grace_s):
                await self._open_calls.wait_none()
        except TimeoutError:
            _log.warning("%d calls run on after %g s", self._open_calls.num_open, grace_s)

    async def stop(self) -> None:
        """End what is left. Idempotent."""
        if self._health_feeder is not None:
            self._health_feeder.cancel()
        await self._server.stop(LAST_WRITES_S)
        await self._fleet.close()

    async def _feed_health(self) -> None:
        """Let health follow the replicas. Looks again and again: silence sends no event."""
        was_serving = False
        while True:
            is_serving = self._fleet.is_serving
            if is_serving != was_serving:
                await self._health.set_serving(is_serving)
                was_serving = is_serving
            await asyncio.sleep(HEALTH_INTERVAL_S)


class _Refusal:
    """Says why a replica is not one that this gateway can speak for."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def __call__(self, welcome: Welcome) -> str | None:
        for what, its, ours in (
            ("version", welcome.model_version_digest, self._spec.version_digest),
            ("tokenizer", welcome.tokenizer_digest, self._spec.tokenizer_digest),
        ):
            if its != ours:
                # The end says how the model is quantised.
                its, ours = (f"{it[:16]}…{it[64:]}" for it in (its, ours))
                return (
                    f"its model's {what} is {its}, this gateway's is {ours}; start it with the "
                    "same checkpoint and model.quantization, or list it at a gateway of its own"
                )
        if welcome.max_context_tokens < self._spec.max_context_tokens:
            return (
                f"its context is {welcome.max_context_tokens} tokens, this gateway's is "
                f"{self._spec.max_context_tokens}; give both the same model.max_context_tokens"
            )
        return None


def run_gateway(settings: Settings, model_dir: Path) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code. Says READY once it can answer."""
    configure_logging(settings.log.level)
    spec = read_model_spec(model_dir, settings.model.name or None, needs_tokenizer=True)
    spec = spec.with_quantization(
        resolve_quantization(Quantization.of(settings.model), model_dir).version
    )
    spec = spec.with_context_of(settings.model.max_context_tokens)
    text = ModelText.load(model_dir)
    shared = SharedPrefixes.load(settings.gateway.shared_prefixes, text, unix_time_ms())
    model = ServedModel(spec, text, shared)
    asyncio.run(_serve(settings.gateway, model, settings.link))
    return 0


async def _serve(config: GatewayConfig, model: ServedModel, door: LinkConfig) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    gateway = Gateway(config, model, SystemClock(), door=door)
    await gateway.start()
    saying = asyncio.create_task(_say_ready(gateway))
    try:
        await stopping.wait()
        await gateway.drain(config.drain_grace_s)
    finally:
        saying.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gateway.stop()


async def _say_ready(gateway: Gateway) -> None:
    """Say READY once a call would be answered; until then calls get UNAVAILABLE."""
    await gateway.wait_ready(None)
    print(f"READY {gateway.address}", flush=True)
