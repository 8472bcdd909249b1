"""How a client connects, waits and retries: frozen groups of settings.

Owns the settings and their limits. Knows nothing of channels: `_channel` builds them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

DEFAULT_TARGET = "127.0.0.1:50051"


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """TLS towards the server. As it stands, the system's authorities are trusted."""

    root_certificates: bytes | None = None
    """Authorities to trust, PEM; None: the system's."""
    private_key: bytes | None = None
    """This client's key, PEM, where the server asks for a certificate (mTLS)."""
    certificate_chain: bytes | None = None
    """This client's certificate, PEM; belongs to `private_key`."""
    server_name: str | None = None
    """Name that the server's certificate must have, if it is not the target's."""

    def __post_init__(self) -> None:
        """Raise ValueError for a key without certificate, or the other way round."""
        if (self.private_key is None) != (self.certificate_chain is None):
            raise ValueError("tls.private_key and tls.certificate_chain must be given together")

    @classmethod
    def from_files(
        cls,
        root_certificates: Path | None = None,
        private_key: Path | None = None,
        certificate_chain: Path | None = None,
        server_name: str | None = None,
    ) -> "TlsConfig":
        """Read the PEM files."""
        return cls(
            _read(root_certificates), _read(private_key), _read(certificate_chain), server_name
        )


@dataclass(frozen=True, slots=True)
class RetryConfig:
    """When a call is made again: one that was refused, and one that broke while under way."""

    max_attempts: int = 4
    """Calls in all while none is answered, 1 to 100; 1: no retries. Higher: fewer errors, later
    ones."""
    max_resumes: int = 30
    """Tries in a row to go on after a break, none of which brings anything new, 0 to 10000. 30 last
    some 40 s where nobody listens: longer than a restart. Higher: later errors."""
    first_backoff_s: float = 0.1
    """First wait where the server named none; doubles each time (after a break up to 2 s).
    Above 0."""
    max_wait_s: float = 30.0
    """A longer wait than this is not begun: the error comes at once. Above 0."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of its range."""
        _check("retry.max_attempts", self.max_attempts, 1, 100)
        _check("retry.max_resumes", self.max_resumes, 0, 10_000)
        _check("retry.first_backoff_s", self.first_backoff_s, 1e-3, 3600)
        _check("retry.max_wait_s", self.max_wait_s, 1e-3, 3600)


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """Everything about a connection."""

    tls: TlsConfig | None = None
    """None: plain text, for the same machine or a mesh that encrypts."""
    timeout_s: float | None = None
    """Deadline of calls that give none; None: no deadline."""
    retry: RetryConfig = field(default_factory=RetryConfig)
    balancing: Literal["round_robin", "pick_first"] = "round_robin"
    """What to do with several addresses: spread calls, or use the first that answers."""
    max_message_bytes: int = 64 << 20
    """Largest message to receive, 1 KiB to 1 GiB (the server has a limit of its own)."""
    keepalive_time_s: float = 30.0
    """A ping after this long without traffic while a call is open, 1 to 7200. Lower: a server
    that vanished is noticed sooner, servers may refuse more than they allow."""
    keepalive_timeout_s: float = 10.0
    """How long a ping may stay unanswered before the connection counts as broken, 1 to 7200."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of its range."""
        _check("max_message_bytes", self.max_message_bytes, 1 << 10, 1 << 30)
        _check("keepalive_time_s", self.keepalive_time_s, 1, 7200)
        _check("keepalive_timeout_s", self.keepalive_timeout_s, 1, 7200)
        if self.timeout_s is not None:
            _check("timeout_s", self.timeout_s, 1e-3, 1e9)


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


def _check(name: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:
        raise ValueError(f"{name} is {value:g}; allowed: {lowest:g} to {highest:g}")
