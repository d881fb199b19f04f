"""Weights on their way from a checkpoint into the external data file of an ONNX model, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import onnx
import torch
from torch import Tensor

from refmodels.checkpoints.load import empty_parameters
from refmodels.dtypes import BY_ONNX, BY_TORCH, DTYPE_TABLE
from refmodels.quantization.arithmetic import code_range, pack_int4
from refmodels.quantization.formats import LinearFormat
from refmodels.spec import ModelSpec

DATA_NAME = "model.onnx.data"

ByteLayout = Literal["plain", "transposed", "row", "int4"]
"""How a tensor is stored: as it is; a matrix with its axes swapped; a matrix of one column as a vector; 4-bit values
held in int8, packed in pairs, the first in the low half of the byte, as INT4."""
# Offsets on page boundaries let a runtime map tensors instead of copying them (ONNX specification, external data).
_ALIGNMENT = 4096
_BLOCK_BYTES = 32 << 20
_RANDOM_SCALE = 0.02
_RANDOM_STEP = 1 / 16
RANDOM_HASH = "random weights, seed 0"
"""Takes the place of the checkpoint's hash in bundles of `random_parameters`."""


class WeightWriter:
    """Appends tensors to an external data file.

    Args:
        stream: the file, empty; its name inside the bundle is `DATA_NAME`.
        progress: called with the number of bytes after each block written.
    """

    def __init__(self, stream: BinaryIO, *, progress: Callable[[int], None] | None = None) -> None:
        self._stream = stream
        self._progress = progress

    def add(self, name: str, tensor: Tensor, *, layout: ByteLayout = "plain") -> onnx.TensorProto:
        """Write a CPU tensor (floats, fp8, int8 or int64) and return the initializer that refers to it.

        A layout other than plain costs memory for one block only.
        """
        self._stream.write(b"\0" * (-self._stream.tell() % _ALIGNMENT))
        offset = self._stream.tell()
        for block in _blocks(tensor, transposed=layout == "transposed"):
            stored = _packed(block) if layout == "int4" else block
            self._stream.write(stored.reshape(-1).view(torch.uint8).numpy().data)
            if self._progress is not None:
                self._progress(block.nbytes)
        dims = {"transposed": tensor.shape[::-1], "row": tensor.shape[:1]}.get(layout, tensor.shape)
        proto = onnx.TensorProto(
            name=name,
            data_type=(DTYPE_TABLE["int4"] if layout == "int4" else BY_TORCH[tensor.dtype]).onnx,
            dims=dims,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        where = {"location": DATA_NAME, "offset": offset, "length": self._stream.tell() - offset}
        for key, value in where.items():
            proto.external_data.add(key=key, value=str(value))
        return proto


def random_parameters(spec: ModelSpec, *, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the decoder in its order, as `refmodels.checkpoints.load.stream_parameters`, but random.

    The values are always the same: normal with standard deviation 0.02, around 1 for norm weights and else 0, so that
    activations keep the size that a trained model's have.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in empty_parameters(spec).items():
        module, _, kind = name.rpartition(".")
        linear = spec.format_of(module)
        if linear is not None and kind != "bias":
            yield name, _random_part(kind, parameter, linear, dtype, generator)
        elif kind in ("key_scale", "value_scale"):
            yield name, torch.full(parameter.shape, _RANDOM_STEP, dtype=dtype)
        else:
            mean = 1.0 if parameter.ndim == 1 and kind == "weight" else 0.0
            yield name, torch.empty(parameter.shape, dtype=dtype).normal_(mean, _RANDOM_SCALE, generator=generator)


def _random_part(
    kind: str, parameter: Tensor, linear: LinearFormat, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """A parameter of a quantized layer whose weight has the same standard deviation and uses all quantized values."""
    shape, (low, high) = parameter.shape, code_range(linear.weight)
    if kind == "weight" and linear.weight == "fp8":
        return torch.empty(shape).normal_(0.0, high / 4, generator=generator).clamp(low, high).to(parameter.dtype)
    if kind in ("weight", "zero"):
        return torch.randint(int(low), int(high) + 1, shape, dtype=parameter.dtype, generator=generator)
    if kind == "order":
        return torch.randperm(shape[0], generator=generator)
    if kind == "pre_quant_scale":
        return torch.empty(shape).uniform_(0.5, 2.0, generator=generator).to(dtype)
    step = _RANDOM_STEP if kind == "input_scale" else 2 * _RANDOM_SCALE / high
    return torch.full(shape, step, dtype=dtype)


def mapped_weights(model: onnx.ModelProto, directory: Path) -> dict[str, Tensor]:
    """The initializers of a graph in `directory`, by name, as `WeightWriter` stored them: mapped, not read."""
    path = directory / DATA_NAME
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    tensors = {}
    for proto in model.graph.initializer:
        where = {entry.key: entry.value for entry in proto.external_data}
        raw = data.narrow(0, int(where["offset"]), int(where["length"]))
        tensors[proto.name] = raw.view(BY_ONNX[proto.data_type].torch).view(*proto.dims)
    return tensors


def _packed(block: Tensor) -> Tensor:
    """int4 values packed in pairs; if their number is odd, the last has a byte of its own."""
    codes = block.reshape(-1)
    return pack_int4(torch.nn.functional.pad(codes, (0, codes.numel() % 2)))


def _blocks(tensor: Tensor, *, transposed: bool) -> Iterator[Tensor]:
    """Contiguous pieces of a tensor, or of its transpose, in the order of storage."""
    if tensor.ndim == 0:
        yield tensor
        return
    axis = 1 if transposed else 0
    length = tensor.shape[axis]
    # An even number of rows, so that no packed byte belongs to two blocks.
    step = max(2, _BLOCK_BYTES * length // max(1, tensor.nbytes) & ~1)
    for start in range(0, length, step):
        block = tensor.narrow(axis, start, min(step, length - start)).contiguous()
        # torch transposes a contiguous matrix several times faster than a slice of one.
        yield block.t().contiguous() if transposed else block
