"""A golden case as an executor: it replays upstream's results for the recorded tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from debug.capture.prompts import Prompts
from debug.executors.step import CacheAxes, ForeignStep
from debug.golden.case import past_layout, read_case
from refmodels.cache import KVCache, StepInputs
from refmodels.checkpoints.load import resolve
from refmodels.dtypes import DTYPES
from refmodels.errors import LogitLockError
from refmodels.recorder import Recorder
from refmodels.taps import is_cache_tap, tap_names
from trt_runtime.engine import Engine


class GoldenEngine(Engine):
    """The recorded tensors of a case.  The prefill has the embedding, every block, the final norm, the logits and the
    cache of the recorded layers; decode steps have the logits.

    Attributes:
        prompts: the recorded prompts; nothing else can be run.
        steps: number of recorded decode steps.

    Args:
        directory: directory of the case, as for `logitlock verify`.
        dtype: fp32, or bf16 or fp16 if the case was recorded in it too.
        decode: the run continues after the prefill; the only tap is then the logits, which every step has.
    Raises:
        LogitLockError: as `debug.golden.case.read_case`.
    """

    prompts: Prompts

    def __init__(self, directory: Path | str, dtype: str = "fp32", *, decode: bool = False) -> None:
        self.case = read_case(Path(directory), dtype)
        meta, expected = self.case.meta, self.case.expected
        self.spec = resolve(self.case.directory).spec
        self.max_positions = self.spec.max_positions
        self.dtype, self.device = DTYPES[dtype], torch.device("cpu")
        self._axes = CacheAxes("".join(past_layout(meta, self.spec)))
        self._check_parts()
        ids = self.case.inputs["input_ids"]
        mask = self.case.inputs.get("attention_mask", torch.ones_like(ids))
        upstream = meta.get("upstream")
        upstream = upstream if isinstance(upstream, dict) else {}
        self.arithmetic = f"recorded from {upstream.get('class', 'upstream code')} in {dtype}"
        self.prompts = Prompts(ids=ids, mask=mask, origin=f"those of {self.case.directory.resolve().name}")
        self.decode_ids = self.case.inputs.get("decode_ids")
        self.steps = expected["decode_logits"].shape[1] if "decode_logits" in expected else 0
        self._taps = dict(self._recorded(ids.shape[1]))
        self.tap_names = ("logits",) if decode else tuple(n for n in tap_names(self.spec) if n in self._taps)

    def _check_parts(self) -> None:
        """Raise if a tensor does not belong to a case, or its shape contradicts the model."""
        ids = self.case.inputs["input_ids"]
        if ids.ndim != 2 or not ids.numel():
            raise self._misshapen("input_ids", ids, "[batch, tokens]")
        outside = (ids < 0) | (ids >= self.spec.vocab_size)
        if bool(outside.any()):
            raise LogitLockError(
                f"{self.case.directory} has the token id {int(ids[outside][0])}, outside the vocabulary of "
                f"{self.spec.vocab_size} ids"
            )
        batch, tokens = ids.shape
        a, layers = self.spec.attention, self.spec.layers
        least = tokens if a.window is None else min(a.window - 1, tokens)
        wide = {"logits": self.spec.vocab_size, "final_norm": self.spec.hidden_size}
        wide |= {f"hidden_states.{i}": self.spec.hidden_size for i in range(layers + 1)}
        caches = {f"past.{i}.{part}" for i in range(layers) for part in ("key", "value")}
        for name, tensor in self.case.expected.items():
            shape = tuple(tensor.shape)
            if name in wide:
                good, wanted = shape == (batch, tokens, wide[name]), f"[{batch}, {tokens}, {wide[name]}]"
            elif name in caches:
                b, h, s, d = self._axes.to_ours(tensor).shape if tensor.ndim == 4 else (0, 0, 0, 0)
                good = (b, h, d) == (batch, a.kv_heads, a.head_dim) and least <= s <= tokens
                wanted = (
                    f"{batch} rows, {a.kv_heads} heads, {tokens} slots and head_dim {a.head_dim} as past_layout says"
                )
            elif name == "decode_logits":
                good = tensor.ndim == 3 and (shape[0], shape[2]) == (batch, self.spec.vocab_size)
                wanted = f"[{batch}, steps, {self.spec.vocab_size}]"
            elif name == "uncached_logits" or name in ("position_ids", "decode_position_ids"):
                continue
            else:
                raise LogitLockError(f"{self.case.directory / self.case.file} has the tensor {name}, which no case has")
            if not good:
                raise self._misshapen(name, tensor, wanted)

    def _misshapen(self, name: str, tensor: Tensor, wanted: str) -> LogitLockError:
        file = self.case.directory / self.case.file
        return LogitLockError(f"{file}: {name} has the shape {list(tensor.shape)}; it must be {wanted}")

    def _recorded(self, tokens: int) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the prefill by tap; cache tensors as [batch, kv_heads, slots, head_dim]."""
        expected = self.case.expected
        yield "logits", expected["logits"]
        if "final_norm" in expected:
            yield "final_norm", expected["final_norm"]
        for i in range(self.spec.layers + 1):
            if f"hidden_states.{i}" in expected:
                yield f"blocks.{i - 1}" if i else "embed", expected[f"hidden_states.{i}"]
        for i in range(self.spec.layers):
            for part in ("key", "value"):
                if f"past.{i}.{part}" in expected:
                    tensor = self._axes.to_ours(expected[f"past.{i}.{part}"])
                    # The cache of a sliding window no longer has the first slots.
                    if tensor.shape[2] == tokens:
                        yield f"blocks.{i}.{part}", tensor

    def run(self, step: StepInputs, cache: KVCache, *, recorder: Recorder | None = None) -> Tensor:
        foreign = ForeignStep(step, cache, recorder)
        number = foreign.past_slots - self.prompts.ids.shape[1] + 1 if foreign.past_slots else 0
        self._check(step, number)
        shown = self._taps if number == 0 else {"logits": self.case.expected["decode_logits"][:, number - 1 : number]}
        for tap in self.tap_names[:-1] if number == 0 else ():
            if is_cache_tap(tap):
                foreign.write(tap, shown[tap])
            else:
                foreign.deliver(tap, foreign.logits_of(shown[tap]) if tap == "final_norm" else shown[tap])
        logits = foreign.logits_of(shown["logits"])
        foreign.deliver("logits", logits)
        cache.advance(step)
        return logits

    def _check(self, step: StepInputs, number: int) -> None:
        recorded = self.prompts.ids
        if number:
            if self.decode_ids is None or not 0 < number <= self.steps:
                raise LogitLockError(f"{self.case.directory} has {self.steps} recorded decode steps, not {number}")
            recorded = self.decode_ids[:, number - 1 : number]
        real = step.new_mask
        if recorded.shape != step.input_ids.shape or not torch.equal(recorded[real], step.input_ids[real]):
            raise LogitLockError(
                f"{self.case.directory} can only replay its own tokens (its prompts); those of step {number} differ"
            )
