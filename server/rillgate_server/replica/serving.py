"""Serves an engine on a Unix socket until a signal or a fault: bind, READY, drain, end.

The calling thread is the I/O thread; the engine has its own. Does not know where the executor comes
from (replica.process loads a model), nor who started the process.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc

from rillgate_proto.v1 import engine_pb2_grpc
from rillgate_server.config.settings import Settings
from rillgate_server.core.block_hash import HASH_SCHEME
from rillgate_server.core.clock import SystemClock
from rillgate_server.core.model_spec import CacheSizes, ModelSpec
from rillgate_server.core.welcome import Welcome
from rillgate_server.engine.engine import Engine
from rillgate_server.engine.engine_loop import EngineLoop
from rillgate_server.engine.executor import Executor
from rillgate_server.errors import ConfigError
from rillgate_server.replica.engine_service import EngineService
from rillgate_server.scheduler.scheduler import Scheduler
from rillgate_server.service.convert_engine import MAX_MESSAGE_BYTES

_log = logging.getLogger(__name__)

EXIT_ENGINE_FAILED = 1
_ENGINE_STOP_S = 5.0  # for the step under way
_LAST_WORDS_S = 0.5  # for streams to end once the service is closed


def serve_engine(settings: Settings, spec: ModelSpec, sizes: CacheSizes, executor: Executor) -> int:
    """Serve `executor`, with a cache of `sizes`, to gateways; return the exit code.

    Raises ConfigError when the socket cannot be had.
    """
    _refuse_if_taken(Path(settings.replica.socket))
    return asyncio.run(_serve(settings, spec, sizes, executor))


async def _serve(settings: Settings, spec: ModelSpec, sizes: CacheSizes, executor: Executor) -> int:
    clock = SystemClock()
    service = EngineService(spec.eos_token_ids, _welcome(settings, spec, sizes), clock)
    ended = _Ending()
    scheduler = Scheduler(settings.batcher, settings.cache, spec, sizes)
    engine_loop = EngineLoop(
        Engine(scheduler, executor, clock), clock, service.on_event, ended.on_fatal
    )
    service.attach(engine_loop)
    path = Path(settings.replica.socket)
    server = _listen(service, path)
    inode = _inode(path)
    engine_loop.start()
    await server.start()
    print(f"READY {spec.name} ({spec.architecture}, {spec.dtype})", flush=True)
    try:
        await ended.wait()
        if ended.is_fatal:
            return EXIT_ENGINE_FAILED
        await _drain(service, settings.replica.drain_grace_s)
        return 0
    finally:
        service.close()
        await server.stop(_LAST_WORDS_S)
        engine_loop.stop(_ENGINE_STOP_S)
        _remove_socket(path, inode)


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
        await asyncio.wait_for(service.wait_done(), grace_s)
    except TimeoutError:
        _log.warning("%d requests did not finish in time", service.num_open_requests)


def _welcome(settings: Settings, spec: ModelSpec, sizes: CacheSizes) -> Welcome:
    return Welcome(
        replica_id=f"{socket.gethostname()}-{os.getpid()}",
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
    )


def _listen(service: EngineService, path: Path) -> grpc.aio.Server:
    """Bind the socket with mode 0600 and nothing in between."""
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        )
    )
    engine_pb2_grpc.add_EngineServicer_to_server(service, server)
    with _umask(0o177):
        try:
            server.add_insecure_port(f"unix:{path.absolute()}")
        except RuntimeError as error:
            raise ConfigError(f"replica.socket is {path}; it cannot be bound: {error}") from error
    path.chmod(0o600)
    return server


def _refuse_if_taken(path: Path) -> None:
    """Raise ConfigError when something else is at `path`, which gRPC would take in silence."""
    if path.exists() and not path.is_socket():
        raise ConfigError(f"replica.socket is {path}, which is there and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return  # nobody, or a dead one's socket, which gRPC removes
    raise ConfigError(f"replica.socket is {path}, where another process listens")


def _remove_socket(path: Path, inode: int) -> None:
    """Remove our socket, unless a successor has put its own in the place already."""
    with contextlib.suppress(FileNotFoundError):
        if _inode(path) == inode:
            path.unlink()


def _inode(path: Path) -> int:
    return path.stat().st_ino


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    previous = os.umask(mask)
    try:
        yield
    finally:
        os.umask(previous)
