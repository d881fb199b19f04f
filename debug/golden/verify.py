"""`logitlock verify`: the reference model against the results of the upstream code (a golden case)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from debug.comparison.metrics import json_number, ulp
from debug.golden.case import _PAST, GoldenCase, _natural, past_layout, read_case
from refmodels.checkpoints.load import load
from refmodels.dtypes import DTYPES
from refmodels.errors import LogitLockError
from refmodels.model import Decoder
from refmodels.recorder import Recorder, recording
from refmodels.spec import ModelSpec

FP32_ATOL = 1e-4
HALF_ULPS = 2
RECORDED_INSTRUCTIONS = "AVX512_CORE_BF16"
"""Newest instructions of the machine that half-precision cases were recorded on, as oneDNN calls them."""
_HIDDEN = re.compile(r"hidden_states\.(\d+)")


@dataclass(kw_only=True)
class CaseResult:
    """Outcome of one case.

    worst: largest absolute difference per tensor, over real positions; NaN if either value is not finite.
    tolerance: largest allowed difference per tensor.  greedy_equal: every greedy token equals upstream's.
    """

    case: str
    dtype: str
    worst: dict[str, float] = field(default_factory=dict)
    tolerance: dict[str, float] = field(default_factory=dict)
    greedy_equal: bool = True
    not_compared: list[str] = field(default_factory=list)

    def failed(self) -> list[str]:
        """Tensors outside their tolerance; NaN is always outside."""
        return [name for name, value in self.worst.items() if not value <= self.tolerance[name]]

    @property
    def passed(self) -> bool:
        return self.greedy_equal and not self.failed()

    def to_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "passed": self.passed,
            "worst": {name: json_number(value) for name, value in self.worst.items()},
            "greedy_equal": self.greedy_equal,
            "dtype": self.dtype,
            "tolerance": self.tolerance,
            "not_compared": self.not_compared,
        }


def verify_case(directory: str | Path, *, dtype: str = "fp32", atol: float | None = None) -> CaseResult:
    """Run the reference (`upstream` numerics, CPU) on the inputs of a golden case and compare every tensor.

    Args:
        directory: holds config.json, model.safetensors (or shards), io.safetensors and meta.json.
        dtype: "fp32", or "bf16"/"fp16" to compare with io_<dtype>.safetensors.
        atol: largest allowed absolute difference of every tensor; None: `default_tolerance`.
    Raises:
        LogitLockError: a file is missing or damaged, a tensor is missing, or a shape contradicts the config.

    In half precision, the last bit is compared.  If this process has multiplied anything before, see
    `add_up_as_recorded`.  A CPU with fp16 instructions sums fp16 products in another order than a CPU without; cases
    were recorded on both, and one of the two orders must give every bit.  transformers keeps its rotary frequencies in
    fp32 if it loads a model in a half dtype, and rounds them if a loaded model is cast; a case may be of either.
    """
    add_up_as_recorded()
    case = read_case(Path(directory), dtype)
    # In half precision, the order of summation, and so the last bit, depends on the number of threads.
    threads = None if dtype == "fp32" else case.meta.get("threads")
    with _threads(threads), torch.inference_mode():
        model = load(case.directory, dtype=DTYPES[dtype], numerics="upstream")
        found = _CaseComparison(case, model, dtype, atol).result()
        if dtype == "fp32" or found.passed:
            return found
        if dtype == "fp16":
            with _SumsInFloat32():
                again = _CaseComparison(case, model, dtype, atol).result()
            if again.passed:
                return again
        if model.spec.rope is None or model.spec.rope.table != "working":
            return found
        rope = replace(model.spec.rope, table="working_frequencies")
        model = load(case.directory, dtype=DTYPES[dtype], numerics="upstream")
        model.spec = replace(model.spec, rope=rope)
        again = _CaseComparison(case, model, dtype, atol).result()
        return again if again.passed else found


class _SumsInFloat32(TorchFunctionMode):
    """Linear layers as fp16 instructions compute them: products and sums in fp32, rounded once."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.nn.functional.linear:
            return func(*args, **(kwargs or {}))
        x, weight, bias = args
        return func(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def add_up_as_recorded() -> None:
    """Keep oneDNN from using instructions that add in another order (AMX), in this process and those that it starts.

    Call it before oneDNN multiplies anything, in any dtype: later it has no effect.
    """
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", RECORDED_INSTRUCTIONS)


def has_recorded_order() -> bool:
    """Whether this CPU, after `add_up_as_recorded`, sums in the order of the recordings, to the last bit."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def default_tolerance(spec: ModelSpec, dtype: str, expected: Tensor) -> float:
    """Allowed absolute difference of one tensor.

    fp32: 1e-4, which separates right from plausibly wrong semantics (the golden cases are at <= 2e-5, the mildest
    mistake at 9e-4).  Half precision on the CPU: 0 for ChatGLM2, Qwen v1 and Baichuan, whose cast orders are part of
    the spec; two units in the last place at the largest magnitude of the tensor for the families of `transformers`.  A
    CPU without AVX-512 adds in another order than the CPU of the recordings, so each of a block's two residual sums,
    and everything after them, may round the other way: one unit is allowed for each of them, for all families.
    """
    if dtype == "fp32":
        return FP32_ATOL
    if not has_recorded_order():
        ulps = 2 * spec.layers + 1
    elif spec.family in ("chatglm2", "baichuan") or spec.variant == "qwen":
        ulps = 0
    else:
        ulps = HALF_ULPS
    return ulps * float(ulp(DTYPES[dtype], expected.double().abs().max()))


class _CaseComparison:
    """One comparison, which shares the case, the model and the result between its steps."""

    def __init__(self, case: GoldenCase, model: Decoder, dtype: str, atol: float | None) -> None:
        self.case, self.model, self.spec, self.dtype, self.atol = case, model, model.spec, dtype, atol
        self.outcome = CaseResult(case=case.directory.resolve().name, dtype=dtype)
        ids = case.inputs["input_ids"]
        if ids.ndim != 2 or not ids.numel():
            raise self._error("input_ids", ids, "[batch, tokens]")
        self.ids = ids
        self.mask = case.inputs.get("attention_mask", torch.ones_like(ids))
        self._check("attention_mask", self.mask, tuple(ids.shape))
        self.real = self.mask != 0
        self.left = set(case.expected)

    def result(self) -> CaseResult:
        batch, tokens = self.ids.shape
        decode_ids = self.case.inputs.get("decode_ids")
        steps = 0
        if decode_ids is not None:
            if decode_ids.ndim != 2 or decode_ids.shape[0] != batch or not decode_ids.shape[1]:
                raise self._error("decode_ids", decode_ids, f"[{batch}, steps]")
            steps = decode_ids.shape[1]
        elif "decode_logits" in self.case.expected:
            raise LogitLockError(f"{self.case.directory / self.case.file} has decode_logits but no decode_ids")
        cache = self.model.new_cache(batch=batch, capacity=tokens + steps)
        recorder = Recorder()
        step = cache.next_step(self.ids, self.mask)
        self._positions("position_ids", step.position_ids, self.real)
        with recording(recorder):
            logits = self.model.run(step, cache)
        self._prefill(logits, recorder.tensors)
        # Upstream keeps trailing pads in its cache and continues after them; our cache would overwrite them.
        cache.lengths = torch.full_like(cache.lengths, tokens)
        cache.mask[:, :tokens] = self.real
        self._first_token(logits, decode_ids)
        if decode_ids is not None and (self.dtype == "fp32" or "decode_logits" in self.case.expected):
            decoded, positions = [], []
            for t in range(steps):
                step = cache.next_step(decode_ids[:, t : t + 1])
                if step.position_ids is not None:
                    positions.append(step.position_ids)
                decoded.append(self.model.run(step, cache))
            self._decode(decode_ids, torch.cat(decoded, 1), torch.cat(positions, 1) if positions else None)
        if "uncached_logits" in self.left and decode_ids is not None:
            self._uncached(decode_ids)
        self.outcome.not_compared = sorted(self.left)
        return self.outcome

    def _prefill(self, logits: Tensor, taps: Mapping[str, Tensor]) -> None:
        self._compare("logits", logits, self.real)
        for name in sorted(self.case.expected, key=_natural):
            hidden, past = _HIDDEN.fullmatch(name), _PAST.fullmatch(name)
            if name == "final_norm":
                self._compare(name, taps["final_norm"], self.real)
            elif hidden:
                index = int(hidden[1])
                if index > self.spec.layers:
                    raise LogitLockError(
                        f"{self.case.directory / self.case.file} has {name}, but the model of config.json has "
                        f"{self.spec.layers} layers"
                    )
                self._compare(name, taps["embed" if index == 0 else f"blocks.{index - 1}"], self.real)
            elif past:
                if int(past[1]) >= self.spec.layers:
                    raise LogitLockError(
                        f"{self.case.directory / self.case.file} has {name}, but the model of config.json has "
                        f"{self.spec.layers} layers"
                    )
                self._compare_past(name, taps[f"blocks.{past[1]}.{past[2]}"])

    def _compare_past(self, name: str, ours: Tensor) -> None:
        theirs = self.case.expected[name]
        layout = past_layout(self.case.meta, self.spec)
        if theirs.ndim != 4:
            raise self._error(name, theirs, str(list(layout)))
        theirs = theirs.permute([layout.index(axis) for axis in ("B", "H", "S", "D")])
        slots = theirs.shape[2]
        batch, heads, tokens, head_dim = ours.shape
        # A sliding-window cache of transformers 5 keeps only the last window - 1 slots.
        window = self.spec.attention.window
        if window is None or not min(window - 1, tokens) <= slots <= tokens:
            slots = tokens
        if theirs.shape != (batch, heads, slots, head_dim):
            wanted = dict(zip("BHSD", (batch, heads, slots, head_dim), strict=True))
            raise self._error(name, self.case.expected[name], str([wanted[axis] for axis in layout]))
        self._record(name, ours[:, :, -slots:].transpose(1, 2), theirs.transpose(1, 2), self.real[:, -slots:])

    def _first_token(self, logits: Tensor, decode_ids: Tensor | None) -> None:
        """The token after the prompt, from the last position, or from the last real one if that is padding."""
        expected = self.case.expected["logits"].double()
        for row in range(len(logits)):
            last = int(self.real[row].nonzero().max())
            ours, theirs = logits[row, last].double(), expected[row, last]
            # In half precision, a tie within the tolerance may be decided either way.
            slack = 0.0 if self.dtype == "fp32" else self.outcome.tolerance["logits"]
            self._greedy(bool(theirs[ours.argmax()] >= theirs.max() - slack))
            if decode_ids is not None and self.dtype == "fp32" and bool(self.real[row, -1]):
                self._greedy(int(ours.argmax()) == int(decode_ids[row, 0]))

    def _decode(self, decode_ids: Tensor, logits: Tensor, positions: Tensor | None) -> None:
        everywhere = torch.ones_like(decode_ids, dtype=torch.bool)
        self._positions("decode_position_ids", positions, everywhere)
        if "decode_logits" in self.case.expected:
            self._compare("decode_logits", logits, everywhere)
        if self.dtype == "fp32":
            self._greedy(torch.equal(logits[:, :-1].argmax(-1), decode_ids[:, 1:]))

    def _uncached(self, decode_ids: Tensor) -> None:
        ids = torch.cat((self.ids, decode_ids), 1)
        mask = torch.cat((self.mask, torch.ones_like(decode_ids)), 1)
        logits = self.model.step(ids, self.model.new_cache(batch=ids.shape[0], capacity=ids.shape[1]), mask)
        self._compare("uncached_logits", logits, mask != 0)

    def _positions(self, name: str, ours: Tensor | None, real: Tensor) -> None:
        """Check that the positions given to upstream are those that the cache derives by itself."""
        theirs = self.case.expected.get(name)
        if theirs is not None and ours is not None:
            self._check(name, theirs, tuple(ours.shape))
            self._record(name, ours, theirs, real, tolerance=0.0)

    def _compare(self, name: str, ours: Tensor, real: Tensor) -> None:
        theirs = self.case.expected[name]
        self._check(name, theirs, tuple(ours.shape))
        self._record(name, ours, theirs, real)

    def _record(self, name: str, ours: Tensor, theirs: Tensor, real: Tensor, tolerance: float | None = None) -> None:
        a, b = ours[real].double(), theirs[real].double()
        if tolerance is None:
            tolerance = default_tolerance(self.spec, self.dtype, b) if self.atol is None else self.atol
        # Infinity minus infinity is NaN as well, so no value that is not finite can pass.
        self.outcome.worst[name] = float((a - b).abs().max()) if a.numel() else 0.0
        self.outcome.tolerance[name] = tolerance
        self.left.discard(name)

    def _greedy(self, equal: bool) -> None:
        self.outcome.greedy_equal = self.outcome.greedy_equal and equal

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise self._error(name, tensor, str(list(shape)))

    def _error(self, name: str, tensor: Tensor, wanted: str) -> LogitLockError:
        file = self.case.directory / self.case.file
        return LogitLockError(f"{file}: {name} has shape {list(tensor.shape)}; config.json and input_ids give {wanted}")


@contextmanager
def _threads(count: object) -> Iterator[None]:
    """Run with at most `count` threads (None: unchanged)."""
    before = torch.get_num_threads()
    if isinstance(count, int) and 0 < count <= before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
