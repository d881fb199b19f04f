"""Quantization against the independent implementations that are installed; the others are skipped, with a reason.

compressed-tensors and onnxruntime are in the `test` extra.  GPTQ, AWQ and SmoothQuant of llmcompressor,
neural-compressor, autoawq and nvidia-modelopt want other versions of torch and transformers; where they are installed
all the same, `benchmarks/quantization_peers.py` is run here on a toy's layers.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import refmodels
from export.quantization.calibrate import quantize_model
from export.quantization.data import calibration_data
from export.quantization.schemes import QuantizeOptions
from refmodels.checkpoints.quantized_layouts import Storage
from refmodels.quantization.arithmetic import quantize_weight, unpack_int4, weight_scale
from refmodels.quantization.formats import LinearFormat
from refmodels.quantization.linear import QuantizedLinear
from tests.support.marks import quick_first
from tests.support.paths import ROOT
from tests.support.scripts import load_script

RESULTS = ROOT / "benchmarks" / "results" / "quantization_peers.json"
FORMATS = {
    "int4 groups": LinearFormat(weight="int4", group=32),
    "int4 zero points": LinearFormat(weight="int4", group=32, symmetric=False),
    "int4 rows": LinearFormat(weight="int4"),
    "int8 rows": LinearFormat(weight="int8"),
    "int8 zero points": LinearFormat(weight="int8", group=64, symmetric=False),
    "fp8 rows": LinearFormat(weight="fp8"),
}
COMPRESSORS = {
    "packed": "PackedQuantizationCompressor",
    "int": "IntQuantizationCompressor",
    "float": "FloatQuantizationCompressor",
}
SUFFIXES = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "input_scale")


def benchmark() -> ModuleType:
    return load_script("benchmarks/quantization_peers.py")


def made_weight() -> torch.Tensor:
    return torch.randn(48, 128, generator=torch.Generator().manual_seed(0)) * 0.05


def same_share(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() == b.float()).double().mean())


def their_arguments(linear: LinearFormat) -> Any:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    return quantization.QuantizationArgs(
        num_bits=4 if linear.weight == "int4" else 8,
        type="float" if linear.weight == "fp8" else "int",
        strategy="channel" if linear.group is None else "group",
        group_size=linear.group,
        symmetric=linear.symmetric,
    )


@pytest.mark.slow
@pytest.mark.parametrize("linear", FORMATS.values(), ids=FORMATS.keys())
def test_compressed_tensors_rounds_packs_and_reads_as_we_do(linear: LinearFormat) -> None:
    arguments = their_arguments(linear)
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    weight = made_weight()
    ours = quantize_weight(weight, linear)
    zero = ours.zero if ours.zero is not None else torch.zeros_like(ours.scale, dtype=torch.int8)
    theirs = forward.quantize(weight, ours.scale, zero, arguments, dtype=ours.codes.dtype)
    if linear.symmetric:
        assert torch.equal(theirs.float(), ours.codes.float())
    else:
        # They add the zero point before they round: ties to even fall on the other side of an odd one.
        assert same_share(theirs, ours.codes) > 0.999 and (theirs.int() - ours.codes.int()).abs().max() <= 1
    floats = forward.dequantize(ours.codes, ours.scale, zero, arguments)
    assert torch.equal(floats, ours.dequantized())


@pytest.mark.parametrize("linear", FORMATS.values(), ids=FORMATS.keys())
def test_compressed_tensors_decompresses_what_we_store(linear: LinearFormat) -> None:
    arguments = their_arguments(linear)
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    ours = quantize_weight(made_weight(), linear)
    stored = Storage(layout="compressed-tensors").encode(ours, linear)
    compressor = getattr(compressors, COMPRESSORS["packed" if "weight_packed" in stored else arguments.type])
    assert torch.equal(compressor.decompress(dict(stored), scheme)["weight"], ours.dequantized())
    # And back: what they make of these floats has the same codes, and we read it.
    floats = {"weight": ours.dequantized(), "weight_scale": ours.scale}
    floats["weight_zero_point"] = ours.zero if ours.zero is not None else torch.zeros_like(ours.scale, dtype=torch.int8)
    theirs = compressor.compress(floats, scheme)
    read, _ = Storage(layout="compressed-tensors").decode(theirs, linear, (48, 128), "a layer")
    assert torch.equal(read.codes.float(), ours.codes.float())


@pytest.mark.parametrize(
    ("toy", "scheme"), quick_first([("baichuan", "fp8"), ("chatglm2", "int4-gptq"), ("qwen", "smoothquant")])
)
def test_compressed_tensors_reads_a_whole_checkpoint_of_ours(toy: str, scheme: str, tmp_path: Path) -> None:
    """With their reading of quantization_config and their decompression, it is a float checkpoint with our weights."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    source = refmodels.resolve(toy)
    data = calibration_data(source, samples=8, tokens=32)
    made = quantize_model(source, tmp_path / "quantized", QuantizeOptions(scheme=scheme), data=data)
    config = json.loads((made / "config.json").read_text())
    theirs = quantization.QuantizationConfig.model_validate(config.pop("quantization_config"))
    tensors = load_file(made / "model.safetensors")
    for scale in [name for name in tensors if name.endswith(".weight_scale")]:
        module = scale.removesuffix(".weight_scale")
        stored = {n: tensors.pop(f"{module}.{n}") for n in SUFFIXES if f"{module}.{n}" in tensors}
        [found] = [group for group in theirs.config_groups.values() if is_target(group.targets, module)]
        compressor = getattr(compressors, COMPRESSORS["packed" if "weight_packed" in stored else found.weights.type])
        tensors[f"{module}.weight"] = compressor.decompress(stored, found)["weight"]
    floats = tmp_path / "floats"
    floats.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, floats / "model.safetensors")
    (floats / "config.json").write_text(json.dumps(config))
    expected, ours = refmodels.load(floats), refmodels.load(made)
    quantized = {name: layer for name, layer in ours.named_modules() if isinstance(layer, QuantizedLinear)}
    assert len(quantized) == len(ours.spec.linears) - (not ours.spec.tied_head)
    for name, layer in quantized.items():
        assert torch.equal(expected.get_submodule(name).weight, layer.quantized.dequantized()), name


def is_target(targets: list[str], module: str) -> bool:
    return any(re.match(t[3:], module) is not None if t.startswith("re:") else t in (module, "Linear") for t in targets)


@pytest.mark.parametrize("symmetric", [True, False])
def test_onnxruntime_rounds_as_we_do(symmetric: bool) -> None:
    """Its MatMulNBits quantizer has scales of its own for symmetric weights; with them, ours gives its codes."""
    quantizer = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    linear = LinearFormat(weight="int4", group=32, symmetric=symmetric)
    weight = made_weight()
    config = quantizer.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=symmetric)
    packed, scales, zeros = quantizer.DefaultWeightOnlyQuantizer(config).qbits_block_quant(
        weight.t().contiguous().numpy()
    )
    scale = torch.from_numpy(scales).view(48, 4)
    # Stored + 8: the sign bit flipped.  Older versions give zero points in one dimension.
    zero = None if symmetric else unpack_int4(torch.from_numpy(zeros).view(48, -1) ^ 0x88)
    theirs = torch.from_numpy(packed).view(48, -1)
    codes = unpack_int4(theirs ^ 0x88)
    ours = quantize_weight(weight, linear, scale=scale, zero=zero)
    # It rounds half away from zero, and divides by multiplying with an inverse.
    assert same_share(ours.codes, codes) > 0.999 and (ours.codes - codes).abs().max() <= 1
    if not symmetric:
        own_scale, own_zero = weight_scale(weight, linear)
        assert torch.allclose(own_scale, scale) and own_zero is not None and torch.equal(own_zero, zero)


@pytest.mark.parametrize(
    ("package", "what", "kind"),
    [row[:3] for row in benchmark().PEERS if row[0] not in ("onnxruntime", "compressed-tensors")],
)
def test_methods_agree_with_peers_on_a_toy(package: str, what: str, kind: str) -> None:
    [make] = [row[3] for row in benchmark().PEERS if row[:3] == (package, what, kind)]
    try:
        run = make()
    except ImportError as error:
        pytest.skip(f"{package} is not installed ({error})")
    for layer in itertools.islice(benchmark().layers_of("chatglm2"), 5):
        result = run(layer)
        if what == "GPTQ":
            # fp32 Cholesky factors (theirs) put a few weights in a thousand on the other side of a tie.
            assert result["same"] > 0.99 and 0.99 < result["error_ratio"] < 1.01, layer[0]
        elif what == "SmoothQuant":
            assert result["largest_difference"] < 1e-5, layer[0]
        else:
            # Their clipping has a coarser search (modelopt) or leaves the lowest code out (autoawq).
            assert result["error_ratio"] < 1.02, layer[0]


def test_the_committed_comparison_is_of_these_peers() -> None:
    rows = json.loads(RESULTS.read_text())["rows"]
    assert {(r["package"], r["what"], r["format"]) for r in rows} == {row[:3] for row in benchmark().PEERS}
    for row in rows:
        if row["what"] == "GPTQ":
            assert row["results"]["same"]["min"] > 0.99 and row["results"]["error_ratio"]["max"] < 1.01
        elif row["what"].startswith("AWQ"):
            assert row["results"]["error_ratio"]["max"] < 1.02
