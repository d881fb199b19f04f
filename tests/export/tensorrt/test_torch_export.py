"""`--backend torch-tensorrt`: real conversions and builds on this machine, in a process of their own.

Networks are run by `network_interpreter`, next to the reference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

import refmodels
from export.graph.trace import build_graph
from refmodels.errors import LogitLockError
from refmodels.ops import fused_rms_norm
from refmodels.spec import ModelSpec
from refmodels.taps import tap_names
from tests.support.command import logitlock
from tests.support.goldens import FEATURES, GOLDENS, TOYS, prompt_of, source_of
from tests.support.native_plan import FUSED, check_plan
from tests.support.once import made_once, shared_root
from tests.support.paths import ROOT
from trt_runtime.bundle import read_bundle
from trt_runtime.plan_layers import read_layers

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
from export.tensorrt import torch_converters
from export.tensorrt import torch_export as torch_tensorrt
from export.tensorrt.build import fix_capacity
from tests.support.network_interpreter import TOLERANCE, Interpreter, random_step, worst_difference
from trt_runtime.tensorrt.api import IS_RTX, LOGGER, package_version, trt

SLOTS = 48
# Case, precision and whether a plan with taps is built as well: every family, precision and position scheme.  A toy has
# the same structure as the golden case of its family, but more layers: its conversion takes twice the time.
JOBS = [
    ("chatglm2", "fp16", False),
    ("toy:qwen", "fp16", False),
    ("baichuan2_7b", "bf16", False),
    ("gpt2", "fp16", False),
    ("qwen_ntk_cross_b1", "fp32", False),
    ("baichuan_13b", "fp16", True),
    ("gpt_bigcode", "fp16", False),
    ("starcoder2_sliding", "fp16", False),
]
NAMES = [job[0] for job in JOBS]
# bf16 constants cannot be read from a network.
NUMERIC = [job[0] for job in JOBS if job[1] != "bf16"]


def fixed_graph(spec: ModelSpec, precision: Any) -> onnx.ModelProto:
    model = build_graph(spec, precision=precision, attention="native", max_positions=SLOTS).model
    fix_capacity(model, SLOTS)
    return model


# torch.export


@pytest.mark.slow
@pytest.mark.parametrize("case", (*FEATURES, "qwen3_yarn_b1"))
def test_the_exported_program_is_the_reference(case: str) -> None:
    """Bit for bit, in shapes unlike those of the export: a prompt with padding, one token, a chunk."""
    source = source_of(case)
    decoder = refmodels.load(source)
    decoder.prepare_tables(SLOTS)
    program = torch_tensorrt.export_decoder(decoder, fixed_graph(source.spec, "fp32"))
    calls = Counter(node.target for node in program.graph.nodes if node.op == "call_function")
    ops = torch.ops.refmodels
    count = sum(made.kind == "norm" for made in source.spec.taps.values())
    norms = count if source.spec.norm.kind == "rms" else 0
    assert calls[ops.cached_attention_functional.default] == source.spec.layers
    assert calls[ops.fused_rms_norm.default] == norms
    assert calls[ops.tap.default] == len(tap_names(source.spec))
    assert all(spec.kind.name == "USER_OUTPUT" for spec in program.graph_signature.output_specs), "no side effects"

    ids, mask = prompt_of(case, source)
    steps = [(ids, mask), (ids[:, :1], None), (ids[:, 1:4], None)]
    mine, theirs = (decoder.new_cache(batch=len(ids), capacity=SLOTS) for _ in range(2))
    run = program.module()
    for chunk, chunk_mask in steps:
        step = mine.next_step(chunk, chunk_mask, last_logits_only=chunk_mask is None)
        before = [cache.clone() for cache in theirs.key]
        logits, keys, values = run(past_key=theirs.key, past_value=theirs.value, **step.tensors())
        assert all(map(torch.equal, theirs.key, before)), "the program does not touch its inputs"
        theirs.key, theirs.value = list(keys), list(values)
        assert torch.equal(logits, decoder.run(step, mine))
        assert all(map(torch.equal, mine.key + mine.value, theirs.key + theirs.value))
        theirs.advance(step)


# Conversions


@pytest.fixture(scope="session")
def site() -> Path:
    """Torch-TensorRT beside the virtual environment: its pins would replace the TensorRT in it."""
    version = torch.__version__.partition("+")[0]

    def install(draft: Path) -> None:
        packages = [f"torch-tensorrt-rtx=={version}", "dllist"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--retries=1", "--timeout=20", "--no-deps"]
        done = subprocess.run([*pip, "--target", draft, *packages], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"Torch-TensorRT cannot be installed: {done.stderr.strip().rpartition(chr(10))[2]}")

    return made_once(ROOT / ".venv-torch-tensorrt" / version, install)


@pytest.fixture(scope="session")
def converted(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a bundle for every job, and what the worker saw of its network."""
    return made_once(shared_root(tmp_path_factory) / "torch_tensorrt", lambda draft: convert(site, draft))


def convert(site: Path, directory: Path) -> None:
    jobs = []
    for case, precision, taps in JOBS:
        output = directory / case
        if case in NUMERIC:
            torch.save(random_step(source_of(case).spec, slots=SLOTS), output.with_suffix(".inputs.pt"))
        meta = GOLDENS / case / "meta.json"
        options = {"precision": precision, "taps": taps, "max_batch": 2, "max_input": 16, "max_seq": SLOTS}
        jobs.append(
            {
                "model": case.removeprefix("toy:") if case in TOYS else str(GOLDENS / case),
                "variant": json.loads(meta.read_text()).get("variant") if meta.is_file() else None,
                "output": str(output),
                "options": options | {"compute_capabilities": ["8.9"]},
            }
        )
    (directory / "jobs.json").write_text(json.dumps(jobs))
    worker = [sys.executable, "-m", "tests.support.torch_tensorrt_worker", str(site), str(directory / "jobs.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(worker, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.tensorrt
@pytest.mark.slow
@pytest.mark.parametrize(("case", "precision", "taps"), JOBS, ids=NAMES)
def test_the_plan(case: str, precision: str, taps: bool, converted: Path) -> None:
    """Names and shapes of the graph, two profiles, fused attention, caches in place, layers that map to taps."""
    bundle = read_bundle(converted / case)
    engine = bundle.info.engine
    assert engine is not None and engine.backend == "torch-tensorrt" and engine.package == package_version()
    assert (engine.plugins, engine.compute_capabilities, engine.taps_plan) == ({}, ["8.9"], taps)
    plans = read_layers(bundle.directory / "engine.layers.json")
    assert [plan.plan for plan in plans] == ["engine.plan", "engine.taps.plan"][: 1 + taps]

    network = json.loads((converted / case).with_suffix(".network.json").read_text())
    outputs = tap_names(bundle.spec) if taps else [tensor.name for tensor in bundle.info.outputs]
    assert set(network["outputs"]) == set(outputs)
    types = {"INT64": "int64", "HALF": "float16", "BF16": "bfloat16", "FLOAT": "float"}
    for tensor in (*bundle.info.inputs, *bundle.info.outputs):
        dtype, *shape = network["inputs" if tensor in bundle.info.inputs else "outputs"][tensor.name]
        assert types[dtype] == tensor.dtype
        assert shape == [SLOTS if d == "capacity" else -1 if isinstance(d, str) else d for d in tensor.shape]
    assert set(network["inputs"]) == {tensor.name for tensor in bundle.info.inputs}

    kernels = {1: "_gemv_mha"} if precision == "fp32" else FUSED
    for plan in plans:
        check_plan(bundle.spec, Counter(network["layers"]), plan.layers, kernels=kernels)
        assert sum(bool(layer.taps) for layer in plan.layers) >= 0.95 * len(plan.layers)
        assert {tap for layer in plan.layers for tap in layer.taps} == set(tap_names(bundle.spec))


@pytest.mark.tensorrt
@pytest.mark.slow
@pytest.mark.parametrize("case", NAMES)
def test_weights_are_in_the_plan_once(case: str, converted: Path) -> None:
    """Of the size that they have in the bundle's graph, and not in another type; TensorRT adds some padding."""
    bundle = read_bundle(converted / case)
    model = onnx.load(bundle.model_path, load_external_data=False)
    stored = sum(int(e.value) for i in model.graph.initializer for e in i.external_data if e.key == "length")
    for plan in read_layers(bundle.directory / "engine.layers.json"):
        assert stored <= plan.weight_bytes <= 1.01 * stored


@pytest.mark.tensorrt
@pytest.mark.slow
@pytest.mark.parametrize("case", NUMERIC)
def test_the_network_computes_what_the_reference_does(case: str, converted: Path) -> None:
    outputs, inputs = (torch.load((converted / case).with_suffix(f".{kind}.pt")) for kind in ("outputs", "inputs"))
    assert worst_difference(converted / case, inputs, outputs) < TOLERANCE


# Converters without Torch-TensorRT


@pytest.mark.tensorrt
@pytest.mark.parametrize("weight_in_float", [False, True])
def test_rms_norm_rounds_where_the_reference_does(weight_in_float: bool) -> None:
    """In fp16, where 1 / sqrt and a division differ by one rounding of fp32 at most: the same fp16 or its neighbour."""
    make = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=make).half() for shape in ((3, 7, 256), (256,)))
    builder = trt.Builder(LOGGER)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    layers = torch_converters.Layers(network, "norm")
    inputs = [network.add_input(name, trt.float16, shape) for name, shape in (("x", (-1, -1, 256)), ("weight", (256,)))]
    network.mark_output(torch_converters.rms_norm_layers(layers, *inputs, 1e-6, weight_in_float))
    (mine,) = Interpreter(network, wide=False).run({"x": x, "weight": weight}).values()
    agree = []
    for order in (weight_in_float, not weight_in_float):
        reference = fused_rms_norm(x, weight, eps=1e-6, weight_in_float=order)
        agree.append(float((mine == reference).float().mean()))
    assert agree[0] > 0.999 > 0.9 > agree[1], agree


@pytest.mark.tensorrt
@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen_ntk_cross_b1", "baichuan_13b", "chatglm2", "starcoder2_sliding"])
def test_plugins_are_called_as_in_the_graph(case: str) -> None:
    """On full TensorRT: the inputs and attributes that the nodes of the ONNX graph have, which the plugins parse."""
    spec = source_of(case).spec
    model = build_graph(spec, precision="fp16", max_positions=SLOTS).model
    fix_capacity(model, SLOTS)
    decoder = refmodels.load(source_of(case), dtype=torch.float16)
    decoder.prepare_tables(SLOTS)
    program = torch_tensorrt.export_decoder(decoder, model)
    converters: dict[Any, Any] = {}
    conversion = SimpleNamespace(
        DYNAMO_ATEN_CONVERTERS=converters,
        dynamo_tensorrt_converter=lambda op, **_: lambda converter: converters.update({op: converter}),
        converter_utils=SimpleNamespace(get_trt_tensor=lambda context, value, name: value),
    )
    ops = torch.ops.refmodels
    kinds = {
        "FusedRmsNorm": ops.fused_rms_norm.default,
        "CachedAttention": ops.cached_attention_functional.default,
    }
    torch_converters.register_converters(conversion, ops.tap.default, *kinds.values(), plugins=True)
    calls: list[tuple[str, int, dict[str, Any]]] = []

    class Network:
        def add_plugin_v3(self, inputs: Any, shapes: Any, plugin: Any) -> Any:
            assert len(inputs) == len(plugin.inputs())
            attributes = {name: getattr(plugin.attributes, name) for name in plugin.attributes.__dataclass_fields__}
            calls.append((plugin.NAME, len(inputs), attributes))
            return SimpleNamespace(get_output=lambda index: f"{plugin.NAME} {index}")

    context = SimpleNamespace(net=Network(), cpu_weights_reference_holder=[])
    for node in program.graph.nodes:
        if node.target in kinds.values():
            args = [value.meta["val"] if isinstance(value, torch.fx.Node) else value for value in node.args]
            outputs = converters[node.target](context, node.target, tuple(args), {}, node.name)
            assert outputs == ("FusedRmsNorm 0" if len(args) == 4 else [f"CachedAttention {i}" for i in range(3)])
    expected = []
    for onnx_node in model.graph.node:
        if onnx_node.op_type in kinds:
            values = {a.name: onnx.helper.get_attribute_value(a) for a in onnx_node.attribute}
            attributes = {name: value for name, value in values.items() if not name.startswith("plugin_")}
            expected.append((onnx_node.op_type, len(onnx_node.input), attributes))
    assert len(calls) == len(expected)
    for call, (name, inputs, attributes) in zip(calls, expected, strict=True):
        assert call[:2] == (name, inputs) and call[2] == pytest.approx(attributes, rel=1e-7)


# Errors


def torch_tensorrt_module(monkeypatch: pytest.MonkeyPatch, *, rtx: bool) -> None:
    module = ModuleType("torch_tensorrt")
    module.ENABLED_FEATURES = SimpleNamespace(tensorrt_rtx=rtx)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_tensorrt", module)


def test_torch_tensorrt_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    command = ("export", "--model", "qwen", "--backend", "torch-tensorrt", "--attention", "native")
    outcome = logitlock(*command, "--output", tmp_path / "bundle")
    outcome.assert_bad_input("which is not installed; run: pip install --no-deps torch-tensorrt-rtx==", "pins")
    assert not list(tmp_path.iterdir())


def test_torch_tensorrt_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "torch_tensorrt"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('Torch not compiled with CUDA enabled')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(LogitLockError, match="Torch not compiled with CUDA enabled; it needs an NVIDIA driver"):
        torch_tensorrt.import_torch_tensorrt()


def test_torch_tensorrt_is_for_the_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_tensorrt_module(monkeypatch, rtx=IS_RTX)
    assert torch_tensorrt.import_torch_tensorrt() is sys.modules["torch_tensorrt"]
    torch_tensorrt_module(monkeypatch, rtx=not IS_RTX)
    with pytest.raises(LogitLockError, match="is not for tensorrt_rtx"):
        torch_tensorrt.import_torch_tensorrt()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--attention", "plugin"), "TensorRT-RTX takes plugins from ONNX graphs only; use native"),
        (("--attention", "decomposed"), "cannot have --attention decomposed"),
        (("--attention", "native", "--numerics", "upstream"), "cannot have --numerics upstream"),
    ],
)
def test_modes_that_cannot_be_built(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_tensorrt_module(monkeypatch, rtx=IS_RTX)
    command = ("export", "--model", "qwen", "--backend", "torch-tensorrt", *options)
    logitlock(*command, "--output", tmp_path / "bundle").assert_bad_input(message)
    assert not list(tmp_path.iterdir())
