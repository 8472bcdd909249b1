"""OpenVINO GenAI's continuous batching, on the checkpoint that optimum-intel converted.

Runs in the peer's environment (benchmarks/peers/openvino.txt): `MODEL_DIR int8|bf16`.
"""

import itertools
import sys
import time

import numpy as np
import openvino
import openvino_genai

from benchmarks.contestants.decode_rate import steady_decode_rate
from benchmarks.contestants.protocol import Message, serve

_CACHE_GB = 1
_MAX_STEP_TOKENS = 4096
"""All prompts of 32 streams in one step: faster here than the default of 256, end to end and in
decode."""


class OpenVinoContestant:
    """A pipeline, loaded once. Keys and values in 8 bits, as is OpenVINO's default on CPUs."""

    def __init__(self, model_dir: str, precision: str) -> None:
        """Compile for two threads; `bf16` computes in it."""
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = _CACHE_GB
        scheduler.max_num_batched_tokens = _MAX_STEP_TOKENS
        scheduler.enable_prefix_caching = False
        properties: dict[str, str | int] = {"INFERENCE_NUM_THREADS": 2}
        if precision == "bf16":
            properties["INFERENCE_PRECISION_HINT"] = "bf16"
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            model_dir, scheduler, "CPU", properties
        )
        self._request_ids = itertools.count()

    def answer(self, request: Message) -> Message:
        """Run all prompts at once."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = request["num_output_tokens"]
        config.ignore_eos, config.do_sample = True, False
        prompts = [openvino.Tensor(np.array([it], dtype=np.int64)) for it in request["prompts"]]
        arrivals: list[list[float]] = [[] for _ in prompts]
        begin = time.perf_counter()
        handles = [
            self._pipeline.add_request(next(self._request_ids), prompt, config)
            for prompt in prompts
        ]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter()
            for handle, times in zip(handles, arrivals, strict=True):
                if handle.can_read():
                    for output in handle.read().values():
                        times += [now] * len(output.generated_ids)
        return {
            "seconds": time.perf_counter() - begin,
            "num_output_tokens": sum(map(len, arrivals)),
            "decode_tokens_per_s": steady_decode_rate(arrivals),
        }


if __name__ == "__main__":
    serve(OpenVinoContestant(sys.argv[1], sys.argv[2]).answer)
