"""A step for which there is too little memory, computed in halves.

Owns the cutting in two, again and again, until it fits. What a step's first tokens store in the
cache the later ones read, so the halves together give what the whole would have given.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from rillgate_server.worker.gpu.step_arrays import StepArrays
from rillgate_server.worker.network.base import Network

_log = logging.getLogger(__name__)


def hidden_in_parts(
    network: Network, compute: Callable[[StepArrays], Tensor], arrays: StepArrays
) -> Tensor:
    """Return what `compute` gives for a step: [num_tokens, hidden_size].

    Raises OutOfMemoryError when there is too little for one token; and at once on a rank of a split
    model, whose collectives the others would wait in.
    """
    try:
        return compute(arrays)
    except torch.OutOfMemoryError:
        if arrays.size == 1 or network.is_split:
            raise
    # Past the handler: what the failed attempt held is free by now.
    _log.warning("out of memory in a step of %d tokens: computing it in halves", arrays.size)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # Cloned: a captured step's output lies where the next one's will.
    halves = [hidden_in_parts(network, compute, half).clone() for half in arrays.halves()]
    return torch.cat(halves)
