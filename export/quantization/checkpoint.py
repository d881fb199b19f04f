"""Writing a quantized model as a checkpoint in Hugging Face layout, layer by layer."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor

from refmodels.checkpoints.load import COMPANION_FILES, ModelSource, match_names, upstream_modules
from refmodels.checkpoints.quantized_config import modelopt_file, write_config
from refmodels.checkpoints.quantized_files import MODELOPT_NAME
from refmodels.checkpoints.quantized_layouts import Storage
from refmodels.checkpoints.quantized_reader import QuantizedReader
from refmodels.checkpoints.shards import WeightFiles
from refmodels.checkpoints.weights import Part, to_checkpoint
from refmodels.errors import LogitLockError
from refmodels.files import copy_files
from refmodels.quantization.arithmetic import QuantizedWeight
from refmodels.quantization.formats import QuantizationSpec

PROVENANCE_NAME = "quantization.json"
FOLDED_NAME = "quantization.folded.npz"
_SHARD_BYTES = 256 << 20
_SINGLE = "model.safetensors"


class CheckpointWriter:
    """Collects layers under their upstream names and writes them as they fill a shard.

    Args:
        source: the model that is being quantized, in floats.
        directory: an empty directory.
        quantization: the format of every layer.
        storage: how quantized weights are stored.
    """

    def __init__(self, source: ModelSource, directory: Path, quantization: QuantizationSpec, storage: Storage) -> None:
        self.source, self.directory, self.quantization, self.storage = source, directory, quantization, storage
        self.table = source.family.weights(source.spec)
        spec = replace(source.spec, quantization=quantization)
        self.reader = QuantizedReader(spec, self.table, storage)
        self.files = WeightFiles(source.directory)
        self.stored = match_names(self.files.tensors, self.table, source)
        self._check_shared()
        # Before any work: the layout may be unable to describe the quantization.
        self.config = write_config(quantization, upstream_modules(source.spec, source.family), storage)
        self._shard: dict[str, Tensor] = {}
        self._shards: list[dict[str, Path]] = []
        self._written: set[str] = set()
        self._bytes = 0

    def add(
        self,
        weights: Mapping[str, QuantizedWeight],
        input_scales: Mapping[str, Tensor],
        floats: Mapping[str, Tensor],
        cache_scales: Mapping[str, Tensor],
    ) -> None:
        """Add some layers; those that share a checkpoint module must come together.

        Args:
            weights, input_scales: by the layer's name in `Decoder`.
            floats: parameters that differ from the source's, by name.
            cache_scales: [kv_heads], by the parameter's name.
        """
        modules: dict[str, dict[str, Tensor]] = {}
        for kind in ("codes", "scale", "zero"):
            by_module = {name: getattr(weight, kind) for name, weight in weights.items()}
            for module, tensor in self._upstream({n: t for n, t in by_module.items() if t is not None}).items():
                modules.setdefault(module, {})[kind] = tensor
        owners = {part.name.removesuffix(".weight"): name for name in weights for part in self.table[f"{name}.weight"]}
        for module, tensors in modules.items():
            name = owners[module]
            whole = QuantizedWeight(
                codes=tensors["codes"], scale=tensors["scale"], zero=tensors.get("zero"), order=weights[name].order
            )
            constants = {"input_scale": input_scales[name]} if name in input_scales else {}
            encoded = self.storage.encode(whole, self.reader.formats[module], constants)
            for suffix, tensor in encoded.items():
                self._put(f"{module}.{suffix}", tensor)
        for parameter, scale in cache_scales.items():
            self._put(self.reader.cache_names[parameter], self.storage.encode_cache(scale))
        changed = {parameter: self.table[parameter] for parameter in floats}
        for name, tensor in to_checkpoint(changed, floats).items():
            self._put(name, tensor)

    def finish(self, provenance: Mapping[str, Any]) -> None:
        """Write the unchanged parameters, the index, config.json, the provenance, and copies of other files."""
        for name, tensor in self.stored.items():
            if name not in self._written and not self.reader.replaces(name):
                self._put(name, self.files.read(tensor).clone())
        self._flush()
        self._index()
        config = {**self.source.config, "quantization_config": self.config}
        _write_json(self.directory / "config.json", config)
        if self.storage.layout == "modelopt":
            producer = {"name": "logitlock", "version": importlib.metadata.version("logitlock")}
            content = {"producer": producer, "quantization": modelopt_file(self.config)}
            _write_json(self.directory / MODELOPT_NAME, content)
        _write_json(self.directory / PROVENANCE_NAME, dict(provenance))
        copy_files(self.source.directory, self.directory, COMPANION_FILES)

    def _check_shared(self) -> None:
        """Layers that share a module of the checkpoint must have one format."""
        sharing: dict[str, list[str]] = {}
        for name, upstream in upstream_modules(self.source.spec, self.source.family).items():
            for module in upstream:
                sharing.setdefault(module, []).append(name)
        for module, names in sharing.items():
            if len({self.quantization.format_of(name) for name in names}) > 1:
                raise LogitLockError(
                    f"{' and '.join(names)} are one module in checkpoints of {self.source.spec.variant} ({module}), so "
                    "they need one format"
                )

    def _upstream(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors [out, ...] of our layers as those of the checkpoint's modules: split, or put together."""
        # Of a module that two of our layers share, the rows of both are there.
        table = {
            f"{name}.weight": tuple(_rows_of(part, tensor) for part in self.table[f"{name}.weight"])
            for name, tensor in tensors.items()
        }
        parts = to_checkpoint(table, {f"{name}.weight": tensor for name, tensor in tensors.items()})
        return {name.removesuffix(".weight"): tensor for name, tensor in parts.items()}

    def _put(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous()
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not bool(tensor.isfinite().all()):
            raise LogitLockError(f"the tensor {name} holds NaN or infinity; a checkpoint with it would be of no use")
        if self._bytes + tensor.nbytes > _SHARD_BYTES and self._shard:
            self._flush()
        self._shard[name] = tensor
        self._written.add(name)
        self._bytes += tensor.nbytes

    def _flush(self) -> None:
        if self._shard:
            path = self.directory / f"shard-{len(self._shards):05}.safetensors"
            try:
                save_file(self._shard, path, metadata={"format": "pt"})
            except OSError as error:
                raise LogitLockError(f"{path} cannot be written: {error.strerror or error}") from None
            self._shards.append(dict.fromkeys(self._shard, path))
            self._shard, self._bytes = {}, 0

    def _name(self, shard: Mapping[str, Path], name: str) -> None:
        path = self.directory / name
        next(iter(shard.values())).rename(path)
        # safetensors makes files that only their owner can read.
        path.chmod(0o644)

    def _index(self) -> None:
        """Give the shards the names that loaders look for."""
        if len(self._shards) == 1:
            self._name(self._shards[0], _SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, 1):
            name = f"model-{number:05}-of-{len(self._shards):05}.safetensors"
            self._name(shard, name)
            weight_map |= dict.fromkeys(shard, name)
        _write_json(self.directory / f"{_SINGLE}.index.json", {"metadata": {}, "weight_map": weight_map})


def _rows_of(part: Part, tensor: Tensor) -> Part:
    """The part of a tensor with the rows of a weight and other columns."""
    rows = part.shape[1] if part.transposed else part.shape[0]
    return replace(part, shape=(rows, *tensor.shape[1:]), transposed=False)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_folded(directory: Path, folded: Mapping[str, Tensor]) -> None:
    """Keep the scales that were folded, [width] by site ('blocks.0.attn.qkv'); no file where there are none.

    Not as safetensors: loaders take every such file for weights.
    """
    if folded:
        numpy.savez(directory / FOLDED_NAME, **{site: scale.cpu().numpy() for site, scale in folded.items()})  # type: ignore[arg-type]


def read_folded(directory: Path) -> dict[str, Tensor]:
    """The scales that `write_folded` kept."""
    path = directory / FOLDED_NAME
    if not path.is_file():
        return {}
    with numpy.load(path, allow_pickle=False) as stored:
        return {site: torch.from_numpy(stored[site]) for site in stored.files}


def read_provenance(directory: Path) -> dict[str, Any] | None:
    """The record of how `logitlock quantize` made the checkpoint; None: another program made it."""
    path = directory / PROVENANCE_NAME
    if not path.is_file():
        return None
    from refmodels.json_records import read_json

    return read_json(path)
