"""Who is let in: what a request must pass before it is queued, and the numbers of a refusal.

Owns the limits of the queue and the count of requests that have not started. Refuses at once and
for good: a refused request was never queued. Does not know the running batch, but for what a
prediction needs.

The time to the first token is predicted as

    batch_wait_s + tokens ahead / prefill_tokens_per_s + prefill_s(0, own tokens)

from the fitted costs and what the queue says goes before the request. Hits in the prefix cache are
not foreseen, so it is an upper estimate of the computation; what arrives later, and that each one
ahead needs a slot too, are not foreseen either. Nothing is predicted until a prefill was measured.
"""

import math
from collections.abc import Callable

from rillgate_server.config.groups import BatcherConfig
from rillgate_server.core.model_spec import CacheSizes, ModelSpec
from rillgate_server.core.request import Rejection, RejectReason, Request
from rillgate_server.errors import InvalidRequest
from rillgate_server.kvcache.cost_model import CostModel
from rillgate_server.scheduler.request_queue import RequestQueue
from rillgate_server.scheduler.sequence import RequestGroup

UNMEASURED_RETRY_S = 1.0
"""Where nothing is measured yet."""
MIN_RETRY_S, MAX_RETRY_S = 0.05, 60.0
"""A shorter wait only adds load, and a longer prediction is worth nothing."""
MAX_TENANT_NAME_BYTES = 256
MAX_TENANT_WEIGHT = 1e6
_SALT_BYTES = 16


class Admission:
    """Checks requests against the model's, the cache's and the queue's limits.

    State: requests that wait for their first start, and their tokens.
    """

    def __init__(
        self,
        config: BatcherConfig,
        spec: ModelSpec,
        sizes: CacheSizes,
        block_size_tokens: int,
        queue: RequestQueue,
        costs: CostModel,
    ) -> None:
        """Start with nobody waiting; queue and costs are read, never changed."""
        self.num_requests = 0
        self.num_tokens = 0
        self.is_draining = False
        self._config = config
        self._spec = spec
        self._num_blocks = sizes.num_device_blocks
        self._block_size_tokens = block_size_tokens
        self._queue = queue
        self._costs = costs

    def __repr__(self) -> str:
        return f"Admission(requests={self.num_requests}, tokens={self.num_tokens})"

    def entered(self, group: RequestGroup) -> None:
        """Count a request that was queued."""
        self.num_requests += 1
        self.num_tokens += group.num_tokens

    def left(self, group: RequestGroup) -> None:
        """Count a request that started, or ended before it started."""
        self.num_requests -= 1
        self.num_tokens -= group.num_tokens

    def refuse(
        self,
        group: RequestGroup,
        now: float,
        num_available_blocks: int,
        batch_wait_s: float,
        count_cached_tokens: Callable[[], int],
    ) -> Rejection | None:
        """Return why the request is not taken on, or None.

        `batch_wait_s`: predicted time until the running batch takes on more. `count_cached_tokens`
        looks the request up in the cache; it costs the hashes of its prompt, so only who would be
        refused for a deadline is looked up. What can never be comes before what could be later.
        """
        request = group.request
        try:
            _check_fields(request, self._spec.vocab_size)
        except InvalidRequest as error:
            return Rejection(RejectReason.INVALID, str(error))
        never = (
            self._refuse_too_long(request)
            or self._refuse_too_many_blocks(request, num_available_blocks)
            or self._refuse_draining()
            or self._refuse_late_when_idle(request, now, count_cached_tokens)
        )
        if never is not None:
            return never
        return self._refuse_when_full(group, batch_wait_s) or self._refuse_late(
            group, now, batch_wait_s, count_cached_tokens
        )

    # -- never here -------------------------------------------------------------------------------

    def _refuse_too_long(self, request: Request) -> Rejection | None:
        num_prompt, limit = len(request.prompt_token_ids), self._spec.max_context_tokens
        asked = num_prompt + request.max_tokens
        if asked <= limit:
            return None
        return Rejection(
            RejectReason.TOO_LONG,
            f"the prompt has {num_prompt} tokens and max_tokens is {request.max_tokens}: "
            f"{asked} together; the context holds {limit}",
            asked=asked,
            free=max(0, limit - num_prompt),
            limit=limit,
        )

    def _refuse_too_many_blocks(self, request: Request, num_available: int) -> Rejection | None:
        """Refuse when one choice alone would not fit into the whole cache."""
        # The last token is sampled and never computed, so it needs no room.
        num_tokens = len(request.prompt_token_ids) + request.max_tokens - 1
        asked = -(-num_tokens // self._block_size_tokens)
        if asked <= self._num_blocks:
            return None
        return Rejection(
            RejectReason.TOO_LONG,
            f"{num_tokens} tokens need {asked} cache blocks of {self._block_size_tokens} tokens; "
            f"free now: {num_available}, in all: {self._num_blocks}",
            asked=asked,
            free=num_available,
            limit=self._num_blocks,
        )

    def _refuse_draining(self) -> Rejection | None:
        if not self.is_draining:
            return None
        return Rejection(
            RejectReason.DRAINING, "the replica is draining", retry_after_s=UNMEASURED_RETRY_S
        )

    def _refuse_late_when_idle(
        self, request: Request, now: float, count_cached_tokens: Callable[[], int]
    ) -> Rejection | None:
        """Refuse when the deadline is over, or was too soon for the request's own prefill alone.

        From its arrival on: what it has waited since, for the step under way at least, is load.
        """
        if request.deadline_s is None:
            return None
        available_s = request.deadline_s - min(now, request.arrival_s)
        needed_s = self.own_prefill_s(request)
        if 0.0 < available_s < needed_s:
            needed_s = self.own_prefill_s(request, count_cached_tokens())
        if request.deadline_s > now and needed_s <= available_s:
            return None
        return Rejection(
            RejectReason.DEADLINE_NEVER,
            f"the first token is predicted in {math.ceil(needed_s * 1e3)} ms with nobody ahead; "
            f"the deadline leaves {math.floor(available_s * 1e3)} ms",
            asked=math.ceil(needed_s * 1e3),
            free=max(0, math.floor(available_s * 1e3)),
            predicted_ttft_s=needed_s,
        )

    # -- not now ----------------------------------------------------------------------------------

    def _refuse_when_full(self, group: RequestGroup, batch_wait_s: float) -> Rejection | None:
        """Refuse what the queue has no room for, with the time until it has."""
        config, asked = self._config, group.num_tokens
        # A request that is larger than the whole limit may wait alone: else it never could.
        num_tokens_over = self.num_tokens + asked - config.max_waiting_tokens
        if self.num_requests and num_tokens_over > 0:
            return Rejection(
                RejectReason.OVERLOADED,
                f"the queue holds {self.num_tokens} of {config.max_waiting_tokens} tokens, "
                f"the request has {asked}",
                asked=asked,
                free=max(0, config.max_waiting_tokens - self.num_tokens),
                limit=config.max_waiting_tokens,
                retry_after_s=self._drain_s(num_tokens_over, batch_wait_s),
                predicted_ttft_s=self._predicted_ttft_s(group, batch_wait_s),
            )
        if self.num_requests >= config.max_waiting_requests:
            num_tokens_ahead = self.num_tokens // self.num_requests  # one of them must start
            return Rejection(
                RejectReason.OVERLOADED,
                f"{self.num_requests} requests wait, the queue holds {config.max_waiting_requests}",
                asked=1,
                free=0,
                limit=config.max_waiting_requests,
                retry_after_s=self._drain_s(num_tokens_ahead, batch_wait_s),
                predicted_ttft_s=self._predicted_ttft_s(group, batch_wait_s),
            )
        return None

    def _refuse_late(
        self,
        group: RequestGroup,
        now: float,
        batch_wait_s: float,
        count_cached_tokens: Callable[[], int],
    ) -> Rejection | None:
        """Refuse what would get its first token too late behind what waits."""
        if group.request.deadline_s is None:
            return None
        ttft_s = self._predicted_ttft_s(group, batch_wait_s)
        available_s = group.request.deadline_s - now
        if ttft_s > available_s:
            ttft_s = self._predicted_ttft_s(group, batch_wait_s, count_cached_tokens())
        if ttft_s <= available_s:
            return None
        return Rejection(
            RejectReason.DEADLINE_NOW,
            f"the first token is predicted in {math.ceil(ttft_s * 1e3)} ms behind what waits; "
            f"the deadline leaves {math.floor(available_s * 1e3)} ms",
            asked=math.ceil(ttft_s * 1e3),
            free=math.floor(available_s * 1e3),
            retry_after_s=_retry_s(ttft_s - available_s),  # then so much less is ahead
            predicted_ttft_s=ttft_s,
        )

    # -- predictions ------------------------------------------------------------------------------

    def own_prefill_s(self, request: Request, num_cached_tokens: int = 0) -> float:
        """Predict the prefill up to the first token of the choice that leads; 0: unmeasured."""
        num_tokens = len(request.prompt_token_ids) + len(request.choices[0].generated_token_ids)
        return self._costs.prefill_s(num_cached_tokens, num_tokens - num_cached_tokens)

    def _predicted_ttft_s(
        self, group: RequestGroup, batch_wait_s: float, num_cached_tokens: int = 0
    ) -> float:
        """Predict the time to the first token behind what waits; 0 while nothing is measured."""
        rate = self._costs.prefill_tokens_per_s
        if rate == 0.0:
            return 0.0
        num_ahead = self._queue.num_tokens_ahead(group.request, group.num_tokens)
        own_s = self.own_prefill_s(group.request, num_cached_tokens)
        return batch_wait_s + num_ahead / rate + own_s

    def _drain_s(self, num_tokens: int, batch_wait_s: float) -> float:
        """Predict when `num_tokens` will have left the queue."""
        rate = self._costs.prefill_tokens_per_s
        return UNMEASURED_RETRY_S if rate == 0.0 else _retry_s(batch_wait_s + num_tokens / rate)


def _retry_s(seconds: float) -> float:
    return min(max(seconds, MIN_RETRY_S), MAX_RETRY_S)


def _check_fields(request: Request, vocab_size: int) -> None:
    """Raise InvalidRequest for the first field that the worker could not take."""
    if not request.prompt_token_ids:
        raise InvalidRequest.of("prompt_token_ids", "empty", "at least one token")
    if not request.choices:
        raise InvalidRequest.of("choices", "empty", "at least one choice")
    indices = [choice.index for choice in request.choices]
    if len(set(indices)) < len(indices) or min(indices) < 0:
        raise InvalidRequest.of("choices", indices, "distinct indices from 0")
    if request.max_tokens < 1:
        raise InvalidRequest.of("max_tokens", request.max_tokens, "at least 1")
    if len(request.cache_salt) != _SALT_BYTES:
        raise InvalidRequest.of("cache_salt", f"{len(request.cache_salt)} bytes", "16 bytes")
    _check_account(request)
    sampling = request.sampling
    sampling.validate(vocab_size)
    if not 0 <= sampling.min_tokens <= request.max_tokens:
        raise InvalidRequest.of("min_tokens", sampling.min_tokens, f"0 to {request.max_tokens}")
    _check_token_ids("prompt_token_ids", request.prompt_token_ids, vocab_size)
    _check_token_ids("stop_token_ids", tuple(request.stop_token_ids), vocab_size)
    _check_token_ids("banned_until_min_tokens", sampling.banned_until_min_tokens, vocab_size)
    for choice in request.choices:
        field = f"choices[{choice.index}].generated_token_ids"
        _check_token_ids(field, choice.generated_token_ids, vocab_size)


def _check_account(request: Request) -> None:
    """Refuse what the order of the queue or the cache's salt could not take."""
    num_prompt, num_shared = len(request.prompt_token_ids), request.num_shared_prefix_tokens
    if not 0 <= num_shared <= num_prompt:
        raise InvalidRequest.of("shared_prefix_tokens", num_shared, f"0 to {num_prompt}")
    tenant = request.tenant
    num_bytes = len(tenant.name.encode())
    if num_bytes > MAX_TENANT_NAME_BYTES:
        raise InvalidRequest.of("tenant", f"{num_bytes} bytes", f"{MAX_TENANT_NAME_BYTES} bytes")
    if not 0.0 < tenant.weight <= MAX_TENANT_WEIGHT:  # also refuses NaN
        raise InvalidRequest.of(
            "tenant_weight", tenant.weight, f"above 0, to {MAX_TENANT_WEIGHT:.0f}"
        )
    if request.deadline_s is not None and not math.isfinite(request.deadline_s):
        raise InvalidRequest.of("deadline", request.deadline_s, "a finite time, or none")
    if not math.isfinite(request.arrival_s):
        raise InvalidRequest.of("arrival", request.arrival_s, "a finite time")


def _check_token_ids(field: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    """Refuse ids outside the vocabulary; min and max alone cost 1 ms for 100,000 ids."""
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        position, token_id = next(
            (i, token_id) for i, token_id in enumerate(token_ids) if not 0 <= token_id < vocab_size
        )
        raise InvalidRequest.of(f"{field}[{position}]", token_id, f"0 to {vocab_size - 1}")
