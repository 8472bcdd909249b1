"""The flags that several commands share, and what is made of them.

Owns the flags' names. Limits are the server's to check.
"""

import argparse
import os
from pathlib import Path

from rillgate.config import DEFAULT_TARGET, ClientConfig, TlsConfig
from rillgate.sync_client import Client
from rillgate.types import GenerateOptions, Priority, Speculation


class UsageError(Exception):
    """A flag or a file cannot be used as it was given."""


_TARGET_VARIABLE = "RILLGATE_TARGET"

# option -> (type, help); the flag is the option's name with dashes
_OPTIONS: dict[str, tuple[type[int] | type[float], str]] = {
    "max_tokens": (int, "most tokens to generate (default: what the context leaves)"),
    "min_tokens": (int, "tokens before which nothing but --max-tokens ends it"),
    "temperature": (float, "0 takes the likeliest token (default: the model's own)"),
    "top_p": (float, "keep the likeliest tokens up to this sum of probabilities"),
    "top_k": (int, "keep this many of the likeliest tokens; 0: all"),
    "min_p": (float, "drop tokens less likely than this fraction of the likeliest"),
    "repetition_penalty": (float, "over 1: repeats tokens less"),
    "presence_penalty": (float, "taken from the logits of tokens already there"),
    "frequency_penalty": (float, "the same, once per occurrence"),
    "seed": (int, "draw the same tokens again"),
}


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    """Add where the server is and how to reach it."""
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--target",
        default=os.environ.get(_TARGET_VARIABLE, DEFAULT_TARGET),
        metavar="HOST:PORT[,…]",
        help=f"address of the server (default: {_TARGET_VARIABLE}, then {DEFAULT_TARGET})",
    )
    group.add_argument("--timeout", type=float, metavar="SECONDS", help="deadline of each call")
    group.add_argument("--tls", action="store_true", help="encrypt, trusting the system's roots")
    group.add_argument("--tls-root-certificates", type=Path, metavar="FILE", help="PEM; trusted")
    group.add_argument("--tls-private-key", type=Path, metavar="FILE", help="PEM; for mTLS")
    group.add_argument("--tls-certificate-chain", type=Path, metavar="FILE", help="PEM; for mTLS")
    group.add_argument("--tls-server-name", metavar="NAME", help="name in the server's certificate")


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """Add what steers an answer."""
    group = parser.add_argument_group("generation")
    group.add_argument("--model", help="one of `rillgate models` (default: the only one)")
    for name, (kind, help_text) in _OPTIONS.items():
        metavar = "N" if kind is int else "X"
        group.add_argument(_flag(name), type=kind, metavar=metavar, help=help_text)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end where this text comes; repeatable"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's end")
    group.add_argument(
        "--priority",
        choices=[priority.value for priority in Priority],
        help="who goes first where requests wait (default: normal)",
    )
    group.add_argument(
        "--speculation",
        choices=[method.value for method in Speculation],
        help="which tokens are tried ahead; changes none (default: as the server is set)",
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def generation_options(args: argparse.Namespace) -> GenerateOptions:
    """Collect the options that were given."""
    options = GenerateOptions()
    for name in ("model", *_OPTIONS, "stop", "priority", "speculation"):
        value = getattr(args, name)
        if value is not None:
            options[name] = value  # type: ignore[literal-required] # names of GenerateOptions
    if args.ignore_eos:
        options["ignore_eos"] = True
    return options


def client_config(args: argparse.Namespace) -> ClientConfig:
    """Turn the connection flags into a ClientConfig."""
    files = (args.tls_root_certificates, args.tls_private_key, args.tls_certificate_chain)
    try:
        tls = None
        if args.tls or args.tls_server_name or any(files):
            tls = TlsConfig.from_files(*files, args.tls_server_name)
        return ClientConfig(tls=tls, timeout_s=args.timeout)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error


def targets(args: argparse.Namespace) -> str | list[str]:
    """Split several addresses; one address stays a text in gRPC's own syntax."""
    several = [part for part in args.target.split(",") if part]
    return several if len(several) > 1 else str(args.target)


def connect(args: argparse.Namespace) -> Client:
    """Make the client that the flags ask for."""
    try:
        return Client(targets(args), client_config(args))
    except ValueError as error:
        raise UsageError(str(error)) from error
