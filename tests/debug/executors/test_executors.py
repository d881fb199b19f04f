"""Executors of models that are not ours: transformers, ONNX files of other exporters, golden cases."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import refmodels
from debug.capture.prompts import Prompts, left_padded, random_prompts
from debug.comparison.compare import diff_engine
from debug.comparison.results import DiffResult
from debug.executors import candidates
from debug.executors.golden import GoldenEngine
from debug.executors.huggingface import HuggingFaceEngine
from debug.executors.name_map import NameMap, Source, read_name_map
from debug.executors.onnx_file import OnnxFileEngine
from debug.executors.open import FORMS, forms_help, numerics_of, open_executor
from debug.executors.propose import Proposal, propose_map
from export.bundle import export_model
from refmodels.errors import LogitLockError
from refmodels.recorder import Recorder
from refmodels.taps import is_cache_tap, tap_names
from tests.support import foreign
from tests.support.goldens import GOLDENS, case_source
from trt_runtime.engine import Engine
from trt_runtime.torch_gpu.engine import TorchEngine

pytest.importorskip("transformers")

NATIVE = ["gpt2", "gpt_bigcode", "gpt_bigcode_mha_b1", "starcoder2_sliding", "qwen2"]
# Of all that differs between these: learned positions, one shared kv head, heads grouped, RoPE and GQA.
EXPORTED = ["gpt2", "gpt_bigcode", "gpt_bigcode_mha_b1", "starcoder2", "qwen2"]
CULPRIT_OF_A_MODULE = ("local", "nonfinite")


def reference(case: str, **options: Any) -> TorchEngine:
    return TorchEngine(refmodels.load(case_source(case), **options))


def tolerance(spec: refmodels.ModelSpec, tap: str) -> float:
    """Relative L2 that two fp32 runs of one model may differ by.

    Each module sums at most K terms in an order of its own (a random walk of K roundings), and n of them follow each
    other.
    """
    longest = max(spec.hidden_size, spec.mlp.width, spec.attention.heads * spec.attention.head_dim)
    return 2**-24 * math.sqrt(longest * (tap_names(spec).index(tap) + 1))


def disagreements(
    engine: Engine, other: Engine, prompts: Prompts, *, steps: int = 4, between: Callable[..., None] | None = None
) -> list[str]:
    """Taps of `engine` that are not those of `other`, over a prefill and teacher-forced steps; shapes must be equal."""
    found = []
    size = {"batch": len(prompts.ids), "capacity": prompts.ids.shape[1] + steps}
    ours, theirs = engine.new_cache(**size), other.new_cache(**size)
    ids, mask = prompts.ids, prompts.mask
    for step in range(steps + 1):
        inputs = theirs.next_step(ids, mask)
        a, b = Recorder(), Recorder()
        logits = engine.run(inputs, ours, recorder=a)
        expected = other.run(inputs, theirs, recorder=b)
        assert set(a.tensors) == set(engine.tap_names) and torch.equal(a.tensors["logits"], logits)
        assert torch.equal(ours.lengths, theirs.lengths) and torch.equal(ours.mask, theirs.mask)
        for tap, tensor in a.tensors.items():
            cache = is_cache_tap(tap)
            pair = [t.transpose(1, 2) if cache else t for t in (tensor, b.tensors[tap])]
            assert pair[0].shape == pair[1].shape, tap
            real = inputs.attention_mask != 0 if cache else inputs.new_mask
            actual, right = (t[real].double() for t in pair)
            if not float((actual - right).norm()) <= tolerance(engine.spec, tap) * float(right.norm()):
                found.append(f"{step} {tap}")
        last = (prompts.mask.sum(1) - 1)[:, None] if step == 0 and not bool(mask[:, -1].all()) else None
        best = expected.argmax(-1)
        ids = best[:, -1:] if last is None else best.gather(1, last)
        mask = torch.ones_like(ids)
        if between is not None:
            between(ours, theirs)
    return found


def prompts_of(case: str) -> Prompts:
    """Three rows, padded on the left."""
    return random_prompts(case_source(case).spec.vocab_size, (20, 13, 9), seed=0)


def right_padded(case: str) -> Prompts:
    prompts = prompts_of(case)
    shift = [int(n) for n in prompts.mask.sum(1)]
    ids, mask = (torch.stack([t.roll(n) for t, n in zip(x, shift, strict=True)]) for x in (prompts.ids, prompts.mask))
    return Prompts(ids=ids, mask=mask, origin="")


def diff(engine: Engine, case: str, prompts: Prompts | None = None, *, steps: int = 1) -> DiffResult:
    truth = refmodels.load(case_source(case), dtype=torch.float64)
    rounded = refmodels.load(case_source(case), dtype=engine.dtype, numerics=numerics_of(engine))
    return diff_engine(engine, truth, rounded, prompts or prompts_of(case), steps=steps)


def first_wrong(result: DiffResult) -> str | None:
    return next((c.tap for c in result.culprits if c.kind in CULPRIT_OF_A_MODULE), None)


# transformers itself


@pytest.mark.parametrize("case", NATIVE)
def test_huggingface_shows_what_the_reference_computes(case: str) -> None:
    source = case_source(case)
    engine = HuggingFaceEngine(source.directory, source.spec)
    assert engine.tap_names == tap_names(source.spec)
    assert not disagreements(engine, reference(case, numerics="upstream"), prompts_of(case))
    assert "transformers" in engine.arithmetic and "float32, eager" in engine.arithmetic
    assert "shows no" not in engine.arithmetic


def test_huggingface_in_half_precision() -> None:
    engine = HuggingFaceEngine(GOLDENS / "qwen2", case_source("qwen2").spec, "bf16")
    upstream = reference("qwen2", dtype=torch.bfloat16, numerics="upstream")
    assert engine.dtype == torch.bfloat16 and not disagreements(engine, upstream, prompts_of("qwen2"), steps=2)


def test_huggingface_takes_the_cache_of_the_caller() -> None:
    def forget(*caches: refmodels.KVCache) -> None:
        for cache in caches:
            cache.key[0][:, :, 15] = 0.0
            cache.value[1][0, :, 17] *= -1.0

    engine = HuggingFaceEngine(foreign.huggingface("qwen2"), case_source("qwen2").spec)
    assert not disagreements(engine, reference("qwen2", numerics="upstream"), prompts_of("qwen2"), between=forget)


def test_huggingface_with_rows_of_different_lengths() -> None:
    engine = HuggingFaceEngine(foreign.huggingface("qwen2"), case_source("qwen2").spec)
    assert not disagreements(engine, reference("qwen2", numerics="upstream"), right_padded("qwen2"))
    case = "starcoder2_sliding"
    engine = HuggingFaceEngine(foreign.huggingface(case), case_source(case).spec)
    with pytest.raises(LogitLockError, match="pad the prompts on the left"):
        disagreements(engine, reference(case, numerics="upstream"), right_padded(case))


def test_logits_of_the_last_token_only(exported: Callable[..., Path]) -> None:
    """The final norm is then of that token too, which is another one in each row."""
    prompts, upstream = right_padded("qwen2"), reference("qwen2", numerics="upstream")
    size = {"batch": 3, "capacity": 20}
    expected = Recorder()
    last = {"last_logits_only": True}
    upstream.prefill(prompts.ids, upstream.new_cache(**size), prompts.mask, recorder=expected, **last)
    onnx_file = proposed(exported("qwen2"), "qwen2")[1]
    for engine in (HuggingFaceEngine(foreign.huggingface("qwen2"), upstream.spec), onnx_file):
        found = Recorder()
        logits = engine.prefill(prompts.ids, engine.new_cache(**size), prompts.mask, recorder=found, **last)
        assert logits.shape == (3, 1, upstream.spec.vocab_size)
        for tap in ("final_norm", "logits"):
            torch.testing.assert_close(found.tensors[tap], expected.tensors[tap], rtol=1e-4, atol=1e-4)


def test_sequence_first_and_a_cache_of_tuples() -> None:
    """Code in the layout of ChatGLM2's own: fused qkv, fused gate and up, [tokens, batch, width]."""
    spec = case_source("chatglm2").spec
    model = foreign.ChatGlm(spec, load_file(GOLDENS / "chatglm2" / "model.safetensors"))
    engine = HuggingFaceEngine(model, spec)
    assert engine.tap_names == tap_names(spec)
    assert not disagreements(engine, reference("chatglm2"), prompts_of("chatglm2"))


def test_taps_that_upstream_does_not_have_are_absent() -> None:
    class Renamed(nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.inner = mlp

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x)
            return result

    def rename(model: Any) -> None:
        model.model.layers[1].mlp = Renamed(model.model.layers[1].mlp)

    spec = case_source("qwen2").spec
    engine = HuggingFaceEngine(foreign.huggingface("qwen2", rename), spec)
    absent = [f"blocks.1.mlp.{part}" for part in ("gate", "up", "act", "out")]
    assert set(tap_names(spec)) - set(engine.tap_names) == set(absent)
    assert f"shows no {', '.join(absent)}" in engine.arithmetic
    assert not disagreements(engine, reference("qwen2", numerics="upstream"), prompts_of("qwen2"), steps=1)


def test_a_fault_in_transformers_is_found_at_its_tap() -> None:
    def fault(model: Any) -> None:
        model.transformer.h[1].attn.c_attn.bias[70] += 0.5

    def other(model: Any) -> None:
        model.model.layers[0].mlp.down_proj.weight.mul_(1.01)

    engine = HuggingFaceEngine(foreign.huggingface("gpt2", fault), case_source("gpt2").spec)
    assert first_wrong(diff(engine, "gpt2")) == "blocks.1.attn.qkv"
    engine = HuggingFaceEngine(foreign.huggingface("qwen2", other), case_source("qwen2").spec)
    assert first_wrong(diff(engine, "qwen2")) == "blocks.0.mlp.out"


def test_huggingface_refuses() -> None:
    spec = case_source("qwen2").spec
    with pytest.raises(LogitLockError, match=r"has no modules model\.layers\.N"):
        HuggingFaceEngine(foreign.huggingface("gpt2"), spec)
    with pytest.raises(LogitLockError, match=r"no config\.json"):
        HuggingFaceEngine(GOLDENS / "_tables", spec)
    with pytest.raises(LogitLockError, match="--trust-remote-code"):
        HuggingFaceEngine(GOLDENS / "chatglm2", case_source("chatglm2").spec)
    engine = HuggingFaceEngine(foreign.huggingface("qwen2"), spec)
    cache = engine.new_cache(batch=1, capacity=3)
    swap = Recorder(substitutes={"embed": torch.zeros(1, 3, spec.hidden_size)})
    with pytest.raises(LogitLockError, match="substitutes embed"):
        engine.run(cache.next_step(torch.ones(1, 3, dtype=torch.int64)), cache, recorder=swap)


# ONNX files of other exporters


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports a case once for each set of options."""
    root = tmp_path_factory.mktemp("onnx")

    def make(case: str, **options: Any) -> Path:
        path = root / f"{case}{''.join(f'-{k}{v}' for k, v in options.items())}.onnx"
        return path if path.exists() else foreign.export(foreign.huggingface(case), path, **options)

    return make


def proposed(path: Path, case: str) -> tuple[Proposal, OnnxFileEngine]:
    proposal = propose_map(path, refmodels.load(case_source(case)))
    return proposal, OnnxFileEngine(path, case_source(case).spec, proposal.names)


@pytest.mark.parametrize("case", EXPORTED)
def test_every_tap_is_found(case: str, exported: Callable[..., Path], tmp_path: Path) -> None:
    spec = case_source(case).spec
    proposal, engine = proposed(exported(case), case)
    # Of 27 to 29 taps not one may be missing or wrong; the cache outputs and the logits need no map.
    assert not proposal.unmatched and not proposal.ambiguous and engine.tap_names == tap_names(spec)
    assert set(proposal.confidence) == {tap for tap in tap_names(spec) if not is_cache_tap(tap)}
    assert min(proposal.confidence.values()) > 1 - 1e-9
    assert not disagreements(engine, reference(case, numerics="upstream"), prompts_of(case))
    proposal.write(tmp_path / "names.json")
    assert read_name_map(tmp_path / "names.json", spec) == proposal.names
    split = proposal.names.taps["blocks.0.attn.qkv"].to_json()
    assert isinstance(split, dict) and len(split.get("concat", [])) == 3 if case in ("qwen2", "starcoder2") else True


def _module(path: str) -> Callable[[Any], Any]:
    return lambda model: model.get_submodule(path)


def _weight(path: str, change: Callable[[Tensor], Tensor]) -> foreign.Change:
    def apply(model: nn.Module) -> None:
        parameter = model.get_parameter(path)
        parameter.copy_(change(parameter.clone()))

    return apply


def _values_for_keys(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj


def _gate_for_up(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def _scale(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 1.05


FAULTS: dict[str, tuple[foreign.Change, list[str]]] = {
    "nothing": (lambda model: None, []),
    "scale": (_scale, ["blocks.1.attn.context"]),
    # Of what follows nothing is like the right tensor: the module after it tells where it is.
    "transposed": (_weight("model.layers.0.self_attn.o_proj.weight", torch.t), ["blocks.0.attn.out"]),
    "rows": (_weight("model.layers.0.mlp.up_proj.weight", lambda w: w.roll(7, 0)), ["blocks.0.mlp.up"]),
    "gate rows": (_weight("model.layers.1.mlp.gate_proj.weight", lambda w: w.flip(0)), ["blocks.1.mlp.gate"]),
    "norm": (_weight("model.layers.1.input_layernorm.weight", lambda w: w.flip(0) - 1), ["blocks.1.attn_norm"]),
    "gate and up": (_gate_for_up, ["blocks.1.mlp.gate", "blocks.1.mlp.up"]),
    "key rows": (_weight("model.layers.1.self_attn.k_proj.weight", lambda w: w.roll(5, 0)), ["blocks.1.attn.qkv"]),
    # The map says truly which tensors are keys and values; what is cached under these names is not.
    "keys": (_values_for_keys, ["blocks.1.key", "blocks.1.value", "blocks.1.attn.context"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_map_of_a_faulty_graph_finds_the_fault(name: str, exported: Callable[..., Path], tmp_path: Path) -> None:
    change, wrong = FAULTS[name]
    path = foreign.export(foreign.huggingface("qwen2", change), tmp_path / "model.onnx")
    proposal, engine = proposed(path, "qwen2")
    assert not proposal.unmatched and not proposal.ambiguous
    if name not in ("keys", "gate and up"):
        # The same nodes, so the same names as without the fault.
        assert proposal.names == proposed(exported("qwen2"), "qwen2")[0].names
    if name == "transposed":
        assert proposal.summary() == "24 taps by a proposed map, unlike: blocks.0.attn.out"
    result = diff(engine, "qwen2")
    assert [c.tap for c in result.culprits if c.kind in CULPRIT_OF_A_MODULE] == wrong
    assert (result.verdict == "aligned") == (not wrong)


def test_a_graph_without_a_cache(exported: Callable[..., Path]) -> None:
    spec = case_source("qwen2").spec
    proposal, engine = proposed(exported("qwen2", cached=False), "qwen2")
    assert not engine.roles.past and "without a cache" in engine.arithmetic
    assert not proposal.unmatched and engine.tap_names == tap_names(spec)
    upstream = reference("qwen2", numerics="upstream")
    assert not disagreements(engine, upstream, prompts_of("qwen2"))
    assert not disagreements(engine, upstream, right_padded("qwen2"))


def test_a_graph_for_one_row(exported: Callable[..., Path]) -> None:
    for options in ({}, {"cached": False}):
        _, engine = proposed(exported("gpt2", batch=1, **options), "gpt2")
        assert "row by row" in engine.arithmetic
        upstream = reference("gpt2", numerics="upstream")
        assert not disagreements(engine, upstream, prompts_of("gpt2"))
        assert not disagreements(engine, upstream, right_padded("gpt2"))


def test_a_graph_for_one_row_that_sees_no_padding(exported: Callable[..., Path], tmp_path: Path) -> None:
    """As fused attention that takes a length: what is padded must not reach it."""
    import onnx

    model = onnx.load(exported("gpt2", batch=1))
    for node in model.graph.node:
        node.input[:] = ["all_seen" if name == "attention_mask" else name for name in node.input]
    one = onnx.helper.make_tensor("one", onnx.TensorProto.INT64, [1], [1])
    model.graph.node.insert(0, onnx.helper.make_node("ConstantOfShape", ["its_shape"], ["all_seen"], value=one))
    model.graph.node.insert(0, onnx.helper.make_node("Shape", ["attention_mask"], ["its_shape"]))
    onnx.save(model, tmp_path / "model.onnx")
    _, engine = proposed(tmp_path / "model.onnx", "gpt2")
    upstream = reference("gpt2", numerics="upstream")
    for prompts in (prompts_of("gpt2"), right_padded("gpt2")):
        assert not [d for d in disagreements(engine, upstream, prompts) if not d.startswith("0 embed")]


def test_fused_operators(tmp_path: Path) -> None:
    path = foreign.fused_graph(refmodels.load(case_source("qwen2")), tmp_path / "model.onnx")
    proposal, engine = proposed(path, "qwen2")
    # The last residual is inside a node.  That is one tap of 29.
    assert proposal.unmatched == ["blocks.1"] and not proposal.ambiguous and "row by row" in engine.arithmetic
    for prompts in (prompts_of("qwen2"), right_padded("qwen2")):
        assert not disagreements(engine, reference("qwen2"), prompts)
    result = diff(engine, "qwen2")
    assert first_wrong(result) is None, result.culprits


def test_a_fault_before_a_tap_that_is_not_there(tmp_path: Path) -> None:
    decoder = refmodels.load(case_source("qwen2"))
    weight = decoder.blocks[1].mlp.out.weight
    weight.copy_(weight.roll(3, 0))
    proposal, engine = proposed(foreign.fused_graph(decoder, tmp_path / "model.onnx"), "qwen2")
    assert proposal.unmatched == ["blocks.1"] and "unlike: blocks.1.mlp.out" in proposal.summary()
    assert first_wrong(diff(engine, "qwen2")) == "blocks.1.mlp.out"


def test_gate_and_up_in_one_projection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fused(nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.both = nn.Parameter(torch.cat((mlp.up_proj.weight, mlp.gate_proj.weight)))
            self.down = mlp.down_proj

        def forward(self, x: Tensor) -> Tensor:
            up, gate = (x @ self.both.t()).chunk(2, -1)
            result: Tensor = self.down(nn.functional.silu(gate) * up)
            return result

    def fuse(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp = Fused(layer.mlp)

    path = foreign.export(foreign.huggingface("qwen2", fuse), tmp_path / "model.onnx")
    _without_parts(monkeypatch)
    proposal, engine = proposed(path, "qwen2")
    width = case_source("qwen2").spec.mlp.width
    gate, up = (proposal.names.taps[f"blocks.1.mlp.{part}"] for part in ("gate", "up"))
    assert (gate.columns, up.columns) == ([width, 2 * width], [0, width]) and gate.value == up.value
    assert not disagreements(engine, reference("qwen2", numerics="upstream"), prompts_of("qwen2"), steps=1)


def test_query_key_and_value_by_head(exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    case = "gpt_bigcode_mha_b1"
    _without_parts(monkeypatch)
    proposal, engine = proposed(exported(case), case)
    assert proposal.names.taps["blocks.1.attn.qkv"].heads == 4 and not proposal.unmatched
    assert proposal.names.taps["blocks.1.attn.context"].transpose == [0, 2, 1, 3]
    assert not disagreements(engine, reference(case, numerics="upstream"), prompts_of(case), steps=1)


def _without_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a graph whose fused operators take the whole product: no value holds a part of it."""
    plausible = candidates.plausible
    moved = ("Slice", "Split", "Reshape", "Transpose")
    monkeypatch.setattr(candidates, "plausible", lambda v: plausible(v) and v.producer().op_type not in moved)


def test_sources() -> None:
    x = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    tensors = {"x": x, "flat": x.view(6, 4), "heads": x.view(2, 3, 2, 2).transpose(1, 2), "first": x.transpose(0, 1)}
    for source in (
        Source(value="x"),
        Source(value="flat"),
        Source(value="heads", transpose=[0, 2, 1, 3]),
        Source(value="first", transpose=[1, 0, 2]),
        Source(concat=[Source(value="x", columns=[0, 1]), Source(value="flat", columns=[1, 4])]),
    ):
        assert torch.equal(source.read(tensors, 2, 3), x)
    grouped = torch.stack([torch.arange(12.0) + 10 * i for i in range(2)])[:, None]
    # Two heads of width 2: (q0 k0 v0) (q1 k1 v1) become q0 q1 k0 k1 v0 v1.
    read = Source(value="g", heads=2).read({"g": grouped}, 2, 1)[0, 0]
    assert read.tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    with pytest.raises(LogitLockError, match=r"heads has shape \[2, 2, 3, 2\]; with \[2, 3\] tokens"):
        Source(value="heads").read(tensors, 2, 3)


def test_a_graph_in_half_precision(tmp_path: Path) -> None:
    path = foreign.export(foreign.huggingface("qwen2").half(), tmp_path / "half.onnx")
    proposal, engine = proposed(path, "qwen2")
    assert engine.dtype == torch.float16 and not proposal.unmatched
    rounded = OnnxFileEngine(path, engine.spec, proposal.names, emulate_rounding=True)
    assert "rounded to float16" in rounded.arithmetic
    for side in (engine, rounded):
        result = diff(side, "qwen2")
        assert first_wrong(result) is None, result.culprits
    recorder = Recorder()
    rounded.prefill(torch.ones(1, 9, dtype=torch.int64), rounded.new_cache(batch=1, capacity=9), recorder=recorder)
    assert {tensor.dtype for tensor in recorder.tensors.values()} == {torch.float16}


def test_roles_that_are_not_understood(exported: Callable[..., Path], tmp_path: Path) -> None:
    import onnx

    spec = case_source("qwen2").spec
    model = onnx.load(exported("qwen2"))
    renamed = {"input_ids": "a", "past_k_0": "b", "past_v_0": "c", "past_k_1": "d", "past_v_1": "e", "logits": "y"}
    # Outputs without names that tell come in the order of the inputs.
    renamed |= {"new_k_0": "o3", "new_v_0": "o2", "new_k_1": "o1", "new_v_1": "o0"}
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for value in (*model.graph.input, *model.graph.output):
        value.name = renamed.get(value.name, value.name)
    onnx.save(model, tmp_path / "renamed.onnx")
    with pytest.raises(LogitLockError) as caught:
        OnnxFileEngine(tmp_path / "renamed.onnx", spec)
    for part in ("no input of token ids", "the input a of int64", "the input e of float", '"inputs"', "input_ids"):
        assert part in str(caught.value)
    assert "logits" not in str(caught.value).split(". Say")[0], "an output of that width is recognized by its shape"
    roles = {"input_ids": "a", "blocks.0.key": "b", "blocks.0.value": "c", "blocks.1.key": "d", "blocks.1.value": "e"}
    (tmp_path / "names.json").write_text(json.dumps({"inputs": roles, "taps": {}}))
    names = read_name_map(tmp_path / "names.json", spec)
    engine = OnnxFileEngine(tmp_path / "renamed.onnx", spec, names)
    assert not disagreements(engine, reference("qwen2", numerics="upstream"), prompts_of("qwen2"), steps=1)
    proposal = propose_map(tmp_path / "renamed.onnx", refmodels.load(case_source("qwen2")), names=names)
    assert not proposal.unmatched and proposal.names.inputs == roles
    with pytest.raises(LogitLockError, match="which has only"):
        OnnxFileEngine(tmp_path / "renamed.onnx", spec, NameMap(inputs={"input_ids": "x"}))
    with pytest.raises(LogitLockError, match="expected the axes batch, 4 key heads"):
        OnnxFileEngine(exported("qwen2"), case_source("gpt2").spec)
    (tmp_path / "no.onnx").write_text("nothing")
    with pytest.raises(LogitLockError, match="cannot be read as an ONNX model"):
        OnnxFileEngine(tmp_path / "no.onnx", spec)


def test_name_maps_that_do_not_fit(exported: Callable[..., Path], tmp_path: Path) -> None:
    spec, path = case_source("qwen2").spec, exported("qwen2")
    good = propose_map(path, refmodels.load(case_source("qwen2"))).names.to_json()["taps"]
    file = tmp_path / "names.json"

    def opened(taps: dict[str, Any]) -> OnnxFileEngine:
        file.write_text(json.dumps(taps))
        return OnnxFileEngine(path, spec, file)

    some = opened({"blocks.0.attn.out": good["blocks.0.attn.out"]})
    assert "blocks.0.attn.out" in some.tap_names and "blocks.1.attn.out" not in some.tap_names
    with pytest.raises(LogitLockError, match=r"'blocks\.9' is no tap of qwen2"):
        opened({"blocks.9": "x"})
    with pytest.raises(LogitLockError, match="no value 'nowhere', which the name map gives for embed"):
        opened({"embed": "nowhere"})
    with pytest.raises(LogitLockError, match='either "value" or "concat"'):
        opened({"embed": {"transpose": [1, 0, 2]}})
    with pytest.raises(LogitLockError, match=r"gives blocks\.0\.attn\.qkv a width of 64; it must be 128"):
        diff(opened({"blocks.0.attn.qkv": good["blocks.0.attn.out"]}), "qwen2")
    context = {"value": next(iter(Source(**_dict(good["blocks.0.attn.context"])).values())), "transpose": [0, 1]}
    with pytest.raises(LogitLockError, match="cannot be transposed"):
        diff(opened({"blocks.0.attn.context": context}), "qwen2")


def _dict(source: str | dict[str, Any]) -> dict[str, Any]:
    return {"value": source} if isinstance(source, str) else source


# Golden cases


@pytest.mark.parametrize("case", ["chatglm2", "baichuan_13b", "qwen_ntk", "gpt2", "starcoder2_sliding"])
def test_a_golden_case_replays(case: str) -> None:
    engine = GoldenEngine(GOLDENS / case)
    assert {"embed", "blocks.0", "blocks.1", "final_norm", "logits"} <= set(engine.tap_names)
    assert ("blocks.0.key" in engine.tap_names) == (case != "starcoder2_sliding")
    upstream = TorchEngine(refmodels.load(case_source(case), numerics="upstream"))
    assert not disagreements(engine, upstream, engine.prompts, steps=0)
    assert first_wrong(diff(engine, case, engine.prompts, steps=0)) is None
    decoding = GoldenEngine(GOLDENS / case, decode=True)
    assert decoding.tap_names == ("logits",) and decoding.steps == 12
    assert not disagreements(decoding, upstream, engine.prompts, steps=12)


def test_a_golden_case_in_half_precision() -> None:
    engine = GoldenEngine(GOLDENS / "qwen2", "bf16")
    assert engine.dtype == torch.bfloat16 and "bf16" in engine.arithmetic
    assert first_wrong(diff(engine, "qwen2", engine.prompts, steps=0)) is None


def test_a_wrong_golden_case_is_found(tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "qwen2", tmp_path / "case")
    tensors = load_file(tmp_path / "case" / "io.safetensors")
    tensors["hidden_states.1"][0, 5] *= 1.01
    save_file(tensors, tmp_path / "case" / "io.safetensors")
    engine = GoldenEngine(tmp_path / "case")
    result = diff(engine, "qwen2", engine.prompts, steps=0)
    assert first_wrong(result) == "blocks.0" and result.culprits[0].worst == (0, 5)


def test_a_golden_case_runs_nothing_else() -> None:
    engine = GoldenEngine(GOLDENS / "qwen2")
    with pytest.raises(LogitLockError, match="only replay its own tokens"):
        disagreements(engine, reference("qwen2"), prompts_of("qwen2"))
    with pytest.raises(LogitLockError, match="has 12 recorded decode steps, not 13"):
        disagreements(GoldenEngine(GOLDENS / "qwen2", decode=True), reference("qwen2"), engine.prompts, steps=13)


# Names of sides


def test_every_form_opens(exported: Callable[..., Path], tmp_path: Path) -> None:
    source = case_source("qwen2")
    export_model(source, precision="fp16", output=tmp_path / "bundle")
    sides = {
        "reference": "float64, exact",
        "reference:fp16": "float16, exact",
        "reference:fp32:upstream": "float32, upstream",
        "hf": "transformers",
        "hf:bf16": "bfloat16",
        f"hf:{GOLDENS / 'qwen2'}": "float32",
        f"hf:fp16:{GOLDENS / 'qwen2'}": "float16",
        str(tmp_path / "bundle"): "rounded to float16",
        str(GOLDENS / "qwen2"): "recorded",
        f"{GOLDENS / 'qwen2'}:bf16": "bf16",
        str(exported("qwen2")): "ONNX Runtime",
    }
    for text, arithmetic in sides.items():
        engine = open_executor(text, source=source)
        assert arithmetic in engine.arithmetic and engine.spec == source.spec
        exact = text == str(tmp_path / "bundle") or ("reference" in text and "upstream" not in text)
        assert numerics_of(engine) == ("exact" if exact else "upstream")
    assert len(open_executor(str(exported("qwen2")), source=source).tap_names) == len(tap_names(source.spec))
    (tmp_path / "names.json").write_text("{}")
    few = open_executor(str(exported("qwen2")), source=source, map=tmp_path / "names.json")
    assert len(few.tap_names) == 5
    # A map that is not there yet is proposed and written, and the engine says what is to be looked at.
    written = tmp_path / "written.json"
    proposing = open_executor(str(exported("qwen2")), source=source, map=written)
    assert len(read_name_map(written, source.spec).taps) == 24 and proposing.arithmetic.endswith(
        "24 taps by a proposed map"
    )
    with pytest.raises(LogitLockError, match="cannot be written"):
        open_executor(str(exported("qwen2")), source=source, map=tmp_path / "none" / "names.json")
    assert open_executor(str(GOLDENS / "qwen2"), source=source, decode=True).tap_names == ("logits",)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("refrence", "names no executor"),
        ("", "names no executor"),
        ("reference:fp8", "not understood"),
        ("reference:fp16:exact:more", "not understood"),
        ("hf:fp16:a:b", "not understood"),
        ("tensorrt", "not understood"),
        ("nowhere", "names no executor"),
    ],
)
def test_other_names_are_told_the_forms(text: str, part: str) -> None:
    with pytest.raises(LogitLockError) as caught:
        open_executor(text, source=case_source("qwen2"))
    assert part in str(caught.value) and repr(text) in str(caught.value)
    for form in FORMS:
        assert form.text in str(caught.value) and f"{form.text} " in forms_help() and form.meaning in forms_help()


def test_executors_say_themselves_what_is_missing(tmp_path: Path) -> None:
    source = case_source("qwen2")
    if not torch.cuda.is_available():
        with pytest.raises(LogitLockError, match="CUDA GPU"):
            open_executor("kernels:fp16", source=source)
    with pytest.raises(LogitLockError, match="is not a bundle"):
        open_executor(f"tensorrt:{tmp_path}", source=source)
    with pytest.raises(LogitLockError, match="cannot be read"):
        open_executor(str(tmp_path / "no.onnx"), source=source)


def test_prompts_of_one_row() -> None:
    """A batch of one with nothing padded: shapes that a batch of three hides."""
    engine = HuggingFaceEngine(GOLDENS / "gpt2", case_source("gpt2").spec)
    prompts = left_padded([list(range(5, 15))], "")
    assert not disagreements(engine, reference("gpt2", numerics="upstream"), prompts)
