"""nvidia-modelopt's checkpoints: its exports (`goldens_modelopt`), read and written again, and ours beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import refmodels
from debug.comparison.code_flips import CodeFlips
from debug.sides import diff_bundle
from export.bundle import export_model
from export.graph.trace import build_graph
from export.quantization.calibrate import quantize_model
from export.quantization.data import CalibrationData
from export.quantization.method import MethodOptions
from export.quantization.schemes import QuantizeOptions
from refmodels.checkpoints.load import upstream_modules
from refmodels.checkpoints.quantized_config import modelopt_file, write_config
from refmodels.checkpoints.quantized_files import MODELOPT_NAME
from refmodels.checkpoints.quantized_layouts import CheckpointFormat, Storage
from refmodels.checkpoints.quantized_reader import QuantizedReader
from refmodels.quantization.arithmetic import quantize_weight
from refmodels.quantization.formats import LinearFormat, group_formats
from tests.support.command import logitlock
from tests.support.goldens import case_source
from tests.support.marks import quick_first
from tests.support.paths import GOLDENS_MODELOPT

FORMATS: dict[str, dict[str, LinearFormat]] = {
    "fp8": dict.fromkeys(("attn.qkv", "mlp.out"), LinearFormat(weight="fp8", input="fp8", input_scale="tensor")),
    "fp8_pc_pt": dict.fromkeys(("attn.qkv", "mlp.out"), LinearFormat(weight="fp8", input="fp8")),
    "int4_awq": {
        "attn.qkv": LinearFormat(weight="int4", group=16),
        "attn.out": LinearFormat(weight="int4", group=16, pre_quant_scale=True),
        "mlp.out": LinearFormat(weight="int4", group=16, pre_quant_scale=True),
    },
    "int8_sq": dict.fromkeys(
        ("attn.qkv", "mlp.up", "mlp.out"),
        LinearFormat(weight="int8", input="int8", input_scale="tensor", pre_quant_scale=True),
    ),
    "mixed": {
        "attn.out": LinearFormat(weight="fp8", input="fp8", input_scale="tensor"),
        "mlp.up": LinearFormat(weight="int4", group=16),
        "mlp.out": LinearFormat(weight="int8"),
    },
}
LIKE: dict[str, dict[str, Any]] = {
    "fp8": {"scheme": "fp8", "inputs": "tensor", "cache": "fp8"},
    "fp8_pc_pt": {"scheme": "fp8"},
    "int4_awq": {"scheme": "int4-awq", "group": 16},
    "int8_sq": {"scheme": "smoothquant", "inputs": "tensor"},
}
"""Our options for what modelopt did."""


def stored(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def ours(output: Path, layout: CheckpointFormat = "modelopt", **options: Any) -> Path:
    data = CalibrationData(rows=[[1, 2, 3, 4, 5, 6, 7, 8], [15, 3, 9, 0, 2]], origin="a test")
    return quantize_model(
        refmodels.resolve(GOLDENS_MODELOPT / "source"), output, QuantizeOptions(**options), data=data, layout=layout
    )


# Theirs


@pytest.mark.parametrize("name", FORMATS)
def test_the_reference_computes_what_modelopt_does(name: str) -> None:
    model = refmodels.load(GOLDENS_MODELOPT / name)
    for module, linear in FORMATS[name].items():
        assert model.spec.format_of(f"blocks.0.{module}") == linear
    assert model.spec.cache_code == ("fp8" if name == "fp8" else None)
    assert (model.spec.format_of("blocks.0.mlp.gate") is None) == (name == "mixed")
    case = load_file(GOLDENS_MODELOPT / name / "logits.safetensors")
    found = model.step(case["ids"], model.new_cache(batch=1, capacity=12))
    error = (found - case["logits"]).norm(dim=-1) / case["logits"].norm(dim=-1)
    # fp32 in another order, through a block and a head; what quantization changes here is 1.7 to 13 %.
    assert float(error.max()) < 10 * 2**-23


def test_codes_and_scales_by_hand() -> None:
    """Two rows of int4 in a byte, the even one in its low bits; tensors of q, k and v one after another."""
    tensors, model = stored(GOLDENS_MODELOPT / "int4_awq"), refmodels.load(GOLDENS_MODELOPT / "int4_awq")
    name, layer = "model.layers.0.mlp.down_proj", model.blocks[0].mlp.out
    packed = tensors[f"{name}.weight"]
    for row, column in ((0, 0), (1, 0), (6, 31), (31, 17)):
        nibble = int(packed[row // 2, column]) >> 4 * (row % 2) & 15
        assert int(layer.weight[row, column]) == (nibble - 16 if nibble > 7 else nibble)
    assert torch.equal(layer.scale, tensors[f"{name}.weight_scale"])
    assert torch.equal(layer.pre_quant_scale, tensors[f"{name}.pre_quant_scale"])
    parts = [tensors[f"model.layers.0.self_attn.{x}_proj.weight_scale"] for x in "qkv"]
    assert torch.equal(model.blocks[0].attn.qkv.scale, torch.cat(parts))
    fp8, tensors = refmodels.load(GOLDENS_MODELOPT / "fp8"), stored(GOLDENS_MODELOPT / "fp8")
    scales = [
        tensors[f"model.layers.0.self_attn.{x}_proj.weight_scale"].expand(n)
        for x, n in (("q", 32), ("k", 16), ("v", 16))
    ]
    assert torch.equal(fp8.blocks[0].attn.qkv.scale[:, 0], torch.cat(scales))
    assert torch.equal(fp8.blocks[0].attn.key_scale, tensors["model.layers.0.self_attn.k_proj.k_scale"].expand(2))


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_read_is_written_again(name: str) -> None:
    """Every byte of every quantized module; and the configs say the same."""
    source, tensors = refmodels.resolve(GOLDENS_MODELOPT / name), stored(GOLDENS_MODELOPT / name)
    assert source.storage == Storage(layout="modelopt") and source.spec.quantization is not None
    table = source.family.weights(source.spec)
    reader, written = QuantizedReader(source.spec, table, source.storage), {}
    shapes = {part.name: part.shape for parts in table.values() for part in parts}
    for module, linear in reader.formats.items():
        found = {s: tensors[f"{module}.{s}"] for s in source.storage.suffixes if f"{module}.{s}" in tensors}
        weight, constants = source.storage.decode(found, linear, shapes[f"{module}.weight"], module)
        written |= {f"{module}.{s}": t for s, t in source.storage.encode(weight, linear, constants).items()}
    for key in tensors:
        if key.rpartition(".")[0] in reader.formats and not key.endswith(("bias", "k_scale", "v_scale")):
            again = written.pop(key)
            assert (again.dtype, again.shape) == (tensors[key].dtype, tensors[key].shape), key
            assert torch.equal(again.flatten().view(torch.uint8), tensors[key].flatten().view(torch.uint8)), key
    assert not written
    said = json.loads((GOLDENS_MODELOPT / name / MODELOPT_NAME).read_text())["quantization"]
    modules = upstream_modules(source.spec, source.family)
    other = modelopt_file(write_config(source.spec.quantization, modules, source.storage))
    assert other["kv_cache_quant_algo"] == said["kv_cache_quant_algo"]
    if name != "int4_awq":  # Ours says of each layer whether it has a pre-quant scale, and mixes for that.
        assert other["quant_algo"] == said["quant_algo"]
    for module, layer in other.get("quantized_layers", {}).items():
        theirs = said.get("quantized_layers", {}).get(module, said)
        assert {**layer, "pre_quant_scale": None} == {k: theirs.get(k) for k in layer} | {"pre_quant_scale": None}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4_awq", "int8_sq"])
def test_a_bundle_of_it(name: str, tmp_path: Path) -> None:
    bundle = export_model(GOLDENS_MODELOPT / name, precision="fp16", backend="onnxruntime", output=tmp_path / "bundle")
    assert (bundle / MODELOPT_NAME).is_file()
    result = diff_bundle(bundle, str(GOLDENS_MODELOPT / name), steps=2)
    assert result.verdict == "aligned", result.culprits


def test_flips_are_of_the_scaled_input() -> None:
    """How far a code that falls to the other side moves the result, against the size of what is quantized."""
    model = refmodels.load(GOLDENS_MODELOPT / "int8_sq")
    layer, x = model.blocks[0].mlp.out, torch.rand(1, 3, 32, dtype=torch.float64) + 0.5
    found = CodeFlips(model).of("blocks.0.mlp.out", {"blocks.0.mlp.act": x})
    expected = layer.input_scale.double() / (x * layer.pre_quant_scale).norm(dim=-1) / 4
    assert found is not None and torch.allclose(found, expected, rtol=1e-6)


def test_norms_do_not_quantize_for_layers_that_scale_first() -> None:
    source = refmodels.resolve(GOLDENS_MODELOPT / "source")
    for scaled, nodes in ((False, 1), (True, 0)):
        linear = LinearFormat(weight="int8", input="int8", pre_quant_scale=scaled)
        spec = replace(source.spec, quantization=group_formats({"blocks.0.attn.qkv": linear}))
        graph = build_graph(spec, precision="fp16").model.graph
        assert sum(node.op_type == "FusedRmsNormQuant" for node in graph.node) == nodes


# Ours


@pytest.mark.parametrize("name", quick_first(LIKE, 3))
def test_our_checkpoints_have_its_tensors(name: str, tmp_path: Path) -> None:
    made, theirs = stored(ours(tmp_path / "q", **LIKE[name])), stored(GOLDENS_MODELOPT / name)
    # Ours are folded into what makes the input.
    kinds = {k: (t.dtype, t.shape) for k, t in theirs.items() if not k.endswith("pre_quant_scale")}
    unquantized = {k for k in kinds if "proj" not in k or k.endswith("bias")}
    assert {k: t.shape for k, t in made.items() if k in unquantized} == {k: kinds[k][1] for k in unquantized}
    assert {k: (t.dtype, t.shape) for k, t in made.items() if k not in unquantized} == {
        k: kind for k, kind in kinds.items() if k not in unquantized
    }
    # Scales of fp8 follow one rule in both programs.  Where a tensor has one, ours have q, k and v, or gate and up.
    same = [k for k in theirs if "proj.weight" in k and (name == "fp8_pc_pt" or (name == "fp8" and "down" in k))]
    assert len(same) == {"fp8_pc_pt": 14, "fp8": 2}.get(name, 0)
    for key in same:
        if key.endswith("scale"):
            assert torch.allclose(made[key], theirs[key], rtol=2**-23, atol=0), key
        else:
            assert torch.equal(made[key].float(), theirs[key].float()), key


@pytest.mark.parametrize("name", quick_first(LIKE))
def test_our_checkpoints_are_read_back(name: str, tmp_path: Path) -> None:
    """The same parameters and logits as from the native layout; one fp8 scale per tensor has no counterpart there."""
    made = refmodels.load(ours(tmp_path / "q", **LIKE[name]))
    ids = torch.arange(12)[None]
    logits = made.step(ids, made.new_cache(batch=1, capacity=12))
    if name == "fp8":
        tensors = stored(tmp_path / "q")
        for upstream, module in (("mlp.up_proj", made.blocks[0].mlp.up), ("mlp.gate_proj", made.blocks[0].mlp.gate)):
            codes, scale = (tensors[f"model.layers.0.{upstream}.{s}"] for s in ("weight", "weight_scale"))
            assert torch.equal(module.weight.float(), codes.float()) and torch.equal(module.scale, scale.expand(32, 1))
        assert float(made.blocks[0].mlp.up.weight.float().abs().max()) <= 448
        source = refmodels.load(GOLDENS_MODELOPT / "source")
        plain = source.step(ids, source.new_cache(batch=1, capacity=12))
        assert 0 < float((logits - plain).norm() / plain.norm()) < 0.15
        return
    native = refmodels.load(ours(tmp_path / "native", "compressed-tensors", **LIKE[name]))
    assert made.spec == native.spec
    for (key, a), (_, b) in zip(made.named_parameters(), native.named_parameters(), strict=True):
        assert torch.equal(a.float(), b.float()), key
    assert torch.equal(logits, native.step(ids, native.new_cache(batch=1, capacity=12)))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen_b1", "chatglm2_b1", "gpt2_b1", "gpt_bigcode_mha_b1", "starcoder2_b1"])
def test_families(case: str, tmp_path: Path) -> None:
    """Fused, split and [in, out] projections; scales of the cache beside projections that there are not."""
    source = case_source(case)
    data = CalibrationData(rows=[[1, 2, 3, 4, 5, 6, 7, 8]], origin="a test")
    read = []
    for layout in ("modelopt", "compressed-tensors"):
        options = QuantizeOptions(scheme="int4-awq", group=16)
        read.append(refmodels.load(quantize_model(source, tmp_path / layout, options, data=data, layout=layout)))
    for (key, a), (_, b) in zip(*(model.named_parameters() for model in read), strict=True):
        assert torch.equal(a.float(), b.float()), key
    options = QuantizeOptions(scheme="fp8", inputs="tensor", cache="fp8")
    made = refmodels.load(quantize_model(source, tmp_path / "fp8", options, data=data, layout="modelopt"))
    assert made.spec.cache_code == "fp8" and made.blocks[0].attn.key_scale.unique().numel() == 1
    names = [name for name in stored(tmp_path / "fp8") if name.endswith((".k_proj.k_scale", ".v_proj.v_scale"))]
    assert len(names) == 2 * source.spec.layers


def test_gptq_keeps_to_one_scale_a_tensor(tmp_path: Path) -> None:
    """A plan's method quantizes fp8 layers too."""
    plan = tmp_path / "plan.json"
    plan.write_text('{"schema": 1, "precision": "fp8", "schemes": {"blocks.0.mlp.*": "int4-gptq"}}')
    options = {"scheme": "fp8", "inputs": "tensor", "plan": plan, "method": MethodOptions(damping=0.1)}
    made = refmodels.resolve(ours(tmp_path / "q", **options))
    said = json.loads((made.directory / MODELOPT_NAME).read_text())["quantization"]
    assert said["quant_algo"] == "MIXED_PRECISION"
    assert said["quantized_layers"]["model.layers.0.mlp.up_proj"]["group_size"] == 32
    scale = refmodels.load(made).blocks[0].attn.out.scale
    assert made.spec.format_of("blocks.0.attn.out") == FORMATS["fp8"]["mlp.out"] and scale.unique().numel() == 1


def test_the_verb(tmp_path: Path) -> None:
    shown = logitlock("quantize", "--model", str(GOLDENS_MODELOPT / "source"), "--precision", "int8", "--layout",
                      "modelopt", "--output", str(tmp_path / "q"))  # fmt: skip
    assert shown.code == 0, shown.err
    assert json.loads((tmp_path / "q" / MODELOPT_NAME).read_text())["quantization"]["quant_algo"] == "W8A16"
    refused = logitlock("quantize", "--model", str(GOLDENS_MODELOPT / "source"), "--precision", "int8", "--layout",
                        "tensorrt", "--output", str(tmp_path / "no"))  # fmt: skip
    assert refused.code == 2 and "--layout is 'tensorrt'" in refused.err and not (tmp_path / "no").exists()


# Bad input


def copied(name: str, target: Path, edit: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """A golden whose quantization in both files is edited."""
    shutil.copytree(GOLDENS_MODELOPT / name, target)
    if edit is not None:
        for file, key in ((MODELOPT_NAME, "quantization"), ("config.json", "quantization_config")):
            content = json.loads((target / file).read_text())
            edit(content[key])
            (target / file).write_text(json.dumps(content))
    return target


def test_either_file_will_do(tmp_path: Path) -> None:
    spec = refmodels.resolve(GOLDENS_MODELOPT / "fp8").spec
    new = copied("fp8", tmp_path / "new")
    (new / MODELOPT_NAME).unlink()
    old = copied("int4_awq", tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    del config["quantization_config"]  # as before modelopt 0.29
    (old / "config.json").write_text(json.dumps(config))
    assert refmodels.resolve(new).spec == spec
    assert refmodels.resolve(old).spec == refmodels.resolve(GOLDENS_MODELOPT / "int4_awq").spec
    # Groups are in one file only.
    awq = copied("int4_awq", tmp_path / "awq")
    (awq / MODELOPT_NAME).unlink()
    with pytest.raises(refmodels.LogitLockError, match=r"group_size None; it must be a number, as in hf_quant_config"):
        refmodels.resolve(awq)


def test_patterns_leave_modules_out(tmp_path: Path) -> None:
    def edit(said: dict[str, Any]) -> None:
        said["exclude_modules"] = said["ignore"] = ["lm_head", "model.layers.0.mlp.*", "*.o_proj"]

    spec = refmodels.resolve(copied("int8_sq", tmp_path / "m", edit)).spec
    assert spec.quantization is not None and spec.quantization.modules == ("blocks.0.attn.qkv",)


def _set(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda said: said.update(values)


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("fp8", _set(quant_algo="NVFP4"), r"hf_quant_config\.json: quantization has quant_algo 'NVFP4'.* W4A16_AWQ "),
        ("int4_awq", _set(quant_algo="W4A8_AWQ"), "quant_algo 'W4A8_AWQ'.* W4A16_AWQ is the closest"),
        ("fp8", _set(quant_algo="fp8_pb_wo"), "quant_algo 'fp8_pb_wo'.* FP8 is the closest"),
        ("fp8", _set(kv_cache_quant_algo="NVFP4", kv_cache_scheme="NVFP4"), "cache of 'NVFP4'; .*FP8 can be read"),
        ("fp8", _set(kv_cache_quant_algo="INT8", kv_cache_scheme="INT8"), "cache of 'INT8'; .*FP8 can be read"),
        ("mixed", _set(quantized_layers=[]), "no place for"),
        ("mixed", _set(quantized_layers={"model.layers.0.mlp.up_proj": 8}), "up_proj must be an object, got int"),
        ("int8_sq", _set(quant_algo="W8A16"), "has a tensor input_scale, but the config says that it has none"),
        ("fp8_pc_pt", _set(quant_algo="FP8"), "lacks .*input_scale"),
        ("fp8_pc_pt", _set(quant_algo="W8A16"), r"float8_e4m3fn; in this layout int8 is int8"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_read(
    name: str, edit: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(refmodels.LogitLockError, match=message):
        refmodels.load(copied(name, tmp_path / "m", edit))


MLP, ATTENTION = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn"
SHORT = "layers.0.mlp.down_proj.pre_quant_scale"


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    quick_first([
        ("fp8", lambda t: t.pop(f"{MLP}.weight_scale"), f"lacks the tensor {MLP}.weight_scale"),
        ("fp8", lambda t: t[f"{ATTENTION}.k_proj.input_scale"].mul_(2), "qkv differ in their input_scale"),
        ("fp8", lambda t: t.update({f"{ATTENTION}.k_proj.k_scale": torch.ones(3)}), "3 scales for 2 kv heads"),
        ("fp8", lambda t: t.update({f"{MLP}.weight_scale_2": torch.ones(())}), "weight_scale_2 .*no place for"),
        ("int4_awq", lambda t: t.update({f"{MLP}.weight": t[f"{MLP}.weight"].view(torch.int8)}), "is int8; in this"),
        ("int4_awq", lambda t: t.update({f"{MLP}.weight": t[f"{MLP}.weight"][:8].clone()}), r"shape \[16, 32\]"),
        ("int4_awq", lambda t: t.update({f"{MLP}.pre_quant_scale": torch.ones(31)}), r"pre_quant_scale of .* \[31\]"),
        ("int4_awq", lambda t: t[f"{MLP}.pre_quant_scale"].fill_(float("nan")), "does not fit"),
        # No known checkpoint has it under another name than the config's.
        ("int4_awq", lambda t: t.update({SHORT: t.pop(f"{MLP}.pre_quant_scale")}), "has a tensor pre_quant_scale, but"),
    ], 3),
)  # fmt: skip
def test_tensors_that_do_not_fit(
    name: str, edit: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    made = copied(name, tmp_path / "m")
    tensors = stored(made)
    edit(tensors)
    save_file(tensors, made / "model.safetensors")
    with pytest.raises(refmodels.LogitLockError, match=message):
        refmodels.load(made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "smoothquant"}, "cannot store int8 weights by channel, int8 inputs by token"),
        ({"scheme": "int4", "symmetric": False}, "cannot store int4 weights in groups of 32 with zero points"),
        ({"scheme": "int4", "group": 0}, "cannot store int4 weights by channel"),
        ({"scheme": "int8", "group": 16}, "cannot store int8 weights in groups of 16"),
        ({"scheme": "fp8", "inputs": "float"}, "cannot store fp8 weights by channel"),
        ({"scheme": "int8", "cache": "int8"}, "no int8 cache, only an fp8 cache"),
    ],
)
def test_what_the_layout_cannot_say(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(refmodels.LogitLockError, match=message):
        ours(tmp_path / "q", **options)
    assert not (tmp_path / "q").exists()


def test_scales_that_the_layout_cannot_say() -> None:
    storage = Storage(layout="modelopt")
    linear = FORMATS["fp8"]["mlp.out"]
    with pytest.raises(refmodels.LogitLockError, match="one scale per weight"):
        storage.encode(quantize_weight(torch.randn(4, 8), linear), linear, {"input_scale": torch.ones(())})
    with pytest.raises(refmodels.LogitLockError, match="one scale for all heads"):
        storage.encode_cache(torch.tensor([1.0, 2.0]))
    with pytest.raises(refmodels.LogitLockError, match="rows of int4 in pairs"):
        int4 = LinearFormat(weight="int4", group=8)
        storage.encode(quantize_weight(torch.randn(3, 8), int4), int4)
