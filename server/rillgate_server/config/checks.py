"""What a setting's value must be; each raises ConfigError that names field, value and limit."""

from rillgate_server.errors import ConfigError

_MIN_SECRET_BYTES, _MAX_SECRET_BYTES = 16, 1024


def check(field: str, value: float, lowest: float, highest: float) -> None:
    """Refuse a number out of its range."""
    # Also refuses NaN, which no comparison holds for.
    if not lowest <= value <= highest:
        raise ConfigError(f"{field} is {value}; allowed: {lowest} to {highest}")


def check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse what is none of a few words."""
    if value not in allowed:
        raise ConfigError(f"{field} is {value!r}; allowed: {', '.join(allowed)}")


def check_address(field: str, value: str) -> None:
    """Refuse what is no HOST:PORT."""
    host, colon, port = value.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ConfigError(f"{field} is {value!r}; allowed: HOST:PORT with a port of 0 to 65535")


def check_secret(field: str, value: str) -> None:
    """Refuse a secret that is too short or too long, without showing it."""
    try:
        num_bytes = len(value.encode())
    except UnicodeEncodeError:  # its text would show what it could not encode
        raise ConfigError(
            f"{field} is no UTF-8 text; allowed: none, or "
            f"{_MIN_SECRET_BYTES} to {_MAX_SECRET_BYTES} bytes of it"
        ) from None
    if num_bytes and not _MIN_SECRET_BYTES <= num_bytes <= _MAX_SECRET_BYTES:
        raise ConfigError(
            f"{field} has {num_bytes} bytes; allowed: none, or "
            f"{_MIN_SECRET_BYTES} to {_MAX_SECRET_BYTES}"
        )
