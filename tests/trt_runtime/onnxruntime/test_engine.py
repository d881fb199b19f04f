"""The CPU engine against the reference and the goldens: results, taps, and caches that are bound and not copied."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file

import refmodels
from export.bundle import export_model
from refmodels.errors import LogitLockError
from refmodels.recorder import Recorder
from refmodels.taps import tap_names
from tests.support.goldens import CASES, GOLDENS, case_source, needs_opset_24, slow_but_two
from tests.support.marks import quick_first
from trt_runtime.bundle import read_bundle
from trt_runtime.generation import GenerationConfig, generate
from trt_runtime.onnxruntime import engine as onnxruntime_engine
from trt_runtime.onnxruntime import errors as onnxruntime_errors
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine
from trt_runtime.open import open_engine
from trt_runtime.torch_gpu.engine import TorchEngine

Exported = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Exports a golden case once for each precision and length."""
    root = tmp_path_factory.mktemp("bundles")

    def bundle(case: str, precision: str = "fp32", max_seq: int | None = None) -> Path:
        output = root / f"{case}-{precision}-{max_seq}"
        if not output.exists():
            export_model(case_source(case), precision=precision, output=output, max_seq=max_seq)  # type: ignore[arg-type]
        return output

    return bundle


def reference(case: str) -> TorchEngine:
    return TorchEngine(refmodels.load(case_source(case)))


@pytest.mark.parametrize("case", slow_but_two(CASES))
def test_goldens(case: str, exported: Exported) -> None:
    engine = OnnxRuntimeEngine(exported(case), threads=1)
    io = load_file(GOLDENS / case / "io.safetensors")
    batch, tokens = io["input_ids"].shape
    steps = io["decode_ids"].shape[1]
    cache = engine.new_cache(batch=batch, capacity=tokens + steps)
    logits = engine.prefill(io["input_ids"], cache, io["attention_mask"])
    real = io["attention_mask"] != 0
    assert (logits - io["logits"])[real].abs().max() <= 1e-4
    last = logits[:, -1:]
    for step in range(steps):
        assert torch.equal(last[:, -1].argmax(-1), io["decode_ids"][:, step])
        last = engine.decode(io["decode_ids"][:, step], cache)
        assert (last[:, 0] - io["decode_logits"][:, step]).abs().max() <= 1e-4


@pytest.mark.parametrize("case", quick_first(["chatglm2", "baichuan2_13b", "qwen_ntk", "gpt2", "starcoder2_sliding"]))
def test_taps_are_the_references_and_leave_the_logits_alone(case: str, exported: Exported) -> None:
    engine, model = OnnxRuntimeEngine(exported(case), threads=1), reference(case)
    assert engine.tap_names == tap_names(engine.spec)
    ids = torch.randint(0, engine.spec.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    caches = [e.new_cache(batch=2, capacity=24) for e in (model, engine, engine)]
    theirs, ours = Recorder(), Recorder()
    model.prefill(ids, caches[0], mask, recorder=theirs)
    tapped = engine.prefill(ids, caches[1], mask, recorder=ours)
    assert torch.equal(tapped, engine.prefill(ids, caches[2], mask))
    model.decode(torch.tensor([1, 2]), caches[0], recorder=theirs)
    tapped = engine.decode(torch.tensor([1, 2]), caches[1], recorder=ours)
    assert torch.equal(tapped, engine.decode(torch.tensor([1, 2]), caches[2]))
    assert list(ours.tensors) == list(engine.tap_names) and ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        if name.endswith((".key", ".value")):
            assert tensor.shape[2] == 21
            mine, his = ours.tensors[name][1, :, :14], tensor[1, :, :14]
        else:
            mine, his = ours.tensors[name], tensor
        assert (mine - his).abs().max() <= 5e-5, name
    some = Recorder({"embed", "blocks.1.key"})
    engine.decode(torch.tensor([1, 2]), caches[1], recorder=some)
    assert set(some.tensors) == {"embed", "blocks.1.key"}
    with pytest.raises(LogitLockError, match=r"substitutes blocks\.0"):
        engine.decode(
            torch.tensor([1, 2]), caches[1], recorder=Recorder(substitutes={"blocks.0": ours.tensors["blocks.0"]})
        )


@pytest.mark.parametrize("precision", quick_first(["fp32", "fp16", "bf16"]))
def test_caches_are_bound_in_place(
    precision: str, exported: Exported, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # ONNX Runtime warns whenever a cache write could not be done in place.
    monkeypatch.setattr(onnxruntime_errors, "_LOG_SEVERITY", 2)
    engine = OnnxRuntimeEngine(exported("qwen2", precision), threads=1)
    cache = engine.new_cache(batch=2, capacity=32)
    buffers = [*cache.key, *cache.value]
    poison = float("nan")
    for buffer in buffers:
        buffer.fill_(poison)
    before = [b.data_ptr() for b in buffers]
    ids = torch.arange(12).reshape(2, 6)
    engine.prefill(ids, cache)
    engine.decode(torch.tensor([1, 2]), cache)
    assert [b.data_ptr() for b in (*cache.key, *cache.value)] == before
    for buffer in buffers:
        assert not buffer[:, :, :7].isnan().any(), "the step's keys and values are in the caller's memory"
        assert buffer[:, :, 7:].isnan().all(), "and nothing else was written"
    logits = engine.decode(torch.tensor([3, 4]), cache, recorder=Recorder())
    assert logits.isfinite().all(), "slots beyond the live length are not read"
    assert "in-place optimization not activated" not in capfd.readouterr().err


@needs_opset_24
def test_the_log_would_show_a_copy(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnxruntime_errors, "_LOG_SEVERITY", 2)
    engine = OnnxRuntimeEngine(exported("qwen2"), threads=1)
    cache = engine.new_cache(batch=1, capacity=8)
    session = engine._session("plain")
    io = session.binding(cache)
    other = torch.empty_like(cache.key[0])
    onnxruntime_engine.bind(io.bind_output, "blocks.0.key", other)
    engine.decode(torch.tensor([1]), cache)
    assert "in-place optimization not activated" in capfd.readouterr().err


@pytest.mark.parametrize("precision", quick_first(["fp32", "fp16", "bf16"]))
def test_a_step_costs_the_same_for_any_capacity(precision: str, exported: Exported) -> None:
    positions = 65536
    engine = OnnxRuntimeEngine(exported("qwen2", precision, positions), emulate_rounding=True, threads=1)
    times = {}
    for capacity in (32, positions):
        cache = engine.new_cache(batch=1, capacity=capacity)
        engine.prefill(torch.arange(16)[None], cache)
        token = torch.tensor([1])
        step = cache.next_step(token[:, None], last_logits_only=True)
        samples = []
        for _ in range(40):
            lengths, mask = cache.lengths.clone(), cache.mask.clone()
            start = time.perf_counter()
            engine.run(step, cache)
            samples.append(time.perf_counter() - start)
            cache.lengths, cache.mask = lengths, mask
        times[capacity] = min(samples)
        bytes_in_cache = sum(b.nbytes for b in (*cache.key, *cache.value))
    # One copy of the large cache (8 or 16 MiB here) takes longer than the whole step.
    assert bytes_in_cache >= 4 << 20
    assert times[positions] <= 1.5 * times[32] + 2e-4, times


def test_buffers_that_were_replaced_are_bound_anew(exported: Exported) -> None:
    engine = OnnxRuntimeEngine(exported("qwen2"), threads=1)
    one, two = (engine.new_cache(batch=1, capacity=16) for _ in range(2))
    ids = torch.arange(6)[None]
    engine.prefill(ids, one)
    expected = engine.decode(torch.tensor([1]), one)
    engine.prefill(ids, two)
    two.key = [k.clone() for k in two.key]
    assert torch.equal(engine.decode(torch.tensor([1]), two), expected)
    assert two.key[0][:, :, 6].abs().max() > 0


def test_logits_are_not_overwritten_by_later_steps(exported: Exported) -> None:
    engine = OnnxRuntimeEngine(exported("qwen2"), threads=1)
    cache = engine.new_cache(batch=1, capacity=16)
    first = engine.prefill(torch.arange(6)[None], cache, last_logits_only=True)
    kept = first.clone()
    engine.decode(torch.tensor([1]), cache)
    assert torch.equal(first, kept) and first.shape == (1, 1, engine.spec.vocab_size)


@pytest.mark.slow
def test_chunked_prefill_and_generation_equal_the_reference(exported: Exported) -> None:
    engine, model = open_engine(exported("qwen_ntk"), threads=1), reference("qwen_ntk")
    prompts = [list(range(40)), [7, 3], list(range(100, 111))]
    for chunk in (None, 7):
        config = GenerationConfig(max_new_tokens=12, prefill_chunk=chunk)
        ours = [r.token_ids for r in generate(engine, None, prompts, config)]
        assert ours == [r.token_ids for r in generate(model, None, prompts, config)]


def test_every_tap_width_is_the_graphs(exported: Exported) -> None:
    bundle = read_bundle(exported("gpt_bigcode"))
    engine = OnnxRuntimeEngine(bundle, threads=1)
    recorder = Recorder()
    engine.prefill(torch.arange(5)[None], engine.new_cache(batch=1, capacity=8), recorder=recorder)
    model = reference("gpt_bigcode")
    expected = Recorder()
    model.prefill(torch.arange(5)[None], model.new_cache(batch=1, capacity=8), recorder=expected)
    for name, tensor in expected.tensors.items():
        assert recorder.tensors[name].shape == tensor.shape
        if not name.endswith((".key", ".value")):
            assert bundle.spec.taps[name].width == tensor.shape[-1]


def test_large_bundles_keep_one_session(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_engine, "_BOTH_SESSIONS_BYTES", 1)
    engine = OnnxRuntimeEngine(exported("qwen2"), threads=1)
    cache = engine.new_cache(batch=1, capacity=8)
    for recorder in (None, Recorder(), None):
        engine.decode(torch.tensor([1]), cache, recorder=recorder)
        assert len(engine._sessions) == 1
    monkeypatch.setattr(onnxruntime_engine, "_BOTH_SESSIONS_BYTES", 1 << 30)
    engine = OnnxRuntimeEngine(exported("qwen2"), threads=1)
    engine.decode(torch.tensor([1]), engine.new_cache(batch=1, capacity=8), recorder=Recorder())
    assert len(engine._sessions) == 2


@pytest.mark.slow
def test_foreign_caches_and_bad_options(exported: Exported) -> None:
    engine = OnnxRuntimeEngine(exported("qwen2", "fp32", 64), threads=1)
    with pytest.raises(LogitLockError, match="longer than the 64 positions"):
        engine.new_cache(batch=1, capacity=65)
    for foreign in (
        reference("gpt2").new_cache(batch=1, capacity=8),
        reference("qwen2").new_cache(batch=1, capacity=65),
        OnnxRuntimeEngine(exported("qwen2", "fp16"), threads=1).new_cache(batch=1, capacity=8),
    ):
        with pytest.raises(LogitLockError, match="use the engine's new_cache"):
            engine.decode(torch.tensor([1]), foreign)
    with pytest.raises(LogitLockError, match="threads must be at least 1"):
        OnnxRuntimeEngine(exported("qwen2"), threads=0)


def test_weights_outside_the_bundle_are_refused(exported: Exported, tmp_path: Path) -> None:
    bundle = read_bundle(exported("qwen2"))
    model = onnx.load(bundle.model_path, load_external_data=False)
    for initializer in model.graph.initializer:
        for entry in initializer.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere.data"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(LogitLockError, match="not a file of this bundle"):
        onnxruntime_engine.load_graph(tmp_path / "model.onnx", files=bundle.info.files)


@needs_opset_24
def test_session_runs_the_exported_file_itself(exported: Exported) -> None:
    """What the engine runs in fp32 is the graph on disk: ONNX Runtime alone gives the same logits from it."""
    bundle = read_bundle(exported("chatglm2"))
    engine = OnnxRuntimeEngine(bundle, threads=1)
    cache = engine.new_cache(batch=1, capacity=8)
    step = cache.next_step(torch.arange(5)[None])
    feeds = {name: tensor.numpy() for name, tensor in step.tensors().items()}
    for i in range(engine.spec.layers):
        feeds[f"past.blocks.{i}.key"] = cache.key[i].numpy().copy()
        feeds[f"past.blocks.{i}.value"] = cache.value[i].numpy().copy()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(bundle.model_path), options, providers=["CPUExecutionProvider"])
    known = {i.name for i in session.get_inputs()}
    (logits,) = session.run(["logits"], {k: v for k, v in feeds.items() if k in known})
    assert torch.equal(torch.from_numpy(logits), engine.run(step, cache))
