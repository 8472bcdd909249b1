"""The examples run as the README says, from Python, from Node and with buf."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rillgate.testing import FakeError, FakeReply, FakeServer
from rillgate.types import ChatMessage

ROOT = Path(__file__).parents[2]
NODE = str(Path(sys.executable).parent / "node")
# buf curl speaks gRPC; the schema comes from the checkout, so the server needs no reflection here.
BUF = str(ROOT / "node_modules" / ".bin" / "buf")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """Serve on a free port."""
    with FakeServer() as running:
        yield running


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    # grpc-js would send even 127.0.0.1 through a proxy of the environment.
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment["PATH"] = f"{Path(NODE).parent}:{environment['PATH']}"
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


PYTHON_STUB = (sys.executable, "examples/python/plain_stub.py")
NODE_STUB = (NODE, "examples/node/plain_stub.js")
both_stubs = pytest.mark.parametrize("command", [PYTHON_STUB, NODE_STUB], ids=["python", "node"])


@both_stubs
def test_a_plain_stub_streams_reasoning_and_answer(
    command: tuple[str, ...], server: FakeServer
) -> None:
    """The stub prints the reasoning, the answer below it and why it ended."""
    server.reply(FakeReply("Grüße: 42", reasoning_text="6 times 7"))
    done = _run(*command, "What is 6 times 7?", server.target)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "6 times 7\n\nGrüße: 42\n[FINISH_REASON_STOP, 20 tokens]\n"
    assert server.requests[0].messages == (ChatMessage("user", "What is 6 times 7?"),)
    assert server.requests[0].options == {"max_tokens": 512}
    timeout_s = server.requests[0].timeout_s
    assert timeout_s is not None
    assert 50 < timeout_s < 61  # gRPC rounds


@both_stubs
def test_a_plain_stub_says_which_error_came(command: tuple[str, ...], server: FakeServer) -> None:
    """A refusal ends the example with its status and message."""
    server.reply(FakeError("RESOURCE_EXHAUSTED", "the queue is full"))
    done = _run(*command, "hello", server.target)
    assert done.returncode == 1
    assert done.stderr.strip() == "RESOURCE_EXHAUSTED: the queue is full"


def test_buf_curl_calls_the_server_with_the_checked_out_protos(server: FakeServer) -> None:
    """The command line of the README gets messages as JSON."""
    server.reply(FakeReply("42"))
    done = _run(
        *(BUF, "curl", "--schema", "protos", "--protocol", "grpc", "--http2-prior-knowledge"),
        *("--data", '{"request": {"prompt": "6 times 7"}}'),
        f"http://{server.target}/rillgate.v1.Inference/Complete",
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["text"] == "42"
    assert server.requests[0].prompt == "6 times 7"


def test_the_readme_shows_the_client_example_and_it_runs(server: FakeServer) -> None:
    """README and example are the same lines, and they work against a server."""
    source = (ROOT / "examples/python/client.py").read_text(encoding="utf-8")
    lines = source.split("# --- readme\n")[1].rstrip("\n").splitlines()
    shown = "\n".join(f"    {line}" if line else "" for line in lines)
    assert shown in (ROOT / "README.md").read_text(encoding="utf-8")
    assert len([line for line in lines if line]) <= 10
    server.reply(FakeReply("4821 + 1397 = 6218"), FakeReply("maerts"))
    code = "\n".join(lines).replace("127.0.0.1:50051", server.target)
    done = _run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "4821 + 1397 = 6218 FinishReason.STOP 18\nmaerts"
