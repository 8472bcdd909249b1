"""Which layers a method of quantisation makes on a device, and what it needs to be there.

Triton comes with builds of torch for GPUs, bitsandbytes is an extra: either is imported when a
setting asks for it. Does not know which layers of a model are quantised, nor files.
"""

import logging
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import ModuleType

import torch

from rillgate_server.core.model_spec import NO_QUANTIZATION
from rillgate_server.core.quantization import BNB_INT8, BNB_NF4, Quantization
from rillgate_server.errors import ConfigError
from rillgate_server.worker.compute_device import CPU
from rillgate_server.worker.kernels.library import Kernels
from rillgate_server.worker.model_loader import WeightStore
from rillgate_server.worker.quantization.int8 import Int8Linear


def with_layers(
    store: WeightStore, quantization: Quantization, kernels: Kernels | None
) -> WeightStore:
    """Return a store that makes the layers of a method.

    `kernels`: for INT8 on a CPU. Raises ConfigError where the method cannot be had.
    """
    if quantization.method == NO_QUANTIZATION:
        return store
    store = replace(store, quantization=quantization)
    if quantization.method in (BNB_INT8, BNB_NF4):
        return _with_bitsandbytes(store, quantization)
    if store.device != CPU:
        needs = "Triton, which torch for GPUs brings"
        layer = _import("int8_triton", "int8", store.device, needs).TritonInt8Linear
        return replace(
            store, quantize=lambda weight, channels: layer(weight, None, channels), restore=layer
        )
    return replace(
        store,
        quantize=lambda weight, channels: Int8Linear(weight, kernels, None, channels),
        restore=lambda weight, scales: Int8Linear(weight, kernels, scales),
    )


def _with_bitsandbytes(store: WeightStore, quantization: Quantization) -> WeightStore:
    """Return a store that makes bitsandbytes' layers."""
    device = store.device
    # It says at each import that a faster product for CPUs could be fetched from the network.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    needs = "bitsandbytes (`pip install 'rillgate[bitsandbytes]'`)"
    module = _import("bitsandbytes_layers", quantization.method, device, needs)
    if not module.supports(device):
        raise ConfigError(
            f"model.quantization is {quantization.method} on {device}, which the installed "
            "bitsandbytes does not support; allowed: none, int8"
        )
    if quantization.is_stored:
        stored = _import("stored_bitsandbytes", quantization.method, device, needs).StoredWeights
        store = replace(store, open_stored=partial(stored, quantization.method))
    if quantization.method == BNB_NF4:
        return replace(store, quantize=lambda weight, _: module.BnbNf4Linear(weight))
    threshold = quantization.bnb_int8_threshold
    return replace(
        store,
        quantize=lambda weight, channels: module.BnbInt8Linear(weight, threshold, channels),
    )


def _import(name: str, method: str, device: torch.device, needs: str) -> ModuleType:
    """Import one of this folder's modules; raises ConfigError without what it needs."""
    try:
        return import_module(f"rillgate_server.worker.quantization.{name}")
    except ImportError as error:
        raise ConfigError(
            f"model.quantization is {method} on {device}, which needs {needs}: {error}; allowed "
            "without: another model.quantization"
        ) from error
