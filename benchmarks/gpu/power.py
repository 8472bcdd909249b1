"""The device's energy: a log of joules over time, from NVML's counter or nvidia-smi's readings.

The counter counts millijoules by itself; where there is none (an old driver, a part of a GPU),
nvidia-smi says watts ten times a second, and the log sums them. Without either, and on a CPU, there
is no log, and rows say nothing of joules. It counts the first device, and everything that runs on
it.
"""

import bisect
import contextlib
import ctypes
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

_PERIOD_S = 0.05
"""The counter moves about as often."""
_SMI = ("nvidia-smi", "-i", "0", "--query-gpu=power.draw", "--format=csv,noheader,nounits")
_SMI_PERIOD_MS = 100

ReadJoules = Callable[[], float]


class EnergyLog:
    """Joules since some start, at moments of the monotonic clock.

    State: the moments, ascending, and the joules at each; one thread adds, others read.
    """

    def __init__(self) -> None:
        """Begin empty."""
        self._times: list[float] = []
        self._joules: list[float] = []

    def add(self, now_s: float, joules: float) -> None:
        """Note a reading of a counter."""
        self._joules.append(joules)
        self._times.append(now_s)  # last: who reads sees as many joules at least

    def add_watts(self, now_s: float, watts: float) -> None:
        """Note a power that holds since the reading before."""
        before_s = self._times[-1] if self._times else now_s
        before = self._joules[-1] if self._joules else 0.0
        self.add(now_s, before + watts * (now_s - before_s))

    def joules(self, begin_s: float, end_s: float) -> float | None:
        """Return the energy between two moments; None where no readings lie around both."""
        first, last = self._at(begin_s), self._at(end_s)
        if first is None or last is None or end_s <= begin_s:
            return None
        return last - first

    def _at(self, moment_s: float) -> float | None:
        """Return the joules at a moment, on the line between the readings around it."""
        times = self._times[:]
        after = bisect.bisect_left(times, moment_s)
        if after == len(times):
            return None
        if times[after] == moment_s:
            return self._joules[after]
        if after == 0:
            return None
        share = (moment_s - times[after - 1]) / (times[after] - times[after - 1])
        before = self._joules[after - 1]
        return before + share * (self._joules[after] - before)


def parse_watts(line: str) -> float | None:
    """Return what a line of nvidia-smi says: `512.31`, `512.31 W`; None for a heading or [N/A]."""
    try:
        return float(line.strip().removesuffix("W"))
    except ValueError:
        return None


@contextlib.contextmanager
def energy_log() -> Iterator[EnergyLog]:
    """Log the energy while inside. An empty log where nobody says it."""
    log, stop = EnergyLog(), threading.Event()
    read = open_counter()
    if read is not None:
        thread = threading.Thread(target=_log_counter, args=(read, log, stop))
        thread.start()
        try:
            yield log
        finally:
            stop.set()
            thread.join()
    elif shutil.which(_SMI[0]):
        with subprocess.Popen(
            [*_SMI, f"-lms={_SMI_PERIOD_MS}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as smi:
            thread = threading.Thread(target=_log_watts, args=(smi, log))
            thread.start()
            try:
                yield log
            finally:
                smi.terminate()
                thread.join()
    else:
        yield log


def _log_counter(read: ReadJoules, log: EnergyLog, stop: threading.Event) -> None:
    while True:
        log.add(time.monotonic(), read())
        if stop.wait(_PERIOD_S):
            log.add(time.monotonic(), read())
            return


def _log_watts(smi: "subprocess.Popen[str]", log: EnergyLog) -> None:
    assert smi.stdout is not None
    for line in smi.stdout:
        if (watts := parse_watts(line)) is not None:
            log.add_watts(time.monotonic(), watts)


def open_counter(library: str = "libnvidia-ml.so.1") -> ReadJoules | None:
    """Return how the first device's energy counter is read; None where there is none."""
    try:
        nvml = ctypes.CDLL(library)
        device, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        works = (
            nvml.nvmlInit_v2() == 0
            and nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) == 0
            and nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)) == 0
        )
    except (OSError, AttributeError):
        return None
    if not works:
        return None

    def read() -> float:
        nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    return read
