"""What a decode step's time goes into: clocks around the C++ kernels while this is entered."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

from rillgate_server.worker.kernels.library import Kernels

_ATTENTION = "attend"
"""How the names of attention's kernels begin; all others are matrix products, with what the layers
fuse around them."""


class StepParts:
    """Seconds in kernels since the last step, and those of the decode steps noted so far."""

    def __init__(self) -> None:
        """Enter it to put the clocks on, for the whole process."""
        self._seconds = {"products": 0.0, "attention": 0.0}
        self._originals: dict[str, Callable[..., Any]] = {}
        self._steps: dict[str, list[float]] = {"products": [], "attention": [], "rest": []}

    def __enter__(self) -> "StepParts":
        """Put the clocks on."""
        for name, function in list(vars(Kernels).items()):
            if not name.startswith("_") and callable(function):
                self._originals[name] = function
                kind = "attention" if name.startswith(_ATTENTION) else "products"
                setattr(Kernels, name, self._clocked(function, kind))
        return self

    def __exit__(self, *_: object) -> None:
        """Take them off."""
        for name, function in self._originals.items():
            setattr(Kernels, name, function)

    def note_step(self, seconds: float, is_decode: bool) -> None:
        """End a step that took the worker `seconds`."""
        if is_decode:
            for kind, spent in self._seconds.items():
                self._steps[kind].append(spent)
            self._steps["rest"].append(seconds - sum(self._seconds.values()))
        self._seconds = dict.fromkeys(self._seconds, 0.0)

    def medians_ms(self) -> dict[str, float]:
        """Say what a decode step takes: `products_ms`, `attention_ms`, `rest_ms` (the worker's)."""
        return {f"{kind}_ms": statistics.median(it) * 1e3 for kind, it in self._steps.items()}

    def _clocked(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            result = function(*arguments, **named)
            self._seconds[kind] += time.perf_counter() - begin
            return result

        return run
