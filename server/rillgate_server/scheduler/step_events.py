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

    def forget(self, request_id: int, choice_indices: tuple[int, ...] = ()) -> None:
        """Drop what was to be told of an aborted request, or of some of its choices."""

        def is_kept(event: ChoiceTokens | ChoiceFinished) -> bool:
            return event.request_id != request_id or (
                bool(choice_indices) and event.choice_index not in choice_indices
            )

        self.tokens = [event for event in self.tokens if is_kept(event)]
        self.finished = [event for event in self.finished if is_kept(event)]
        if not choice_indices:
            self.started = [event for event in self.started if event.request_id != request_id]
            self.prompt_logprobs = [e for e in self.prompt_logprobs if e.request_id != request_id]

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
