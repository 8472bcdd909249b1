"""Decode tokens/s from when tokens arrived: one definition for every contestant.

Runs in the peers' environments, too: the standard library alone.
"""

from collections.abc import Sequence


def steady_decode_rate(arrivals: Sequence[Sequence[float]]) -> float | None:
    """Return tokens/s while all streams decode: from the last first token to the first last one.

    arrivals: seconds, ascending, one per token and stream. None where the streams never all decode
    at one time.
    """
    begin = max(times[0] for times in arrivals)
    end = min(times[-1] for times in arrivals)
    if end <= begin:
        return None
    num_tokens = sum(begin < time <= end for times in arrivals for time in times)
    return num_tokens / (end - begin)
