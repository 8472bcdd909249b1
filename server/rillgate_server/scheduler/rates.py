"""What steps cost, measured: the rates that refusals and the load report give."""

_WEIGHT = 0.2
"""Of the newest sample in the moving averages: about the last ten steps count."""


class MeasuredRates:
    """Moving averages of steps' times. 0 means not measured yet.

    State: the two averages.
    """

    def __init__(self) -> None:
        """Start without measurements."""
        self.prefill_tokens_per_s = 0.0
        self.decode_step_s = 0.0

    def __repr__(self) -> str:
        return (
            f"MeasuredRates(prefill_tokens_per_s={self.prefill_tokens_per_s:.1f}, "
            f"decode_step_s={self.decode_step_s:.6f})"
        )

    def step_done(self, num_prefill_tokens: int, num_decode_rows: int, seconds: float) -> None:
        """Take in one step. A mixed step's decode part is taken to cost what decode steps cost."""
        if num_prefill_tokens == 0:
            self.decode_step_s = _averaged(self.decode_step_s, seconds)
            return
        if num_decode_rows:
            seconds -= self.decode_step_s
        if seconds > 0.0:
            rate = num_prefill_tokens / seconds
            self.prefill_tokens_per_s = _averaged(self.prefill_tokens_per_s, rate)


def _averaged(average: float, sample: float) -> float:
    return sample if average == 0.0 else average + _WEIGHT * (sample - average)
