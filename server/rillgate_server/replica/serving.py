"""Serves an engine to gateways until a signal or a fault: bind, READY, drain, end.

The calling thread is the I/O thread; the engine has its own. Does not know where the executor comes
from (replica.process loads a model), nor who started the process.
"""

import asyncio
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable
from functools import partial

from rillgate_server.config.settings import Settings
from rillgate_server.core.block_hash import HASH_SCHEME
from rillgate_server.core.clock import SystemClock
from rillgate_server.core.model_spec import NO_QUANTIZATION, CacheSizes, ModelSpec
from rillgate_server.core.welcome import Welcome
from rillgate_server.engine.engine import Engine
from rillgate_server.engine.engine_loop import EngineLoop
from rillgate_server.engine.executor import Executor, PacedExecutor
from rillgate_server.replica.child import LISTENING, READY
from rillgate_server.replica.doors import Doors, check_doors
from rillgate_server.replica.engine_service import EngineService
from rillgate_server.replica.watchdog import Watchdog
from rillgate_server.scheduler.scheduler import Scheduler
from rillgate_server.worker.compute_device import CPU, Device, used_memory

_log = logging.getLogger(__name__)

EXIT_ENGINE_FAILED = 1
_ENGINE_STOP_S = 5.0  # for the step under way
_LAST_WORDS_S = 0.5  # for streams to end once the service is closed


CallOnLoss = Callable[[Callable[[Exception], None]], None]
"""Takes whom to tell, from any thread, when the executor is lost with or without a step to fail."""


def serve_engine(
    settings: Settings,
    spec: ModelSpec,
    sizes: CacheSizes,
    executor: Executor,
    call_on_loss: CallOnLoss | None = None,
) -> int:
    """Serve `executor`, with a cache of `sizes`, to gateways; return the exit code.

    `call_on_loss` is a split model's. Raises ConfigError when a door cannot be had.
    """
    check_doors(settings.replica, settings.link)
    if settings.replica.min_step_ms:
        executor = PacedExecutor(executor, settings.replica.min_step_ms / 1000)
    return asyncio.run(_serve(settings, spec, sizes, executor, call_on_loss))


def _device_of(executor: Executor) -> Device:
    """Return where it computes; what is no model's computes nowhere."""
    return getattr(executor, "device", CPU)


async def _serve(
    settings: Settings,
    spec: ModelSpec,
    sizes: CacheSizes,
    executor: Executor,
    call_on_loss: CallOnLoss | None,
) -> int:
    clock = SystemClock()
    service = EngineService(spec.eos_token_ids, _welcome(settings, spec, sizes), clock)
    ended = _Ending()
    scheduler = Scheduler(settings.batcher, settings.cache, spec, sizes, settings.speculation)
    engine_loop = EngineLoop(
        Engine(scheduler, executor, clock), clock, service.on_event, ended.on_fatal
    )
    service.attach(engine_loop, partial(used_memory, _device_of(executor)))
    doors = Doors(service, settings.replica, settings.link)
    watchdog = Watchdog(engine_loop.load, clock)
    engine_loop.start()
    watchdog.start()
    if call_on_loss is not None:
        call_on_loss(engine_loop.give_up)
    await doors.open()
    if doors.tcp_address:
        print(f"{LISTENING} {doors.tcp_address}", flush=True)
    weights = "" if spec.quantization == NO_QUANTIZATION else f", weights in {spec.quantization}"
    print(f"{READY} {spec.name} ({spec.architecture}, {spec.dtype}{weights})", flush=True)
    try:
        await ended.wait()
        if ended.is_fatal:
            return EXIT_ENGINE_FAILED
        await _drain(service, settings.replica.drain_grace_s)
        return 0
    finally:
        service.close()
        watchdog.stop()
        await doors.close(_LAST_WORDS_S)
        # After a fault the thread has ended, or is in a step that never will.
        engine_loop.stop(0.0 if ended.is_fatal else _ENGINE_STOP_S)


class _Ending:
    """Why the process ends: a signal, or a fault of the engine. Made inside the loop."""

    def __init__(self) -> None:
        self.is_fatal = False
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._event.set)

    def on_fatal(self, error: Exception) -> None:
        """End the process; called on the engine's thread."""
        self.is_fatal = True
        self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        """Wait for the end. From here on a second signal kills."""
        await self._event.wait()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)


async def _drain(service: EngineService, grace_s: float) -> None:
    """Refuse new requests and let those that run finish, for at most `grace_s`."""
    service.drain()
    _log.info("draining %d requests", service.num_open_requests)
    try:
        async with asyncio.timeout(grace_s):
            await service.wait_done()
    except TimeoutError:
        _log.warning("%d requests did not finish in time", service.num_open_requests)


def _welcome(settings: Settings, spec: ModelSpec, sizes: CacheSizes) -> Welcome:
    return Welcome(
        replica_id=settings.replica.name or f"{socket.gethostname()}-{os.getpid()}",
        incarnation=secrets.randbits(64),
        model=spec.name,
        model_version_digest=spec.version_digest,
        tokenizer_digest=spec.tokenizer_digest,
        vocab_size=spec.vocab_size,
        max_context_tokens=spec.max_context_tokens,
        block_size_tokens=settings.cache.block_size_tokens,
        hash_scheme=HASH_SCHEME,
        kv_dtype=sizes.kv_dtype,
        max_running=settings.batcher.max_running,
        tensor_parallel_size=settings.replica.tensor_parallel_size,
    )
