"""llama.cpp as its batched bench runs it: one batch of parallel sequences, each step one decode.

Runs in the peer's environment (benchmarks/peers/llamacpp.txt): `GGUF_FILE`. Tokens are the largest
logits, picked with numpy.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.contestants.decode_rate import steady_decode_rate
from benchmarks.contestants.protocol import Message, serve

_NUM_THREADS = 2
_STEP_TOKENS = 2048
"""llama.cpp's default for a batch."""

Row = tuple[int, int, int, bool]  # token, position, sequence, whether its logits are wanted


class LlamaCppContestant:
    """A model, loaded once; each request gets a context of its size before the clock runs."""

    def __init__(self, path: str) -> None:
        """Load a GGUF file."""
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise RuntimeError(f"{path} was not loaded")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)

    def answer(self, request: Message) -> Message:
        """Run all prompts at once."""
        prompts, num_tokens = request["prompts"], request["num_output_tokens"]
        context = self._context(len(prompts), len(prompts[0]) + num_tokens)
        batch = llama_cpp.llama_batch_init(_STEP_TOKENS, 0, 1)
        try:
            return self._run(context, batch, prompts, num_tokens)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)

    def _context(self, num_sequences: int, sequence_len: int) -> Any:  # Any: an address
        parameters = llama_cpp.llama_context_default_params()
        per_sequence = -(-sequence_len // 256) * 256  # as llama.cpp pads it
        parameters.n_ctx = num_sequences * per_sequence
        parameters.n_seq_max = num_sequences
        parameters.n_batch = _STEP_TOKENS
        parameters.n_threads = parameters.n_threads_batch = _NUM_THREADS
        context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not context:
            raise RuntimeError(f"no context for {num_sequences} sequences")
        return context

    def _run(
        self,
        context: Any,  # Any: an address
        batch: Any,  # Any: a ctypes structure
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
    ) -> Message:
        arrivals: list[list[float]] = [[] for _ in prompts]
        prompt_len = len(prompts[0])
        per_step = _STEP_TOKENS // prompt_len
        begin = time.perf_counter()
        tokens: list[int] = []
        for first in range(0, len(prompts), per_step):
            rows = [
                (token, position, first + i, position == prompt_len - 1)
                for i, prompt in enumerate(prompts[first : first + per_step])
                for position, token in enumerate(prompt)
            ]
            tokens += self._decode(context, batch, rows)
            for times in arrivals[first : first + per_step]:
                times.append(time.perf_counter())
        for position in range(prompt_len, prompt_len + num_tokens - 1):
            rows = [(token, position, sequence, True) for sequence, token in enumerate(tokens)]
            tokens = self._decode(context, batch, rows)
            now = time.perf_counter()
            for times in arrivals:
                times.append(now)
        return {
            "seconds": time.perf_counter() - begin,
            "num_output_tokens": sum(map(len, arrivals)),
            "decode_tokens_per_s": steady_decode_rate(arrivals),
        }

    def _decode(self, context: Any, batch: Any, rows: Sequence[Row]) -> list[int]:  # Any: see _run
        """Run one step and return the most likely token of each row that asks for it."""
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, is_last) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = is_last
        code = llama_cpp.llama_decode(context, batch)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")
        size = (self._vocab_size,)
        return [
            int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), size).argmax())
            for i, row in enumerate(rows)
            if row[3]
        ]


if __name__ == "__main__":
    serve(LlamaCppContestant(sys.argv[1]).answer)
