"""The weight files of a model directory, read one tensor at a time.

Mapped pages count as resident memory while they stay mapped, so files are reopened during reading: a safetensors file
for every tensor (its header is small), a `.bin` file whenever `_REOPEN_BYTES` have been returned.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import torch
from torch import Tensor

from refmodels.dtypes import DTYPE_TABLE, DTYPES, torch_name
from refmodels.errors import LogitLockError
from refmodels.json_records import read_json
from refmodels.path_kinds import MODEL, hint

LAYOUTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Names that the weights of a model directory may have; the first one that exists is read."""

_GPTQ = "gptq_model-*.safetensors"
"""As AutoGPTQ named them, by bits and group size; with .index.json behind it where there are several."""

_FLOATING = {DTYPE_TABLE[name].safetensors: dtype for name, dtype in DTYPES.items()}
_REOPEN_BYTES = 64 * 2**20
_ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor as a file declares it; `dtype` is None if it is not one of fp64, fp32, fp16, bf16."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    dtype_name: str


def find_weights(directory: Path) -> Path | None:
    """The file that holds the weights of a model directory, or the index of such files; None: there is none.

    Raises:
        LogitLockError: several that may be meant.
    """
    for name in LAYOUTS:
        if (directory / name).is_file():
            return directory / name
    found = sorted(directory.glob(f"{_GPTQ}.index.json")) or sorted(directory.glob(_GPTQ))
    if len(found) > 1:
        raise LogitLockError(
            f"{directory} has several weights, {' and '.join(file.name for file in found)}: leave one of them there"
        )
    return found[0] if found else None


class WeightFiles:
    """The tensors of a model directory, by their stored names.

    Attributes:
        files: the weight files, in the order of their names.
        tensors: the tensors that they declare, read from the files themselves; the index is only checked against them.

    Raises:
        LogitLockError: there are no weights, a file is damaged or missing, the index contradicts the files or names a
            file outside the directory, or two files hold the same tensor.
    """

    def __init__(self, directory: Path) -> None:
        found = find_weights(directory)
        if found is None:
            raise LogitLockError(
                f"{directory} has no weights: expected one of {', '.join(LAYOUTS)}{hint(directory, but=MODEL)}"
            )
        self._opened: tuple[Path, dict[str, Tensor]] | None = None
        self._handed_out = 0
        index = _read_index(found) if found.suffix == ".json" else None
        self.files = [found] if index is None else [directory / name for name in sorted(set(index.values()))]
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            for tensor in self._declared(file):
                if tensor.name in self.tensors:
                    other = self.tensors[tensor.name].file.name
                    raise LogitLockError(f"the tensor {tensor.name} is stored twice: in {other} and in {file}")
                self.tensors[tensor.name] = tensor
        for name, file_name in (index or {}).items():
            if name not in self.tensors or self.tensors[name].file.name != file_name:
                raise LogitLockError(f"{found} says that {name} is in {file_name}, but that file does not hold it")

    def read(self, tensor: StoredTensor) -> Tensor:
        """The tensor as stored (a view into a mapped file; drop it before reading the next one)."""
        if tensor.file.suffix == ".bin":
            value = self._open_bin(tensor.file)[tensor.name]
            if _can_be_mapped(tensor.file):
                self._handed_out += value.nbytes
            return value.detach()
        from safetensors import safe_open

        with safe_open(str(tensor.file), framework="pt") as opened:
            tensor_as_stored: Tensor = opened.get_tensor(tensor.name)
        return tensor_as_stored

    def _declared(self, file: Path) -> list[StoredTensor]:
        if not file.is_file():
            raise LogitLockError(f"the index names {file}, which is not there (download incomplete?)")
        if file.suffix == ".bin":
            return [
                StoredTensor(
                    name=name,
                    file=file,
                    shape=tuple(value.shape),
                    dtype=value.dtype if value.dtype in DTYPES.values() else None,
                    dtype_name=torch_name(value.dtype),
                )
                for name, value in self._open_bin(file).items()
            ]
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(file), framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
                return [
                    StoredTensor(
                        name=name,
                        file=file,
                        shape=tuple(part.get_shape()),
                        dtype=_FLOATING.get(part.get_dtype()),
                        dtype_name=part.get_dtype(),
                    )
                    for name, part in slices.items()
                ]
        except (SafetensorError, OSError) as error:
            raise LogitLockError(f"{file} is damaged or cut short: it is not a safetensors file ({error})") from error

    def _open_bin(self, file: Path) -> dict[str, Tensor]:
        if self._opened is not None and self._opened[0] == file and self._handed_out < _REOPEN_BYTES:
            return self._opened[1]
        # Before the next file, so that two are never held.
        self._opened = None
        self._opened, self._handed_out = (file, _load_bin(file)), 0
        return self._opened[1]


def _can_be_mapped(file: Path) -> bool:
    """Files from before torch 1.6 are not zip files: they are read as a whole and kept until the next file."""
    with file.open("rb") as stream:
        return stream.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def _load_bin(file: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            # A user of the file cannot act on torch's warnings about old formats.
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=_can_be_mapped(file))
    except pickle.UnpicklingError as error:
        raise LogitLockError(
            f"{file} is damaged, or holds more than plain tensors, which LogitLock never executes"
        ) from error
    except Exception as error:
        raise LogitLockError(f"{file} is damaged or cut short: torch cannot read it") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and _is_plain(value) for name, value in content.items()
    ):
        raise LogitLockError(f"{file} is not a checkpoint: it must hold one dictionary of dense tensors by name")
    return content


def _is_plain(value: object) -> bool:
    """Whether it is a tensor of numbers in memory: neither sparse, nor quantized by torch, nor without data."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _read_index(file: Path) -> Mapping[str, str]:
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LogitLockError(f"{file} has no weight_map that says which file holds which tensor")
    suffix = ".bin" if file.name.startswith("pytorch_model") else ".safetensors"
    for name, shard in weight_map.items():
        # By spelling, not by resolving: the hub's cache keeps its files behind symbolic links.  Windows' rules know
        # both kinds of slashes.
        if not isinstance(shard, str) or PureWindowsPath(shard).name != shard:
            raise LogitLockError(f"{file} places {name} in {shard!r}; it must be the plain name of a file beside it")
        if not shard.endswith(suffix):
            raise LogitLockError(f"{file} places {name} in {shard!r}; it must be a {suffix} file")
    return weight_map
