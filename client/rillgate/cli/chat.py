"""`rillgate chat`: a conversation in the terminal.

Owns the loop and the history, which is sent back without the reasoning. Ctrl-C cancels the answer
under way and keeps what there was of it; Ctrl-D or /quit leaves.
"""

import argparse
import sys
from typing import TextIO

from rillgate.cli.arguments import (
    add_connection_flags,
    add_generation_flags,
    connect,
    generation_options,
)
from rillgate.cli.interrupt import closed_by_ctrl_c
from rillgate.cli.terminal import AnswerWriter, dim, no_answer_reason
from rillgate.errors import RillgateError
from rillgate.sync_client import Client
from rillgate.types import ChatMessage, GenerateOptions

try:
    import readline  # gives input() its line editing and history
except ImportError:  # Python without it still has input()
    readline = None  # type: ignore[assignment] # the name is all that is used

_HELP = "/reset forgets the conversation, /quit leaves, Ctrl-C stops an answer."


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser("chat", help="talk in the terminal", description=_HELP)
    parser.add_argument("--system", metavar="TEXT", help="a system message before everything")
    parser.add_argument("--hide-reasoning", action="store_true", help="show answers alone")
    add_generation_flags(parser)
    add_connection_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talk until the end of input."""
    options = generation_options(args)
    with connect(args) as client:
        model = options.get("model") or client.models()[0].name  # fails now if nobody is there
        if sys.stdin.isatty():
            print(dim(f"{model}. {_HELP}", sys.stdout))
        if readline is not None:
            readline.set_auto_history(True)
        chat = _Chat(client, options, args.system, not args.hide_reasoning)
        return chat.loop()


class _Chat:
    """Owns the messages so far."""

    def __init__(
        self, client: Client, options: GenerateOptions, system: str | None, show_reasoning: bool
    ) -> None:
        self._client = client
        self._options = options
        self._preamble = [] if system is None else [ChatMessage("system", system)]
        self._show_reasoning = show_reasoning
        self._messages = list(self._preamble)

    def loop(self) -> int:
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                if sys.stdin.isatty():
                    print()
                return 0
            except KeyboardInterrupt:
                _note("\n/quit or Ctrl-D leaves.")
                continue
            if line == "/quit":
                return 0
            if line == "/reset":
                self._messages = list(self._preamble)
                _note("The conversation is forgotten.")
            elif line.startswith("/"):
                _note(_HELP)
            elif line:
                self._answer(line)

    def _answer(self, question: str) -> None:
        """Answer one question; the history grows only by what was answered."""
        messages = [*self._messages, ChatMessage("user", question)]
        writer = AnswerWriter(self._show_reasoning)
        answer: list[str] = []
        try:
            with (
                self._client.chat_stream(messages, **self._options) as stream,
                closed_by_ctrl_c(stream) as pressed,
            ):
                for chunk in stream:
                    writer.write(chunk)
                    answer.append(chunk.text)
            writer.end()
            if pressed.is_set():
                _note("stopped" if any(answer) else "stopped; this question is forgotten")
            elif not any(answer):
                _note(f"no answer: {no_answer_reason(stream.collect())}; the question is forgotten")
        except RillgateError as error:
            writer.end()
            _note(f"rillgate: {error}", sys.stderr)
            return
        if any(answer):
            self._messages = [*messages, ChatMessage("assistant", "".join(answer).strip())]


def _note(text: str, stream: TextIO | None = None) -> None:
    """Say something that belongs to neither side of the conversation."""
    where = sys.stdout if stream is None else stream
    if where.isatty() or stream is not None:
        print(dim(text, where), file=where, flush=True)
