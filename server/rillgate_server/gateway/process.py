"""The gateway process: the public services over one replica, from start to drained end.

Owns the order of starting and stopping. Does not know what the services do. Imports neither torch
nor transformers, directly or through others.

    start   bind (a port in use is an error at once), link to the replica, serve
    ready   health follows the replica: connected, of this checkpoint, and heard from lately
    SIGTERM health NOT_SERVING, no new calls, open ones finish within the grace, end
"""

import asyncio
import contextlib
import logging
import secrets
import signal
from pathlib import Path

from rillgate_proto.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from rillgate_server.config.groups import GatewayConfig
from rillgate_server.config.settings import Settings
from rillgate_server.core.checkpoint import read_model_spec
from rillgate_server.core.clock import Clock, SystemClock
from rillgate_server.core.model_spec import ModelSpec
from rillgate_server.core.welcome import Welcome
from rillgate_server.gateway.control import ControlService
from rillgate_server.gateway.inference import InferenceService
from rillgate_server.gateway.open_calls import OpenCalls
from rillgate_server.gateway.prompt import ServedModel, unix_time_ms
from rillgate_server.gateway.replica_link import ReplicaLink
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


class Gateway:
    """The public server over one replica; made and used inside one asyncio loop."""

    def __init__(
        self,
        config: GatewayConfig,
        model: ServedModel,
        replica_address: str,
        clock: Clock,
        tenant_of: TenantOf = default_tenant,
    ) -> None:
        """Build and bind; raises ConfigError when the port cannot be had."""
        self._config = config
        self._link = ReplicaLink(replica_address, refuse=_Refusal(model.spec))
        self._open_calls = OpenCalls()
        self._server = public_server(config, (CallBorder((INFERENCE, CONTROL)),))
        tenancy = Tenancy(config.cluster_secret or secrets.token_hex(), tenant_of)
        inference = InferenceService(model, self._link, tenancy, self._open_calls, clock)
        inference_pb2_grpc.add_InferenceServicer_to_server(inference, self._server)
        control = ControlService(model.spec, self._link, self._open_calls, clock)
        control_pb2_grpc.add_ControlServicer_to_server(control, self._server)
        self._health = HealthBoard.add_to(self._server, (INFERENCE, CONTROL, model.spec.name))
        add_introspection(self._server, (INFERENCE, CONTROL))
        self._health_feeder: asyncio.Task[None] | None = None
        host, _, _ = config.listen.rpartition(":")
        self.address = f"{host}:{bind(self._server, config.listen)}"
        """HOST:PORT with the port that was taken."""

    async def start(self) -> None:
        """Serve, and begin to connect to the replica."""
        await self._health.set_serving(False)
        await self._link.start()
        await self._server.start()
        self._health_feeder = asyncio.create_task(self._feed_health())

    async def wait_ready(self, timeout_s: float | None) -> None:
        """Wait for the replica; raises NoReplica after `timeout_s`, if there is one."""
        await self._link.wait_ready(timeout_s)

    async def drain(self) -> None:
        """Take no new calls, and wait for the open ones, at most the grace."""
        self._open_calls.drain()
        await self._health.drain()
        try:
            await asyncio.wait_for(self._open_calls.wait_none(), self._config.drain_grace_s)
        except TimeoutError:
            _log.warning(
                "cut off %d calls after a grace of %g s",
                self._open_calls.num_open,
                self._config.drain_grace_s,
            )

    async def stop(self) -> None:
        """End what is left. Idempotent."""
        if self._health_feeder is not None:
            self._health_feeder.cancel()
        await self._server.stop(LAST_WRITES_S)
        await self._link.close()

    async def _feed_health(self) -> None:
        """Let health follow the replica. Looks again and again: silence sends no event."""
        was_serving = False
        while True:
            is_serving = not self._link.is_lost
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
                return f"its model's {what} is {its[:16]}…, this gateway's is {ours[:16]}…"
        return None


def run_gateway(settings: Settings, model_dir: Path) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code. Says READY once it can answer."""
    configure_logging(settings.log.level)
    spec = read_model_spec(
        model_dir, settings.model.name or None, needs_tokenizer=True
    ).with_context_of(settings.model.max_context_tokens)
    text = ModelText.load(model_dir)
    shared = SharedPrefixes.load(settings.gateway.shared_prefixes, text, unix_time_ms())
    model = ServedModel(spec, text, shared)
    asyncio.run(_serve(settings.gateway, model, settings.gateway.replica_addresses[0]))
    return 0


async def _serve(config: GatewayConfig, model: ServedModel, replica_address: str) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    gateway = Gateway(config, model, replica_address, SystemClock())
    await gateway.start()
    saying = asyncio.create_task(_say_ready(gateway))
    try:
        await stopping.wait()
        await gateway.drain()
    finally:
        saying.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gateway.stop()


async def _say_ready(gateway: Gateway) -> None:
    """Say READY once a call would be answered; until then calls get UNAVAILABLE."""
    await gateway.wait_ready(None)
    print(f"READY {gateway.address}", flush=True)
