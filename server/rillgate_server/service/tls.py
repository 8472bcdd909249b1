"""Certificates between gateway and replicas: both ends show one, signed by one authority.

Owns the reading of the files and its errors. Who may connect without a certificate is
service.link_door's. The public door is not this one. https://grpc.io/docs/guides/auth/
"""

from pathlib import Path

import grpc

from rillgate_server.config.groups import LinkConfig
from rillgate_server.errors import ConfigError

_MARK = b"-----BEGIN "


def server_credentials(config: LinkConfig) -> grpc.ServerCredentials:
    """Return what a replica's door needs: its certificate, and the authority of its callers."""
    return grpc.ssl_server_credentials(
        [(_read("tls_key", config.tls_key), _read("tls_certificate", config.tls_certificate))],
        root_certificates=_read("tls_authority", config.tls_authority),
        require_client_auth=True,
    )


def channel_credentials(config: LinkConfig) -> grpc.ChannelCredentials:
    """Return what a gateway shows, and whom it trusts."""
    return grpc.ssl_channel_credentials(
        _read("tls_authority", config.tls_authority),
        _read("tls_key", config.tls_key),
        _read("tls_certificate", config.tls_certificate),
    )


def check_files(config: LinkConfig) -> None:
    """Raise ConfigError now for a file that would be missed later."""
    if config.has_tls:
        channel_credentials(config)


def _read(field: str, path: str) -> bytes:
    try:
        text = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"link.{field} is {path!r}: {error.strerror}") from error
    if _MARK not in text:
        raise ConfigError(f"link.{field} is {path!r}, which holds no PEM; allowed: a PEM file")
    return text
