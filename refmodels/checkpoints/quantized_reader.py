"""The parameters of quantized layers from the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from refmodels.checkpoints.quantized_layouts import Storage
from refmodels.checkpoints.shards import StoredTensor, WeightFiles
from refmodels.checkpoints.weights import Part, WeightMap
from refmodels.dtypes import torch_name
from refmodels.errors import LogitLockError
from refmodels.quantization.arithmetic import QuantizedWeight
from refmodels.quantization.formats import LinearFormat
from refmodels.spec import ModelSpec

_BIAS = "bias"


class QuantizedReader:
    """Reads the quantized tensors that a checkpoint holds instead of float weights.

    Args:
        spec: with its `quantization`.
        table: the checkpoint tensors of each parameter, if nothing were quantized.
        storage: how the checkpoint stores quantized modules.
    """

    def __init__(self, spec: ModelSpec, table: WeightMap, storage: Storage) -> None:
        self.spec, self.table, self.storage = spec, table, storage
        quantization = spec.quantization
        assert quantization is not None
        self.formats: dict[str, LinearFormat] = {}
        """Quantized modules of the checkpoint."""
        for module in quantization.modules:
            linear = spec.format_of(module)
            assert linear is not None
            self.formats |= {upstream: linear for upstream in self._upstream(module)}
        self.cache_names: dict[str, str] = {}
        if quantization.cache is not None:
            for layer in range(spec.layers):
                beside = self._upstream(f"blocks.{layer}.attn.qkv")[0].rpartition(".")[0]
                for ours, theirs in storage.cache_scales.items():
                    self.cache_names[f"blocks.{layer}.attn.{ours}"] = f"{beside}.{theirs}"

    def owns(self, name: str) -> bool:
        """Whether a checkpoint's tensor belongs to a quantized module or is a scale of the cache.

        This includes a bias that the model does not have: AutoGPTQ writes such biases, all zeros.
        """
        module, _, suffix = name.rpartition(".")
        if module in self.formats and (suffix in self.storage.suffixes or suffix == _BIAS):
            return True
        return name in self.cache_names.values()

    def replaces(self, name: str) -> bool:
        """Whether a float tensor of the unquantized checkpoint is missing in this one."""
        return name.removesuffix(".weight") in self.formats

    def missing(self, found: Mapping[str, object]) -> list[str]:
        """Names of required tensors that are missing."""
        wanted = list(self.cache_names.values())
        for module, linear in self.formats.items():
            needed = self.storage.required(linear, lambda s, m=module: f"{m}.{s}" in found)  # type: ignore[misc]
            wanted += [f"{module}.{suffix}" for suffix in needed]
        return [name for name in wanted if name not in found]

    def provides(self, parameter: str) -> bool:
        """Whether this reader makes the decoder's parameter of that name."""
        owner, _, leaf = parameter.rpartition(".")
        return parameter in self.cache_names or (leaf != _BIAS and self.spec.format_of(owner) is not None)

    def read(
        self, files: WeightFiles, stored: Mapping[str, StoredTensor], parameter: str, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """The parameter; for the weight of a layer, also all other parameters of the layer except its bias.

        Raises:
            LogitLockError: the content is not allowed in the format, or `dtype` cannot hold a scale.
        """
        owner, _, leaf = parameter.rpartition(".")
        if parameter in self.cache_names:
            tensor = stored[self.cache_names[parameter]]
            kv_heads = self.spec.attention.kv_heads
            scale = files.read(tensor).reshape(-1)
            if scale.numel() not in (1, kv_heads):
                raise LogitLockError(
                    f"{tensor.name} in {tensor.file} has {scale.numel()} scales for {kv_heads} kv heads"
                )
            yield parameter, _positive(scale.expand(kv_heads), dtype, tensor.name)
        elif leaf == "weight":
            weight, constants = self._layer(files, stored, owner)
            yield parameter, weight.codes.contiguous()
            yield f"{owner}.scale", _positive(weight.scale, dtype, owner)
            if weight.zero is not None:
                yield f"{owner}.zero", weight.zero.contiguous()
            for kind, constant in constants.items():
                yield f"{owner}.{kind}", _positive(constant, dtype, owner)
            if weight.order is not None:
                yield f"{owner}.order", weight.order

    def _layer(
        self, files: WeightFiles, stored: Mapping[str, StoredTensor], owner: str
    ) -> tuple[QuantizedWeight, dict[str, Tensor]]:
        found = [self._rows(files, stored, part) for part in self.table[f"{owner}.weight"]]
        weights = [weight for weight, _ in found]
        first, constants = found[0]
        for weight, others in found[1:]:
            pairs = [(kind, constant, others[kind]) for kind, constant in constants.items()]
            if first.order is not None and weight.order is not None:
                pairs.append(("order of columns", first.order, weight.order))
            for what, one, other in pairs:
                if not torch.equal(one, other):
                    raise LogitLockError(
                        f"the parts of {owner} differ in their {what} in this checkpoint, but they are one layer here"
                    )
        if len(weights) > 1:
            zeros = [w.zero for w in weights if w.zero is not None]
            first = QuantizedWeight(
                codes=torch.cat([w.codes for w in weights]),
                scale=torch.cat([w.scale for w in weights]),
                zero=torch.cat(zeros) if zeros else None,
                order=first.order,
            )
        return first, constants

    def _rows(
        self, files: WeightFiles, stored: Mapping[str, StoredTensor], part: Part
    ) -> tuple[QuantizedWeight, dict[str, Tensor]]:
        """The rows that one checkpoint module contributes."""
        module = part.name.removesuffix(".weight")
        tensors = {s: files.read(stored[f"{module}.{s}"]) for s in self.storage.suffixes if f"{module}.{s}" in stored}
        bias = stored.get(f"{module}.{_BIAS}")
        known = {p.name for parts in self.table.values() for p in parts}
        if bias is not None and f"{module}.{_BIAS}" not in known and bool((files.read(bias) != 0).any()):
            raise LogitLockError(f"{bias.name} in {bias.file} is not zero, but {self.spec.variant} has no such bias")
        shape = (part.shape[1], part.shape[0]) if part.transposed else (part.shape[0], part.shape[1])
        weight, constants = self.storage.decode(tensors, self.formats[module], shape, module)
        rows = part.of_rows
        return (
            QuantizedWeight(
                codes=rows(weight.codes),
                scale=rows(weight.scale),
                zero=None if weight.zero is None else rows(weight.zero),
                order=weight.order,
            ),
            constants,
        )

    def _upstream(self, module: str) -> list[str]:
        return [part.name.removesuffix(".weight") for part in self.table[f"{module}.weight"]]


def _positive(scale: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Scales in the working dtype, as a new tensor."""
    cast = scale.to(dtype).contiguous().clone()
    if not bool((cast.isfinite() & ((cast != 0) | (scale == 0))).all()):
        raise LogitLockError(f"a scale of {where} does not fit in {torch_name(dtype)}")
    return cast
