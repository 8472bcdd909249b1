"""A gateway with a planted fault, to show that the survival tests would see it.

    python -m tests.end_to_end.faulty_gateway FAULT FLAGS OF `rillgate gateway` ...

Everything but the fault is the real gateway. A fault shows after a stream went on elsewhere:

    drop      one token is left out, as if it had never been
    repeat    one token is given twice
    withhold  the text that was held back (half a stop string, half a character) is lost
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rillgate_server.cli.__main__ import main
from rillgate_server.core.pending_output import StepEntry
from rillgate_server.core.step import ChoiceFinished, ChoiceTokens
from rillgate_server.gateway import inference
from rillgate_server.gateway.generation import Generation
from rillgate_server.gateway.text.assembler import TextAssembler

FAULTS = ("drop", "repeat", "withhold")


class FaultyGeneration(Generation):
    """A generation that goes wrong once, after its first move."""

    fault: str

    def __init__(self, *args: Any, **keywords: Any) -> None:  # the real one's own
        """Take what the real one takes."""
        super().__init__(*args, **keywords)
        self._given = args
        self._is_broken = False
        self._shift: dict[int, int] = {}  # choice -> tokens too few (below 0) or too many

    def break_off(self) -> None:
        """Go wrong from here on."""
        super().break_off()
        self._is_broken = True
        if self.fault == "withhold":
            prepared, model_text = self._given[0], self._given[1]
            for choice in self._choices:
                if choice.end_reason is None:
                    choice.assembler = TextAssembler(
                        model_text,
                        (*prepared.prompt_token_ids, *choice.token_ids),
                        prepared.call.stop_strings,
                        prepared.call.sampling.min_tokens,
                    )

    def apply(self, events: Sequence[StepEntry]) -> tuple[int, ...]:
        """Take events, one token too few or too many among them."""
        return super().apply([self._bent(event) for event in events])

    def _bent(self, event: StepEntry) -> StepEntry:
        if isinstance(event, ChoiceFinished):
            shift = self._shift.get(event.choice_index, 0)
            return replace(event, num_tokens=event.num_tokens + shift)
        if not isinstance(event, ChoiceTokens) or self.fault == "withhold":
            return event
        shift = self._shift.get(event.choice_index, 0)
        event = replace(event, token_offset=event.token_offset + shift)
        if not self._is_broken or shift:
            return event
        ids, logprobs = event.token_ids, event.logprobs
        if self.fault == "drop":
            self._shift[event.choice_index] = -1
            return replace(event, token_ids=ids[1:], logprobs=logprobs[1:])
        self._shift[event.choice_index] = 1
        return replace(event, token_ids=(ids[0], *ids), logprobs=(*logprobs[:1], *logprobs))


def faulty(fault: str) -> type[FaultyGeneration]:
    """Return the class with one of the faults."""
    return type("FaultyGeneration", (FaultyGeneration,), {"fault": fault})


if __name__ == "__main__":
    setattr(inference, "Generation", faulty(sys.argv[1]))  # noqa: B010 - mypy takes no other name
    sys.exit(main(["gateway", *sys.argv[2:]]))
