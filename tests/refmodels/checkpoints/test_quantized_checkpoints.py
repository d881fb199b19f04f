"""Quantized checkpoints: layouts, config, reading, writing; the exact arithmetic; the streaming run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import refmodels
from export.precision import SCHEMES
from export.quantization.calibrate import quantize_model
from export.quantization.checkpoint import read_provenance
from export.quantization.data import calibration_data
from export.quantization.method import MethodOptions
from export.quantization.schemes import QuantizeOptions, quantization_of
from refmodels.checkpoints.load import with_directory
from refmodels.checkpoints.quantized_layouts import CheckpointFormat, Storage
from refmodels.quantization.arithmetic import (
    QuantizedWeight,
    coded_product,
    dequantize,
    grouped_product,
    pack_int4,
    quantize_groups,
    quantize_static,
    quantize_tokens,
    quantize_weight,
    unpack_int4,
)
from refmodels.quantization.formats import LIMITS, LinearFormat
from refmodels.quantization.linear import QuantizedLinear
from tests.support.checkpoints import read_case, write_model
from tests.support.goldens import CASES, case_source
from tests.support.marks import quick_first

FORMATS = {
    "int8": LinearFormat(weight="int8"),
    "int8-groups": LinearFormat(weight="int8", group=32),
    "int4": LinearFormat(weight="int4", group=32),
    "int4-zeros": LinearFormat(weight="int4", group=16, symmetric=False),
    "int4-reordered": LinearFormat(weight="int4", group=32, reordered=True),
    "fp8": LinearFormat(weight="fp8"),
    "w8a8-token": LinearFormat(weight="int8", input="int8"),
    "w8a8-tensor": LinearFormat(weight="int8", input="int8", input_scale="tensor"),
    "fp8-tensor": LinearFormat(weight="fp8", input="fp8", input_scale="tensor"),
    "fp8-token": LinearFormat(weight="fp8", input="fp8"),
    "w4a8-group": LinearFormat(weight="int4", group=32, input="int8", input_scale="group"),
    "w8a8-pre-quant-scale": LinearFormat(weight="int8", input="int8", input_scale="tensor", pre_quant_scale=True),
    "int4-pre-quant-scale": LinearFormat(weight="int4", group=32, pre_quant_scale=True),
}
STORAGES = {
    "compressed-tensors": Storage(layout="compressed-tensors"),
    "gptq": Storage(layout="gptq"),
    "gptq_v2": Storage(layout="gptq", gptq_zero_offset=0),
    "awq": Storage(layout="awq"),
    "modelopt": Storage(layout="modelopt"),
}
PLACES = {
    "compressed-tensors": {name for name in FORMATS if "pre-quant-scale" not in name},
    "gptq": {"int8", "int8-groups", "int4", "int4-zeros", "int4-reordered"},
    "gptq_v2": {"int8", "int8-groups", "int4", "int4-zeros", "int4-reordered"},
    "awq": {"int4", "int4-zeros"},
    "modelopt": {
        "int8",
        "int4",
        "w8a8-tensor",
        "fp8-tensor",
        "fp8-token",
        "w8a8-pre-quant-scale",
        "int4-pre-quant-scale",
    },
}
"""The formats that each layout can express."""
SMALL = ["qwen_b1", "chatglm2_b1", "baichuan2_13b_b1", "gpt2_b1", "gpt_bigcode_mha_b1", "starcoder2_b1"]


def quantized(linear: LinearFormat, rows: int = 24, columns: int = 64) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    if not linear.reordered:
        return quantize_weight(weight, linear)
    assert linear.group is not None
    groups = torch.randperm(columns, generator=torch.Generator().manual_seed(1)) // linear.group
    order = groups.argsort(stable=True)
    return replace(quantize_weight(weight[:, order], linear), order=order)


# Arithmetic


@pytest.mark.parametrize("linear", FORMATS.values(), ids=FORMATS)
def test_rounding_is_within_half_a_step(linear: LinearFormat) -> None:
    weight = torch.randn(24, 64, dtype=torch.float64)
    found = quantize_weight(weight, replace(linear, reordered=False))
    error = (found.dequantized() - weight).abs().unflatten(1, (found.scale.shape[1], -1))
    if linear.weight == "fp8":
        # e4m3 has 3 bits behind the point, and steps of 2^-9 below 2^-6.
        bound = torch.maximum(weight.abs().unflatten(1, error.shape[1:]) * 2**-4, 2**-10 * found.scale[:, :, None])
    else:
        bound = found.scale[:, :, None] / 2
    assert bool((error <= bound * (1 + 1e-9)).all())


@given(st.integers(1, 5), st.integers(1, 64))
def test_int4_packing(rows: int, pairs: int) -> None:
    codes = torch.randint(-8, 8, (rows, 2 * pairs), dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(codes)), codes)


def test_token_codes_are_what_the_kernel_computes() -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).half()
    for code in ("int8", "fp8"):
        codes, scale = quantize_tokens(x, code)
        amax = x.float().abs().amax(-1, keepdim=True)
        assert torch.equal(scale, amax / LIMITS[code])
        # Half a step, and the fp32 rounding of limit / amax, of the product with x, and of amax / limit.
        bound = (0.5 / 127 if code == "int8" else 2**-4) + 3 * 2**-24
        assert float((codes.float() * scale - x.float()).abs().max()) <= float(amax.max()) * bound
        assert float(codes.float().abs().amax()) == LIMITS[code]
    zero, scale = quantize_tokens(torch.zeros(1, 8), "int8")
    assert not zero.any() and float(scale) > 0


def test_products_of_codes_are_exact_sums() -> None:
    x, linear = torch.randn(7, 64), FORMATS["w8a8-token"]
    weight = quantized(linear)
    codes, scale = quantize_tokens(x, "int8")
    sums = codes.long() @ weight.codes.long().T
    expected = sums.double() * scale.double() * weight.scale.double().flatten()
    found = coded_product(codes, scale, weight.codes, weight.scale, torch.float32)
    # Two float products and one rounding of the sum, in fp32.
    assert float(((found - expected) / expected.abs().clamp(min=1e-6)).abs().max()) <= 4 * 2**-24


def test_products_by_group_are_sums_of_exact_products() -> None:
    x, linear = torch.randn(7, 64), FORMATS["w4a8-group"]
    weight = quantized(linear)
    codes, scale = quantize_groups(x, "int8", 2)
    expected = torch.zeros(7, 24, dtype=torch.float64)
    for g, columns in enumerate((slice(0, 32), slice(32, 64))):
        sums = codes[:, columns].long() @ weight.codes[:, columns].long().T
        expected += sums.double() * scale[:, g, None].double() * weight.scale[:, g].double()
    found = grouped_product(codes, scale, weight, torch.float32)
    assert float((found - expected).abs().max()) <= 2**-24 * float(expected.abs().max())


@pytest.mark.parametrize("linear", FORMATS.values(), ids=FORMATS)
def test_layer_against_floats(linear: LinearFormat) -> None:
    """A layer gives what its numbers give: of the weight, and of the input where that is quantized too."""
    weight = quantized(linear)
    layer = layer_of(weight, linear, input_scale=torch.tensor(4.0 / LIMITS[linear.input or "int8"]))
    x = torch.randn(2, 3, 64)
    rounded = x if layer.pre_quant_scale is None else x * layer.pre_quant_scale
    rounded = rounded if weight.order is None else rounded[..., weight.order]
    if linear.input is not None:
        if linear.input_scale == "tensor":
            assert layer.input_scale is not None
            rounded = quantize_static(rounded, layer.input_scale, linear.input).float() * layer.input_scale
        else:
            codes, scale = quantize_groups(
                rounded, linear.input, layer.scale.shape[1] if linear.input_scale == "group" else 1
            )
            rounded = (codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)
    numbers = dequantize(weight.codes, weight.scale, weight.zero)
    expected = F.linear(rounded.double(), numbers.double(), layer.bias.double() if layer.bias is not None else None)
    # 64 terms and a few roundings, each at most a unit of the sum of magnitudes.
    size = float((rounded.abs() @ numbers.abs().T).max())
    assert float((layer(x) - expected).abs().max()) <= 64 * 2**-24 * size


def layer_of(weight: QuantizedWeight, linear: LinearFormat, *, input_scale: Tensor) -> QuantizedLinear:
    layer = QuantizedLinear(weight.codes.shape[1], len(weight.codes), bias=True, linear=linear)
    for name, value in (
        ("weight", weight.codes),
        ("scale", weight.scale),
        ("zero", weight.zero),
        ("order", weight.order),
    ):
        if value is not None:
            getattr(layer, name).data = value
    if layer.input_scale is not None:
        layer.input_scale.data = input_scale
    if layer.pre_quant_scale is not None:
        layer.pre_quant_scale.data = torch.rand(weight.codes.shape[1]) + 0.5
    assert layer.bias is not None
    layer.bias.data = torch.randn(len(weight.codes))
    return layer


# Layouts


@pytest.mark.parametrize("layout", STORAGES)
@pytest.mark.parametrize("name", FORMATS)
def test_layouts_are_inverses(layout: str, name: str) -> None:
    linear, storage = FORMATS[name], STORAGES[layout]
    weight = quantized(linear)
    if layout == "modelopt" and name == "fp8-tensor":
        weight = replace(weight, scale=weight.scale.amax().expand_as(weight.scale))
    constants = {}
    if linear.input_scale == "tensor":
        constants["input_scale"] = torch.tensor(0.3)
    if linear.pre_quant_scale:
        constants["pre_quant_scale"] = torch.rand(64) + 0.5
    if name not in PLACES[layout]:
        with pytest.raises(refmodels.LogitLockError, match=f"{storage.layout} cannot store"):
            storage.encode(weight, linear, constants)
        return
    stored = storage.encode(weight, linear, constants)
    found, read = storage.decode(stored, linear, (24, 64), "layer")
    for ours, theirs in zip(vars(weight).values(), vars(found).values(), strict=True):
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours.float(), theirs.float()))
    assert read.keys() == constants.keys() and all(torch.equal(read[n], constants[n]) for n in read)


def test_gptq_words_by_hand() -> None:
    """Eight input columns a word, the first in the low bits; zero points less one; scales by group and column."""
    word = sum(code << (4 * i) for i, code in enumerate([1, 2, 3, 4, 5, 6, 7, 15]))
    word -= 2**32 if word >= 2**31 else 0
    stored = {
        "qweight": torch.tensor([[word] * 8], dtype=torch.int32),
        "qzeros": torch.tensor([[0x77777777]], dtype=torch.int32),
        "scales": torch.full((1, 8), 0.5),
        "g_idx": torch.zeros(8, dtype=torch.int32),
    }
    found, _ = Storage(layout="gptq").decode(stored, LinearFormat(weight="int4", group=8), (8, 8), "layer")
    assert found.dequantized()[0].tolist() == [0.5 * (c - 8) for c in (1, 2, 3, 4, 5, 6, 7, 15)]


def test_awq_words_by_hand() -> None:
    """Eight output columns a word, in the order 0 2 4 6 1 3 5 7."""
    codes = [1, 2, 3, 4, 5, 6, 7, 15]
    word = sum(codes[column] << (4 * i) for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    word -= 2**32 if word >= 2**31 else 0
    stored = {
        "qweight": torch.full((8, 1), word, dtype=torch.int32),
        "qzeros": torch.full((1, 1), -0x77777778, dtype=torch.int32),  # 8 everywhere
        "scales": torch.full((1, 8), 0.5),
    }
    found, _ = Storage(layout="awq").decode(stored, LinearFormat(weight="int4", group=8), (8, 8), "layer")
    assert found.dequantized()[:, 0].tolist() == [0.5 * (c - 8) for c in codes]


# Checkpoints


def tiny(
    source: refmodels.ModelSource,
    options: QuantizeOptions,
    output: Path,
    layout: CheckpointFormat = "compressed-tensors",
) -> Path:
    data = calibration_data(source, samples=4, tokens=16)
    return quantize_model(source, output, options, data=data, layout=layout)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [*SCHEMES, None])
@pytest.mark.parametrize("case", SMALL)
def test_every_scheme_and_family(case: str, scheme: str | None, tmp_path: Path) -> None:
    """What is written is read back, and computes about what the model does; nothing else of it is changed."""
    source = case_source(case)
    options = QuantizeOptions(
        scheme=scheme, group=32 if scheme and "int4" in scheme else None, cache=None if scheme else "int8"
    )
    made = with_directory(source, tiny(source, options, tmp_path / "q"))
    assert made.spec.quantization == quantization_of(source.spec, options)
    model, plain = refmodels.load(made, dtype=torch.float64), refmodels.load(source, dtype=torch.float64)
    ids = torch.randint(0, source.spec.vocab_size, (2, 12), generator=torch.Generator().manual_seed(3))
    found, expected = (m.step(ids, m.new_cache(batch=2, capacity=12)) for m in (model, plain))
    error = float((found - expected).norm() / expected.norm())
    # These models are random; int4 of them is coarse.
    assert 0 < error < (0.6 if scheme and "int4" in scheme else 0.15)
    provenance = read_provenance(made.directory)
    assert provenance is not None and provenance["checkpoint_hash"] == refmodels.checkpoint_hash(source)
    assert (provenance["calibration"] is None) == (scheme in ("int8", "int4", "fp8"))


@pytest.mark.parametrize("layout", quick_first(["gptq", "awq"]))
def test_published_layouts_give_the_same_model(layout: CheckpointFormat, tmp_path: Path) -> None:
    source = case_source("qwen2_b1")
    options = QuantizeOptions(scheme="int4", group=16, symmetric=layout == "gptq")
    ours, theirs = (
        refmodels.load(refmodels.resolve(tiny(source, options, tmp_path / name, name)))  # type: ignore[arg-type]
        for name in ("compressed-tensors", layout)
    )
    assert ours.spec == theirs.spec
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a.float(), b.float()), name


def test_zero_biases_of_autogptq_are_taken_and_others_refused(tmp_path: Path) -> None:
    """AutoGPTQ once wrote a bias for every layer, as in Qwen-7B-Chat-Int4."""
    source = case_source("qwen_b1")
    made = tiny(source, QuantizeOptions(scheme="int4", group=16), tmp_path / "q", "gptq")
    file = made / "model.safetensors"
    tensors = load_file(file)
    name = "transformer.h.0.mlp.w1.bias"
    tensors[name] = torch.zeros(tensors["transformer.h.0.mlp.w1.scales"].shape[1])
    save_file(tensors, file)
    refmodels.load(refmodels.resolve(made))
    tensors[name][3] = 1.0
    save_file(tensors, file)
    with pytest.raises(refmodels.LogitLockError, match=r"mlp\.w1\.bias in .* is not zero"):
        refmodels.load(refmodels.resolve(made))


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = case_source("chatglm2_b1")
    whole = refmodels.load(refmodels.resolve(tiny(source, QuantizeOptions(scheme="int8"), tmp_path / "whole")))
    monkeypatch.setattr("export.quantization.checkpoint._SHARD_BYTES", 20_000)
    made = tiny(source, QuantizeOptions(scheme="int8"), tmp_path / "shards")
    assert len(list(made.glob("model-*-of-*.safetensors"))) > 2
    for (name, a), (_, b) in zip(
        whole.named_parameters(), refmodels.load(refmodels.resolve(made)).named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_plan_mixes_schemes(tmp_path: Path) -> None:
    source = case_source("qwen2_b1")
    plan = tmp_path / "plan.json"
    plan.write_text(
        json.dumps(
            {
                "schema": 1,
                "precision": "int4",
                "schemes": {"blocks.0.*": "int8", "blocks.*.mlp.out": None, "logits": "fp8"},
            }
        )
    )
    made = refmodels.resolve(tiny(source, QuantizeOptions(scheme="int4", group=32, plan=plan), tmp_path / "q"))
    formats = {name: made.spec.format_of(name) for name in made.spec.linears}
    assert formats["blocks.0.attn.qkv"] == LinearFormat(weight="int8", group=32)
    assert formats["blocks.1.attn.qkv"] == LinearFormat(weight="int4", group=32)
    assert formats["blocks.1.mlp.out"] is None
    head = formats["head"]
    assert head is not None and head.weight == "fp8" and head.input == "fp8"
    refmodels.load(made)


# Bad input


def damaged(tmp_path: Path, edit: Any, layout: CheckpointFormat = "compressed-tensors", **options: Any) -> str:
    source = case_source("qwen2_b1")
    made = tiny(source, QuantizeOptions(**{"scheme": "int4", "group": 16, **options}), tmp_path / "q", layout)
    tensors, config = load_file(made / "model.safetensors"), json.loads((made / "config.json").read_text())
    edit(tensors, config["quantization_config"])
    save_file(tensors, made / "model.safetensors")
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(refmodels.LogitLockError) as caught:
        refmodels.load(refmodels.resolve(made))
    return str(caught.value)


NAME, KEY = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.k_proj"


def _set(values: Mapping[str, Any]) -> Any:
    def edit(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config.update(values)

    return edit


@pytest.mark.parametrize(
    ("edit", "expected"),
    quick_first([
        (lambda t, c: t.pop(f"{NAME}.weight_packed"), [NAME, "weight_packed", "lacks"]),
        (lambda t, c: t.pop(f"{NAME}.weight_scale"), [NAME, "weight_scale", "lacks"]),
        (lambda t, c: t.update({f"{NAME}.weight_scale": t[f"{NAME}.weight_scale"][:, :1].clone()}), [NAME, "scales"]),
        (lambda t, c: t[f"{NAME}.weight_scale"].fill_(float("nan")), [NAME, "NaN"]),
        (_set({"quant_method": "bitsandbytes"}), ["bitsandbytes", "compressed-tensors, gptq, awq and modelopt"]),
        (_set({"format": "marlin-24"}), ["marlin-24"]),
        (lambda t, c: c["config_groups"]["group_0"]["weights"].update(num_bits=3), ["3-bit", "int4, int8 and fp8"]),
        (lambda t, c: c["config_groups"]["group_0"]["weights"].update(strategy="block"), ["block"]),
        (lambda t, c: c["config_groups"]["group_0"]["targets"].remove(KEY), ["k_proj", "different formats"]),
        (lambda t, c: c["config_groups"]["group_0"]["targets"].append(1e-30), ["group_0.targets", "list of names"]),
        (lambda t, c: c.update(ignore=["re:("]), ["ignore", "not a regular expression"]),
        (lambda t, c: c.update(kv_cache_scheme={"num_bits": 4, "type": "int"}), ["kv_cache_scheme"]),
    ], 3),
    ids=["codes", "scales", "shape", "nan", "method", "format", "bits", "strategy", "fused", "target", "ignore",
         "cache"],
)  # fmt: skip
def test_damaged_checkpoints(edit: Any, expected: list[str], tmp_path: Path) -> None:
    message = damaged(tmp_path, edit)
    assert all(part in message for part in expected), message


def test_config_and_contents_must_agree(tmp_path: Path) -> None:
    def wrong(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors[f"{NAME}.qzeros"].fill_(0x66666666)

    assert "zero points, but the config says that it is symmetric" in damaged(tmp_path, wrong, "gptq")


def test_codes_without_a_config_are_refused(tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen2_b1")
    tensors[f"{NAME}.weight"] = tensors[f"{NAME}.weight"].to(torch.int8)
    with pytest.raises(refmodels.LogitLockError, match="quantization_config"):
        refmodels.load(refmodels.resolve(write_model(tmp_path, config, tensors)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int3"}, "--precision is 'int3'"),
        ({"scheme": None}, "nothing to quantize"),
        ({"scheme": "int4", "group": 48}, "do not divide"),
        ({"scheme": "int4", "inputs": "token"}, "int8 inputs need symmetric int8 weights"),
        ({"scheme": "fp8", "symmetric": False}, "fp8 inputs need"),
        ({"scheme": "int8", "cache": "int4"}, "--kv-cache is 'int4'"),
        ({"scheme": "int8", "inputs": "rows"}, "--inputs is 'rows'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(refmodels.LogitLockError, match=message):
        tiny(case_source("qwen2_b1"), QuantizeOptions(**options), tmp_path / "q")
    assert not list(tmp_path.iterdir())


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    made = refmodels.resolve(tiny(case_source("qwen2_b1"), QuantizeOptions(scheme="int8"), tmp_path / "q"))
    with pytest.raises(refmodels.LogitLockError, match="is quantized already"):
        tiny(made, QuantizeOptions(scheme="int8"), tmp_path / "again")


def test_tied_heads_stay(tmp_path: Path) -> None:
    with pytest.raises(refmodels.LogitLockError, match="its embedding"):
        tiny(case_source("gpt2_b1"), QuantizeOptions(scheme="int8", head=True), tmp_path / "q")


def test_calibration_files(tmp_path: Path) -> None:
    source = refmodels.resolve("qwen")
    (tmp_path / "a.jsonl").write_text('{"text": "2+2=4"}\n\n{"prompt": "3+4=", "answer": "7"}\n', encoding="utf-8")
    (tmp_path / "b.txt").write_text("世界上第二高的山峰是哪座？" * 40, encoding="utf-8")
    data = calibration_data(source, [tmp_path / "a.jsonl", tmp_path / "b.txt"], tokens=50)
    assert max(map(len, data.rows)) == 50 and len(data.rows) > 3
    assert data.sha256 == calibration_data(source, [tmp_path / "a.jsonl", tmp_path / "b.txt"], tokens=50).sha256
    for name, content, message in (
        ("c.jsonl", "{", "line 1 is not valid JSON"),
        ("d.jsonl", '{"question": "?"}', 'line 1 must be an object with a text under "text"'),
        ("e.txt", "", "no text for calibration"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(refmodels.LogitLockError, match=message):
            calibration_data(source, [tmp_path / name])


def test_batches_do_not_change_what_is_found(tmp_path: Path) -> None:
    """Rows padded together or alone: padding is never observed."""
    source = case_source("qwen2_b1")
    rows = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [5] * 12]
    data = replace(calibration_data(source, samples=1), rows=rows)
    options = QuantizeOptions(scheme="smoothquant", inputs="tensor", cache="int8")
    together = quantize_model(source, tmp_path / "a", options, data=data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.quantization.data._BATCH_TOKENS", 1)
        alone = quantize_model(source, tmp_path / "b", options, data=data)
    one, other = (load_file(path / "model.safetensors") for path in (together, alone))
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor.float(), other[name].float(), rtol=1e-4, atol=1.01 if tensor.dtype == torch.int8 else 1e-5
        )


def test_nan_in_calibration_names_the_layer(tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen2_b1")
    tensors["model.layers.1.input_layernorm.weight"].fill_(3e38)
    source = refmodels.resolve(write_model(tmp_path / "m", config, tensors))
    with pytest.raises(refmodels.LogitLockError, match=r"blocks\.1\.attn\.qkv holds (NaN|infinity) during calibration"):
        tiny(source, QuantizeOptions(scheme="smoothquant"), tmp_path / "q")
    assert not (tmp_path / "q").exists()


@pytest.mark.slow
def test_gptq_reports_less_error_than_rounding(tmp_path: Path) -> None:
    source = refmodels.resolve("qwen")
    options = QuantizeOptions(scheme="int4-gptq", group=64, method=MethodOptions(act_order=True))
    made = quantize_model(source, tmp_path / "q", options, data=calibration_data(source, samples=32))
    provenance = read_provenance(made)
    assert provenance is not None and len(provenance["layers"]) == 25
    for name, report in provenance["layers"].items():
        assert report["error"] < report["nearest_error"], name


def test_cases_exist() -> None:
    assert set(SMALL) <= set(CASES)
