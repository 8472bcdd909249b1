"""bitsandbytes' layers on a GPU: as near the exact model as on a CPU."""

import pytest
import torch

from rillgate_server.worker.worker import Worker, WorkerOptions
from tests.gpu.conftest import Note
from tests.support.equality import mixed_prompts
from tests.support.worker_fixtures import BLOCK_SIZE, NUM_BLOCKS, MakeCheckpoint, MakeReference
from tests.worker.test_equality import run_alone

NUM_PROMPTS = 4


@pytest.mark.parametrize("method", ["bnb-int8", "bnb-nf4"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "deepseek_v3"])
def test_a_model_is_as_near_the_exact_one_as_on_a_cpu(
    kind: str,
    method: str,
    cuda: torch.device,
    checkpoint: MakeCheckpoint,
    reference: MakeReference,
    note: Note,
) -> None:
    """By the first log-probabilities' error, relative to how far they lie apart."""
    pytest.importorskip("bitsandbytes")
    _, expected = reference(kind)
    errors = []
    for device in (torch.device("cpu"), cuda):
        options = WorkerOptions(
            "float32", block_size_tokens=BLOCK_SIZE, quantization=method, device=device
        )
        worker = Worker.load(checkpoint(kind), options)
        found = []
        for prompt, answer in list(zip(mixed_prompts(), expected, strict=True))[:NUM_PROMPTS]:
            worker.allocate_cache(NUM_BLOCKS)
            got = dict(run_alone(worker, prompt).logprobs[0].top)
            exact = answer.logits[0].log_softmax(dim=-1)
            error = torch.tensor([got[i] for i in range(len(exact))]) - exact
            found.append(float(error.std() / exact.std()))
        worker.close()
        errors.append(sum(found) / NUM_PROMPTS)
    on_cpu, on_gpu = errors
    note(f"relative error {on_gpu:.3f}, on a CPU {on_cpu:.3f}")
    assert 0.0 < on_gpu < 1.25 * on_cpu
