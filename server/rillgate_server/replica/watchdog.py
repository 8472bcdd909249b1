"""Ends a replica whose engine makes no progress though it has work, and says where it stands.

Owns a thread of its own, which needs neither the engine nor the loop to be alive: a deadlock, a
kernel that never returns or a collective whose peer is gone stops both. Whoever started the process
starts it again, and gateways have taken its streams elsewhere by then (they apply the same rule to
what its Loads say). Does not know what a step is.
"""

import faulthandler
import logging
import os
import sys
from collections.abc import Callable
from threading import Event, Thread

from rillgate_server.core.clock import Clock
from rillgate_server.core.load import EngineLoad
from rillgate_server.replica.child import EXIT_FROZEN

TICK_S = 0.5
_SAME_STEP_S = 0.1  # two looks that disagree by more speak of different steps; a look takes time

_log = logging.getLogger(__name__)


class StandstillCount:
    """Tells a frozen engine from a process that was stopped as a whole and goes on.

    Time passes for a stopped process, too, so the age of a step says little by itself: the step
    must also have been the same one for as many ticks, and no tick comes while all stands still.

    State: when the step began that was seen last, and for how many ticks it has been the same.
    """

    def __init__(self, tick_s: float = TICK_S) -> None:
        """Begin to count ticks, one each `tick_s`."""
        self._tick_s = tick_s
        self._began_s = 0.0
        self._num_ticks = 0

    def __repr__(self) -> str:
        return f"StandstillCount(ticks={self._num_ticks})"

    def tick(self, load: EngineLoad, now: float) -> bool:
        """Look once more; True: the engine is frozen."""
        began_s = now - load.step_age_s
        if abs(began_s - self._began_s) > _SAME_STEP_S:
            self._began_s = began_s
            self._num_ticks = 0
        else:
            self._num_ticks += 1
        return load.is_frozen and self._num_ticks * self._tick_s > load.frozen_after_s


class Watchdog:
    """Watches an engine until `stop`. Its thread is a daemon: it holds no process back."""

    def __init__(
        self,
        load: Callable[[], EngineLoad],
        clock: Clock,
        on_frozen: Callable[[EngineLoad], None] | None = None,
        tick_s: float = TICK_S,
    ) -> None:
        """Watch what `load` says; `on_frozen` (ending the process, if None) is called once, on the
        watchdog's thread."""
        self._load = load
        self._clock = clock
        self._on_frozen = on_frozen or end_process
        self._tick_s = tick_s
        self._stopped = Event()
        self._thread = Thread(target=self._run, name="rillgate-watchdog", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def _run(self) -> None:
        count = StandstillCount(self._tick_s)
        while not self._stopped.wait(self._tick_s):
            load = self._load()
            if count.tick(load, self._clock.now()):
                self._on_frozen(load)
                return


def end_process(load: EngineLoad) -> None:
    """Log every thread's stack and end the process at once."""
    _log.error(
        "the engine has made no step for %.1f s (allowed: %.1f s) with %d requests running and %d "
        "waiting; this replica ends. Where its threads stand:",
        load.step_age_s,
        load.frozen_after_s,
        load.num_running,
        load.num_waiting,
    )
    for handler in logging.getLogger().handlers:
        handler.flush()
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    sys.stderr.flush()
    os._exit(EXIT_FROZEN)
