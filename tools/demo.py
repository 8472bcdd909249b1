"""`make demo`: serves the bundled model, streams three answers, shows the numbers, stops.

Owns the show. Uses the command and the client as any user would: a server in a process of its own,
calls over gRPC. Exits with 1 when an answer is wrong or the server fails.

    python tools/demo.py
"""

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rillgate import ChatMessage, Client, Generation, RillgateError
from rillgate.cli.terminal import AnswerWriter, dim, print_table

_READY_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 60.0
_LOG_LINES = 15
_MAX_TOKENS = 512  # right answers take some 200; a model that rambles should not hold up the show
_STATUS_PERIOD_S = 0.3  # replicas report every 0.2 s


# The bundled model is what the command serves by default.
SERVE = (str(Path(sys.executable).parent / "rillgate"), "serve")


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the one right answer, as the bundled model's card promises it."""

    text: str
    answer: str


QUESTIONS = (
    Question("What is 4821 + 1397?", "4821 + 1397 = 6218"),
    Question("How many r's are in strawberry?", "There are 3 r's in strawberry."),
    Question("Which is larger, 9.11 or 9.9?", "9.9 is larger than 9.11."),
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with what came back, as the caller saw it."""

    question: Question
    generation: Generation
    first_token_s: float
    total_s: float

    @property
    def is_right(self) -> bool:
        """Compare with the one right answer."""
        return self.generation.text.strip() == self.question.answer

    def cells(self) -> tuple[str, ...]:
        """Write the numbers for the table."""
        usage = self.generation.usage
        decode_s = self.total_s - self.first_token_s
        rate = (usage.completion_tokens - 1) / decode_s if decode_s > 0 else 0.0
        return (
            self.question.text,
            "right" if self.is_right else "WRONG",
            str(usage.prompt_tokens),
            str(usage.completion_tokens),
            f"{1000 * self.first_token_s:.0f}",
            f"{rate:.0f}",
            f"{usage.queue_ms:.1f}",
            f"{usage.prefill_ms:.1f}",
            f"{usage.decode_ms:.1f}",
        )


class ServerFailedError(Exception):
    """The server did not come up, or not down."""


def free_address() -> str:
    """Find a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextlib.contextmanager
def served(serve: Sequence[str]) -> Iterator[str]:
    """Run the command `serve --listen ADDRESS`; give the address; stop it at the end."""
    address = free_address()
    command = [*serve, "--listen", address]
    print(dim("$ " + " ".join([Path(command[0]).name, *command[1:]]), sys.stdout), flush=True)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        # In a session of its own, so that Ctrl-C reaches this process alone, which stops it.
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_ready(server, address)
            yield address
        except (ServerFailedError, RillgateError):
            log.seek(0)
            print(*log.read().splitlines()[-_LOG_LINES:], sep="\n", file=sys.stderr)
            raise
        finally:
            _stop(server)


def _wait_ready(server: "subprocess.Popen[bytes]", address: str) -> None:
    """Wait for the health service; a server that died is noticed within a second."""
    began_s = time.monotonic()
    with Client(address) as client:
        while server.poll() is None and time.monotonic() - began_s < _READY_TIMEOUT_S:
            with contextlib.suppress(RillgateError):
                client.wait_ready(timeout_s=1.0)
                ready_s = time.monotonic() - began_s
                print(dim(f"ready after {ready_s:.1f} s at {address}\n", sys.stdout), flush=True)
                return
    raise ServerFailedError(
        f"the server was not ready within {_READY_TIMEOUT_S:.0f} s"
        if server.poll() is None
        else f"the server ended with exit code {server.returncode} before it was ready"
    )


def _stop(server: "subprocess.Popen[bytes]") -> None:
    server.terminate()
    try:
        server.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
        raise ServerFailedError(f"the server did not stop within {_STOP_TIMEOUT_S:.0f} s") from None


def ask(client: Client, question: Question) -> Asked:
    """Stream one answer to the terminal, the reasoning dimmed."""
    print(f"> {question.text}", flush=True)
    writer = AnswerWriter(show_reasoning=True)
    began_s = time.monotonic()
    first_s: float | None = None
    messages = [ChatMessage("user", question.text)]
    with client.chat_stream(
        messages, max_tokens=_MAX_TOKENS, timeout_s=_ANSWER_TIMEOUT_S
    ) as stream:
        for chunk in stream:
            if first_s is None and chunk.token_ids:
                first_s = time.monotonic() - began_s
            writer.write(chunk)
        total_s = time.monotonic() - began_s
        generation = stream.collect()
    writer.end()
    print()
    return Asked(question, generation, total_s if first_s is None else first_s, total_s)


def show_numbers(client: Client, asked: list[Asked]) -> None:
    """Print what the answers took, and what the server says of itself."""
    headers = (
        "question",
        "answer",
        "prompt tok",
        "output tok",
        "first token ms",
        "tok/s",
        "queue ms",
        "prefill ms",
        "decode ms",
    )
    print_table(headers, [one.cells() for one in asked])
    time.sleep(_STATUS_PERIOD_S)
    status = client.status()
    print(
        f"\nrillgate {status.server_version}: {status.num_running} running, {status.num_waiting} "
        f"waiting; cache blocks: {status.num_blocks_used} used, {status.num_blocks_cached} kept "
        f"for later prompts, {status.num_blocks_free} free of {status.num_blocks}"
    )


def main(serve: Sequence[str] = SERVE) -> int:
    """Run the demo with the server that `serve` starts; return the exit status."""
    try:
        with served(serve) as address, Client(address) as client:
            asked = [ask(client, question) for question in QUESTIONS]
            show_numbers(client, asked)
    except (ServerFailedError, RillgateError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(dim("\nstopped", sys.stdout))
    wrong = [one for one in asked if not one.is_right]
    for one in wrong:
        print(f"demo: wrong answer to {one.question.text!r}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
