"""ONNX files of other exporters as executors: name maps are proposed, written, read and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refmodels
from debug.executors import candidates
from debug.executors.name_map import NameMap, Source, read_name_map
from debug.executors.onnx_file import OnnxFileEngine
from debug.executors.propose import propose_map
from refmodels.errors import LogitLockError
from refmodels.recorder import Recorder
from refmodels.taps import is_cache_tap, tap_names
from tests.support import foreign
from tests.support.executors import (
    CULPRIT_OF_A_MODULE,
    diff,
    disagreements,
    first_wrong,
    prompts_of,
    proposed,
    reference,
    right_padded,
)
from tests.support.goldens import case_source

pytest.importorskip("transformers")


# Of all that differs between these: learned positions, one shared kv head, heads grouped, RoPE and GQA.
EXPORTED = ["gpt2", "gpt_bigcode", "gpt_bigcode_mha_b1", "starcoder2", "qwen2"]


@pytest.mark.slow
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


@pytest.mark.slow
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
        assert proposal.summary() == "24 taps by a proposed map, guessed: blocks.0.attn.out"
    result = diff(engine, "qwen2")
    assert [c.tap for c in result.culprits if c.kind in CULPRIT_OF_A_MODULE] == wrong
    assert (result.verdict == "aligned") == (not wrong)


@pytest.mark.slow
def test_a_graph_without_a_cache(exported: Callable[..., Path]) -> None:
    spec = case_source("qwen2").spec
    proposal, engine = proposed(exported("qwen2", cached=False), "qwen2")
    assert not engine.roles.past and "without a cache" in engine.arithmetic
    assert not proposal.unmatched and engine.tap_names == tap_names(spec)
    upstream = reference("qwen2", numerics="upstream")
    assert not disagreements(engine, upstream, prompts_of("qwen2"))
    assert not disagreements(engine, upstream, right_padded("qwen2"))


@pytest.mark.slow
def test_a_graph_for_one_row(exported: Callable[..., Path]) -> None:
    for options in ({}, {"cached": False}):
        _, engine = proposed(exported("gpt2", batch=1, **options), "gpt2")
        assert "row by row" in engine.arithmetic
        upstream = reference("gpt2", numerics="upstream")
        assert not disagreements(engine, upstream, prompts_of("gpt2"))
        assert not disagreements(engine, upstream, right_padded("gpt2"))


@pytest.mark.slow
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


@pytest.mark.slow
def test_fused_operators(tmp_path: Path) -> None:
    path = foreign.fused_graph(refmodels.load(case_source("qwen2")), tmp_path / "model.onnx")
    proposal, engine = proposed(path, "qwen2")
    # The last residual is inside a node.  That is one tap of 29.
    assert proposal.unmatched == ["blocks.1"] and not proposal.ambiguous and "row by row" in engine.arithmetic
    for prompts in (prompts_of("qwen2"), right_padded("qwen2")):
        assert not disagreements(engine, reference("qwen2"), prompts)
    result = diff(engine, "qwen2")
    assert first_wrong(result) is None, result.culprits


@pytest.mark.slow
def test_a_fault_before_a_tap_that_is_not_there(tmp_path: Path) -> None:
    decoder = refmodels.load(case_source("qwen2"))
    weight = decoder.blocks[1].mlp.out.weight
    weight.copy_(weight.roll(3, 0))
    proposal, engine = proposed(foreign.fused_graph(decoder, tmp_path / "model.onnx"), "qwen2")
    assert proposal.unmatched == ["blocks.1"] and "guessed: blocks.1.mlp.out" in proposal.summary()
    assert first_wrong(diff(engine, "qwen2")) == "blocks.1.mlp.out"


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"taps": None}, "taps must be an object"),
        ({"taps": 5}, "taps must be an object"),
        ({"taps": ["embed"]}, "taps must be an object"),
        ({"taps": {"embed": 5}}, "must be an object"),
        ({"taps": {"embed": {"value": "x", "heads": -1}}}, "heads of x are -1"),
        ({"taps": {"embed": {"value": "x", "columns": [3, 3]}}}, "from 0 on"),
        ({"taps": {"embed": {"value": "x", "columns": [-4, 4]}}}, "from 0 on"),
        ({"taps": {"embed": {"concat": 5}}}, "embed"),
    ],
)
def test_name_maps_of_another_form(content: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps(content))
    with pytest.raises(LogitLockError, match=said):
        read_name_map(tmp_path / "names.json", case_source("qwen2_b1").spec)


@pytest.mark.parametrize("shape", [None, [1, 1], [5], [1, 2, 2], []])
def test_logits_of_another_shape(shape: list[int] | None, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    vocab = case_source("gpt2").spec.vocab_size
    if shape is None:
        node = helper.make_node("Identity", ["input_ids"], ["logits"])
    else:
        node = helper.make_node("ConstantOfShape", ["shape"], ["logits"])
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])
    logits = helper.make_tensor_value_info("logits", TensorProto.INT64 if shape is None else TensorProto.FLOAT, None)
    sizes = [*(shape or []), vocab]
    constant = helper.make_tensor("shape", TensorProto.INT64, [len(sizes)], sizes)
    graph = helper.make_graph([node], "wrong", [ids], [logits], [constant])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "x.onnx")
    with pytest.raises(LogitLockError, match=r"the output logits has the shape \[.*\] for 2 rows of 13 tokens"):
        propose_map(tmp_path / "x.onnx", refmodels.load(case_source("gpt2")))
    with pytest.raises(LogitLockError, match="the output logits has the shape"):
        diff(OnnxFileEngine(tmp_path / "x.onnx", case_source("gpt2").spec), "gpt2")


@pytest.mark.parametrize("heads", [7, 4])
def test_heads_that_do_not_divide_the_width(heads: int) -> None:
    with pytest.raises(LogitLockError, match=f"which is not .query, key, value. of {heads} heads"):
        Source(value="g", heads=heads).read({"g": torch.zeros(2, 3, 18)}, 2, 3)


@pytest.mark.slow
def test_name_maps_that_do_not_fit(exported: Callable[..., Path], tmp_path: Path) -> None:
    spec, path = case_source("qwen2").spec, exported("qwen2")
    good = propose_map(path, refmodels.load(case_source("qwen2"))).names.to_json()["taps"]
    file = tmp_path / "names.json"

    def opened(taps: dict[str, Any]) -> OnnxFileEngine:
        file.write_text(json.dumps(taps))
        return OnnxFileEngine(path, spec, file)

    some = opened({"blocks.0.attn.out": good["blocks.0.attn.out"]})
    assert "blocks.0.attn.out" in some.tap_names and "blocks.1.attn.out" not in some.tap_names
    with pytest.raises(LogitLockError, match=r"'blocks\.9' is not a tap of qwen2"):
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
