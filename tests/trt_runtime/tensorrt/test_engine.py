"""The TensorRT engine without a GPU: its decisions, bindings and errors, and whole generations on a plan whose
part is played by ONNX Runtime (`fake_plan.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import debug.sides
import refmodels
from export.bundle import export_model
from refmodels.errors import LogitLockError
from refmodels.recorder import Recorder
from refmodels.taps import tap_names
from tests.support.command import logitlock
from tests.support.goldens import GOLDENS, case_source, needs_opset_24
from tests.support.marks import quick_first
from tests.support.tensorrt_report import check_engine, equal_start, page
from trt_runtime import open as engines
from trt_runtime.bundle import AttentionMode, Bundle, EngineInfo, Profile, read_bundle
from trt_runtime.generation import GenerationConfig, generate
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine
from trt_runtime.open import open_engine
from trt_runtime.tensorrt import engine as tensorrt_engine
from trt_runtime.tensorrt.engine import (
    TensorRTEngine,
    check_device,
    check_package,
    choose_profile,
    load_plan,
    pad_slots,
)
from trt_runtime.torch_gpu.engine import TorchEngine

try:
    from tests.support.fake_plan import FakeContext, FakeEngine, FakeStream, add_engine
    from trt_runtime.tensorrt.api import IS_RTX, package_version
except LogitLockError as error:
    pytest.skip(str(error), allow_module_level=True)

MAX_SEQ, MAX_INPUT, MAX_BATCH = 48, 12, 3
PROFILES = [
    Profile(name="prefill", batch=[1, MAX_BATCH], tokens=[1, MAX_INPUT], capacity=[MAX_SEQ, MAX_SEQ]),
    Profile(name="decode", batch=[1, MAX_BATCH], tokens=[1, 1], capacity=[MAX_SEQ, MAX_SEQ]),
]
BUILT = EngineInfo(
    backend="tensorrt", package=package_version(), max_batch=MAX_BATCH, max_input=MAX_INPUT, max_seq=MAX_SEQ,
    taps_plan=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """A golden case in fp32 whose bundle.json says that it has a TensorRT engine; its plans are no plans."""
    root = tmp_path_factory.mktemp("bundles")

    def bundle(case: str) -> Bundle:
        directory = root / case
        if not directory.exists():
            export_model(case_source(case), precision="fp32", output=directory, max_seq=MAX_SEQ, backend="onnxruntime")
            add_engine(directory, BUILT, PROFILES)
        return read_bundle(directory)

    return bundle


@pytest.fixture
def opened(bundles: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], TensorRTEngine]:
    """An engine whose plans are played by ONNX Runtime, on the CPU."""
    device(monkeypatch)
    monkeypatch.setattr(tensorrt_engine, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(tensorrt_engine, "CudaStream", FakeStream)

    def engine(case: str, bundle: Bundle | None = None) -> TensorRTEngine:
        bundle = bundle or bundles(case)
        player = OnnxRuntimeEngine(bundle, threads=1)

        def load(directory: Path, name: str, built: EngineInfo) -> FakeEngine:
            return FakeEngine(player._session("tapped" if "taps" in name else "plain").session, bundle.info)

        monkeypatch.setattr(tensorrt_engine, "load_plan", load)
        return TensorRTEngine(bundle)

    return engine


def device(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (8, 9)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU at all")


def fake(engine: TensorRTEngine, *, tapped: bool = False) -> tuple[list[FakeContext], FakeStream]:
    plan: Any = engine._plans[tapped]
    return plan._engine.contexts, plan._stream


def random_ids(engine: Any, batch: int, tokens: int) -> Tensor:
    return torch.randint(0, engine.spec.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))


# What is decided without a GPU


@pytest.mark.parametrize(("slots", "padded"), [(1, 256), (256, 256), (257, 512), (900, 1000), (1000, 1000)])
def test_masks_are_padded_to_buckets_within_the_cache(slots: int, padded: int) -> None:
    mask = torch.ones(2, slots, dtype=torch.int64)
    found = pad_slots(mask, 1000)
    assert found.shape == (2, padded) and found.dtype == torch.int64
    assert torch.equal(found[:, :slots], mask) and not found[:, slots:].any()


@pytest.mark.parametrize(("batch", "tokens", "profile"), [(1, 1, 1), (3, 1, 1), (1, 2, 0), (3, 12, 0)])
def test_one_token_takes_the_decode_profile(batch: int, tokens: int, profile: int) -> None:
    assert choose_profile(PROFILES, batch=batch, tokens=tokens) == profile
    assert choose_profile(PROFILES[::-1], batch=batch, tokens=tokens) == 1 - profile


@pytest.mark.parametrize(("batch", "tokens"), [(4, 1), (1, 13)])
def test_a_step_that_no_profile_serves_is_an_error(batch: int, tokens: int) -> None:
    with pytest.raises(LogitLockError, match=rf"a step of {batch} rows of {tokens} tokens is more than .*--max-input"):
        choose_profile(PROFILES, batch=batch, tokens=tokens)


@pytest.mark.parametrize(
    ("built", "message"),
    [
        ("tensorrt 11.4.0.106", r"another TensorRT package: built by tensorrt 11.4.0.106, installed is tensorrt_rtx 1"),
        ("tensorrt_rtx 1.5.0.114", r"another TensorRT version: built by tensorrt_rtx 1.5.0.114, .* export the bundle"),
    ],
)
def test_another_package_or_version_is_an_error(built: str, message: str) -> None:
    check_package("tensorrt_rtx 1.7.1.116", "tensorrt_rtx 1.7.1.116")
    with pytest.raises(LogitLockError, match=message):
        check_package(built, "tensorrt_rtx 1.7.1.116")


def test_another_device_is_an_error() -> None:
    members = {"NONE": 0, "CURRENT": 1, "SM75": 2, "SM89": 3, "SM120": 4}
    for_89 = dataclasses.replace(BUILT, compute_capabilities=["7.5", "8.9"])
    check_device(BUILT, (8, 9), members)
    check_device(BUILT, (12, 0), members)
    check_device(for_89, (7, 5), None)
    with pytest.raises(
        LogitLockError, match=r"does not serve .* compute capability 9\.0; it serves 7\.5, 8\.9, 12\.0;"
    ):
        check_device(BUILT, (9, 0), members)
    check_device(BUILT, (9, 0), None)
    with pytest.raises(LogitLockError, match=r"built for compute capability 7\.5, 8\.9, this GPU has 12\.0; export"):
        check_device(for_89, (12, 0), members)


@pytest.mark.skipif(not IS_RTX, reason="TensorRT-RTX is not what is installed")
def test_the_h200_is_refused_by_tensorrt_rtx(bundles: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, (9, 0))
    with pytest.raises(LogitLockError, match=r"does not serve this GPU of compute capability 9\.0; .*8\.9.*--engine"):
        TensorRTEngine(bundles("gpt_bigcode"))


def test_what_is_lacking_is_named(bundles: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundles("gpt_bigcode")
    with pytest.raises(LogitLockError, match="needs a CUDA GPU, and PyTorch finds none here"):
        TensorRTEngine(bundle)
    device(monkeypatch)
    without = dataclasses.replace(bundle, info=dataclasses.replace(bundle.info, engine=None))
    with pytest.raises(LogitLockError, match="has no TensorRT engine; export it with --backend tensorrt"):
        TensorRTEngine(without)
    other = dataclasses.replace(BUILT, package="tensorrt_rtx 1.4.0")
    with pytest.raises(LogitLockError, match="another TensorRT version"):
        TensorRTEngine(dataclasses.replace(bundle, info=dataclasses.replace(bundle.info, engine=other)))


@pytest.mark.skipif(not IS_RTX, reason="full TensorRT's libraries are not here")
def test_a_plan_that_tensorrt_refuses_is_an_error_with_its_reason(tmp_path: Path) -> None:
    """Really asks TensorRT-RTX, which needs a GPU to load any plan, and reads the header of a damaged one."""
    (tmp_path / "engine.plan").write_bytes(b"no plan at all" * 100)
    with pytest.raises(LogitLockError, match=r"TensorRT does not load .*engine\.plan: \S+.*; export the bundle again"):
        load_plan(tmp_path, "engine.plan", BUILT)
    unknown = dataclasses.replace(BUILT, plugins={"CachedAttention": "7"})
    with pytest.raises(
        LogitLockError, match=r"the plan needs the TensorRT plugin refmodels::CachedAttention version 7"
    ):
        load_plan(tmp_path, "engine.plan", unknown)
    with pytest.raises(LogitLockError, match=r"kernels\.bin"):
        load_plan(tmp_path, "engine.plan", dataclasses.replace(BUILT, plugins={"CachedAttention": "1"}))


# Whole runs


@needs_opset_24
@pytest.mark.parametrize(
    "case", quick_first(["qwen_ntk", "baichuan_13b", "gpt_bigcode", "starcoder2_sliding", "chatglm2"])
)
def test_generations_are_the_references(case: str, opened: Callable[[str], TensorRTEngine]) -> None:
    engine, reference = opened(case), TorchEngine(refmodels.load(case_source(case)))
    ids = random_ids(engine, 2, 20)
    prompts = [ids[0].tolist(), ids[1, :7].tolist()]
    config = GenerationConfig(max_new_tokens=16)
    found = generate(engine, None, prompts, config)
    expected = generate(reference, None, prompts, config)
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]
    contexts, stream = fake(engine)
    # The prompt is longer than --max-input: 12 + 8 tokens.  One context a profile, and one for the decode step that
    # repeats, which is captured once and then replayed.
    steps = [(c.profile, [s["input_ids"] for s in c.executed]) for c in contexts]
    assert steps == [(0, [(2, 12), (2, 8)]), (1, [(2, 1)]), (1, [(2, 1)] * 14)]
    assert stream.captured == 1
    assert len({c.memory for c in contexts}) == 1
    assert all(s["attention_mask"] == (2, MAX_SEQ) for c in contexts for s in c.executed)


@needs_opset_24
def test_caches_are_bound_in_place_at_their_full_capacity(opened: Callable[[str], TensorRTEngine]) -> None:
    engine = opened("qwen_ntk")
    cache = engine.new_cache(batch=2, capacity=5)
    assert cache.capacity == MAX_SEQ == engine.max_positions
    engine.prefill(random_ids(engine, 2, 5), cache)
    (context,) = fake(engine)[0]
    for i in range(engine.spec.layers):
        for part, tensors in (("key", cache.key), ("value", cache.value)):
            address = tensors[i].data_ptr()
            assert context.addresses[f"blocks.{i}.{part}"] == context.addresses[f"past.blocks.{i}.{part}"] == address
            assert tensors[i][:, :, :5].any() and not tensors[i][:, :, 5:].any()
    assert context.shapes["past.blocks.0.key"] == tuple(cache.key[0].shape)
    assert cache.lengths.tolist() == [5, 5]


@needs_opset_24
def test_logits_stay_and_other_caches_have_steps_of_their_own(opened: Callable[[str], TensorRTEngine]) -> None:
    engine = opened("gpt_bigcode")
    reference = TorchEngine(refmodels.load(case_source("gpt_bigcode")))
    ids = random_ids(engine, 2, 4)
    caches = [engine.new_cache(batch=1, capacity=30) for _ in range(2)]
    theirs = [reference.new_cache(batch=1, capacity=30) for _ in range(2)]
    for row in range(2):
        engine.prefill(ids[row : row + 1], caches[row])
        reference.prefill(ids[row : row + 1], theirs[row])
    kept = []
    for step in range(6):
        for row in range(2):
            token = ids[row : row + 1, step % 4]
            expected = reference.decode(token, theirs[row])
            logits = engine.decode(token, caches[row])
            kept.append((logits, logits.clone()))
            assert (logits - expected).abs().max() <= 1e-5
    assert all(torch.equal(logits, before) for logits, before in kept)
    contexts, stream = fake(engine)
    assert stream.captured == 2
    assert [c.profile for c in contexts] == [0, 1, 1, 1]


@needs_opset_24
def test_only_so_many_steps_are_kept(opened: Callable[[str], TensorRTEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trt_runtime.tensorrt.plan.KEPT_STEPS", 2)
    engine = opened("gpt_bigcode")
    for _ in range(2):
        for tokens in (2, 3, 4):
            engine.prefill(random_ids(engine, 1, tokens), engine.new_cache(batch=1, capacity=8))
    plan: Any = engine._plans[False]
    assert len(plan._steps) == 2
    assert fake(engine)[1].captured == 0


@needs_opset_24
def test_a_step_that_cannot_be_captured_yet_runs_without_a_graph(opened: Callable[[str], TensorRTEngine]) -> None:
    engine = opened("gpt_bigcode")
    cache = engine.new_cache(batch=1, capacity=30)
    ids = random_ids(engine, 1, 4)
    FakeContext.is_stream_capturable, before = (lambda self, stream: False), FakeContext.is_stream_capturable  # type: ignore[method-assign,assignment]
    try:
        for step in range(4):
            engine.decode(ids[:, step], cache)
    finally:
        FakeContext.is_stream_capturable = before  # type: ignore[method-assign]
    assert fake(engine)[1].captured == (0 if IS_RTX else 1)
    engine.decode(ids[:, 0], cache)
    assert fake(engine)[1].captured == 1


@needs_opset_24
@pytest.mark.parametrize("case", quick_first(["qwen_ntk", "gpt_bigcode"]))
def test_taps_are_the_references(case: str, opened: Callable[[str], TensorRTEngine]) -> None:
    engine, reference = opened(case), TorchEngine(refmodels.load(case_source(case)))
    assert engine.tap_names == tap_names(engine.spec)
    ids = random_ids(engine, 2, 9)
    caches = [e.new_cache(batch=2, capacity=12) for e in (engine, reference)]
    for step in range(3):
        ours, theirs = Recorder(), Recorder()
        if step == 0:
            engine.prefill(ids, caches[0], recorder=ours)
            reference.prefill(ids, caches[1], recorder=theirs)
        else:
            engine.decode(ids[:, step], caches[0], recorder=ours)
            reference.decode(ids[:, step], caches[1], recorder=theirs)
        assert list(ours.tensors) == list(engine.tap_names)
        for name, expected in theirs.tensors.items():
            assert ours.tensors[name].shape == expected.shape, name
            assert (ours.tensors[name] - expected).abs().max() <= 1e-4, name
    assert fake(engine, tapped=True)[1].captured == 0
    with pytest.raises(LogitLockError, match="substitutes embed"):
        engine.decode(ids[:, 0], caches[0], recorder=Recorder(substitutes={"embed": torch.zeros(2, 1, 1)}))


def test_taps_need_their_plan(bundles: Callable[[str], Bundle], opened: Callable[..., TensorRTEngine]) -> None:
    bundle = bundles("gpt_bigcode")
    info = dataclasses.replace(bundle.info, engine=dataclasses.replace(BUILT, taps_plan=False))
    engine = opened("gpt_bigcode", dataclasses.replace(bundle, info=info))
    with pytest.raises(LogitLockError, match="shows no intermediate tensors; export it with --taps"):
        engine.prefill(random_ids(engine, 1, 3), engine.new_cache(batch=1, capacity=4), recorder=Recorder())


def test_limits_are_errors(opened: Callable[[str], TensorRTEngine]) -> None:
    engine = opened("gpt_bigcode")
    with pytest.raises(LogitLockError, match=r"a batch of 4 rows is more than the 3 .*--max-batch"):
        engine.new_cache(batch=4, capacity=8)
    with pytest.raises(LogitLockError, match=r"a cache of 49 tokens is longer than the 48 .*--max-seq"):
        engine.new_cache(batch=1, capacity=49)
    cache = engine.new_cache(batch=1, capacity=48)
    with pytest.raises(LogitLockError, match="a step of 1 rows of 13 tokens"):
        engine.run(cache.next_step(random_ids(engine, 1, 13)), cache)
    other = TorchEngine(refmodels.load(case_source("gpt_bigcode"))).new_cache(batch=1, capacity=8)
    with pytest.raises(LogitLockError, match=r"this cache .* is not one of .* use the engine's new_cache"):
        engine.run(other.next_step(random_ids(engine, 1, 3)), other)


@needs_opset_24
def test_what_tensorrt_refuses_at_run_time_is_an_error(opened: Callable[[str], TensorRTEngine]) -> None:
    engine = opened("gpt_bigcode")
    cache = engine.new_cache(batch=1, capacity=8)
    engine.prefill(random_ids(engine, 1, 3), cache)
    (context,) = fake(engine)[0]
    context.fails = True
    with pytest.raises(LogitLockError, match="TensorRT cannot run the step: it gives no reason"):
        engine.prefill(random_ids(engine, 1, 2), cache)
    assert cache.lengths.tolist() == [3]
    context.engine.info = dataclasses.replace(context.engine.info, profiles=PROFILES[1:])
    with pytest.raises(LogitLockError, match=r"TensorRT does not take input_ids of \[1, 2\]"):
        engine.prefill(random_ids(engine, 1, 2), cache)


@pytest.mark.parametrize("name", ["input_ids", "past.blocks.1.key", "logits", "blocks.0.value"])
def test_a_plan_of_another_model_is_an_error(name: str, opened: Callable[[str], TensorRTEngine]) -> None:
    engine = opened("gpt_bigcode")
    plan: Any = engine._plans[False]
    plan._engine.names.remove(name)
    with pytest.raises(LogitLockError, match=f"does not fit its bundle.json: .* differ in {name}"):
        type(plan)(
            plan._engine,
            step_inputs=plan._step_inputs,
            outputs=["logits"],
            caches=[n for n in plan._engine.outputs if n != "logits"],
            device=engine.device,
            stream=FakeStream(),
        )


# Which engine opens a bundle


@pytest.mark.slow
def test_auto_takes_tensorrt_where_it_can_run(
    bundles: Callable[[str], Bundle], opened: Callable[[str], TensorRTEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened("gpt_bigcode")
    bundle = bundles("gpt_bigcode")
    without = dataclasses.replace(bundle, info=dataclasses.replace(bundle.info, engine=None))
    assert isinstance(open_engine(bundle), TensorRTEngine)
    assert isinstance(open_engine(bundle, engine="tensorrt"), TensorRTEngine)
    assert isinstance(open_engine(bundle, engine="onnxruntime", threads=1), OnnxRuntimeEngine)
    assert isinstance(open_engine(bundle, emulate_rounding=True), OnnxRuntimeEngine)
    assert isinstance(open_engine(bundle, threads=1), OnnxRuntimeEngine)
    assert isinstance(open_engine(without), OnnxRuntimeEngine)
    with pytest.raises(LogitLockError, match="are for --engine onnxruntime"):
        open_engine(bundle, engine="tensorrt", threads=1)
    with pytest.raises(LogitLockError, match="--engine is 'cuda'; it must be one of auto, tensorrt, onnxruntime"):
        open_engine(bundle, engine="cuda")  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(open_engine(bundle), OnnxRuntimeEngine)
    with pytest.raises(LogitLockError, match="needs a CUDA GPU"):
        open_engine(bundle, engine="tensorrt")
    assert not engines.serves_tensorrt(bundle)


@pytest.mark.slow
@needs_opset_24
def test_diff_takes_the_same_engine(bundles: Callable[[str], Bundle], opened: Callable[[str], TensorRTEngine]) -> None:
    opened("gpt_bigcode")
    bundle, model = bundles("gpt_bigcode"), str(GOLDENS / "gpt_bigcode")
    result = debug.sides.diff_bundle(bundle.directory, model, steps=2)
    assert result.engine.startswith(f"TensorRT ({package_version()}) in float32") and result.verdict == "aligned"
    assert {error.tap for error in result.taps} == set(tap_names(bundle.spec))
    result = debug.sides.diff_bundle(bundle.directory, model, steps=2, engine="onnxruntime")
    assert result.engine.startswith("ONNX Runtime")


@pytest.mark.slow
def test_the_verbs_offer_the_engine(bundles: Callable[[str], Bundle]) -> None:
    directory = bundles("gpt_bigcode").directory
    outcome = logitlock("generate", "--bundle", directory, "--prompt", "x", "--engine", "tensorrt")
    outcome.assert_bad_input("a TensorRT engine needs a CUDA GPU")
    diff = ("diff", "--bundle", directory, "--model", GOLDENS / "gpt_bigcode", "--steps", 1, "--json")
    logitlock(*diff, "--engine", "tensorrt").assert_bad_input("a TensorRT engine needs a CUDA GPU")
    outcome = logitlock("generate", "--model", "qwen", "--prompt", "x", "--engine", "onnxruntime")
    outcome.assert_bad_input("--engine are for --bundle")
    outcome = logitlock(*diff, "--engine", "onnxruntime")
    assert outcome.code == 0 and "ONNX Runtime" in outcome.out


@pytest.mark.tensorrt
@pytest.mark.slow
@needs_opset_24
@pytest.mark.skipif(not IS_RTX, reason="full TensorRT builds on a GPU only")
@pytest.mark.parametrize(("family", "attention"), [("gpt", "plugin"), ("qwen", "decomposed")])
def test_the_gpu_suite_without_its_gpu(
    family: str, attention: AttentionMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real build and a real bundle; only the plan is played."""
    device(monkeypatch)
    monkeypatch.setattr(tensorrt_engine, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(tensorrt_engine, "CudaStream", FakeStream)

    def load(directory: Path, name: str, built: EngineInfo) -> FakeEngine:
        bundle = read_bundle(directory)
        assert bundle.info.engine == built and (directory / name).stat().st_size > 1000
        return FakeEngine(
            OnnxRuntimeEngine(bundle, threads=1)._session("tapped" if "taps" in name else "plain").session, bundle.info
        )

    monkeypatch.setattr(tensorrt_engine, "load_plan", load)
    row = check_engine(family, "fp32", attention, tmp_path / "bundle")
    assert row.tokens == row.of > 3 and row.verdict == "aligned" and row.margin_flips == 0
    assert row.captured and row.milliseconds > 0 and row.megabytes > 1
    text = page([row, dataclasses.replace(row, verdict="diverged", captured=False)], machine="no GPU")
    assert f"| {family} | fp32 | {attention} |" in text and "1 of 2 engines are aligned" in text
    assert equal_start([1, 2, 3], [1, 2, 4]) == 2 and equal_start([1, 2], [1, 2]) == 2
