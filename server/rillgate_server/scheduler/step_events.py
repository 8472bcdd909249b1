"""What happened to requests since the last output: gathered while a step is planned and applied."""

from rillgate_server.core.step import (
    ChoiceFinished,
    ChoiceTokens,
    PromptLogprobs,
    RequestFailed,
    RequestStarted,
    StepOutput,
)


class StepEvents:
    """Lists of events that leave together as one StepOutput.

    State: the lists.
    """

    __slots__ = ("failed", "finished", "prompt_logprobs", "started", "tokens")

    def __init__(self) -> None:
        """Start empty."""
        self.started: list[RequestStarted] = []
        self.tokens: list[ChoiceTokens] = []
        self.prompt_logprobs: list[PromptLogprobs] = []
        self.finished: list[ChoiceFinished] = []
        self.failed: list[RequestFailed] = []

    def __bool__(self) -> bool:
        return bool(
            self.tokens or self.finished or self.started or self.failed or self.prompt_logprobs
        )

    def __repr__(self) -> str:
        return (
            f"StepEvents(started={len(self.started)}, tokens={len(self.tokens)}, "
            f"finished={len(self.finished)}, failed={len(self.failed)})"
        )

    def take(self, step_id: int) -> StepOutput:
        """Return everything gathered, and start anew."""
        output = StepOutput(
            step_id,
            tuple(self.started),
            tuple(self.tokens),
            tuple(self.prompt_logprobs),
            tuple(self.finished),
            tuple(self.failed),
        )
        self.started, self.tokens, self.prompt_logprobs = [], [], []
        self.finished, self.failed = [], []
        return output
