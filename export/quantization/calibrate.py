"""Quantization of a model layer by layer: calibration data streams through one block at a time.

Memory holds the parameters of one block in fp32, the statistics of its observers, and the residual stream of all
calibration tokens (tokens x hidden size x 4 bytes).  Blocks after a quantized one see its float output or, with GPTQ
and as in its paper, the output of the quantized one.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.precision import SCHEMES
from export.progress import Progress, silent
from export.quantization.checkpoint import CheckpointWriter, write_folded
from export.quantization.data import CalibrationData, calibration_data
from export.quantization.fold import Site, input_tap
from export.quantization.method import (
    InputObserver,
    Method,
    MethodOptions,
    QuantizedLayers,
    observed_sites,
    quantize_layers,
)
from export.quantization.schemes import QuantizeOptions, plan_of, quantization_of
from refmodels.cache import KVCache, StepInputs
from refmodels.checkpoints.load import (
    ModelSource,
    checkpoint_hash,
    empty_decoder,
    put_parameter,
    stream_parameters,
)
from refmodels.checkpoints.quantized_layouts import CheckpointFormat, Storage
from refmodels.errors import LogitLockError
from refmodels.files import write_directory
from refmodels.options import check_choice
from refmodels.quantization.arithmetic import LEAST_SCALE
from refmodels.quantization.formats import LIMITS, LinearFormat, QuantizationSpec
from refmodels.recorder import Recorder, recording
from refmodels.spec import ModelSpec

SCHEMA = 1


def quantize_model(
    source: ModelSource,
    output: Path,
    options: QuantizeOptions,
    *,
    data: CalibrationData | None = None,
    layout: CheckpointFormat = "compressed-tensors",
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Write a quantized checkpoint, whole or not at all.

    Args:
        source: the model, not quantized.
        output: the directory to write, missing or empty.
        options: options of quantization.
        data: calibration data for methods and scales that need inputs; None: `calibration_data(source)`.
        layout: how quantized weights are stored.
        device: where blocks run and methods compute.
        progress: called with the task, how much of it is done, and its total.
    Returns: `output`.
    Raises:
        LogitLockError: the model is quantized already, the output is not empty, the layout is unknown or has no place
            for the formats, options do not fit the model, activations are not finite; and as `stream_parameters`.
    """
    spec = source.spec
    check_choice("layout", layout, CheckpointFormat)
    if spec.quantization is not None:
        raise LogitLockError(f"{source.name} is quantized already ({spec.quantization.describe()})")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise LogitLockError(f"the output {output} is not an empty directory; choose another path")
    quantization = quantization_of(spec, options)
    method = replace(options.method, method=_method(options, spec), per_tensor=layout == "modelopt")
    with write_directory(output, "checkpoint") as draft:
        writer = CheckpointWriter(source, draft, quantization, Storage(layout=layout))
        with torch.no_grad():
            run = _BlockQuantizer(source, quantization, method, device, progress or silent)
            reports = run.quantize(writer, data)
        writer.finish(
            {
                "schema": SCHEMA,
                "tool": f"logitlock {importlib.metadata.version('logitlock')}",
                "model": source.name.rpartition("/")[2],
                "checkpoint_hash": checkpoint_hash(source),
                "scheme": options.scheme,
                "method": dataclasses.asdict(method),
                "quantization": dataclasses.asdict(quantization),
                "calibration": run.data_used,
                "layers": reports,
            },
        )
        write_folded(draft, run.folded)
    return output


def _method(options: QuantizeOptions, spec: ModelSpec) -> Method:
    """The one method, besides rounding to nearest, of the scheme and of the schemes that a plan names."""
    names = {options.scheme, *plan_of(spec, options).values()}
    methods = {SCHEMES[name].method for name in names if name is not None} - {"rtn"}
    if len(methods) > 1:
        mixed = ", ".join(sorted(methods))
        raise LogitLockError(f"{options.plan} mixes {mixed}; besides rounding to nearest there can be one method")
    return methods.pop() if methods else "rtn"


@dataclass(frozen=True)
class _Batch:
    """Calibration rows, padded on the right; `hidden` is the residual stream, on the CPU."""

    step: StepInputs
    hidden: Tensor


class _BlockQuantizer:
    """Quantizes block after block, while the calibration rows stream through."""

    def __init__(
        self,
        source: ModelSource,
        quantization: QuantizationSpec,
        method: MethodOptions,
        device: torch.device | str,
        progress: Progress,
    ) -> None:
        self.source, self.spec, self.method, self.device = source, source.spec, method, device
        self.formats = {module: quantization.format_of(module) for module in self.spec.linears}
        self.cache = quantization.cache
        self.progress = progress
        self.decoder = empty_decoder(self.spec).eval()
        self.data_used: dict[str, Any] | None = None
        self.folded: dict[str, Tensor] = {}
        self._batches: list[_Batch] = []

    def quantize(self, writer: CheckpointWriter, data: CalibrationData | None) -> dict[str, Any]:
        """Every block, then the head; the errors of layers by name."""
        layers = range(self.spec.layers)
        head: dict[str, LinearFormat | None] = {"head": self.formats.get("head")}
        needed = self.cache is not None or any(
            observed_sites(self.spec, formats, self.method) for formats in (*map(self._block_formats, layers), head)
        )
        if needed:
            self._begin(data if data is not None else calibration_data(self.source))
        reports: dict[str, Any] = {}
        steps = self.spec.layers + (head["head"] is not None)
        for layer in layers:
            self._block(layer, writer, reports)
            _give_memory_back()
            self.progress("quantizing", layer + 1, steps)
        if head["head"] is not None:
            self._head(head, writer, reports)
            self.progress("quantizing", steps, steps)
        return reports

    def _begin(self, data: CalibrationData) -> None:
        """Embed the calibration rows."""
        self.data_used = {
            "origin": data.origin, "sha256": data.sha256, "rows": len(data.rows), "tokens": data.tokens,
        }  # fmt: skip
        batches = data.batches()
        with self._holding(("final_norm.",)):
            self.decoder.prepare_tables(max(ids.shape[1] for ids, _ in batches))
        one_layer = replace(self.spec, layers=1)
        with self._holding(("embed.", "position_embed.")):
            for ids, mask in batches:
                step = KVCache(one_layer, batch=len(ids), capacity=ids.shape[1]).next_step(ids, mask)
                hidden = self.decoder.embed(step.input_ids.to(self.device))
                if self.spec.position == "learned":
                    assert step.position_ids is not None
                    hidden = hidden + self.decoder.position_embed(step.position_ids.to(self.device))
                self._batches.append(_Batch(step, hidden.cpu()))

    def _block_formats(self, layer: int) -> dict[str, LinearFormat | None]:
        prefix = f"blocks.{layer}."
        return {m.removeprefix(prefix): f for m, f in self.formats.items() if m.startswith(prefix)}

    def _block(self, layer: int, writer: CheckpointWriter, reports: dict[str, Any]) -> None:
        prefix, formats = f"blocks.{layer}.", self._block_formats(layer)
        with self._holding((prefix,)) as parameters:
            floats = {name.removeprefix(prefix): value for name, value in parameters.items()}
            observers: dict[Site, InputObserver] = {
                site: InputObserver(f"{prefix}{site}", self.spec, site, formats, self.method)
                for site in observed_sites(self.spec, formats, self.method)
            }
            ranges = _CacheRanges()
            outputs = self._forward(layer, observers, ranges)
            result = _named(prefix, lambda: quantize_layers(self.spec, floats, observers, formats, self.method))
            if self.method.method == "gptq" and self._batches:
                self._put_back(prefix, result)
                outputs = self._forward(layer, {}, _CacheRanges())
            self._batches = [_Batch(b.step, y) for b, y in zip(self._batches, outputs, strict=True)]
            self._write(prefix, floats, result, writer, reports, self._cache_scales(prefix, ranges, result))

    def _head(
        self, formats: Mapping[str, LinearFormat | None], writer: CheckpointWriter, reports: dict[str, Any]
    ) -> None:
        with self._holding(("final_norm.", "head.")) as parameters:
            observers: dict[Site, InputObserver] = {
                site: InputObserver("head", self.spec, site, formats, self.method)
                for site in observed_sites(self.spec, formats, self.method)
            }
            for batch in self._batches if observers else ():
                normed = self.decoder.final_norm(batch.hidden.to(self.device))
                for observer in observers.values():
                    observer.observe(normed[batch.step.new_mask.to(self.device)])
            result = _named("", lambda: quantize_layers(self.spec, parameters, observers, formats, self.method))
            self._write("", parameters, result, writer, reports, {})

    def _forward(self, layer: int, observers: Mapping[Site, InputObserver], ranges: _CacheRanges) -> list[Tensor]:
        """The block's outputs; its inputs go to the observers, its keys and values to `ranges`."""
        block, path = self.decoder.blocks[layer], f"blocks.{layer}"
        sites = {f"{path}.{input_tap(self.spec, site)}": observer for site, observer in observers.items()}
        outputs = []
        for batch in self._batches:
            step = batch.step
            real = step.new_mask.to(self.device)

            def watch(name: str, tensor: Tensor, real: Tensor = real) -> None:
                if name in sites:
                    sites[name].observe(tensor[real])
                elif self.cache is not None and self.spec.taps[name].kind == "cache":
                    ranges.observe(self.spec.taps[name].part, tensor.transpose(1, 2)[real])

            a, (rows, tokens) = self.spec.attention, step.input_ids.shape
            shape = (rows, a.kv_heads, tokens, a.head_dim)
            past = torch.zeros(shape, device=self.device), torch.zeros(shape, device=self.device)
            with recording(Recorder(sink=watch)):
                y, _ = block(batch.hidden.to(self.device), past, self.decoder.positions_of(step))
            outputs.append(y.cpu())
        return outputs

    def _put_back(self, prefix: str, result: QuantizedLayers) -> None:
        """Run the block with the weights that were found, in floats."""
        for name, value in result.parameters.items():
            put_parameter(self.decoder, f"{prefix}{name}", value)
        for name, weight in result.weights.items():
            put_parameter(self.decoder, f"{prefix}{name}.weight", weight.dequantized(torch.float32))

    def _cache_scales(self, prefix: str, ranges: _CacheRanges, result: QuantizedLayers) -> dict[str, Tensor]:
        if self.cache is None:
            return {}
        a = self.spec.attention
        found = {}
        for part, largest in ranges.largest.items():
            if part == "value" and (divisor := result.folded.get("attn.out")) is not None:
                # Folding divided the rows that make values; query heads of a group share the divisor.
                largest = largest / divisor.view(a.kv_heads, -1, a.head_dim)[:, 0].to(largest.device)
            by_head = largest.amax(1)
            largest = by_head.amax().expand_as(by_head) if self.method.per_tensor else by_head
            found[f"{prefix}attn.{part}_scale"] = (largest / LIMITS[self.cache]).clamp(min=LEAST_SCALE)
        return found

    def _write(
        self,
        prefix: str,
        floats: Mapping[str, Tensor],
        result: QuantizedLayers,
        writer: CheckpointWriter,
        reports: dict[str, Any],
        cache_scales: Mapping[str, Tensor],
    ) -> None:
        changed = {name for name, value in result.parameters.items() if value is not floats[name]}
        shared = {part.name for name in changed for part in writer.table[f"{prefix}{name}"]}
        together = {
            f"{prefix}{name}": value
            for name, value in result.parameters.items()
            if shared & {part.name for part in writer.table.get(f"{prefix}{name}", ())}
        }
        writer.add(
            {f"{prefix}{name}": weight for name, weight in result.weights.items()},
            {f"{prefix}{name}": scale for name, scale in result.input_scales.items()},
            together,
            cache_scales,
        )
        self.folded |= {f"{prefix}{site}": scale for site, scale in result.folded.items()}
        reports |= {f"{prefix}{name}": dataclasses.asdict(report) for name, report in result.reports.items()}

    @contextmanager
    def _holding(self, prefixes: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
        """Parameters in fp32 on the device, in the decoder inside the block; given by name."""
        held = {
            name: value.to(self.device)
            for name, value in stream_parameters(self.source, dtype=torch.float32, prefixes=prefixes)
        }
        for name, value in held.items():
            put_parameter(self.decoder, name, value)
        try:
            yield held
        finally:
            for name, value in held.items():
                # The decoder tells its dtype and device by its last norm.
                if not name.startswith("final_norm."):
                    put_parameter(self.decoder, name, torch.empty_like(value, device="meta"))


class _CacheRanges:
    """Largest magnitude of cached keys and values, [kv_heads, head_dim] each."""

    def __init__(self) -> None:
        self.largest: dict[str, Tensor] = {}

    def observe(self, part: str, tokens: Tensor) -> None:
        """tokens: [tokens, kv_heads, head_dim]."""
        found = tokens.abs().amax(0)
        self.largest[part] = torch.maximum(self.largest[part], found) if part in self.largest else found


def _give_memory_back() -> None:
    """Blocks of up to 32 MB come from glibc's heap, where the codes that are kept pin what was freed around them."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _named(prefix: str, work: Callable[[], QuantizedLayers]) -> QuantizedLayers:
    try:
        return work()
    except LogitLockError as error:
        raise LogitLockError(f"{prefix}{error}") from None
