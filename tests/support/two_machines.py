"""Two machines that are none: network namespaces joined by a cable that can be cut.

Owns the namespaces, the veth pair between them, what runs in them and the way in for clients. Needs
root; `why_not` says what is missing where it cannot be had.

    namespace A  10.77.N.1 ── veth ══ cable ══ veth ── 10.77.N.2  namespace B
"""

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from rillgate import AsyncClient
from tests.support.served import START_S

_STOP_S = 20.0


@dataclass
class Machine:
    """One side."""

    namespace: str
    device: str
    address: str
    processes: list["subprocess.Popen[str]"] = field(default_factory=list)

    def command(self, *command: str) -> tuple[str, ...]:
        """Return what runs `command` on this machine."""
        return ("ip", "netns", "exec", self.namespace, *command)

    def start(
        self, *command: str, environment: dict[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        """Start a process here; it is killed with the machine."""
        process = subprocess.Popen(
            self.command(*command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.processes.append(process)
        return process


@dataclass
class TwoMachines:
    """Both, and the cable between them."""

    a: Machine
    b: Machine

    def cut(self) -> None:
        """Let nothing pass; both sides' sockets stay as they are, and hear nothing."""
        _ip("-n", self.b.namespace, "link", "set", self.b.device, "down")

    def restore(self) -> None:
        """Let everything pass again."""
        _ip("-n", self.b.namespace, "link", "set", self.b.device, "up")


def why_not() -> str:
    """Say why there can be no second machine here; empty: there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip` command (iproute2)"
    name = f"rg-probe-{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


@contextlib.contextmanager
def two_machines() -> Iterator[TwoMachines]:
    """Make both; at the end kill what runs in them and take them down."""
    tag, number = secrets.token_hex(3), secrets.randbelow(250) + 1
    a = Machine(f"rg-a-{tag}", f"rga{tag}", f"10.77.{number}.1")
    b = Machine(f"rg-b-{tag}", f"rgb{tag}", f"10.77.{number}.2")
    try:
        for machine in (a, b):
            _ip("netns", "add", machine.namespace)
        _ip(
            *("link", "add", a.device, "netns", a.namespace, "type", "veth"),
            *("peer", "name", b.device, "netns", b.namespace),
        )
        for machine in (a, b):
            inside = ("-n", machine.namespace)
            _ip(*inside, "address", "add", f"{machine.address}/24", "dev", machine.device)
            _ip(*inside, "link", "set", machine.device, "up")
            _ip(*inside, "link", "set", "lo", "up")
        yield TwoMachines(a, b)
    finally:
        for machine in (a, b):
            _kill_all(machine)
            subprocess.run(
                ["ip", "netns", "del", machine.namespace], capture_output=True, check=False
            )


async def wait_line(process: "subprocess.Popen[str]", pattern: str) -> re.Match[str]:
    """Read what a process writes until a line matches."""
    stdout = process.stdout
    assert stdout is not None
    lines: list[str] = []
    async with asyncio.timeout(START_S):
        while line := await asyncio.to_thread(stdout.readline):
            lines.append(line)
            if found := re.search(pattern, line):
                return found
    raise AssertionError("".join(lines))


@contextlib.asynccontextmanager
async def client_on(machine: Machine, gateway: str, folder: Path) -> AsyncIterator[AsyncClient]:
    """Call a gateway on a machine that this process is not on."""
    socket = folder / "gateway.sock"
    forward = machine.start(sys.executable, "-m", "tests.support.forward", str(socket), gateway)
    await wait_line(forward, "FORWARDING")
    async with AsyncClient(f"unix:{socket}") as client:
        yield client


def _kill_all(machine: Machine) -> None:
    """Kill every process in a namespace, whoever started it."""
    found = subprocess.run(
        ["ip", "netns", "pids", machine.namespace], capture_output=True, text=True, check=False
    )
    for pid in map(int, found.stdout.split()):
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()
    for process in machine.processes:
        process.wait(_STOP_S)
        assert process.stdout is not None
        process.stdout.close()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
