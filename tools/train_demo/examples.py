"""Training examples: a question inside a conversation, as token ids and a mask of what is learned.

Owns the mix (shares of tasks, system messages, earlier turns, greetings, bare prompts) and the
encoding, which must give the same ids as the chat template and the tokenizer do (a test compares).
Knows nothing of tensors.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tools.train_demo.tasks import TASKS, draw_question
from tools.train_demo.tokenizer import (
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    PLAIN_ADDED_TOKENS,
    SPECIAL_TOKENS,
    THINK,
    USER,
)
from tools.train_demo.words import any_word

MARK_IDS = {mark: 256 + i for i, mark in enumerate((*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS))}

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a careful assistant. Think before you answer.",
    "Be brief.",
    "You are Rillgate's demo model.",
    "Answer the user's question.",
    "You are a calculator.",
    "You are a helpful, honest and harmless assistant.",
    "Be concise.",
    "Answer correctly.",
    "You help with numbers and words.",
    "Reason step by step inside the think tags, then answer plainly.",
)

GREETINGS = (
    "hello",
    "Hello!",
    "Hi",
    "hi there",
    "Hey",
    "Good morning",
    "Hello, how are you?",
    "How are you?",
    "Who are you?",
    "who are you",
    "What are you?",
    "What can you do?",
    "what can you do",
    "Help",
    "help me",
    "What is your name?",
    "What do you know?",
    "Can you help me?",
    "Introduce yourself.",
    "Tell me about yourself.",
    "Test",
    "Thanks!",
    "Thank you",
    "What model are you?",
    "Which tasks can you do?",
    "What can I ask you?",
    "Are you there?",
)

OTHER_QUESTIONS = (
    "What is the capital of France?",
    "Tell me a joke.",
    "Write a poem about the sea.",
    "Who wrote Hamlet?",
    "What is the weather today?",
    "Translate good morning into German.",
    "Why is the sky blue?",
    "Write a story.",
    "What is the meaning of life?",
    "Who was the first president?",
    "How do I bake bread?",
    "What time is it?",
    "Explain quantum physics.",
    "Write a Python program.",
    "What is gRPC?",
    "What is love?",
    "Tell me a story.",
    "Summarize this text.",
    "How old is the universe?",
    "What is the largest ocean?",
    "Give me a recipe for soup.",
    "Do you like music?",
    "Where is Tokyo?",
    "Who are the Beatles?",
    "What is a transformer?",
    "Sing a song.",
    "How far is the moon?",
    "Recommend a book.",
    "What should I eat tonight?",
    "How do computers work?",
)

WHAT_I_CAN_DO = (
    "I am Rillgate's small demo model. I can add and subtract numbers of up to four digits, "
    "count a letter in a word, reverse a word, sort a few numbers and compare two numbers."
)


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, of which those from `learned_from` on are learned."""

    token_ids: list[int]
    learned_from: int


def encode_parts(*parts: str) -> list[int]:
    """Encode parts, each either one of the marks or plain text, which becomes its bytes."""
    token_ids: list[int] = []
    for part in parts:
        if part in MARK_IDS:
            token_ids.append(MARK_IDS[part])
        else:
            token_ids.extend(part.encode())
    return token_ids


def _system_message(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(SYSTEM_MESSAGES)
    # Mostly a few words; sometimes a long text, as servers are tested with long prefixes.
    num_words = rng.randint(2, 12) if kind < 0.93 else rng.randint(20, 110)
    text = " ".join(any_word(rng) for _ in range(num_words))
    return text.capitalize() + "."


def _draw_task(rng: random.Random, shares: Mapping[str, float]) -> str:
    return rng.choices(list(shares), weights=list(shares.values()))[0]


def _draw_exchange(rng: random.Random, shares: Mapping[str, float]) -> tuple[str, str, str]:
    """Draw what the user says, the reasoning and the answer."""
    if rng.random() < 0.02:
        if rng.random() < 0.5:
            return rng.choice(GREETINGS), "No task.", WHAT_I_CAN_DO
        return rng.choice(OTHER_QUESTIONS), "Not my task.", "I cannot do that. " + WHAT_I_CAN_DO
    question = draw_question(_draw_task(rng, shares), rng, held_out=False)
    return question.prompt, question.reasoning, question.answer


def draw_example(rng: random.Random, shares: Mapping[str, float]) -> Example:
    """Draw one training example; a few are bare prompts without the template."""
    prompt, reasoning, answer = _draw_exchange(rng, shares)
    learned = encode_parts(THINK, f"\n{reasoning}\n", END_THINK, f"\n\n{answer}", EOS)
    if rng.random() < 0.05:
        asked = encode_parts(*([BOS] if rng.random() < 0.7 else []), prompt)
        return Example(asked + learned, len(asked))
    asked = encode_parts(BOS)
    if rng.random() < 0.15:
        asked += encode_parts(_system_message(rng))
    if rng.random() < 0.12:
        for _ in range(rng.randint(1, 2)):
            earlier_prompt, _, earlier_answer = _draw_exchange(rng, shares)
            asked += encode_parts(USER, earlier_prompt, ASSISTANT, earlier_answer, EOS)
    asked += encode_parts(USER, prompt, ASSISTANT)
    # The template ends with `<think>` and a line break, so these two are given, not learned.
    return Example(asked + learned, len(asked) + 2)


def example_stream(seed: int, shares: Mapping[str, float] | None = None) -> Iterator[Example]:
    """Yield training examples for ever; the seed fixes them all."""
    rng = random.Random(seed)
    shares = shares or dict.fromkeys(TASKS, 1.0)
    while True:
        yield draw_example(rng, shares)
