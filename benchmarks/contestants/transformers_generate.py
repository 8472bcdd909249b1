"""transformers' own ways to generate: one after another, static batches, continuous batching."""

import sys
import time
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from benchmarks.contestants.protocol import Message, serve


class TransformersContestant:
    """A bf16 network on the CPU, loaded once."""

    def __init__(self, model_dir: str) -> None:
        """Load the checkpoint."""
        torch.set_num_threads(2)
        self._network = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)

    def answer(self, request: Message) -> Message:
        """Run `sequential`, `static` or `continuous`; count what came out."""
        run = {
            "sequential": self._sequential,
            "static": self._static,
            "continuous": self._continuous,
        }[request["mode"]]
        begin = time.perf_counter()
        num_output_tokens = run(request["prompts"], request["num_output_tokens"])
        return {"seconds": time.perf_counter() - begin, "num_output_tokens": num_output_tokens}

    def _sequential(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> int:
        return sum(self._static([prompt], num_tokens) for prompt in prompts)

    def _static(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> int:
        inputs = torch.tensor(prompts)
        output = self._network.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=1,
        )
        return int((output.shape[1] - inputs.shape[1]) * len(prompts))

    def _continuous(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> int:
        """Give the cache room for all requests, as its users would on a machine with memory."""
        pages = len(prompts) * (len(prompts[0]) + num_tokens) // 32 + 64
        results = self._network.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=GenerationConfig(
                max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=1
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=32, num_blocks=pages, max_batch_tokens=2048, allow_block_sharing=False
            ),
        )
        return sum(len(result.generated_tokens) for result in results.values())


if __name__ == "__main__":
    serve(TransformersContestant(sys.argv[1]).answer)
