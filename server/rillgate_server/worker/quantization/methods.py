"""Which layers a method of quantisation makes on a device, and what it needs to be there.

Triton comes with builds of torch for GPUs, bitsandbytes is an extra: either is imported when a
setting asks for it. Does not know which layers of a model are quantised, nor files.
"""

import logging
from importlib import import_module
from types import ModuleType

import torch

from rillgate_server.core.quantization import BNB_INT8, BNB_NF4, Quantization
from rillgate_server.errors import ConfigError
from rillgate_server.worker.compute_device import CPU
from rillgate_server.worker.kernels.library import Kernels
from rillgate_server.worker.model_loader import QuantizeLinear, RestoreLinear
from rillgate_server.worker.quantization.int8 import Int8Linear


def layer_makers(
    quantization: Quantization, device: torch.device, kernels: Kernels | None
) -> tuple[QuantizeLinear, RestoreLinear | None]:
    """Return what makes layers from exact weights, and from those that files hold quantised.

    `kernels`: for INT8 on a CPU. Raises ConfigError where the method cannot be had.
    """
    if quantization.method in (BNB_INT8, BNB_NF4):
        return _bitsandbytes_maker(quantization, device), None
    if device != CPU:
        module = _import("int8_triton", "int8", device, "Triton, which torch for GPUs brings")
        return module.TritonInt8Linear, module.TritonInt8Linear
    return (
        lambda weight: Int8Linear(weight, kernels),
        lambda weight, scales: Int8Linear(weight, kernels, scales),
    )


def _bitsandbytes_maker(quantization: Quantization, device: torch.device) -> QuantizeLinear:
    """Return what makes bitsandbytes' layers."""
    # It says at each import that a faster product for CPUs could be fetched from the network.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    needs = "bitsandbytes (`pip install 'rillgate[bitsandbytes]'`)"
    module = _import("bitsandbytes_layers", quantization.method, device, needs)
    if not module.supports(device):
        raise ConfigError(
            f"model.quantization is {quantization.method} on {device}, which the installed "
            "bitsandbytes does not support; allowed: none, int8"
        )
    if quantization.method == BNB_NF4:
        nf4: QuantizeLinear = module.BnbNf4Linear
        return nf4
    return lambda weight: module.BnbInt8Linear(weight, quantization.bnb_int8_threshold)


def _import(name: str, method: str, device: torch.device, needs: str) -> ModuleType:
    """Import one of this folder's modules; raises ConfigError without what it needs."""
    try:
        return import_module(f"rillgate_server.worker.quantization.{name}")
    except ImportError as error:
        raise ConfigError(
            f"model.quantization is {method} on {device}, which needs {needs}: {error}; allowed "
            "without: another model.quantization"
        ) from error
