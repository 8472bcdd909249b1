"""`rillgate generate`: one answer, streamed to stdout.

Owns that command's flags and output. Only the answer goes into a pipe; on a terminal the reasoning
is shown dimmed.
"""

import argparse
import dataclasses
import json
import sys
import time
from enum import Enum

from rillgate.cli.arguments import (
    UsageError,
    add_connection_flags,
    add_generation_flags,
    connect,
    generation_options,
)
from rillgate.cli.interrupt import closed_by_ctrl_c
from rillgate.cli.terminal import AnswerWriter, dim, no_answer_reason, numbers_line
from rillgate.sync_client import Client
from rillgate.types import ChatMessage, GenerateOptions, Generation, Prompt


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "generate",
        help="generate one answer",
        description="Generate one answer. The prompt is sent as a chat message where the model "
        "has a chat template, and as plain text to go on from where it has none.",
    )
    parser.add_argument("prompt", nargs="?", default="-", help="the prompt; - or none reads stdin")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="send the prompt as a chat message")
    form.add_argument("--raw", action="store_true", help="send the prompt as plain text")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    parser.add_argument("--n", type=int, metavar="N", help="answers to the one prompt")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.add_argument(
        "--reasoning",
        choices=("auto", "show", "hide"),
        default="auto",
        help="write the reasoning to stdout too (auto: where that is a terminal)",
    )
    add_generation_flags(parser)
    add_connection_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate and print."""
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    options = generation_options(args)
    if args.n is not None:
        options["n"] = args.n
    show_reasoning = args.reasoning == "show" or (args.reasoning == "auto" and sys.stdout.isatty())
    with connect(args) as client:
        prompt = _prompt(args, client, text)
        if args.json:
            print(json.dumps(_jsonable(client.generate(prompt, **options)), ensure_ascii=False))
        elif options.get("n", 1) > 1:
            _print_choices(client.generate(prompt, **options), show_reasoning)
        else:
            _stream(client, prompt, options, show_reasoning)
    return 0


def _prompt(args: argparse.Namespace, client: Client, text: str) -> Prompt:
    if args.raw and args.system is not None:
        raise UsageError("--system belongs to a chat; it cannot be given with --raw")
    if args.raw or not (args.chat or args.system is not None or _has_template(args, client)):
        return text
    system = [] if args.system is None else [ChatMessage("system", args.system)]
    return [*system, ChatMessage("user", text)]


def _has_template(args: argparse.Namespace, client: Client) -> bool:
    models = client.models()
    if args.model is None:
        return models[0].has_chat_template
    name = args.model.partition("@")[0]
    return any(model.has_chat_template for model in models if model.name == name)


def _stream(client: Client, prompt: Prompt, options: GenerateOptions, show: bool) -> None:
    writer = AnswerWriter(show)
    began_s = time.monotonic()
    first_s = 0.0
    num_tokens = 0
    with client.stream(prompt, **options) as stream, closed_by_ctrl_c(stream) as pressed:
        try:
            for chunk in stream:
                if chunk.token_ids and num_tokens == 0:
                    first_s = time.monotonic() - began_s
                num_tokens += len(chunk.token_ids)
                writer.write(chunk)
        finally:
            writer.end()
        if pressed.is_set():
            raise KeyboardInterrupt
        generation = stream.collect()
    if sys.stderr.isatty():
        total_s = time.monotonic() - began_s
        why, num_resumes = generation.finish_reason, generation.num_resumes
        line = numbers_line(num_tokens, first_s, total_s, why, num_resumes)
        print(dim(line, sys.stderr), file=sys.stderr)
    elif not generation.text:
        # Into a pipe goes the answer alone: without one, say why there is nothing.
        print(f"rillgate: no answer: {no_answer_reason(generation)}", file=sys.stderr)


def _print_choices(generation: Generation, show_reasoning: bool) -> None:
    for choice in generation.choices:
        print(dim(f"--- {choice.index}: {choice.finish_reason.value}", sys.stdout))
        if show_reasoning and choice.reasoning_text:
            print(dim(choice.reasoning_text.strip("\n"), sys.stdout), end="\n\n")
        print(choice.text.strip("\n"))


def _jsonable(generation: Generation) -> dict[str, object]:
    """Turn the result into what JSON can say: enums by value, bytes as hex."""

    def plain(items: list[tuple[str, object]]) -> dict[str, object]:
        return {
            name: value.value
            if isinstance(value, Enum)
            else value.hex()
            if isinstance(value, bytes)
            else value
            for name, value in items
        }

    return dataclasses.asdict(generation, dict_factory=plain)
