"""`rillgate chat` on a pseudo terminal."""

from rillgate.testing import FakeError, FakeReply, FakeServer
from rillgate.types import ChatMessage
from tests.client.cli.terminal import Terminal

_DIM_REASONING = "\x1b[2mhm\x1b[0m"


def test_answers_stream_with_dimmed_reasoning_and_history_goes_back_without_it(
    server: FakeServer,
) -> None:
    """The second request holds the first question and answer, not the reasoning."""
    server.reply(FakeReply("blue", reasoning_text="hm"), FakeReply("green"))
    with Terminal("chat", "--max-tokens", "50", target=server.target) as terminal:
        terminal.wait_for("> ")
        terminal.type("first\n")
        terminal.wait_for("\x1b\\[2mh\x1b\\[0m\x1b\\[2mm\x1b\\[0m\n\nblue\n")
        terminal.wait_for("> ")
        terminal.type("second\n")
        terminal.wait_for("green\n")
        terminal.wait_for("> ")
        terminal.type("/quit\n")
        assert terminal.wait_end() == 0
    first, second = server.requests
    assert first.messages == (ChatMessage("user", "first"),)
    assert first.options == {"max_tokens": 50}
    assert second.messages == (
        ChatMessage("user", "first"),
        ChatMessage("assistant", "blue"),
        ChatMessage("user", "second"),
    )


def test_ctrl_c_cancels_the_answer_and_not_the_program(server: FakeServer) -> None:
    """The server is free at once, what came is kept, and the next question is answered."""
    server.reply(FakeReply("a long answer", hold_after=6), FakeReply("next"))
    with Terminal("chat", target=server.target) as terminal:
        terminal.wait_for("> ")
        terminal.type("first\n")
        terminal.wait_for("a long")
        assert server.wait_open(1)
        terminal.type("\x03")
        terminal.wait_for("stopped")
        assert server.wait_open(0)
        terminal.wait_for("> ")
        terminal.type("second\n")
        terminal.wait_for("next\n")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.wait_end() == 0
    assert server.requests[1].messages[1] == ChatMessage("assistant", "a long")


def test_a_question_stopped_before_its_answer_is_forgotten(server: FakeServer) -> None:
    """Templates want questions and answers in turn: no question stays without an answer."""
    server.reply(FakeReply("answer", reasoning_text="hm", hold_after=2), FakeReply("next"))
    with Terminal("chat", target=server.target) as terminal:
        terminal.wait_for("> ")
        terminal.type("first\n")
        terminal.wait_for("m\x1b")
        terminal.type("\x03")
        terminal.wait_for("forgotten")
        terminal.wait_for("> ")
        terminal.type("second\n")
        terminal.wait_for("next\n")
    assert server.requests[1].messages == (ChatMessage("user", "second"),)


def test_ctrl_c_at_the_prompt_says_how_to_leave(server: FakeServer) -> None:
    """The program stays, and a half-typed question is dropped.

    Python's input() forgets a Ctrl-C between its last look and its select() until another key
    comes: Enter, which sends nothing either way.
    """
    with Terminal("chat", target=server.target) as terminal:
        terminal.wait_for("> ")
        terminal.type("half a quest")
        terminal.wait_for("half a quest")
        terminal.type("\x03")
        terminal.type("\n")
        terminal.wait_for("/quit or Ctrl-D leaves")
        terminal.wait_for("> ")
        terminal.type("/quit\n")
        assert terminal.wait_end() == 0
    assert server.requests == []


def test_reset_forgets_the_conversation_but_not_the_system_message(server: FakeServer) -> None:
    """After /reset the next question stands alone again."""
    with Terminal("chat", "--system", "be kind", target=server.target) as terminal:
        terminal.wait_for("> ")
        for line, answer in (("one", "one\n"), ("/reset", "forgotten"), ("two", "two\n")):
            terminal.type(line + "\n")
            terminal.wait_for(line)  # the terminal's echo
            terminal.wait_for(answer)
            terminal.wait_for("> ")
    system = ChatMessage("system", "be kind")
    assert server.requests[1].messages == (system, ChatMessage("user", "two"))


def test_an_error_is_one_line_and_the_chat_goes_on(server: FakeServer) -> None:
    """A refused question is said and dropped."""
    server.reply(FakeError("INVALID_ARGUMENT", "too long"), FakeReply("fine"))
    with Terminal("chat", target=server.target) as terminal:
        terminal.wait_for("> ")
        terminal.type("first\n")
        terminal.wait_for("rillgate: too long")
        terminal.wait_for("> ")
        terminal.type("second\n")
        terminal.wait_for("fine\n")
    assert server.requests[1].messages == (ChatMessage("user", "second"),)


def test_a_models_control_characters_do_not_reach_the_terminal(server: FakeServer) -> None:
    """Escape sequences in an answer are not executed by the reader's terminal."""
    server.reply(FakeReply("red\x1b]0;title\x07 and \x9bmore"))
    with Terminal("chat", target=server.target) as terminal:
        terminal.wait_for("> ")
        terminal.type("first\n")
        terminal.wait_for("red\\]0;title and more\n")
