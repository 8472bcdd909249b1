"""Packed linear layers against torch's own."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from rillgate_server.worker.packed_linear import PackedLinear, pack_linear_layers


@pytest.mark.parametrize("num_rows", [1, 3, 16, 40, 257])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_gives_the_product(num_rows: int, bias: bool) -> None:
    """Against the product in float64, to the precision of one rounding to bf16."""
    torch.manual_seed(num_rows)
    linear = nn.Linear(96, 200, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(1, num_rows, 96, dtype=torch.bfloat16)
    exact = x.double() @ linear.weight.double().T
    if linear.bias is not None:
        exact += linear.bias.double()
    with torch.inference_mode():
        result = PackedLinear(linear)(x)
    assert result.shape == (1, num_rows, 200)
    assert torch.allclose(result.double(), exact, rtol=2**-7, atol=1e-3)


def test_packing_replaces_bf16_layers_alone() -> None:
    """fp32 layers stay as they are: the equality tests compare them bit for bit."""
    inner = nn.Sequential(nn.Linear(8, 4, dtype=torch.bfloat16), nn.Linear(4, 4))
    network = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), inner)
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert pack_linear_layers(network) == (2 if supported else 0)
    assert isinstance(inner[1], nn.Linear)
    assert isinstance(network[0], PackedLinear) == supported


@pytest.mark.parametrize("max_second_copy_bytes", [40 * 8 * 2, 40 * 8 * 2 - 1])
def test_a_tied_head_is_packed_while_its_second_copy_is_small(max_second_copy_bytes: int) -> None:
    """A large one stays plain; the embedding keeps its weight either way."""
    network = nn.ModuleDict(
        {
            "embedding": nn.Embedding(40, 8, dtype=torch.bfloat16),
            "layer": nn.Linear(8, 8, dtype=torch.bfloat16),
            "head": nn.Linear(8, 40, bias=False, dtype=torch.bfloat16),
        }
    )
    head, embedding = network["head"], network["embedding"]
    head.weight = embedding.weight
    is_small = max_second_copy_bytes == 640
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    num_packed = pack_linear_layers(network, max_second_copy_bytes=max_second_copy_bytes)
    assert num_packed == (1 + is_small if supported else 0)
    assert isinstance(network["head"], PackedLinear) == (is_small and supported)
    assert network["embedding"].weight.shape == (40, 8)
    assert (network["head"] is head) == (not (is_small and supported))


PEAK_PROGRAM = """
from pathlib import Path
import torch
from torch import nn
from rillgate_server.worker.packed_linear import pack_linear_layers

def megabytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(field))

with torch.inference_mode():
    pack_linear_layers(nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16)))  # loads libraries
    layers = [nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16) for _ in range(12)]
    network = nn.Sequential(*layers)
    del layers
    before = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    pack_linear_layers(network)
    print(megabytes("VmHWM") - before)
"""


def test_packing_holds_no_more_than_one_layer_twice() -> None:
    """Twelve layers of 32 MB: the peak while packing lies far below a second network."""
    ran = subprocess.run([sys.executable, "-c", PEAK_PROGRAM], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 3 * 32
