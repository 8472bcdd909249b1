"""From a checked call to one whose prompt is encoded and whose lengths fit the model.

Owns what needs the prompt's token ids: both lengths, max_tokens, and whether a continuation belongs
to this prompt. Long texts are encoded in a thread (the tokenizers release the interpreter lock).
Does not know replicas or streams.
"""

import asyncio
import time
from dataclasses import dataclass, field

from rillgate_server.core.model_spec import ModelSpec
from rillgate_server.errors import ContinuationMismatch, InvalidRequest
from rillgate_server.gateway.shared_prefixes import SharedPrefixes
from rillgate_server.gateway.tenancy import Account
from rillgate_server.gateway.text.chat_template import ChatTurn
from rillgate_server.gateway.text.model_text import ModelText
from rillgate_server.gateway.text.prompt_digest import prompt_digest
from rillgate_server.service.generate_call import (
    ChatInput,
    GenerateCall,
    GivenChoice,
    PromptInput,
    TextInput,
    TokenInput,
)

MAX_INLINE_CHARACTERS = 2000
"""Texts up to this are encoded on the loop: some 0.3 ms, about what a thread's round trip costs."""

MAX_ENCODED_BYTES = 1 << 20
"""Texts beyond this (half a second of work) are first weighed: a hopeless one is not encoded."""
_HOPELESS_FACTOR = 4
"""A text is hopeless when even the longest pieces make this many times the context: a normalizer
may shrink a text, but not so much."""

_FIELDS: dict[type[PromptInput], str] = {
    TextInput: "prompt",
    ChatInput: "chat.messages",
    TokenInput: "token_ids.ids",
}


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model behind this gateway."""

    spec: ModelSpec
    text: ModelText
    shared_prefixes: SharedPrefixes = field(default_factory=SharedPrefixes)


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """A call that can be submitted as it is."""

    call: GenerateCall
    request_id: str
    model_version: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    prompt_digest: bytes
    template_time_ms: int
    end_token_ids: frozenset[int]
    """Ids that end a choice: the caller's, and the model's own unless they are ignored."""
    account: Account
    num_shared_prefix_tokens: int = 0
    """The prompt's first tokens that the operator declared shared."""

    def given(self, choice_index: int) -> GivenChoice:
        """Return what the caller already has of a choice."""
        choices = self.call.resumption.choices if self.call.resumption is not None else ()
        found = (choice for choice in choices if choice.index == choice_index)
        return next(found, GivenChoice(choice_index))


async def prepare(
    call: GenerateCall, model: ServedModel, request_id: str, account: Account
) -> PreparedCall:
    """Encode the prompt and fit the call to the model; raises what the caller may see."""
    resumption = call.resumption
    template_time_ms = resumption.template_time_ms if resumption is not None else unix_time_ms()
    _refuse_hopeless(call.prompt, model)
    token_ids = await encode(call.prompt, model.text, template_time_ms)
    max_tokens = _fit(call, len(token_ids), model.spec.max_context_tokens)
    digest = prompt_digest(token_ids)
    if resumption is not None and resumption.prompt_digest != digest:
        raise ContinuationMismatch(
            "prompt_digest", resumption.prompt_digest.hex() or "empty", digest.hex()
        )
    own_ends = () if call.ignore_eos else model.spec.eos_token_ids
    return PreparedCall(
        call=call,
        request_id=request_id,
        model_version=model.spec.version_digest,
        prompt_token_ids=token_ids,
        max_tokens=max_tokens,
        prompt_digest=digest,
        template_time_ms=template_time_ms,
        end_token_ids=frozenset((*call.stop_token_ids, *own_ends)),
        account=account,
        num_shared_prefix_tokens=model.shared_prefixes.num_shared_tokens(token_ids),
    )


def unix_time_ms() -> int:
    """Return the time that templates print."""
    return time.time_ns() // 1_000_000


async def encode(
    prompt: PromptInput, model_text: ModelText, template_time_ms: int
) -> tuple[int, ...]:
    """Return the prompt's token ids, at least one."""
    if isinstance(prompt, TokenInput):
        return prompt.token_ids
    if _num_characters(prompt) <= MAX_INLINE_CHARACTERS:
        return _encode(prompt, model_text, template_time_ms)
    return await asyncio.to_thread(_encode, prompt, model_text, template_time_ms)


def _encode(
    prompt: TextInput | ChatInput, model_text: ModelText, template_time_ms: int
) -> tuple[int, ...]:
    if isinstance(prompt, TextInput):
        return tuple(model_text.encode_prompt(prompt.text))
    turns = [ChatTurn(role, content) for role, content in prompt.messages]
    return tuple(model_text.encode_chat(turns, template_time_ms))


def _num_characters(prompt: TextInput | ChatInput) -> int:
    if isinstance(prompt, TextInput):
        return len(prompt.text)
    return sum(len(role) + len(content) for role, content in prompt.messages)


def _refuse_hopeless(prompt: PromptInput, model: ServedModel) -> None:
    """Raise InvalidRequest for a huge text that cannot fit, without encoding it."""
    if isinstance(prompt, TokenInput) or _num_characters(prompt) <= MAX_ENCODED_BYTES // 4:
        return
    texts = [prompt.text] if isinstance(prompt, TextInput) else [it[1] for it in prompt.messages]
    num_bytes = sum(len(text.encode(errors="replace")) for text in texts)
    least_tokens = num_bytes // max(map(len, model.text.pieces.pieces))
    max_context_tokens = model.spec.max_context_tokens
    if num_bytes > MAX_ENCODED_BYTES and least_tokens > _HOPELESS_FACTOR * max_context_tokens:
        raise _too_long(prompt, f"at least {least_tokens}", max_context_tokens)


def _too_long(prompt: PromptInput, num_tokens: str, max_context_tokens: int) -> InvalidRequest:
    return InvalidRequest.of(
        _FIELDS[type(prompt)],
        f"{num_tokens} tokens",
        f"at most {max_context_tokens - 1} tokens (the context holds {max_context_tokens}, "
        f"one of them for the answer)",
    )


def _fit(call: GenerateCall, num_prompt_tokens: int, max_context_tokens: int) -> int:
    """Return the effective max_tokens; raise InvalidRequest for lengths that do not fit."""
    room = max_context_tokens - num_prompt_tokens
    if room < 1:
        raise _too_long(call.prompt, str(num_prompt_tokens), max_context_tokens)
    max_tokens = room if call.max_tokens is None else call.max_tokens
    if max_tokens > room:
        raise InvalidRequest.of(
            "stopping.max_tokens",
            max_tokens,
            f"1 to {room} (a context of {max_context_tokens} tokens less a prompt of "
            f"{num_prompt_tokens})",
        )
    if call.sampling.min_tokens > max_tokens:
        raise InvalidRequest.of(
            "stopping.min_tokens", call.sampling.min_tokens, f"at most max_tokens, {max_tokens}"
        )
    for position, choice in enumerate(call.resumption.choices if call.resumption else ()):
        if len(choice.token_ids) > max_tokens:
            raise InvalidRequest.of(
                f"continuation.choices[{position}].token_ids",
                f"{len(choice.token_ids)} tokens",
                f"at most max_tokens, {max_tokens}",
            )
    return max_tokens
