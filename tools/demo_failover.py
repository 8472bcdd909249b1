"""`make demo-failover`: three replicas, nine answers under way, one replica killed, nobody notices.

Owns the show, on top of `tools.demo`'s server. Each line says how many streams each replica answers
and how many tokens have come; then the busiest replica gets a `kill -9`, its streams go on
elsewhere, and the supervisor brings it back. Exits with 1 when an answer is wrong, a token is
missing or repeated, or nothing was hit.

    python -m tools.demo_failover
"""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from rillgate import ChatMessage, Client, RillgateError
from rillgate.cli.terminal import dim, print_table
from rillgate.status_types import ReplicaState, ReplicaStatus, ServerStatus
from tools.demo import SERVE, Question, ServerFailedError, served

NUM_REPLICAS = 3
# Steps of 30 ms, so that an answer takes a few seconds and can be watched.
SERVE_REPLICAS = (
    *(*SERVE, "--replicas", str(NUM_REPLICAS)),
    *("--dtype", "float32", "--set", "replica.min_step_ms=30"),
)
_MAX_TOKENS = 512
_LINE_EVERY_S = 0.5
_TOKENS_BEFORE_KILL = 20  # per stream, about
_COME_BACK_S = 60.0
_TIMEOUT_S = 120.0

QUESTIONS = (
    *(Question(f"What is {a} + {b}?", f"{a} + {b} = {a + b}") for a, b in ((4821, 1397), (58, 64))),
    *(Question(f"What is {a} + {b}?", f"{a} + {b} = {a + b}") for a, b in ((907, 2045), (12, 30))),
    Question("How many r's are in strawberry?", "There are 3 r's in strawberry."),
    Question("How many s's are in mississippi?", "There are 4 s's in mississippi."),
    Question("Which is larger, 9.11 or 9.9?", "9.9 is larger than 9.11."),
    Question("Which is larger, 3.2 or 3.15?", "3.2 is larger than 3.15."),
    *(Question(f"What is {a} + {b}?", f"{a} + {b} = {a + b}") for a, b in ((3333, 4444),)),
)


@dataclass
class Heard:
    """A question and what has come of its answer."""

    question: Question
    text: str = ""
    num_tokens: int = 0
    longest_pause_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        """Whether the answer is the one right answer, every token once."""
        return self.text.strip() == self.question.answer and not self.faults

    def cells(self) -> tuple[str, ...]:
        """Write the row for the table."""
        verdict = "right" if self.is_right else "WRONG"
        pause = f"{1000 * self.longest_pause_s:.0f}"
        return self.question.text, self.text.strip(), verdict, str(self.num_tokens), pause


def listen(client: Client, heard: Heard) -> None:
    """Stream one answer; check that each token comes once and in order."""
    messages = [ChatMessage("user", heard.question.text)]
    last_s: float | None = None
    options = {"temperature": 0, "max_tokens": _MAX_TOKENS, "timeout_s": _TIMEOUT_S}
    try:
        with client.chat_stream(messages, **options) as stream:  # type: ignore[arg-type]
            for chunk in stream:
                now_s = time.monotonic()
                heard.longest_pause_s = max(heard.longest_pause_s, now_s - (last_s or now_s))
                last_s = now_s
                if chunk.token_offset != heard.num_tokens:
                    heard.faults.append(f"token {chunk.token_offset} after {heard.num_tokens}")
                heard.num_tokens += len(chunk.token_ids)
                heard.text += chunk.text
    except RillgateError as error:
        heard.faults.append(str(error))


class Show:
    """Prints a line now and then until the answers are there.

    State: what was heard, the lock of the terminal.
    """

    def __init__(self, client: Client, heard: list[Heard]) -> None:
        """Watch by `client`."""
        self._client = client
        self._heard = heard
        self._is_over = threading.Event()

    def until(self, condition: Callable[[ServerStatus], bool], timeout_s: float) -> ServerStatus:
        """Print lines until something is so; raises ServerFailedError when it takes too long."""
        ends_s = time.monotonic() + timeout_s
        next_line_s = 0.0
        while time.monotonic() < ends_s:
            status = self._client.status()
            if time.monotonic() >= next_line_s:
                self._print(status)
                next_line_s = time.monotonic() + _LINE_EVERY_S
            if condition(status):
                return status
            self._is_over.wait(0.05)
        raise ServerFailedError(f"what the demo waits for did not come within {timeout_s:.0f} s")

    def _print(self, status: ServerStatus) -> None:
        replicas = "   ".join(
            f"{name(it)} {f'{it.num_streams} streams' if is_ready(it) else 'away':9}"
            for it in status.replicas
        )
        num_tokens = sum(it.num_tokens for it in self._heard)
        moved = f", {status.num_moved_streams} moved" if status.num_moved_streams else ""
        print(f"  {replicas}   {num_tokens:5} tokens{moved}", flush=True)


def name(replica: ReplicaStatus) -> str:
    """Return the name that its process and its socket have."""
    return Path(replica.address.removeprefix("unix:")).stem


def is_ready(replica: ReplicaStatus) -> bool:
    """Whether the gateway uses it."""
    return replica.state is ReplicaState.READY


def kill(victim: ReplicaStatus) -> None:
    """Find the process of a replica of ours and kill it, for all to see."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RILLGATE_REPLICA__NAME") == name(victim):
                print(f"\n$ kill -9 {process.pid}   # {name(victim)}\n", flush=True)
                process.send_signal(signal.SIGKILL)
                return
    raise ServerFailedError(f"the process of {name(victim)} was not found")


def run(client: Client) -> tuple[list[Heard], int]:
    """Ask, kill, watch; return what was heard and how many streams the kill moved."""
    heard = [Heard(question) for question in QUESTIONS]
    show = Show(client, heard)
    show.until(lambda it: sum(map(is_ready, it.replicas)) == NUM_REPLICAS, _COME_BACK_S)
    print(f"\n{len(heard)} questions at once:\n")
    with ThreadPoolExecutor(len(heard)) as pool:
        answers = [pool.submit(listen, client, it) for it in heard]
        enough = _TOKENS_BEFORE_KILL * len(heard)
        status = show.until(lambda _: sum(it.num_tokens for it in heard) > enough, _TIMEOUT_S)
        kill(max(status.replicas, key=lambda it: it.num_streams))
        show.until(lambda _: all(it.done() for it in answers), _TIMEOUT_S)
    print("\nall answers are there; its supervisor starts the replica again:\n")
    status = show.until(lambda it: sum(map(is_ready, it.replicas)) == NUM_REPLICAS, _COME_BACK_S)
    print()
    return heard, status.num_moved_streams


def main() -> int:
    """Run the demo; return the exit status."""
    try:
        with served(SERVE_REPLICAS) as address, Client(address) as client:
            heard, num_moved = run(client)
    except (ServerFailedError, RillgateError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print_table(
        ("question", "answer", "", "tokens", "longest pause ms"), [it.cells() for it in heard]
    )
    print(dim(f"\n{num_moved} streams lost their replica, and went on elsewhere", sys.stdout))
    wrong = [it for it in heard if not it.is_right]
    for it in wrong:
        print(f"demo: {it.question.text!r}: {it.text!r} {it.faults}", file=sys.stderr)
    if num_moved == 0:
        print("demo: the kill hit no stream", file=sys.stderr)
    return 1 if wrong or num_moved == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
