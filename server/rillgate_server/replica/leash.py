"""Runs a command that dies when its parent dies, even by kill -9.

    python leash.py PARENT_PID COMMAND ARGUMENT ...

Asks the kernel for SIGKILL at the parent's death (prctl(2), PR_SET_PDEATHSIG), makes sure that the
parent did not die before it asked, and becomes COMMAND (the wish survives exec). A shim of its own,
because code between fork and exec is not safe in a process with threads, and imported by nobody:
standard library alone, so that it costs some 20 ms.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Become the command that `arguments` give; exit 1 when the parent is gone."""
    parent_pid, *command = arguments
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(parent_pid):
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
