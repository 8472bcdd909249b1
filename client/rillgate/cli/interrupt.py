"""Ctrl-C while an answer comes: it ends the answer, not the line of code that happens to run.

Owns the signal for that time. Does not know what is done with the answer.

Rejected: to catch KeyboardInterrupt. It is raised between any two lines: in gRPC, which then waits
for ever or leaves a lock taken, or after a text was written and before it was kept.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from rillgate.sync_stream import GenerationStream


@contextlib.contextmanager
def closed_by_ctrl_c(stream: GenerationStream) -> Iterator[threading.Event]:
    """Let Ctrl-C close the stream, whose iteration then ends; gives whether it was pressed.

    For the main thread, whose the signal is.
    """
    pressed = threading.Event()

    def close() -> None:
        pressed.set()
        stream.close()

    def on_signal(number: int, frame: FrameType | None) -> None:
        # On a thread of its own: the interrupted line may hold a lock that closing takes.
        threading.Thread(target=close).start()

    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)
