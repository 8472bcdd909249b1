"""When a device got to places in its work, by its own clock.

Owns the marks. On a CPU, whose work is done when its call returns, a mark is the time of day.
"""

import time

import torch


class Mark:
    """A place in the work that was handed to a device so far. State: the event, or the time."""

    def __init__(self, device: torch.device) -> None:
        """Set it behind all that the current stream was given."""
        self._event: torch.cuda.Event | None = None
        self._time_s = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Wait until the device is there; raises what went wrong before."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "Mark") -> float:
        """Return the time between two marks that the device has passed."""
        if self._event is None or earlier._event is None:
            return self._time_s - earlier._time_s
        elapsed_ms: float = earlier._event.elapsed_time(self._event)
        return elapsed_ms / 1e3
