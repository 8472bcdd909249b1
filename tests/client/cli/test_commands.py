"""The commands' output, errors and exit codes, run as a user runs them."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from rillgate import Client
from rillgate.cli import main
from rillgate.testing import FakeError, FakeReply, FakeServer
from rillgate.types import ChatMessage
from tests.client.cli.terminal import Terminal

_COMMAND = str(Path(sys.executable).parent / "rillgate")
_REPLY = FakeReply("42", reasoning_text="6 × 7")


def _run(*arguments: str, target: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [_COMMAND, *arguments],
        env=os.environ | {"RILLGATE_TARGET": target},
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_generate_prints_the_answer_alone_into_a_pipe(server: FakeServer) -> None:
    """No reasoning and no numbers, so that scripts can use it; the prompt goes as a chat."""
    server.reply(_REPLY)
    done = _run("generate", "What is 6 × 7?", "--temperature", "0", target=server.target)
    assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")
    assert server.requests[0].messages == (ChatMessage("user", "What is 6 × 7?"),)
    assert server.requests[0].options == {"temperature": 0.0}


def test_generate_says_why_a_pipe_stays_empty(server: FakeServer) -> None:
    """A limit that falls into the reasoning leaves no answer; stderr says so."""
    server.reply(FakeReply("42", reasoning_text="6 x 7"))
    done = _run("generate", "p", "--max-tokens", "3", target=server.target)
    assert (done.returncode, done.stdout) == (0, "")
    message = "it ended during the reasoning, after 3 tokens (length)"
    assert done.stderr == f"rillgate: no answer: {message}\n"


def test_generate_takes_its_prompt_raw_or_from_stdin_and_a_system_message(
    server: FakeServer,
) -> None:
    """`--raw` sends plain text; `-` reads stdin; `--system` makes it a chat."""
    _run("generate", "--raw", "once upon", target=server.target)
    _run("generate", "--chat", "--system", "be brief", target=server.target, text="from stdin")
    first, second = server.requests
    assert first.prompt == "once upon"
    assert second.messages == (ChatMessage("system", "be brief"), ChatMessage("user", "from stdin"))


def test_generate_sends_every_flag(server: FakeServer) -> None:
    """Each sampling flag arrives under its option."""
    options = {
        "max_tokens": 9,
        "min_tokens": 1,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 3,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "seed": 7,
        "model": "fake",
        "priority": "low",
        "speculation": "prompt-lookup",
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    flags += ["--stop", "END", "--stop", "\n", "--ignore-eos"]
    assert _run("generate", "p", *flags, target=server.target).returncode == 0
    expected = options | {"stop": ("END", "\n"), "ignore_eos": True}
    assert server.requests[0].options == expected


def test_generate_json_holds_everything(server: FakeServer) -> None:
    """One object: what was decided, choices with texts, ids, reason and usage."""
    server.reply(_REPLY)
    done = _run("generate", "p", "--json", "--n", "2", target=server.target)
    answer = json.loads(done.stdout)
    assert answer["started"]["model_version"] == "fake-version"
    assert [choice["text"] for choice in answer["choices"]] == ["42", "42"]
    assert answer["choices"][0]["reasoning_text"] == "6 × 7"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["usage"]["completion_tokens"] == 8


def test_generate_on_a_terminal_dims_the_reasoning_and_adds_numbers(server: FakeServer) -> None:
    """A person sees how the answer came about, and how fast."""
    server.reply(_REPLY)
    with Terminal("generate", "p", target=server.target) as terminal:
        terminal.wait_for("\x1b\\[2m6\x1b\\[0m")
        terminal.wait_for("\n\n42\n")
        terminal.wait_for(r"\[8 tokens, first after \d+ ms, [\d.]+ tokens/s, stop\]")
        assert terminal.wait_end() == 0


def test_ctrl_c_ends_generate_and_frees_the_server(server: FakeServer) -> None:
    """Exit status 130, as a shell expects, and nothing left behind."""
    server.reply(FakeReply("a long answer", hold_after=6))
    with Terminal("generate", "p", target=server.target) as terminal:
        terminal.wait_for("a long")
        terminal.type("\x03")
        assert terminal.wait_end() == 130
        assert "Traceback" not in terminal.text
    assert server.wait_open(0)


def test_models_and_status_print_tables_and_json(server: FakeServer) -> None:
    """Both forms hold the same."""
    assert "fake" in _run("models", target=server.target).stdout
    (model,) = json.loads(_run("models", "--json", target=server.target).stdout)
    assert (model["name"], model["vocab_size"]) == ("fake", 256)
    table = _run("status", target=server.target).stdout
    assert "replica-0" in table
    assert "0 running, 0 waiting" in table
    status = json.loads(_run("status", "--json", target=server.target).stdout)
    assert (status["num_running"], status["num_blocks_cached"]) == (0, 10)
    assert status["replicas"][0]["state"] == "ready"
    assert status["replicas"][0]["host"]["num_blocks_cached"] == 10


def test_flush_cache_says_what_was_dropped(server: FakeServer) -> None:
    """In words, as JSON, and in the status that follows."""
    done = _run("flush-cache", target=server.target)
    assert done.stdout == "dropped 10 device blocks and 10 host blocks of 1 replica\n"
    again = json.loads(_run("flush-cache", "--json", target=server.target).stdout)
    assert again == {"num_replicas": 1, "num_device_blocks": 0, "num_host_blocks": 0}
    status = json.loads(_run("status", "--json", target=server.target).stdout)
    assert status["replicas"][0]["host"]["num_blocks_cached"] == 0


def test_drain_names_the_replica_the_limit_and_what_still_runs(server: FakeServer) -> None:
    """Exit status 0 once nothing is left; the wish arrives as it was given."""
    done = _run("drain", "replica-0", "--time-limit", "1.5", target=server.target)
    assert (done.returncode, done.stdout) == (0, "replica-0 is drained: 0 open\n")
    done = _run("drain", "replica-0", "--undo", target=server.target)
    assert (done.returncode, done.stdout) == (0, "replica-0 is back in service: 0 open\n")
    done = _run("drain", "--json", target=server.target)
    assert (done.returncode, json.loads(done.stdout)) == (0, {"num_open_requests": 0})
    asked = [(it.replica_id, it.time_limit_ms, it.undo) for it in server.drains]
    assert asked == [("replica-0", 1500, False), ("replica-0", 0, True), ("", 0, False)]


def test_drain_fails_where_streams_are_left(server: FakeServer) -> None:
    """A script that stops a machine next must not take this for done."""
    server.reply(FakeReply("a long answer", hold_after=0))
    with Client(server.target) as client, client.stream("p"):
        assert server.wait_open(1)
        done = _run("drain", target=server.target)
    assert (done.returncode, done.stdout) == (1, "the server is drained: 1 open\n")


def test_status_watch_goes_on_until_ctrl_c(server: FakeServer) -> None:
    """It draws again and again, and Ctrl-C is its ordinary end."""
    with Terminal("status", "--watch", "0.1", target=server.target) as terminal:
        for _ in range(3):
            terminal.wait_for("replica-0")
        terminal.type("\x03")
        assert terminal.wait_end() == 0


@pytest.mark.parametrize(
    "command", ["generate p", "chat", "status", "models", "bench", "flush-cache", "drain"]
)
def test_no_server_is_one_line_that_names_the_address(command: str) -> None:
    """Every command says where nobody answered, without a traceback."""
    done = _run(*command.split(), target="127.0.0.1:1")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("rillgate: no answer from 127.0.0.1:1:")


def test_a_refused_request_is_one_line(server: FakeServer) -> None:
    """The server's words, and its name for the request."""
    server.reply(FakeError("INVALID_ARGUMENT", "top_p is 7;\nallowed: (0, 1]", request_id="r-1"))
    done = _run("generate", "p", "--top-p", "7", target=server.target)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "rillgate: top_p is 7; allowed: (0, 1] (request r-1)\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("generate", "p", "--frob"), "unrecognized arguments: --frob"),
        (("generate", "p", "--raw", "--chat"), "not allowed with"),
        (("generate", "p", "--raw", "--system", "s"), "cannot be given with --raw"),
        (("generate", "p", "--timeout", "0"), "timeout_s is 0"),
        (("models", "--tls-private-key", "/nowhere"), "/nowhere"),
        (("models", "--target", "a,b"), "'a' is not an address"),
        (("bench", "--concurrency", "0"), "0 is too small"),
        (("bench", "--request-rate", "-1"), "-1 is too small"),
        (("bench", "--dataset", "/nowhere"), "/nowhere"),
        (("drain", "--undo"), "--undo needs a REPLICA"),
        ((), "COMMAND"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_why(
    arguments: tuple[str, ...], complaint: str, server: FakeServer
) -> None:
    """Flags that cannot be used are refused before anything is sent."""
    done = _run(*arguments, target=server.target)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert server.requests == []


def test_a_reader_that_goes_away_is_no_traceback(server: FakeServer) -> None:
    """`rillgate generate … | head -c 1` ends quietly."""
    server.reply(FakeReply("x" * 400, token_interval_s=0.001))
    done = subprocess.run(
        ["sh", "-c", f"'{_COMMAND}' generate p | head -c 1"],
        env=os.environ | {"RILLGATE_TARGET": server.target},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("x", "")


def test_serve_says_what_to_install_where_the_server_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command is listed, and names the extra and the module that is missing."""
    broken = EntryPoint("server", "no_such_server_module:add", "rillgate.commands")
    assert main(["serve", "--listen", "x"], [broken]) == 2
    message = capsys.readouterr().err
    assert "pip install 'rillgate[server]'" in message
    assert "no_such_server_module" in message


def _run_without(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command as if a package were not installed."""
    code = (
        f"import sys; sys.modules[{module!r}] = None; "
        "from rillgate.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_commands_need_no_rich(server: FakeServer) -> None:
    """The base install has none; tables are plain then."""
    done = _run_without("rich", "models", "--target", server.target)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].split()[0] == "fake"


def test_a_plot_without_matplotlib_is_refused_before_anything_is_sent(server: FakeServer) -> None:
    """Nobody measures for an hour and then learns that nothing can be drawn."""
    done = _run_without("matplotlib", "bench", "--plot", "x.png", "--target", server.target)
    assert done.returncode == 2
    assert "--plot needs matplotlib" in done.stderr
    assert server.requests == []
