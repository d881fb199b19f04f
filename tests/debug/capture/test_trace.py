"""Traces: a capture read back from disk gives the same diff."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import refmodels
from debug.capture.capture import capture_engine
from debug.capture.prompts import random_prompts
from debug.capture.trace import read_trace, trace_origin, write_trace
from debug.comparison.compare import diff_capture
from refmodels.cache import KVCache, StepInputs
from refmodels.errors import LogitLockError
from refmodels.recorder import Recorder
from refmodels.taps import tap_names
from tests.support.command import logitlock
from tests.support.goldens import case_source
from tests.support.marks import quick_first
from trt_runtime.torch_gpu.engine import TorchEngine


def engine_of(case: str, dtype: torch.dtype = torch.bfloat16) -> TorchEngine:
    return TorchEngine(refmodels.load(case_source(case), dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen_ntk", "baichuan_13b", "gpt2"])
def test_a_trace_is_the_capture(case: str, tmp_path: Path) -> None:
    engine = engine_of(case)
    prompts = random_prompts(engine.spec.vocab_size, (20, 13, 9), seed=0)
    path = tmp_path / "a.safetensors"
    write_trace(engine, prompts, path, steps=3, model=case)
    traced, captured = read_trace(path), capture_engine(engine, prompts, steps=3)
    assert trace_origin(path) == (case, "exact") and traced.spec == engine.spec and traced.dtype == engine.dtype
    assert torch.equal(traced.tokens, captured.tokens) and torch.equal(traced.prompts.ids, prompts.ids)
    assert len(traced.forwards) == len(traced.untapped) == 4
    for ours, live in zip(traced.forwards, captured.forwards, strict=True):
        assert set(ours.tensors) == set(tap_names(engine.spec)) and set(live.before) <= set(ours.before)
        for name, tensor in live.tensors.items():
            assert torch.equal(ours.tensors[name], tensor), name
        for name, tensor in live.before.items():
            assert torch.equal(ours.before[name], tensor), name
        assert torch.equal(ours.inputs.attention_mask, live.inputs.attention_mask)
        assert torch.equal(ours.inputs.cache_lengths, live.inputs.cache_lengths)
    source = case_source(case)
    truth, rounded = (refmodels.load(source, dtype=d) for d in (torch.float64, torch.bfloat16))
    found, expected = (diff_capture(c, truth, rounded).to_json() for c in (traced, captured))
    assert found["taps"] == expected["taps"] and found["logits"] == expected["logits"]


class Corrupting(TorchEngine):
    """Spoils an old slot of a cache in the second decode step."""

    calls = 0

    def run(self, step: StepInputs, cache: KVCache, *, recorder: Recorder | None = None) -> Tensor:
        self.calls += recorder is not None
        if self.calls == 3:
            cache.key[1][:, :, 12] *= 2.0
        return super().run(step, cache, recorder=recorder)


@pytest.mark.slow
def test_changed_slots_come_back(tmp_path: Path) -> None:
    engine = Corrupting(refmodels.load(case_source("qwen"), dtype=torch.float32))
    path = tmp_path / "a.safetensors"
    write_trace(engine, random_prompts(engine.spec.vocab_size, (20, 13), seed=0), path, steps=3)
    before, after, later = (read_trace(path).forwards[step].tensors["blocks.1.key"] for step in (1, 2, 3))
    assert torch.equal(after[:, :, 12], 2 * before[:, :, 12])
    assert torch.equal(later[:, :, :22], after) and later.shape[2] == 23
    source = case_source("qwen")
    truth, rounded = (refmodels.load(source, dtype=d) for d in (torch.float64, torch.float32))
    result = diff_capture(read_trace(path), truth, rounded)
    assert (result.culprits[0].tap, result.culprits[0].step, result.culprits[0].worst[1]) == ("blocks.1.key", 2, 12)


def test_taps_are_not_kept_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    original = Recorder.__call__

    def counting(self: Recorder, name: str, tensor: Tensor) -> Tensor:
        result = original(self, name, tensor)
        kept.append(len(self.tensors))
        return result

    monkeypatch.setattr(Recorder, "__call__", counting)
    engine = engine_of("qwen")
    write_trace(engine, random_prompts(engine.spec.vocab_size, (20,), seed=0), tmp_path / "a", steps=1)
    assert kept and max(kept) == 0


def test_bad_traces(tmp_path: Path) -> None:
    engine = engine_of("qwen")
    prompts = random_prompts(engine.spec.vocab_size, (9,), seed=0)
    with pytest.raises(LogitLockError, match="cannot be written"):
        write_trace(engine, prompts, tmp_path / "none" / "a", steps=1)
    path = tmp_path / "a.safetensors"
    with pytest.raises(LogitLockError, match="no such file"):
        read_trace(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(LogitLockError, match="is not a trace"):
        read_trace(path)
    with pytest.raises(LogitLockError, match="but not a trace"):
        read_trace(case_source("qwen").directory / "model.safetensors")
    path.unlink()
    write_trace(engine, prompts, path, steps=1)
    path.write_bytes(path.read_bytes().replace(b'"logitlock_trace": "1"', b'"logitlock_trace": "9"'))
    with pytest.raises(LogitLockError, match="trace schema 9"):
        read_trace(path)


def test_nothing_is_left_of_a_trace_that_failed(tmp_path: Path) -> None:
    class Failing(TorchEngine):
        def run(self, step: StepInputs, cache: KVCache, *, recorder: Recorder | None = None) -> Tensor:
            if recorder is not None:
                raise RuntimeError("out of memory")
            return super().run(step, cache)

    engine = Failing(refmodels.load(case_source("qwen")))
    with pytest.raises(RuntimeError):
        write_trace(engine, random_prompts(engine.spec.vocab_size, (9,), seed=0), tmp_path / "a", steps=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("metadata", "tensors", "said"),
    quick_first(
        [
            ({"spec": None}, {}, "its metadata lacks spec"),
            ({"arithmetic": None, "model": None}, {}, "its metadata lacks model, arithmetic"),
            ({"spec": "{"}, {}, "its spec is not valid JSON"),
            ({"spec": "[" * 5000}, {}, "its spec is nested too deep"),
            ({"spec": "[]"}, {}, "spec must be an object"),
            ({"dtype": "fp7"}, {}, "dtype is 'fp7'; it must be one of"),
            ({"numerics": "x"}, {}, "numerics is 'x'"),
            ({"taps": "5"}, {}, "its taps are not a list of taps"),
            ({"taps": '["embed", "nonsense"]'}, {}, "its taps are not a list of taps"),
            ({}, {"tokens": None}, "it lacks the tensor tokens"),
            ({}, {"prompt.ids": torch.zeros(9, dtype=torch.int64)}, r"prompt.ids is \[9\]"),
            ({}, {"prompt.ids": torch.zeros(1, 9)}, "must be two axes of int64"),
            ({}, {"prompt.mask": torch.ones(1, 8, dtype=torch.int64)}, "do not fit together"),
            ({}, {"prompt.ids": torch.full((1, 9), 10**9)}, "outside the vocabulary"),
            ({}, {"0.embed": None}, "it lacks the tensor 0.embed"),
            ({}, {"1.untapped": torch.zeros(1, 2, 3)}, "1.untapped has the shape"),
            ({}, {"0.blocks.0.key": torch.zeros(1, 9, 3)}, "0.blocks.0.key has the shape"),
            (
                {},
                {"1.blocks.0.key": torch.zeros(1, 4, 0, 16)},
                r"1.blocks.0.key has the shape .*must be \[1, 4, 1, 16\]",
            ),
            ({}, {"1.blocks.0.key.all": torch.zeros(1, 4, 9, 16)}, r"1.blocks.0.key.all .*must be \[1, 4, 10, 16\]"),
        ],
        3,
    ),
)
def test_damaged_traces(
    tmp_path: Path, metadata: dict[str, str | None], tensors: dict[str, Tensor | None], said: str
) -> None:
    engine, path = engine_of("qwen"), tmp_path / "a.safetensors"
    write_trace(engine, random_prompts(engine.spec.vocab_size, (9,), seed=0), path, steps=1)
    with safe_open(path, "pt") as file:
        stored = file.metadata() | metadata
    content = load_file(path) | tensors
    save_file(
        {name: tensor for name, tensor in content.items() if tensor is not None},
        path,
        metadata={key: value for key, value in stored.items() if value is not None},
    )
    with pytest.raises(LogitLockError, match=said) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path} is damaged: ") and str(caught.value).count(str(path)) == 1


@pytest.mark.slow
def test_texts_of_a_trace_are_no_markup(tmp_path: Path) -> None:
    engine, path = engine_of("qwen"), tmp_path / "a.safetensors"
    write_trace(engine, random_prompts(engine.spec.vocab_size, (9,), seed=0), path, steps=1)
    with safe_open(path, "pt") as file:
        stored = file.metadata()
    save_file(load_file(path), path, metadata=stored | {"arithmetic": "[/nope] [red]"})
    found = logitlock("diff", path, "--model", case_source("qwen").directory)
    assert found.code == 0 and "[/nope] [red]" in found.out
