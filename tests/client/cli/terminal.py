"""A command on a pseudo terminal, as a person has it.

Owns the child process and what it wrote. Waits for texts, never for time.
"""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_COMMAND = str(Path(sys.executable).parent / "rillgate")
_TIMEOUT_S = 20.0


class Terminal:
    """Owns one run of `rillgate` and its screen's text so far."""

    def __init__(self, *arguments: str, target: str) -> None:
        """Start the command."""
        self._master, slave = pty.openpty()
        environment = os.environ | {"RILLGATE_TARGET": target, "TERM": "xterm", "COLUMNS": "160"}
        self.process = subprocess.Popen(
            [_COMMAND, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)
        self.text = ""
        self._seen = 0

    def __enter__(self) -> Self:
        """Give the terminal itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the command, whatever happened."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        """Press keys; `\\x03` is Ctrl-C, `\\x04` is Ctrl-D."""
        os.write(self._master, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Wait until the text since the last match matches; give what was matched."""
        deadline_s = time.monotonic() + _TIMEOUT_S
        while (match := re.search(pattern, self.text[self._seen :])) is None:
            if not self._read(deadline_s - time.monotonic()):
                raise AssertionError(f"{pattern!r} did not come; the screen: {self.text!r}")
        self._seen += match.end()
        return match.group()

    def wait_end(self) -> int:
        """Read to the end; give the exit status."""
        deadline_s = time.monotonic() + _TIMEOUT_S
        while self._read(deadline_s - time.monotonic()):
            pass
        return self.process.wait(_TIMEOUT_S)

    def _read(self, timeout_s: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, timeout_s))
        if not ready:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the other side is closed
            return False
        self.text += data.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(data)


def _take_terminal() -> None:
    """Make the terminal the child's own, so that Ctrl-C reaches it as a signal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.close(os.open(os.ttyname(0), os.O_RDWR))
