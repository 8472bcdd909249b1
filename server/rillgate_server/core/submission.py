"""A request as a gateway hands it to a replica: what the Submit message says, in plain types.

Not yet checked against the model, and not yet a Request: the replica joins the model's own ends of
sequence to the stop ids and gives it a number of its own. Does not know protobuf.
"""

from dataclasses import dataclass

from rillgate_server.core.request import (
    DEFAULT_TENANT,
    NO_SALT,
    ChoiceStart,
    PriorityClass,
    Speculation,
    Tenant,
)
from rillgate_server.core.sampling_params import SamplingParams

MAX_REQUEST_ID_BYTES = 128
"""Of the name that logs carry."""


@dataclass(frozen=True, slots=True)
class Submission:
    """One request in token ids, every sampling value resolved."""

    request_id: str
    """The gateway's name for it, for logs; at most MAX_REQUEST_ID_BYTES."""
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    """`banned_until_min_tokens` is left empty: the replica knows which ids end a choice."""
    max_tokens: int
    """Most tokens per choice from the original start."""
    choices: tuple[ChoiceStart, ...] = (ChoiceStart(0),)
    """The unfinished ones."""
    stop_token_ids: tuple[int, ...] = ()
    """Beside the model's own."""
    ignore_eos: bool = False
    """Goes on after the model's own ends of sequence."""
    cache_salt: bytes = NO_SALT
    """16 bytes."""
    num_shared_prefix_tokens: int = 0
    """The prompt's first tokens that an operator declared shared."""
    tenant: Tenant = DEFAULT_TENANT
    priority: PriorityClass = PriorityClass.NORMAL
    time_remaining_s: float | None = None
    """Until the caller gives up; None: never. Not a time of day: clocks differ."""
    waited_s: float = 0.0
    """What it has waited already, here or at another replica."""
    speculation: Speculation | None = None
    """None: as the replica is set."""
