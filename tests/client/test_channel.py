"""From targets and settings to a connection, TLS included."""

from pathlib import Path

import grpc
import pytest

from rillgate import Client, ClientConfig, RetryConfig, TlsConfig
from rillgate._channel import plan_channel
from rillgate.errors import UnavailableError
from rillgate.testing import FakeServer

# Made for these tests alone (valid for a hundred years); the server's name is rillgate.test.
CERTIFICATES = Path(__file__).parent / "certificates"
NO_RETRY = RetryConfig(max_attempts=1)


@pytest.mark.parametrize(
    ("target", "planned"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051"),
        ("dns:///models.example:50051", "dns:///models.example:50051"),
        (["127.0.0.1:1"], "127.0.0.1:1"),
        (["127.0.0.1:1", "127.0.0.2:2"], "ipv4:127.0.0.1:1,127.0.0.2:2"),
        (["127.0.0.1:1", "127.0.0.1:1"], "ipv4:127.0.0.1:1"),
        (["[::1]:1", "[::1]:2"], "ipv6:[::1]:1,[::1]:2"),
    ],
)
def test_addresses_become_one_target(target: str | list[str], planned: str) -> None:
    """A text is left to gRPC; several addresses are joined, each once."""
    assert plan_channel(target, ClientConfig()).target == planned


@pytest.mark.parametrize("targets", [[], ["127.0.0.1:1", "no-port"], ["a:b", "127.0.0.1:1"]])
def test_what_is_no_address_is_refused(targets: list[str]) -> None:
    """The error names what is allowed."""
    with pytest.raises(ValueError, match="allowed"):
        plan_channel(targets, ClientConfig())


def test_settings_become_channel_options() -> None:
    """Message size, keepalive and balancing reach gRPC."""
    config = ClientConfig(
        max_message_bytes=4096, keepalive_time_s=5, keepalive_timeout_s=2, balancing="pick_first"
    )
    options = dict(plan_channel("h:1", config).options)
    assert options["grpc.max_receive_message_length"] == 4096
    assert options["grpc.keepalive_time_ms"] == 5000
    assert options["grpc.keepalive_timeout_ms"] == 2000
    assert "pick_first" in str(options["grpc.service_config"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClientConfig(timeout_s=0),
        lambda: ClientConfig(max_message_bytes=1),
        lambda: ClientConfig(keepalive_time_s=float("nan")),
        lambda: RetryConfig(max_attempts=0),
        lambda: RetryConfig(max_wait_s=-1),
        lambda: TlsConfig(private_key=b"key"),
        lambda: TlsConfig(certificate_chain=b"chain"),
    ],
)
def test_settings_out_of_range_are_refused(make: object) -> None:
    """A wrong setting is an error where it is made, not where it is used."""
    assert callable(make)
    with pytest.raises(ValueError, match=r"allowed|together"):
        make()


def _server_credentials(*, mutual: bool) -> grpc.ServerCredentials:
    key, chain = ((CERTIFICATES / f"server.{ending}").read_bytes() for ending in ("key", "pem"))
    roots = (CERTIFICATES / "client.pem").read_bytes() if mutual else None
    return grpc.ssl_server_credentials([(key, chain)], roots, require_client_auth=mutual)


def _tls(**changes: Path | str | None) -> ClientConfig:
    files = {
        "root_certificates": CERTIFICATES / "server.pem",
        "private_key": CERTIFICATES / "client.key",
        "certificate_chain": CERTIFICATES / "client.pem",
        "server_name": "rillgate.test",
    }
    return ClientConfig(tls=TlsConfig.from_files(**(files | changes)), retry=NO_RETRY)  # type: ignore[arg-type]


def test_tls_with_a_trusted_root_and_the_right_name_connects() -> None:
    """Without a client's certificate where none is asked for, with one where it is."""
    with (
        FakeServer(credentials=_server_credentials(mutual=False)) as server,
        Client(server.target, _tls(private_key=None, certificate_chain=None)) as client,
    ):
        assert client.generate("secret").text == "secret"
    with (
        FakeServer(credentials=_server_credentials(mutual=True)) as server,
        Client(server.target, _tls()) as client,
    ):
        assert client.generate("secret").text == "secret"


@pytest.mark.parametrize(
    "config",
    [
        ClientConfig(retry=NO_RETRY),
        ClientConfig(tls=TlsConfig(), retry=NO_RETRY),
        _tls(server_name="other.test"),
        _tls(private_key=None, certificate_chain=None),
    ],
    ids=["plain text", "unknown root", "another name", "no client certificate"],
)
def test_tls_refuses_what_it_should(config: ClientConfig) -> None:
    """Plain text, strange roots, a wrong name and a missing certificate all fail."""
    with (
        FakeServer(credentials=_server_credentials(mutual=True)) as server,
        Client(server.target, config) as client,
    ):
        with pytest.raises(UnavailableError):
            client.generate("secret")
        assert server.requests == []
