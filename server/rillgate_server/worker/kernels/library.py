"""The C++ kernels, by name and over tensors.

Owns finding them and the checks that their pointers need. Does not know layers. What each computes
is written down beside it in torch, in worker/quantization and in the tests.
"""

import ctypes
import logging
import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from rillgate_server.errors import ConfigError
from rillgate_server.worker.kernels.build import LEVELS, library_of, source_digest

_log = logging.getLogger(__name__)

LEVEL_VARIABLE = "RILLGATE_KERNELS"
"""Names the level of kernels, or switches them off; for tests and comparisons."""

Size = tuple[int, int]
_INT, _POINTER, _THREADS = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "rg_pack_int8": (_POINTER, _INT, _INT, _POINTER),
    "rg_pack_bf16": (_POINTER, _INT, _INT, _POINTER),
    "rg_attend": (*(_POINTER,) * 6, _THREADS),
    "rg_linear_f32": (_POINTER, _POINTER, _INT, _POINTER, _THREADS),
    "rg_linear_bf16": (_POINTER, _POINTER, _INT, _POINTER, _THREADS),
    **dict.fromkeys(
        ("rg_into_attention_f32", "rg_into_attention_bf16"),
        (_POINTER, _POINTER, _POINTER, _INT, *(_POINTER,) * 5, _THREADS),
    ),
    **dict.fromkeys(
        ("rg_add_attention_f32", "rg_add_attention_bf16", "rg_add_mlp"),
        (*(_POINTER,) * 4, _INT, _THREADS),
    ),
}


class Linear(ctypes.Structure):
    """RgLinear of kernels/packed_gemm.h. Holds addresses: its maker keeps the tensors."""

    _fields_ = (
        *((name, _POINTER) for name in ("weight", "scales", "bias")),
        *((name, _INT) for name in ("n", "k")),
    )

    @classmethod
    def of(cls, packed: Tensor, scales: Tensor | None, bias: Tensor | None, size: Size) -> "Linear":
        """Describe a packed weight of `size`, (out_features, in_features).

        scales: [out_features], float32, of INT8; None: bf16. bias: the same, or None.
        """
        addresses = (None if it is None else it.data_ptr() for it in (packed, scales, bias))
        return cls(*addresses, *size)


class Layer(ctypes.Structure):
    """RgLayer: a layer's norms and products."""

    _fields_ = (
        ("attention_norm", _POINTER),
        ("qkv", Linear),
        ("query_norm", _POINTER),
        ("key_norm", _POINTER),
        ("output", Linear),
        ("mlp_norm", _POINTER),
        ("gate_up", Linear),
        ("down", Linear),
    )


class Shape(ctypes.Structure):
    """RgShape: what all layers share."""

    _fields_ = (
        *((name, _INT) for name in ("hidden", "heads", "kv_heads", "head_dim", "intermediate")),
        ("epsilon", ctypes.c_float),
    )


class Heads(ctypes.Structure):
    """RgHeads of kernels/attention_tiles.h."""

    _fields_ = (
        *((name, _INT) for name in ("heads", "kv_heads", "key_dim", "value_dim")),
        ("scale", ctypes.c_float),
    )


class Vectors(ctypes.Structure):
    """RgVectors: one layer's keys or values, and their scales in INT8; strides in elements."""

    _fields_ = (
        *((name, _POINTER) for name in ("elements", "scales")),
        *((name, _INT) for name in ("stride", "scale_stride", "dim")),
    )


class Cache(ctypes.Structure):
    """RgCache: one layer's."""

    _fields_ = (
        *((name, Vectors) for name in ("keys", "values")),
        *((name, _INT) for name in ("block_size", "kv_heads")),
    )


class NewTokens(ctypes.Structure):
    """RgNewTokens of kernels/attention.cpp: what a step stores, and the addresses of where."""

    _fields_ = (
        *((name, _POINTER) for name in ("keys", "values", "blocks", "offsets")),
        ("num_tokens", _INT),
    )


class Rows(ctypes.Structure):
    """RgRows: addresses of int64 per row, and of each row's block table."""

    _fields_ = (
        *((name, _POINTER) for name in ("offsets", "starts", "counts", "tables")),
        *((name, _INT) for name in ("num_rows", "window")),
    )


TakeMemory = Callable[[int], Tensor]
"""Makes a tensor of so many bytes, uint8."""


def take_plain(num_bytes: int) -> Tensor:
    """Take memory as torch does."""
    return torch.empty(num_bytes, dtype=torch.uint8)


@cache
def load_kernels(level: str = "") -> "Kernels | None":
    """Return those of a level, or of the highest that the processor has.

    RILLGATE_KERNELS in the environment names the level, too; `off` means none. None where they were
    not built or the processor lacks what they need. Raises ConfigError for an unknown level.
    """
    asked = level or os.environ.get(LEVEL_VARIABLE, "")
    if asked == "off":
        _log.info("%s is off; computing with torch's own kernels", LEVEL_VARIABLE)
        return None
    if asked and asked not in LEVELS:
        raise ConfigError(f"{LEVEL_VARIABLE} is {asked!r}; allowed: {', '.join(LEVELS)}, off")
    for name in (asked,) if asked else LEVELS:
        library = _open_library(name)
        if library is not None:
            _log.info("computing with the C++ kernels for %s", name)
            return Kernels(library)
    _log.info("no C++ kernels here (`make setup` builds them); computing with torch's own")
    return None


def _open_library(level: str) -> ctypes.CDLL | None:
    """Open a level's library; None where there is none that fits sources and processor."""
    path = library_of(level)
    if not path.exists():
        return None
    library = ctypes.CDLL(str(path))
    library.rg_digest.restype = ctypes.c_char_p
    if library.rg_digest().decode() != source_digest():
        _log.warning("%s is of other sources (`make setup` builds it); not used", path.name)
        return None
    if not library.rg_is_supported():
        _log.info("this processor lacks what %s needs: %s", path.name, ", ".join(LEVELS[level]))
        return None
    return library


class Kernels:
    """The functions of one level. Tensors are on the CPU; results are new. State: none."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Use `load_kernels`."""
        self._library = library
        library.rg_packed_elements.restype = _INT
        library.rg_packed_elements.argtypes = (_INT, _INT, _INT)
        for name, arguments in _SIGNATURES.items():
            if hasattr(library, name):
                function = getattr(library, name)
                function.restype, function.argtypes = None, arguments
        self.has_attention = hasattr(library, "rg_attend")
        """Whether attention is there at this level, too."""

    def pack_int8(self, weight: Tensor, take: TakeMemory = take_plain) -> Tensor:
        """Pack [out_features, in_features], int8. Returns [some], uint8."""
        num_bytes = self._library.rg_packed_elements(*weight.shape, 4)
        return self._pack("rg_pack_int8", weight, take(num_bytes))

    def pack_bf16(self, weight: Tensor, take: TakeMemory = take_plain) -> Tensor:
        """Pack [out_features, in_features], bfloat16. Returns [some], bfloat16."""
        num_elements = self._library.rg_packed_elements(*weight.shape, 2)
        packed = take(2 * num_elements).view(torch.bfloat16)
        return self._pack("rg_pack_bf16", weight, packed)

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """Return x W^T + b, each row computed as if it were alone.

        x: [num_rows, in_features]; float32, or bfloat16, which it must be for a weight in bf16. In
        INT8 bit for bit what quantization.int8 defines, in bf16 summed in float32. Returns
        [num_rows, out_features] in x's type.
        """
        x = x.contiguous()
        y = x.new_empty(len(x), layer.n)
        is_bf16 = x.dtype == torch.bfloat16
        function = self._library.rg_linear_bf16 if is_bf16 else self._library.rg_linear_f32
        threads = torch.get_num_threads()
        function(ctypes.byref(layer), x.data_ptr(), len(x), y.data_ptr(), threads)
        return y

    def into_attention(
        self,
        shape: object,
        layer: object,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        into: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Fill `into`, queries, keys and values [heads, num_rows, head_dim], from x.

        shape, layer: ctypes.byref of Shape and Layer; x: [num_rows, hidden_size], float32; angles:
        cosines and sines [num_rows, head_dim], float32.
        """
        is_bf16 = into[0].dtype == torch.bfloat16
        name = "rg_into_attention_bf16" if is_bf16 else "rg_into_attention_f32"
        addresses = [tensor.data_ptr() for tensor in (*angles, *into)]
        getattr(self._library, name)(
            shape, layer, x.data_ptr(), len(x), *addresses, torch.get_num_threads()
        )

    def add_attention(self, shape: object, layer: object, attended: Tensor, sums: Tensor) -> None:
        """Add a layer's output product to sums, [num_rows, hidden_size], float32.

        attended: [num_rows, heads, head_dim].
        """
        is_bf16 = attended.dtype == torch.bfloat16
        name = "rg_add_attention_bf16" if is_bf16 else "rg_add_attention_f32"
        getattr(self._library, name)(
            shape, layer, attended.data_ptr(), sums.data_ptr(), len(sums), torch.get_num_threads()
        )

    def add_mlp(self, shape: object, layer: object, x: Tensor, sums: Tensor) -> None:
        """Add what a layer makes of x behind its attention to sums, which may be x itself.

        x, sums: [num_rows, hidden_size], float32.
        """
        self._library.rg_add_mlp(
            shape, layer, x.data_ptr(), sums.data_ptr(), len(x), torch.get_num_threads()
        )

    def attend(
        self, heads: Heads, cache: Cache, new: NewTokens, rows: Rows, query: Tensor
    ) -> Tensor:
        """Store a step's new tokens, then attend. Returns [num_tokens, heads, value_dim], bf16.

        query: [heads, num_tokens, key_dim], bf16.
        """
        query = query.contiguous()
        output = query.new_empty(query.shape[1], heads.heads, heads.value_dim)
        structs = (ctypes.byref(it) for it in (heads, cache, new, rows))
        self._library.rg_attend(
            *structs, query.data_ptr(), output.data_ptr(), torch.get_num_threads()
        )
        return output

    def unpack_int8(self, packed: Tensor, out_features: int, in_features: int) -> Tensor:
        """Return what was packed. [out_features, in_features], int8."""
        groups = -(-in_features // 4)
        panels = packed.view(-1, groups, 64, 4).transpose(1, 2).reshape(-1, groups * 4)
        return (panels[:out_features, :in_features] ^ 0x80).contiguous().view(torch.int8)

    def unpack_int8_rows(self, packed: Tensor, rows: Tensor, in_features: int) -> Tensor:
        """Return some rows of what was packed, whose numbers are `rows`. [len(rows), in_features],
        int8."""
        panels = packed.view(-1, -(-in_features // 4), 64, 4)
        found = panels[rows // 64, :, rows % 64].flatten(1)[:, :in_features]
        return (found ^ 0x80).contiguous().view(torch.int8)

    def _pack(self, function: str, weight: Tensor, packed: Tensor) -> Tensor:
        weight = weight.contiguous()
        getattr(self._library, function)(weight.data_ptr(), *weight.shape, packed.data_ptr())
        return packed
