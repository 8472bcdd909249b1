"""The Inference service: what applications call.

Owns a call's life: its deadline, its cancellation, and that what it holds at a replica is given up
whatever ends it. What a request means is convert_public's and gateway.prompt's, what its events
mean gateway.generation's. Errors leave as exceptions; the border of the service translates them.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, cast

import grpc

from rillgate_proto.v1 import inference_pb2 as pb
from rillgate_proto.v1 import inference_pb2_grpc
from rillgate_server.core.clock import Clock
from rillgate_server.errors import DeadlineExceeded
from rillgate_server.gateway.fleet import Fleet
from rillgate_server.gateway.generation import Generation
from rillgate_server.gateway.open_calls import OpenCalls
from rillgate_server.gateway.prompt import (
    MAX_INLINE_CHARACTERS,
    PreparedCall,
    ServedModel,
    encode,
    prepare,
    unix_time_ms,
)
from rillgate_server.gateway.relay import Relay
from rillgate_server.gateway.tenancy import Account, Tenancy
from rillgate_server.service.call_context import current_call
from rillgate_server.service.convert_public import (
    check_model,
    complete_response,
    generate_response,
    model_message,
    to_generate_call,
    to_prompt_input,
)
from rillgate_server.service.generate_call import OutputDelta, StreamUpdate
from rillgate_server.service.stream_writer import StreamWriter, joined

MIN_DEADLINE_MARGIN_S = 0.05
MAX_DEADLINE_MARGIN_S = 0.5
DEADLINE_MARGIN_FRACTION = 0.05

# Any: grpc's context is generic in message types that one servicer has many of.
_Context = grpc.aio.ServicerContext[Any, Any]
_Write = Callable[[StreamUpdate], Awaitable[None]]


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """The servicer of Inference. All methods run on the server's loop."""

    def __init__(
        self,
        model: ServedModel,
        fleet: Fleet,
        tenancy: Tenancy,
        open_calls: OpenCalls,
        clock: Clock,
    ) -> None:
        """Serve `model` with the replicas of `fleet`."""
        self._model = model
        self._fleet = fleet
        self._tenancy = tenancy
        self._open_calls = open_calls
        self._clock = clock

    # -- generation -------------------------------------------------------------------------------

    async def Generate(self, request: pb.GenerateRequest, context: _Context) -> None:
        """Stream the answer to one request."""

        async def write(update: StreamUpdate) -> None:
            await context.write(generate_response(update))

        await self._serve(request, context, write)

    async def Complete(self, request: pb.CompleteRequest, context: _Context) -> pb.CompleteResponse:
        """Answer one request whole."""
        updates: list[StreamUpdate] = []

        async def write(update: StreamUpdate) -> None:
            updates.append(update)

        await self._serve(request.request, context, write)
        return _whole(updates)

    async def _serve(self, message: pb.GenerateRequest, context: _Context, write: _Write) -> None:
        """Run one request from its message to its last update."""
        ends_at_s = _end_time(context)
        arrival_s = self._clock.now()
        with self._open_calls.enter():
            prepared = await self._prepare(message, self._tenancy.account(context))
            writer = StreamWriter(write)
            generation = Generation(prepared, self._model.text, writer, self._clock, arrival_s)
            relay = Relay(generation, self._fleet, self._clock, ends_at_s)
            try:
                await _run(generation, relay, writer, ends_at_s)
            finally:
                current_call().log_fields["tokens"] = generation.num_tokens
                if relay.num_moves:
                    current_call().log_fields["moves"] = relay.num_moves

    async def _prepare(self, message: pb.GenerateRequest, account: Account) -> PreparedCall:
        log = current_call()
        call = to_generate_call(
            message, self._model.spec, self._model.text.generation_defaults, _new_seed
        )
        prepared = await prepare(call, self._model, log.request_id, account)
        log.log_fields["prompt_tokens"] = len(prepared.prompt_token_ids)
        log.log_fields["choices"] = call.num_choices
        if call.resumption is not None:
            log.log_fields["resumes"] = call.resumption.request_id
        return prepared

    # -- tokens and models ------------------------------------------------------------------------

    async def Tokenize(self, request: pb.TokenizeRequest, context: _Context) -> pb.TokenizeResponse:
        """Return exactly the ids that Generate would feed to the model."""
        spec = self._model.spec
        check_model(request.model, spec)
        prompt = to_prompt_input(request, spec)
        return pb.TokenizeResponse(
            token_ids=await encode(prompt, self._model.text, unix_time_ms()),
            max_context_tokens=spec.max_context_tokens,
        )

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: _Context
    ) -> pb.DetokenizeResponse:
        """Return the text of token ids."""
        check_model(request.model, self._model.spec)
        ids, keep = tuple(request.token_ids), request.keep_special_tokens
        decode = self._model.text.decode
        is_long = len(ids) > MAX_INLINE_CHARACTERS
        text = await asyncio.to_thread(decode, ids, keep) if is_long else decode(ids, keep)
        return pb.DetokenizeResponse(text=text)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: _Context
    ) -> pb.ListModelsResponse:
        """List the one model."""
        model = model_message(self._model.spec, self._model.text.has_chat_template)
        return pb.ListModelsResponse(models=[model])


async def _run(
    generation: Generation, relay: Relay, writer: StreamWriter, ends_at_s: float | None
) -> None:
    """Write until the generation is over, its deadline comes, or something breaks.

    Two sides: a task takes the replicas' events, so that a stop string or an error counts at once
    even while a slow reader holds up a write; this one writes what gathers.
    """

    def on_deadline() -> None:
        generation.end_at_deadline()
        writer.close()
        events.cancel()

    def on_events_over(task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            writer.fail(error)
        writer.close()

    loop = asyncio.get_running_loop()
    timer = loop.call_at(ends_at_s, on_deadline) if ends_at_s is not None else None
    events = asyncio.create_task(relay.run())
    events.add_done_callback(on_events_over)
    try:
        await writer.run()
    finally:
        events.cancel()
        if timer is not None:
            timer.cancel()
        await asyncio.gather(events, return_exceptions=True)


def _end_time(context: _Context) -> float | None:
    """Return when to end the stream, on the loop's clock; None without a deadline."""
    # The stubs do not know that a call may have none.
    remaining_s = cast("float | None", context.time_remaining())
    if remaining_s is None:
        return None
    if remaining_s <= 0:
        raise DeadlineExceeded("the deadline had passed when the request arrived")
    return asyncio.get_running_loop().time() + max(
        remaining_s - deadline_margin_s(remaining_s), 0.0
    )


def deadline_margin_s(remaining_s: float) -> float:
    """Return how long before its caller's deadline a stream ends (design, section 4)."""
    margin_s = max(MIN_DEADLINE_MARGIN_S, DEADLINE_MARGIN_FRACTION * remaining_s)
    return min(margin_s, MAX_DEADLINE_MARGIN_S)


def _new_seed() -> int:
    return secrets.randbits(64)


def _whole(updates: list[StreamUpdate]) -> pb.CompleteResponse:
    """Join a stream's updates into one answer."""
    started = next(update.started for update in updates if update.started is not None)
    ends = sorted(
        (end for update in updates for end in update.ended), key=lambda end: end.choice_index
    )
    deltas: dict[int, list[OutputDelta]] = {end.choice_index: [] for end in ends}
    for update in updates:
        for output in update.outputs:
            deltas[output.choice_index].append(output)
    choices = [
        (joined(deltas[end.choice_index] or [OutputDelta(end.choice_index, 0, ())]), end)
        for end in ends
    ]
    prompt_logprobs = [position for update in updates for position in update.prompt_logprobs]
    return complete_response(started, choices, prompt_logprobs)
