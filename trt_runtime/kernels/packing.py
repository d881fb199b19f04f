"""Packing of quantized weights (codes) and scales in the order in which `quantized_linear` reads them, and back."""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from refmodels.quantization.formats import CODE_TYPES, Code

ROWS = WORDS = 16
_PARTS: dict[Code, int] = {"int4": 4, "int8": 2, "fp8": 2}
_MIDDLE: dict[Code, int] = {"int4": 8, "int8": 128, "fp8": 0}
assert _PARTS.keys() == set(get_args(Code))


def pack(codes: Tensor, code: Code) -> Tensor:
    """int32 [row tiles, column units, 128] of codes [out, in]; rows and columns are padded to whole tiles."""
    parts, rows = _PARTS[code], len(codes)
    u = codes.view(torch.uint8) if code == "fp8" else codes
    # A few rows at a time, because the words are computed in 32 bits.
    return torch.cat([_pack_rows(u[i : i + 4096], parts, _MIDDLE[code]) for i in range(0, rows, 4096)])


def _pack_rows(u: Tensor, parts: int, middle: int) -> Tensor:
    u = u.to(torch.int32) + middle
    u = F.pad(u, (0, -u.shape[1] % (WORDS * parts), 0, -u.shape[0] % ROWS))
    # Columns of a unit: four runs, of which each thread has one; the parts of a word are four columns apart.
    u = u.unflatten(1, (-1, 4, parts, 4))
    shifts = torch.arange(parts, device=u.device, dtype=torch.int32) * (16 // parts)
    words = (u << shifts[:, None]).sum(3, dtype=torch.int32)
    words = torch.where(words >= 2**15, words - 2**16, words).to(torch.int16)
    # [tile, row // 8, row % 8, unit, run, word // 2, word % 2], as a matrix instruction distributes them.
    words = words.unflatten(0, (-1, 2, 8)).unflatten(-1, (2, 2))
    packed: Tensor = words.permute(0, 3, 2, 4, 5, 1, 6).flatten(2).contiguous().view(torch.int32)
    return packed


def unpack(packed: Tensor, code: Code, *, rows: int, columns: int) -> Tensor:
    """The inverse of `pack`: codes [rows, columns] in `CODE_TYPES[code]`."""
    parts = _PARTS[code]
    bits = 16 // parts
    words = packed.view(torch.int16).unflatten(2, (8, 4, 2, 2, 2)).permute(0, 5, 2, 1, 3, 4, 6)
    # int16 from here on: a shift brings in the sign, the mask takes it away.
    u = torch.stack([(words >> (bits * part)) & (2**bits - 1) for part in range(parts)], 5)
    codes = (u - _MIDDLE[code]).flatten(3).flatten(0, 2)[:rows, :columns]
    if code == "fp8":
        codes = codes.to(torch.uint8).view(torch.float8_e4m3fn)
    unpacked: Tensor = codes.to(CODE_TYPES[code]).contiguous()
    return unpacked


def by_tile(values: Tensor) -> Tensor:
    """[row tiles, groups, 16] of values [out, groups], rows padded with zeros; r and r + 8 of a tile are neighbours."""
    padded = F.pad(values, (0, 0, 0, -values.shape[0] % ROWS))
    tiled: Tensor = padded.unflatten(0, (-1, 2, 8)).permute(0, 3, 2, 1).flatten(2).contiguous()
    return tiled


def offsets(zero: Tensor, code: Code, dtype: torch.dtype) -> Tensor:
    """The kernels' converted value of a code `zero` [out, groups], by tile: exact in `dtype`."""
    start = 1024 if dtype == torch.float16 else 128 if code == "int4" else 0
    return by_tile(zero.to(torch.float32) + (start + _MIDDLE[code])).to(dtype)
