"""Export: one file that onnx.checker, the ONNX reference evaluator and ONNX Runtime run as the reference does.

Tolerances in fp32 are 1e-5 of the largest logit or 1e-5, whichever is more: on the Baichuan-13B golden (logits up to
6.7) eager torch itself is 1.2e-5 away from fp64, more than the exported graph is (9.5e-6).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import refmodels
from export.bundle import default_output, export_model
from export.graph.external_data import WeightWriter
from export.graph.functions import make_functions
from export.graph.trace import build_graph
from refmodels.attention import AttentionFacts, AttentionInputs, inputs_of, node_inputs
from refmodels.dtypes import DTYPE_TABLE, DTYPES
from refmodels.errors import LogitLockError
from refmodels.ops import cached_attention
from refmodels.positions import build_tables
from refmodels.recorder import Recorder, recording
from refmodels.taps import tap_names
from tests.support.checkpoints import read_case, write_model
from tests.support.command import logitlock
from tests.support.goldens import CASES, FEATURES, TOYS, needs_opset_24, prompt_of, slow_but_two, source_of
from tests.support.graph_runs import TOLERANCE, Evaluator, Runtime, to_numpy, to_torch, worst_on_walk
from tests.support.marks import quick_first
from tests.support.paths import GOLDENS
from trt_runtime.bundle import read_bundle

pytestmark = needs_opset_24


@pytest.mark.parametrize("case", slow_but_two([*CASES, *TOYS]))
def test_every_runtime_agrees_with_the_reference(case: str, tmp_path: Path) -> None:
    source = source_of(case)
    plugin = export_model(source, precision="fp32", output=tmp_path / "plugin")
    decomposed = export_model(source, precision="fp32", attention="decomposed", output=tmp_path / "decomposed")
    for bundle in (plugin, decomposed):
        onnx.checker.check_model(str(bundle / "model.onnx"), full_check=True)
    for runner in (Runtime(plugin), Evaluator(plugin), Runtime(decomposed)):
        assert worst_on_walk(case, source, runner) <= 1


@pytest.mark.parametrize("case", quick_first(FEATURES))
def test_taps_are_values_of_the_graph(case: str, tmp_path: Path) -> None:
    source = source_of(case)
    decoder = refmodels.load(source)
    ids, mask = prompt_of(case, source)
    for attention in ("plugin", "decomposed"):
        bundle = export_model(source, precision="fp32", attention=attention, output=tmp_path / attention)
        assert tuple(read_bundle(bundle).info.taps) == tap_names(source.spec)
        caches = [decoder.new_cache(batch=len(ids), capacity=ids.shape[1]) for _ in range(2)]
        step = caches[0].next_step(ids, mask)
        recorder = Recorder()
        with recording(recorder):
            decoder.run(step, caches[0])
        values = Evaluator(bundle).run(step, caches[1])
        sizes = {"batch": len(ids), "tokens": ids.shape[1], "logit_tokens": ids.shape[1], "capacity": ids.shape[1]}
        for name in tap_names(source.spec):
            expected = recorder.tensors[name]
            declared = [sizes[d] if isinstance(d, str) else d for d in source.spec.taps[name].shape]
            assert declared == list(values[name].shape) == list(expected.shape), name
            # Padding rows are compared too: their context is 0 by definition, and nothing else of them differs.
            scale = max(1.0, float(expected.abs().max()))
            assert float((values[name] - expected).abs().max()) <= 2 * TOLERANCE * scale, name


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ["exact", "upstream"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("case", FEATURES)
def test_half_precision(case: str, precision: Any, numerics: Any, tmp_path: Path) -> None:
    """The file in half precision is as far from fp64 as the reference in that dtype is (up to the bias's rounding)."""
    source = source_of(case)
    bundle = export_model(source, precision=precision, numerics=numerics, output=tmp_path / "bundle")
    onnx.checker.check_model(str(bundle / "model.onnx"), full_check=True)
    dtype = DTYPES[precision]
    half = refmodels.load(source, dtype=dtype, numerics=numerics)
    truth = refmodels.load(source, dtype=torch.float64, numerics="exact")
    ids, mask = prompt_of(case, source)
    capacity = ids.shape[1] + 1
    caches = [d.new_cache(batch=len(ids), capacity=capacity) for d in (half, half, truth)]
    runner = Evaluator(bundle)
    for chunk, chunk_mask in ((ids, mask), (ids[:, :1], None)):
        step = caches[0].next_step(chunk, chunk_mask)
        expected = half.run(step, caches[0])[step.new_mask].double()
        true = truth.run(caches[2].next_step(chunk, chunk_mask), caches[2])[step.new_mask]
        logits = runner.run(step, caches[1])["logits"]
        assert logits.dtype == dtype and caches[1].key[0].dtype == dtype
        floor = float((expected - true).abs().max())
        assert float((logits[step.new_mask].double() - expected).abs().max()) <= 3 * floor


@pytest.mark.parametrize("numerics", quick_first(["exact", "upstream"]))
@pytest.mark.parametrize("precision", quick_first(["fp32", "bf16"]))
@pytest.mark.parametrize(
    "case", quick_first([*FEATURES, "baichuan_7b", "gpt_bigcode_mha_b1", "qwen2", "gpt2:eager_upcast"])
)
def test_attention_body_is_the_op(case: str, precision: Any, numerics: Any) -> None:
    """One node on random inputs with hidden slots and rows of unequal length: cached keys bit for bit in bf16."""
    case, _, other = case.partition(":")
    spec = source_of(case).spec
    if other:
        spec = replace(spec, attention=replace(spec.attention, upstream_arithmetic=other))
    a, dtype = spec.attention, DTYPES[precision]
    make = torch.Generator().manual_seed(0)
    batch, tokens, capacity, live = 2, 5, 256, 212
    tables = build_tables(spec, positions=capacity, numerics=numerics, dtype=dtype)
    cache = [torch.randn(batch, a.kv_heads, capacity, a.head_dim, generator=make).to(dtype) for _ in range(2)]
    visible = torch.ones(batch, live, dtype=torch.bool)
    visible[1, :3] = False
    inputs = {
        "qkv": torch.randn(batch, tokens, spec.qkv_width, generator=make).to(dtype),
        "past_key": cache[0],
        "past_value": cache[1],
        "cache_lengths": torch.tensor([207, 0]),
        "visible": visible,
    }
    positions = torch.arange(207, 212).expand(batch, tokens)
    if tables.rope_cos is not None and tables.rope_sin is not None:
        inputs |= {"cos": tables.rope_cos[positions], "sin": tables.rope_sin[positions]}
    if a.logn_seq_length is not None:
        inputs["query_scale"] = (1 + torch.rand(batch, tokens, generator=make)).to(
            dtype if numerics == "upstream" else torch.float32
        )
    if tables.alibi_slopes is not None:
        inputs["alibi_slopes"] = tables.alibi_slopes
    assert tuple(inputs) == node_inputs(spec)
    attributes: dict[str, Any] = {
        "heads": a.heads,
        "kv_heads": a.kv_heads,
        "scale": a.scale,
        "window": 4 * bool(a.window),
    }
    node = onnx.helper.make_node("CachedAttention", list(inputs), ["context", "key", "value"], "a", domain="refmodels")
    node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.items())
    body = make_functions(spec, precision=precision, numerics=numerics)["CachedAttention"]
    element = DTYPE_TABLE[precision].onnx
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [node],
            "one",
            [
                onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(to_numpy(t).dtype), t.shape)
                for n, t in inputs.items()
            ],
            [onnx.helper.make_tensor_value_info(n, element, None) for n in ("context", "key", "value")],
        ),
        functions=[body],
        opset_imports=[onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid("refmodels", 1)],
    )
    results = ReferenceEvaluator(model).run(None, {n: to_numpy(t) for n, t in inputs.items()})
    assert isinstance(results, list)
    context, key, value = (to_torch(r) for r in results)
    expected = cached_attention(
        AttentionInputs(**{row.name: inputs[row.node] for row in inputs_of(spec)}),
        AttentionFacts(
            **attributes,
            rotary_interleaved=spec.rope is not None and spec.rope.interleaved,
            arithmetic=a.upstream_arithmetic if numerics == "upstream" else "exact",
        ),
    )
    assert context.dtype == key.dtype == dtype
    if precision == "bf16":
        assert torch.equal(key, expected[1]) and torch.equal(value, expected[2])
        assert float((context.float() - expected[0].float()).abs().max()) <= 2**-7 * float(expected[0].abs().max())
    else:
        for mine, theirs in zip((context, key, value), expected, strict=True):
            assert float((mine - theirs).abs().max()) <= TOLERANCE
    assert bool((context[1, :3] == 0).all())


@pytest.mark.parametrize("case", quick_first(CASES, 3))
def test_nodes_by_type(case: str) -> None:
    spec = source_of(case).spec
    graph = build_graph(spec, precision="fp16")
    counts = Counter(node.op_type for node in graph.model.graph.node if node.domain == "refmodels")
    count = sum(tap.kind == "norm" for tap in spec.taps.values())
    norms = {"FusedRmsNorm": count} if spec.norm.kind == "rms" else {}
    assert counts == {"CachedAttention": spec.layers, **norms}
    assert {f.name for f in graph.model.functions} == set(counts)
    for node in graph.model.graph.node:
        if node.domain == "refmodels":
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert attributes["plugin_namespace"] == b"refmodels" and attributes["plugin_version"] == b"1"
            assert all(isinstance(value, (int, float, bytes)) for value in attributes.values())
    plain = build_graph(spec, precision="fp16", attention="decomposed").model
    assert {node.domain for node in plain.graph.node} == {""} and not plain.functions
    assert [o.domain for o in plain.opset_import] == [""]
    for model in (graph.model, plain):
        names = [node.name for node in model.graph.node]
        assert len(set(names)) == len(names) and all(names)
    assert f"blocks.{spec.layers - 1}.attn" in [node.name for node in graph.model.graph.node]


@pytest.mark.parametrize(
    ("case", "absent"),
    quick_first(
        [
            ("baichuan_13b", {"position_ids", "ntk_table"}),
            ("qwen2", {"ntk_table"}),
            ("gpt2", {"ntk_table"}),
            ("qwen_ntk", set()),
        ],
        3,
    ),
)
def test_inputs_and_outputs(case: str, absent: set[str], tmp_path: Path) -> None:
    source = source_of(case)
    info = read_bundle(export_model(source, precision="bf16", output=tmp_path / "bundle")).info
    steps = ["input_ids", "position_ids", "cache_lengths", "attention_mask", "ntk_table", "logit_index"]
    caches = [f"blocks.{i}.{part}" for i in range(source.spec.layers) for part in ("key", "value")]
    assert [i.name for i in info.inputs] == [n for n in steps if n not in absent] + [f"past.{n}" for n in caches]
    assert [o.name for o in info.outputs] == ["logits", *caches]
    assert info.inputs[-1].dtype == "bfloat16" and info.inputs[0].dtype == "int64"
    assert info.inputs[-1].shape == [
        "batch",
        source.spec.attention.kv_heads,
        "capacity",
        source.spec.attention.head_dim,
    ]


def test_layers_keep_their_own_scale_and_window() -> None:
    spec = source_of("starcoder2_sliding").spec
    spec = replace(spec, attention=replace(spec.attention, scale_by_layer=True, window=4, window_first_layer=1))
    nodes = [n for n in build_graph(spec, precision="fp32").model.graph.node if n.op_type == "CachedAttention"]
    attributes = [{a.name: onnx.helper.get_attribute_value(a) for a in n.attribute} for n in nodes]
    assert [a["window"] for a in attributes] == [0] + [4] * (spec.layers - 1)
    assert [a["scale"] for a in attributes] == pytest.approx([spec.scale(i) for i in range(spec.layers)])


def test_a_bundle_is_complete_and_export_is_deterministic(tmp_path: Path) -> None:
    first = export_model("qwen", precision="fp16", output=tmp_path / "a")
    second = export_model("qwen", precision="fp16", output=tmp_path / "b")
    files = sorted(p.name for p in first.iterdir())
    assert {"bundle.json", "config.json", "model.onnx", "model.onnx.data", "tokenizer.json"} <= set(files)
    assert files == sorted(p.name for p in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    assert refmodels.load_tokenizer(first).encode("7+5")


def test_weights_are_stored_as_matmul_wants_them(tmp_path: Path) -> None:
    source = source_of("gpt2")
    bundle = export_model(source, precision="fp32", output=tmp_path / "bundle")
    stored = {i.name: i for i in onnx.load(bundle / "model.onnx").graph.initializer}
    decoder = refmodels.load(source)
    assert set(stored) == {name for name, _ in decoder.named_parameters()}
    for name, parameter in decoder.named_parameters():
        linear = isinstance(decoder.get_submodule(name.rpartition(".")[0]), torch.nn.Linear)
        expected = parameter.t() if linear and parameter.ndim == 2 else parameter
        assert np.array_equal(onnx.numpy_helper.to_array(stored[name]), expected.numpy()), name
    shells = onnx.load(bundle / "model.onnx", load_external_data=False).graph.initializer
    assert all(int(e.value) % 4096 == 0 for i in shells for e in i.external_data if e.key == "offset")


@pytest.mark.slow
def test_large_tensors_are_written_in_blocks(tmp_path: Path) -> None:
    value = torch.arange(12 * 2**20, dtype=torch.float32).reshape(4096, 3072)
    written: list[int] = []
    with (tmp_path / "model.onnx.data").open("wb") as stream:
        writer = WeightWriter(stream, progress=written.append)
        protos = [writer.add("plain", value), writer.add("transposed", value, layout="transposed")]
    assert len(written) == 4 and sum(written) == 2 * value.nbytes
    for proto, expected in zip(protos, (value, value.t()), strict=True):
        onnx.external_data_helper.load_external_data_for_tensor(proto, str(tmp_path))
        assert np.array_equal(onnx.numpy_helper.to_array(proto), expected.numpy())


def test_max_seq_limits_the_tables(tmp_path: Path) -> None:
    source = source_of("qwen_ntk")
    small = build_graph(source.spec, precision="fp32", max_positions=64).tables
    large = build_graph(source.spec, precision="fp32", max_positions=128).tables
    assert small["logn"].shape == (64,) and large["logn"].shape == (128,)
    assert len(small["rope_cos"]) % 64 == 0 and len(small["rope_cos"]) < len(large["rope_cos"])
    bundle = export_model(source, precision="fp32", max_seq=64, output=tmp_path / "bundle")
    assert read_bundle(bundle).info.max_positions == 64
    stored = {
        i.name: list(i.dims) for i in onnx.load(bundle / "model.onnx", load_external_data=False).graph.initializer
    }
    assert stored["rope_cos"] == list(small["rope_cos"].shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp9"}, "--precision is 'fp9'; it must be one of fp32, fp16, bf16, int8, int4, int4-awq, "),
        ({"attention": "flash"}, "--attention is 'flash'; it must be one of plugin, decomposed, native"),
        ({"numerics": "fast"}, "--numerics is 'fast'; it must be one of exact, upstream"),
        ({"max_seq": 0}, "--max-seq is 0; it must be at least 1"),
        ({"max_seq": 10**6}, "--max-seq is 1000000; .* has 64 learned positions"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(LogitLockError, match=message):
        export_model(source_of("gpt2"), **{"precision": "fp32", "output": tmp_path / "out", **options})
    assert not list(tmp_path.iterdir())


def test_output_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LogitLockError, match="is not empty"):
        export_model(source_of("gpt2"), precision="fp32", output=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    bundle = export_model(source_of("gpt2"), precision="fp32", output=tmp_path / "bundle")
    export_model(source_of("gpt2"), precision="fp16", output=bundle, overwrite=True)
    assert read_bundle(bundle).info.precision == "fp16"


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(step: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_model(source_of("qwen2"), precision="fp32", output=tmp_path / "out", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    export_model(
        source_of("qwen2"), precision="fp32", output=tmp_path / "out", progress=lambda *state: seen.append(state)
    )
    assert {step for step, _, _ in seen} == {"weights"} and seen[-1][1] == seen[-1][2]
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_all_chat_templates_come_along(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", *read_case("qwen2_b1")[:2])
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(name)
    bundle = export_model(model, precision="int8", output=tmp_path / "out")
    for folder in (bundle, read_bundle(bundle).quantized_path):
        assert folder is not None
        for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
            assert (folder / name).read_text() == name


def test_weights_too_large_for_fp16(tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen2_b1")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    model = write_model(tmp_path / "model", config, tensors)
    with pytest.raises(LogitLockError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .*does not fit in float16"):
        export_model(model, precision="fp16", output=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    export_model(model, precision="bf16", output=tmp_path / "out")


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    arguments = ["--model", GOLDENS / "qwen2_b1", "--precision", "fp16", "--output", tmp_path / "out"]
    done = logitlock("export", *arguments, "--json")
    assert done.code == 0
    result = json.loads(done.out)
    assert result["precision"] == "fp16" and read_bundle(result["bundle"]).info.model == "qwen2_b1"
    logitlock("export", *arguments).assert_bad_input("is not empty")
    assert "Example: logitlock export" in logitlock("export", "--help").out


def test_default_output() -> None:
    assert default_output("qwen", "fp16") == Path("engines/qwen-fp16")
    assert default_output("Qwen/Qwen-7B", "bf16") == Path("engines/Qwen-7B-bf16")
