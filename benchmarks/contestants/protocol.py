"""How `compare_cpu` talks with a contestant: JSON lines over standard input and output.

In: {"mode": …, "prompts": [[token ids], …], "num_output_tokens": n}.
Out: {"seconds": …, "num_output_tokens": …, …}; the first line out, {"ready": true}, says that the
model is loaded. A contestant ends when its input does.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Message = dict[str, Any]  # Any: JSON


def serve(answer: Callable[[Message], Message]) -> None:
    """Be a contestant: answer each line. Whatever libraries print goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=out, flush=True)


class Contestant:
    """A contestant's process, as seen by `compare_cpu`."""

    def __init__(
        self, module: str, arguments: Sequence[str], python: str | Path = sys.executable
    ) -> None:
        """Start `python -m module arguments` and wait until it is ready.

        Raises RuntimeError where it ends instead.
        """
        self._module = module
        self._process = subprocess.Popen(
            [python, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._receive()

    def ask(self, mode: str, prompts: Sequence[Sequence[int]], num_output_tokens: int) -> Message:
        """Run one mode over the prompts and return what it measured."""
        return self.tell({"mode": mode, "prompts": prompts, "num_output_tokens": num_output_tokens})

    def tell(self, request: Message) -> Message:
        """Send a message of any kind and return the answer."""
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._receive()

    def close(self) -> None:
        """End the process and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _receive(self) -> Message:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._module} ended with {self._process.wait()}")
        message: Message = json.loads(line)
        return message
