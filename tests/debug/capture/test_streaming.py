"""The reference with the weights of one stage at a time gives the same diff, and holds no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import refmodels
from debug import sides
from debug.capture import streaming
from debug.capture.prompts import random_prompts
from debug.capture.streaming import StreamedDecoder, ready_at, stages
from debug.comparison.compare import diff_engine
from debug.sides import reference_of
from export.bundle import export_model
from refmodels.checkpoints.load import stream_parameters
from refmodels.taps import tap_names
from tests.support import mutate
from tests.support.goldens import case_source
from tests.support.marks import quick_first
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine
from trt_runtime.torch_gpu.engine import TorchEngine

# Learned positions and a tied head; rope and an own head.
CASES = ["gpt2", "qwen_ntk"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_same_result_as_in_memory(case: str, tmp_path: Path) -> None:
    source = case_source(case)
    bundle = export_model(source, precision="fp16", attention="plugin", output=tmp_path / "clean")
    broken = mutate.mutated(bundle, tmp_path / "broken", mutate.attention_scale("blocks.1.attn", 2.0))
    prompts = random_prompts(source.spec.vocab_size, (20, 13), seed=0)
    engine = OnnxRuntimeEngine(broken, emulate_rounding=True, threads=1)
    loaded = [refmodels.load(source, dtype=d) for d in (torch.float64, torch.float16)]
    streamed = [StreamedDecoder(source, dtype=d) for d in (torch.float64, torch.float16)]
    expected = diff_engine(engine, loaded[0], loaded[1], prompts, steps=2).to_json()
    assert diff_engine(engine, streamed[0], streamed[1], prompts, steps=2).to_json() == expected
    assert expected["culprits"][0]["diagnosis"][0]["fault"].startswith("wrong attention scale: doubled")


@pytest.mark.parametrize("case", quick_first(CASES))
def test_only_one_part_is_there(case: str) -> None:
    source = case_source(case)
    streamed = StreamedDecoder(source, dtype=torch.float64)
    there: list[set[str]] = []

    def look(*_: object) -> None:
        named = streamed.decoder.named_parameters(remove_duplicate=False)
        there.append({name for name, value in named if value.device.type != "meta"})

    with streamed.running() as decoder, torch.inference_mode():
        for block in decoder.blocks:
            block.register_forward_hook(look, prepend=True)
        decoder.step(torch.tensor([[5, 6, 7]]), decoder.new_cache(batch=1, capacity=4))
    final = {name for name in dict(streamed.decoder.named_parameters()) if name.startswith("final_norm.")}
    for i, names in enumerate(there):
        assert names - final and all(name.startswith(f"blocks.{i}.") for name in names - final)
    look()
    assert there[-1] == final
    with ready_at(streamed, "logits") as decoder:
        assert decoder.head.weight.device.type == "cpu"


def test_a_diff_reads_the_large_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clean model's linear layers, of each of both references; norms are also looked at for small faults."""
    source = case_source("qwen_ntk")
    read: list[str] = []

    def counted(*arguments: Any, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in stream_parameters(*arguments, **options):
            read.append(name)
            yield name, value

    monkeypatch.setattr(streaming, "stream_parameters", counted)
    streamed = [StreamedDecoder(source, dtype=d) for d in (torch.float64, torch.float32)]
    engine = TorchEngine(refmodels.load(source, dtype=torch.float32))
    prompts = random_prompts(source.spec.vocab_size, (9,), seed=0)
    assert diff_engine(engine, streamed[0], streamed[1], prompts, steps=1).aligned
    linears = [name for name in read if "norm" not in name]
    assert linears and set(Counter(linears).values()) == {2}


def test_parts_make_every_tap_once() -> None:
    for case in CASES:
        spec = case_source(case).spec
        assert [tap for stage in stages(spec) for tap in stage.taps] == list(tap_names(spec))


def test_large_models_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    source = case_source("gpt2")
    assert isinstance(reference_of(source, dtype=torch.float64), refmodels.Decoder)
    monkeypatch.setattr(sides, "_IN_MEMORY", 1000)
    assert isinstance(reference_of(source, dtype=torch.float64), StreamedDecoder)
