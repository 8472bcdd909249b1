"""Certificates for both ends of the link to a replica; each is its own authority."""

from pathlib import Path

from rillgate_server.config.groups import LinkConfig

_FOLDER = Path(__file__).parents[1] / "client" / "certificates"


def link_tls(own: str, other: str, server_name: str = "") -> LinkConfig:
    """Return an end that shows `own` and trusts `other`."""
    return LinkConfig(
        tls_certificate=str(_FOLDER / f"{own}.pem"),
        tls_key=str(_FOLDER / f"{own}.key"),
        tls_authority=str(_FOLDER / f"{other}.pem"),
        tls_server_name=server_name,
    )


REPLICA_TLS = link_tls("server", "client")
GATEWAY_TLS = link_tls("client", "server", "rillgate.test")
