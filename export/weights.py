"""Weights on their way from a checkpoint into the external data file of an ONNX model, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import onnx
import torch
from torch import Tensor

from refmodels.checkpoint import parameter_shapes
from refmodels.spec import ModelSpec

DATA_NAME = "model.onnx.data"
_ELEMENT_TYPES: Mapping[torch.dtype, int] = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
}
# Offsets on page boundaries let a runtime map tensors instead of copying them (ONNX specification, external data).
_ALIGNMENT = 4096
_BLOCK_BYTES = 32 << 20
_RANDOM_SCALE = 0.02
RANDOM_HASH = "random weights, seed 0"
"""Stands for the hash of a checkpoint in bundles of `random_parameters`."""


class WeightWriter:
    """Appends tensors to an external data file.

    Args:
        stream: the file, empty; its name inside the bundle is `DATA_NAME`.
        progress: called with the number of bytes after each block written.
    """

    def __init__(self, stream: BinaryIO, *, progress: Callable[[int], None] | None = None) -> None:
        self._stream = stream
        self._progress = progress

    def add(self, name: str, tensor: Tensor, *, transposed: bool = False) -> onnx.TensorProto:
        """Write a CPU tensor (fp32, fp16 or bf16) and return the initializer that refers to it.

        `transposed` stores a matrix with its axes swapped; that costs memory for one block only.
        """
        self._stream.write(b"\0" * (-self._stream.tell() % _ALIGNMENT))
        offset = self._stream.tell()
        for block in _blocks(tensor, transposed=transposed):
            self._stream.write(block.view(torch.uint8).numpy().data)
            if self._progress is not None:
                self._progress(block.nbytes)
        proto = onnx.TensorProto(
            name=name,
            data_type=_ELEMENT_TYPES[tensor.dtype],
            dims=reversed(tensor.shape) if transposed else tensor.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        where = {"location": DATA_NAME, "offset": offset, "length": self._stream.tell() - offset}
        for key, value in where.items():
            proto.external_data.add(key=key, value=str(value))
        return proto


def random_parameters(spec: ModelSpec, *, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the decoder in its order, as `refmodels.checkpoint.stream_parameters`, but random.

    Always the same: normal with standard deviation 0.02, around 1 for the weights of norms and else around 0, so that
    activations keep the size that a trained model's have.
    """
    generator = torch.Generator().manual_seed(0)
    for name, shape in parameter_shapes(spec).items():
        mean = 1.0 if len(shape) == 1 and name.endswith(".weight") else 0.0
        yield name, torch.empty(shape, dtype=dtype).normal_(mean, _RANDOM_SCALE, generator=generator)


def mapped_weights(model: onnx.ModelProto, directory: Path) -> dict[str, Tensor]:
    """The initializers of a graph in `directory`, by name, as `WeightWriter` stored them: mapped, not read."""
    path = directory / DATA_NAME
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    dtypes = {element: dtype for dtype, element in _ELEMENT_TYPES.items()}
    tensors = {}
    for proto in model.graph.initializer:
        where = {entry.key: entry.value for entry in proto.external_data}
        raw = data.narrow(0, int(where["offset"]), int(where["length"]))
        tensors[proto.name] = raw.view(dtypes[proto.data_type]).view(*proto.dims)
    return tensors


def _blocks(tensor: Tensor, *, transposed: bool) -> Iterator[Tensor]:
    """Contiguous pieces of a tensor, or of its transpose, in the order of storage."""
    axis = 1 if transposed else 0
    length = tensor.shape[axis]
    step = max(1, _BLOCK_BYTES * length // max(1, tensor.nbytes))
    for start in range(0, length, step):
        block = tensor.narrow(axis, start, min(step, length - start)).contiguous()
        # torch transposes a contiguous matrix several times faster than a slice of one.
        yield block.t().contiguous() if transposed else block
