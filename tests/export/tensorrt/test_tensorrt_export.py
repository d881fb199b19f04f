"""`export` with a TensorRT plan: the bundle, its options, random weights, and cancelling it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import refmodels
from export.bundle import export_model
from export.graph.external_data import RANDOM_HASH, random_parameters
from export.options import ExportOptions
from export.tensorrt import backends as engine
from export.tensorrt.options import BuildOptions
from refmodels.checkpoints.load import empty_decoder, resolve
from refmodels.errors import LogitLockError
from refmodels.taps import tap_names
from tests.support.command import logitlock
from tests.support.goldens import GOLDENS, needs_opset_24, source_of
from trt_runtime.bundle import read_bundle
from trt_runtime.generation import GenerationConfig, generate
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine
from trt_runtime.plan_layers import read_layers
from trt_runtime.torch_gpu.engine import TorchEngine

CASE = GOLDENS / "qwen2_b1"
SPEC = resolve(CASE).spec


def builds(function: Any) -> Any:
    able = engine.default_backend(SPEC, attention="plugin", numerics="exact")[0] == "tensorrt"
    return pytest.mark.tensorrt(pytest.mark.skipif(not able, reason="TensorRT cannot build here")(function))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy that the README shows, as the command line makes it, with a plan for taps."""
    output = tmp_path_factory.mktemp("toy") / "qwen"
    arguments = ["--model", "qwen", "--max-batch", "2", "--max-input", "32", "--compute-capability", "8.9", "--taps"]
    done = logitlock("export", *arguments, "--output", output, "--json")
    assert done.code == 0 and json.loads(done.out)["backend"] == "tensorrt"
    return output


@pytest.mark.slow
@builds
def test_what_is_in_the_bundle(toy: Path) -> None:
    bundle = read_bundle(toy)
    info, spec = bundle.info, bundle.spec
    made = info.engine
    assert made is not None and made.backend == "tensorrt" and made.package.startswith("tensorrt_rtx 1.")
    assert (made.max_batch, made.max_input, made.max_seq) == (2, 32, spec.max_positions) and made.taps_plan
    assert made.compute_capabilities == ["8.9"] and made.plugins == {"CachedAttention": "1", "FusedRmsNorm": "1"}
    assert {"engine.plan", "engine.taps.plan", "engine.layers.json", "kernels.bin"} <= info.files.keys()
    assert [(p.name, p.batch, p.tokens, p.capacity) for p in info.profiles] == [
        ("prefill", [1, 2], [1, 32], [256, 256]),
        ("decode", [1, 2], [1, 1], [256, 256]),
    ]
    plain, tapped = read_layers(toy / "engine.layers.json")
    assert (plain.plan, tapped.plan) == ("engine.plan", "engine.taps.plan")
    for plan, outputs in ((plain, {"logits"}), (tapped, set(tap_names(spec)))):
        for profile in (0, 1):
            written = {t.name for layer in plan.layers if layer.profile == profile for t in layer.outputs}
            assert outputs <= written, f"{plan.plan} writes its outputs"
    assert not set(tap_names(spec)) <= {t.name for layer in plain.layers for t in layer.outputs}
    from trt_runtime.kernels.compiled import CompiledKernels

    kernels = CompiledKernels.load(toy / "kernels.bin")
    assert [target.capability for target in kernels.manifest.targets] == [89]


@builds
@needs_opset_24
def test_a_bundle_with_a_plan_runs_on_the_cpu(toy: Path) -> None:
    tokenizer = refmodels.load_tokenizer("qwen")
    config = GenerationConfig(max_new_tokens=12)
    ids = [tokenizer.encode("世界上第二高的山峰是哪座？")]
    expected = generate(TorchEngine(refmodels.load("qwen")), tokenizer, ids, config)
    assert generate(OnnxRuntimeEngine(toy), tokenizer, ids, config)[0].token_ids == expected[0].token_ids


@builds
def test_inspect_shows_the_engine(toy: Path) -> None:
    found = json.loads(logitlock("inspect", toy, "--json").out)
    assert found["engine"]["max_input"] == 32
    assert [plan["plan"] for plan in found["plans"]] == ["engine.plan", "engine.taps.plan"]
    assert all(plan["with_taps"] == sum(plan["layers"]) for plan in found["plans"])
    assert found["plans"][0]["types"][0]["PluginV3"] == 5 and found["plans"][0]["types"][1]["custom_layer"] == 11
    shown = " ".join(logitlock("inspect", toy).out.split())
    for text in ("tensorrt_rtx 1.", "8.9", "FusedRmsNorm 1, CachedAttention 1", "prefill", "custom_layer"):
        assert text in shown


@builds
def test_the_line_of_output_says_which_backend(tmp_path: Path) -> None:
    def run(*options: str) -> str:
        arguments = ["--model", CASE, "--attention", "native", "--overwrite", "--output", tmp_path / "out"]
        done = logitlock("export", *arguments, "--max-seq", 16, *options)
        assert done.code == 0 and len(done.out.splitlines()) == 1
        return done.out.strip()

    assert ", backend tensorrt (the default: tensorrt_rtx 1." in run()
    assert (tmp_path / "out" / "engine.plan").is_file() and not (tmp_path / "out" / "kernels.bin").exists()
    assert run("--backend", "onnxruntime").endswith(", backend onnxruntime")
    assert read_bundle(tmp_path / "out").info.engine is None


def test_default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, reason = engine.default_backend(SPEC, attention="plugin", numerics="upstream")
    assert backend == "onnxruntime" and "exact numerics only" in reason
    api = pytest.importorskip("trt_runtime.tensorrt.api", exc_type=LogitLockError)
    assert engine.default_backend(SPEC, attention="decomposed", numerics="upstream")[0] == "tensorrt"
    monkeypatch.setattr(api, "can_build", lambda: False)
    backend, reason = engine.default_backend(SPEC, attention="native", numerics="exact")
    assert backend == "onnxruntime" and "CUDA GPU" in reason
    with pytest.raises(LogitLockError, match="builds on a machine with a CUDA GPU"):
        export_model(CASE, precision="fp16", backend="tensorrt", output="never")


@pytest.mark.slow
def test_without_tensorrt_the_default_is_onnxruntime(tmp_path: Path) -> None:
    """A package that cannot be imported is as one that is not installed."""
    code = (
        "import runpy, sys; sys.modules['tensorrt'] = sys.modules['tensorrt_rtx'] = None\n"
        "runpy.run_module('export', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, "--model", str(CASE), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "backend onnxruntime (the default: TensorRT is not installed)" in done.stdout
    done = subprocess.run([*command, "--backend", "tensorrt", "--overwrite"], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'logitlock[tensorrt-rtx]'" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tvm"}, "--backend is 'tvm'; it must be one of onnxruntime, tensorrt, torch-tensorrt"),
        ({"max_seq": 0}, "--max-seq is 0; it must be at least 1"),
        ({"max_batch": 0}, "--max-batch is 0; it must be at least 1"),
        ({"max_input": -1}, "--max-input is -1; it must be at least 1"),
        ({"max_seq": 8, "max_input": 9}, "--max-input is 9, more than --max-seq, which is 8"),
        ({"workspace": 0}, "--workspace is 0 MiB"),
        ({"optimization_level": 6}, "--optimization-level is 6; it must be from 0 to 5"),
        ({"compute_capabilities": ["9.0"]}, r"--compute-capability is '9\.0'; tensorrt_rtx .* builds for 7\.5, 8\.0"),
        (
            {"compute_capabilities": ["sm_90"]},
            r"--compute-capability is 'sm_90'; tensorrt_rtx .* builds for 7\.5, 8\.0",
        ),
        ({"compute_capabilities": ["7.5"]}, r"kernels cannot be compiled for compute capability 7\.5"),
        ({"numerics": "upstream"}, "plugins compute --numerics exact only.*--attention decomposed"),
        ({"backend": "onnxruntime", "taps": True}, "--taps is for --backend tensorrt"),
        ({"backend": "onnxruntime", "workspace": 5}, "--workspace is for --backend tensorrt"),
        ({"backend": "onnxruntime", "compute_capabilities": ["8.9"]}, "--compute-capability is for --backend tensorrt"),
        ({"backend": "onnxruntime", "optimization_level": 3}, "--optimization-level is for --backend tensorrt"),
    ],
)
@builds
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    done: list[str] = []
    given = {"precision": "fp16", "backend": "tensorrt", "output": tmp_path / "out", **options}
    with pytest.raises(LogitLockError, match=message):
        export_model(CASE, progress=lambda what, *_: done.append(what), **given)
    assert not list(tmp_path.iterdir())
    assert not done or "kernels" in message, "refused before any work"


@builds
def test_unknown_warnings_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.tensorrt import build as tensorrt_build

    monkeypatch.setattr(tensorrt_build, "_HARMLESS", {"already exists": "", "Int64 binding: never": ""})
    made = logitlock("export", "--model", CASE, "--attention", "native", "--max-seq", "16", "--output", tmp_path / "b")
    lines = made.err.splitlines()
    assert made.code == 0 and all(line.startswith("warning: TensorRT said of engine.plan: ") for line in lines)
    assert any("Make sure input input_ids has Int64 binding" in line for line in lines)
    assert "warning of engine.plan: " in logitlock("inspect", tmp_path / "b").out


@builds
def test_kernels_need_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(LogitLockError, match="needs triton to compile its kernels: pip install triton"):
        export_model(CASE, precision="fp16", backend="tensorrt", output=tmp_path / "out", max_seq=16)
    assert not list(tmp_path.iterdir())


def test_default_limits() -> None:
    def limits(case: str, **given: Any) -> tuple[int, int, int]:
        options = ExportOptions(**{"precision": "fp16", "backend": "tensorrt", **given})
        build = options.build_options(source_of(case).spec)
        return build.max_batch, build.max_input, build.max_seq

    assert source_of("qwen_b1").spec.max_positions == 32768
    assert limits("qwen_b1") == (8, 2048, 4096)
    assert limits("qwen_b1", backend="onnxruntime") == (8, 2048, 32768)
    assert limits("qwen_b1", max_seq=20000, max_input=20000, max_batch=1) == (1, 20000, 20000)
    assert limits("qwen_b1", max_seq=100) == (8, 100, 100)
    assert limits("gpt2") == (8, 64, 64)


def test_random_weights() -> None:
    spec = source_of("baichuan_13b").spec
    drawn = dict(random_parameters(spec, dtype=torch.float32))
    assert {n: t.shape for n, t in drawn.items()} == {n: p.shape for n, p in empty_decoder(spec).named_parameters()}
    for name, tensor in drawn.items():
        middle = 1.0 if "norm" in name else 0.0
        assert abs(float(tensor.mean()) - middle) < 0.02, name
        assert tensor.numel() < 500 or float(tensor.std()) == pytest.approx(0.02, rel=0.2), name
    again = dict(random_parameters(spec, dtype=torch.float32))
    assert all(torch.equal(tensor, again[name]) for name, tensor in drawn.items())
    weights = [t for t in drawn.values() if t.ndim == 2 and t.shape == drawn["blocks.0.attn.out.weight"].shape]
    assert len(weights) > 1 and not torch.equal(*weights[:2])
    biases = dict(random_parameters(source_of("gpt2").spec, dtype=torch.bfloat16))
    assert abs(float(biases["blocks.0.attn.qkv.bias"].float().mean())) < 0.01
    assert biases["final_norm.weight"].dtype == torch.bfloat16 and float(biases["final_norm.weight"].mean()) > 0.9


@needs_opset_24
def test_random_weights_from_a_config_alone(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copyfile(CASE / "config.json", model / "config.json")
    with pytest.raises(LogitLockError):
        export_model(model, precision="fp16", output=tmp_path / "none")
    arguments = ["--model", model, "--random-weights", "--backend", "onnxruntime", "--precision", "fp32"]
    assert logitlock("export", *arguments, "--output", tmp_path / "out").code == 0
    bundle = read_bundle(tmp_path / "out")
    assert bundle.info.checkpoint_hash == RANDOM_HASH
    drawn = dict(random_parameters(bundle.spec, dtype=torch.float32))
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(bundle.model_path).graph.initializer}
    assert (stored["embed.weight"] == drawn["embed.weight"].numpy()).all()
    runtime = OnnxRuntimeEngine(bundle)
    logits = runtime.prefill(torch.tensor([[1, 2, 3]]), runtime.new_cache(batch=1, capacity=8))
    assert logits.isfinite().all() and 0.001 < float(logits.std()) < 10


@pytest.mark.slow
@builds
@pytest.mark.parametrize("attention", ["plugin", "native"])
@pytest.mark.parametrize("stop", [0, 100, 500, 800, 833])
def test_a_cancelled_build_leaves_no_plan(
    attention: Any, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.tensorrt import build as tensorrt_build
    from export.tensorrt.build import build_plan

    written: list[int] = []
    write = tensorrt_build._PlanWriter.write
    monkeypatch.setattr(
        tensorrt_build._PlanWriter, "write", lambda self, data: written.append(len(data)) or write(self, data)
    )
    source = source_of("qwen2_b1")
    bundle = export_model(source, precision="fp16", attention=attention, output=tmp_path / "out", max_seq=32)
    before = sorted(p.name for p in bundle.iterdir())
    reported = []

    def interrupt(what: str, done: int, total: int) -> None:
        reported.append(done)
        assert what == "building engine.plan" and total == 1000
        if done >= stop:
            raise KeyboardInterrupt

    options = BuildOptions(max_batch=2, max_input=8, max_seq=32)
    with pytest.raises(KeyboardInterrupt):
        build_plan(bundle, source.spec, options=options, progress=interrupt)
    assert sorted(p.name for p in bundle.iterdir()) == before
    assert reported == sorted(reported) and reported[-2:][0] < max(stop, 1)
    assert not written, "TensorRT gave up before it had a plan"
    # The process is as good as new.
    assert build_plan(bundle, source.spec, options=options).plan.is_file()


@builds
def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("building") and done > 400:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_model(
            CASE,
            precision="fp16",
            attention="native",
            backend="tensorrt",
            output=tmp_path / "out",
            max_seq=32,
            progress=interrupt,
        )
    assert not list(tmp_path.iterdir())


@builds
def test_nobody_waits_for_a_build_that_does_not_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    from export.tensorrt import build as tensorrt_build

    left: list[threading.Thread] = []
    monkeypatch.setattr(tensorrt_build.atexit, "register", lambda leave, thread: left.append(thread))
    monkeypatch.setattr(tensorrt_build, "_PATIENCE", 0.1)
    monitor, release = tensorrt_build._Monitor("plan", None), threading.Event()
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        tensorrt_build._in_thread(lambda: release.wait(60), monitor, None)
    assert monitor.cancelled and not monitor.step_complete("a phase", 0), "it stops at its next step"
    assert left[0].is_alive() and left[0].daemon
    release.set()
    left[0].join(60)
    assert not left[0].is_alive()


_EXPORT = """
import runpy
import export.cli
from export.bundle import export_model

def told(*arguments, progress, **options):
    def say(what, done, total):
        if what.startswith("building"):
            print(what, flush=True)
    return export_model(*arguments, progress=say, **options)

export.cli.export_model = told
runpy.run_module("export", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@builds
@pytest.mark.parametrize("wait", [0.0, 1.5])
def test_ctrl_c_ends_an_export_within_seconds_and_leaves_nothing(wait: float, tmp_path: Path) -> None:
    """0.3 GB of random weights: TensorRT is busy for some seconds, most of them in a single step."""
    model = tmp_path / "model"
    model.mkdir()
    config = json.loads((CASE / "config.json").read_text())
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 2}
    config |= {**sizes, "num_hidden_layers": 12, "vocab_size": 16000}
    (model / "config.json").write_text(json.dumps(config))
    work = tmp_path / "work"
    arguments = ["--model", str(model), "--random-weights", "--attention", "native", "--output", str(work / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", _EXPORT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None and process.stdout.readline().startswith("building"), process.stderr
    time.sleep(wait)
    assert process.poll() is None, "the build is still going on"
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    assert time.monotonic() - start < 15
    assert not list(work.iterdir()), "neither a bundle nor a draft"
