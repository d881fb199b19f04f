"""Quantized tensors of the wrong rank, length or kind, and indices out of range, are refused in every layout."""

from __future__ import annotations

import pytest
import torch

from refmodels.checkpoints.quantized_layouts import CheckpointFormat, Storage
from refmodels.errors import LogitLockError
from refmodels.quantization.arithmetic import QuantizedWeight
from refmodels.quantization.formats import LinearFormat

ROWS, COLUMNS = 16, 64
FORMATS: dict[CheckpointFormat, LinearFormat] = {
    "compressed-tensors": LinearFormat(weight="int4", group=16, symmetric=False),
    "gptq": LinearFormat(weight="int4", group=16, symmetric=False),
    "awq": LinearFormat(weight="int4", group=16, symmetric=False),
    "modelopt": LinearFormat(weight="int4", group=16, pre_quant_scale=True),
}


def stored(layout: CheckpointFormat) -> dict[str, torch.Tensor]:
    linear = FORMATS[layout]
    generator = torch.Generator().manual_seed(0)
    groups = linear.groups(COLUMNS)
    weight = QuantizedWeight(
        codes=torch.randint(-8, 8, (ROWS, COLUMNS), generator=generator, dtype=torch.int8),
        scale=torch.rand(ROWS, groups, generator=generator) + 0.1,
        zero=None if linear.symmetric else torch.zeros(ROWS, groups, dtype=torch.int8),
        order=None,
    )
    constants = {"pre_quant_scale": torch.ones(COLUMNS)} if linear.pre_quant_scale else None
    return Storage(layout=layout).encode(weight, linear, constants)


def decode(layout: CheckpointFormat, tensors: dict[str, torch.Tensor]) -> None:
    Storage(layout=layout).decode(tensors, FORMATS[layout], (ROWS, COLUMNS), "module")


@pytest.mark.parametrize("layout", FORMATS)
def test_ranks_lengths_and_kinds(layout: CheckpointFormat) -> None:
    sound = stored(layout)
    decode(layout, sound)
    for name, tensor in sound.items():
        other = tensor.to(torch.int32) if tensor.is_floating_point() else tensor.double()
        for changed in (tensor[None], tensor[..., None, None], tensor.flatten()[:0], tensor.flatten()[0], other):
            with pytest.raises(LogitLockError, match="module"):
                decode(layout, {**sound, name: changed})


@pytest.mark.parametrize("value", [2**31 - 1, -7, COLUMNS // 16])
def test_group_indices_are_in_range_before_they_are_counted(value: int) -> None:
    tensors = stored("gptq")
    tensors["g_idx"][3] = value
    with pytest.raises(LogitLockError, match="group index of module must be from 0 to 3"):
        decode("gptq", tensors)
