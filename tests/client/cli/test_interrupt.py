"""Ctrl-C while an answer comes, pressed in the middle of its reader's work."""

import signal

import pytest

from rillgate import Client
from rillgate.cli.interrupt import closed_by_ctrl_c
from rillgate.testing import FakeReply, FakeServer


def test_ctrl_c_ends_the_iteration_and_interrupts_no_line(server: FakeServer) -> None:
    """What came is kept, the server is free, and the signal is given back."""
    server.reply(FakeReply("a long answer", hold_after=6))
    texts: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with (
        Client(server.target) as client,
        client.stream("p") as stream,
        closed_by_ctrl_c(stream) as pressed,
    ):
        for chunk in stream:
            if len("".join(texts)) == 5:
                signal.raise_signal(signal.SIGINT)
            texts.append(chunk.text)
        assert pressed.is_set()
        assert server.wait_open(0)
    assert "".join(texts) == "a long"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stream_that_ends_by_itself_was_not_stopped(server: FakeServer) -> None:
    """Nobody pressed; afterwards Ctrl-C is a KeyboardInterrupt again."""
    server.reply(FakeReply("short"))
    with (
        Client(server.target) as client,
        client.stream("p") as stream,
        closed_by_ctrl_c(stream) as pressed,
    ):
        assert "".join(chunk.text for chunk in stream) == "short"
    assert not pressed.is_set()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
