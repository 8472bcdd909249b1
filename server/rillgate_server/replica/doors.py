"""A replica's doors: a Unix socket for this machine, TCP for others, the same service behind both.

Owns binding and taking down, and that a TCP door is never open by accident. Who is let in is
service.link_door's to check.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc

from rillgate_proto.v1 import engine_pb2_grpc
from rillgate_server.config.groups import LinkConfig, ReplicaConfig
from rillgate_server.errors import ConfigError
from rillgate_server.replica.engine_service import EngineService
from rillgate_server.service.convert_engine import MAX_MESSAGE_BYTES
from rillgate_server.service.link_door import KEEPALIVE_OPTIONS, TokenCheck
from rillgate_server.service.tls import check_files, server_credentials

_log = logging.getLogger(__name__)

_MESSAGE_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not half of the calls
)


class Doors:
    """The open doors. Made inside the loop.

    State: the servers; the socket's path and inode, if there is one.
    """

    def __init__(self, service: EngineService, replica: ReplicaConfig, link: LinkConfig) -> None:
        """Bind what is configured, at least one; raises ConfigError for what cannot be had."""
        self._servers: list[grpc.aio.Server] = []
        self._socket: tuple[Path, int] | None = None
        self.tcp_address = ""
        """HOST:PORT with the port that was taken; empty: no such door."""
        if replica.socket:
            path = Path(replica.socket)
            self._servers.append(_open_socket(service, path))
            self._socket = (path, _inode(path))
        if replica.listen:
            server, port = _open_tcp(service, replica.listen, link)
            self._servers.append(server)
            self.tcp_address = f"{replica.listen.rpartition(':')[0]}:{port}"
            if not (link.has_tls or link.token):
                _log.warning(
                    "link.insecure: whoever can connect to %s may use this replica, past every "
                    "quota",
                    self.tcp_address,
                )

    def __repr__(self) -> str:
        return f"Doors(socket={self._socket}, tcp={self.tcp_address!r})"

    async def open(self) -> None:
        """Take calls."""
        for server in self._servers:
            await server.start()

    async def close(self, grace_s: float) -> None:
        """End what is left after `grace_s`; remove the socket."""
        for server in self._servers:
            await server.stop(grace_s)
        if self._socket is not None:
            _remove_socket(*self._socket)


def check_doors(replica: ReplicaConfig, link: LinkConfig) -> None:
    """Raise ConfigError before anything is loaded: no door, one that is taken, one without lock."""
    if not (replica.socket or replica.listen):
        raise ConfigError(
            "replica.socket and replica.listen are empty; allowed: a path (--socket PATH), "
            "HOST:PORT (--listen HOST:PORT), or both"
        )
    if replica.socket:
        _refuse_if_taken(Path(replica.socket))
    if replica.listen and not (link.has_tls or link.token or link.insecure):
        raise ConfigError(
            f"replica.listen is {replica.listen!r} and nothing keeps strangers out; allowed: with "
            f"link.tls_certificate, tls_key and tls_authority, or link.token, or link.insecure "
            f"(--insecure) where everybody who can connect may use it, past every quota"
        )
    check_files(link)


def _open_socket(service: EngineService, path: Path) -> grpc.aio.Server:
    """Bind the socket with mode 0600 and nothing in between."""
    server = grpc.aio.server(options=_MESSAGE_OPTIONS)
    engine_pb2_grpc.add_EngineServicer_to_server(service, server)
    with _umask(0o177):
        try:
            server.add_insecure_port(f"unix:{path.absolute()}")
        except RuntimeError as error:
            raise ConfigError(f"replica.socket is {path}; it cannot be bound: {error}") from error
    path.chmod(0o600)
    return server


def _open_tcp(service: EngineService, listen: str, link: LinkConfig) -> tuple[grpc.aio.Server, int]:
    """Bind HOST:PORT behind whatever `link` has; return the port, too."""
    server = grpc.aio.server(
        interceptors=(TokenCheck(link.token),) if link.token else (),
        options=(*_MESSAGE_OPTIONS, *KEEPALIVE_OPTIONS),
    )
    engine_pb2_grpc.add_EngineServicer_to_server(service, server)
    try:
        if link.has_tls:
            port = server.add_secure_port(listen, server_credentials(link))
        else:
            port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise ConfigError(f"replica.listen is {listen!r}; it cannot be bound: {error}") from error
    return server, port


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
