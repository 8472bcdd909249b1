"""Keeps memory that a step frees for the next one.

By default glibc gives large buffers back to the system when they are freed, and every step takes
them anew: a page fault and a zeroed page for each 4 KB. A step's buffers are the same step after
step, so the process keeps them. Does not know what the memory is for.

Threads other than the main one get heaps of 64 MiB by default, and whatever `mallopt` says, one
that becomes empty goes back to the system. Where the last buffer that a layer needs happened to be
the first one of another heap, each layer of each step began and ended one: some 300,000 page faults
a second, and a replica that decoded at half its speed until it ended (about one start in ten).
"""

import ctypes

_M_TRIM_THRESHOLD = -1  # mallopt(3)
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_KEPT_BYTES = 256 << 20
"""Most free memory at the heap's end; a step of 2048 tokens of a small model uses about 100 MB."""
_LARGEST_KEPT_BYTES = 32 << 20
"""Larger buffers still come and go; every glibc takes this value, some a higher one."""


def use_one_heap() -> bool:
    """Let all threads allocate from the main thread's heap, which grows and never goes away; False
    without glibc.

    To be called before anything starts a thread, which importing numpy does.
    """
    library = ctypes.CDLL(None)
    return hasattr(library, "mallopt") and library.mallopt(_M_ARENA_MAX, 1) == 1


def return_freed_memory() -> bool:
    """Give buffers from 1 MiB on back as soon as they are freed, while weights are loaded; False
    without glibc.

    By default glibc stops doing so at the first that is freed, and what weights were converted from
    leaves holes between them.
    """
    library = ctypes.CDLL(None)
    return hasattr(library, "mallopt") and library.mallopt(_M_MMAP_THRESHOLD, 1 << 20) == 1


def keep_freed_memory() -> bool:
    """Give back what is free now, and from now on keep what is freed; False without glibc.

    To be called after loading: its buffers do not come again, and weights that glibc maps apart
    get the system's large pages (with these settings from the start, a decode step of
    Qwen2.5-0.5B's shape took 25 ms instead of 20). Afterwards 32 rows decode in 59 instead of
    63 ms, on two cores.
    """
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim")):
        return False
    library.malloc_trim(0)
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES))
    return all(library.mallopt(name, value) == 1 for name, value in settings)
