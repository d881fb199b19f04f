"""Quantized checkpoints of ours in other programs, and theirs here: transformers with compressed-tensors."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import refmodels
from debug.sides import diff
from export.quantization.calibrate import quantize_model
from export.quantization.data import calibration_data
from export.quantization.schemes import QuantizeOptions
from tests.support.goldens import case_source

# Not imported to know it: that takes more than a second.
pytestmark = pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed")

OPTIONS: dict[str, dict[str, Any]] = {
    "int4": {"scheme": "int4", "group": 16},
    "int4-gptq": {"scheme": "int4-gptq", "group": 16},
    "int8": {"scheme": "int8"},
    "int8-tensor": {"scheme": "int8", "inputs": "tensor"},
    "smoothquant": {"scheme": "smoothquant"},
    "fp8": {"scheme": "fp8"},
    "fp8-tensor": {"scheme": "fp8", "inputs": "tensor"},
}


def made(tmp_path: Path, **options: Any) -> Path:
    source = case_source("qwen2_b1")
    data = calibration_data(source, samples=8, tokens=32)
    return quantize_model(source, tmp_path / "q", QuantizeOptions(**options), data=data)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = made(tmp_path, **OPTIONS[name])
    ours = refmodels.load(refmodels.resolve(path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.randint(0, ours.spec.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    found = ours.step(ids, ours.new_cache(batch=2, capacity=12))
    expected = theirs(ids).logits
    error = float((found - expected).norm() / expected.norm())
    if name == "smoothquant":
        # int8 inputs per token: compressed-tensors divides by amax / 127.5, all other kernels by amax / 127.
        assert error < 0.05
    elif "inputs" in OPTIONS[name] or name == "fp8":
        # A number next to a boundary may get the neighbouring code: 2^-4 of one of 64 inputs, for e4m3.
        assert error < 2**-4 / 8
    else:
        # fp32 in another order, through two blocks and a head: about ten roundings of the largest numbers.
        assert error < 10 * 2**-23 * 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4", "fp8-tensor"])
def test_a_diff_with_transformers(name: str, tmp_path: Path) -> None:
    path = made(tmp_path, **OPTIONS[name])
    result = diff("reference", "hf:fp32", model=str(path), steps=2)
    assert result.verdict == "aligned", result.culprits


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_are_read_as_compressed_tensors_reads_them(symmetric: bool, tmp_path: Path) -> None:
    """Zero points too, which transformers cannot load (it does not expect them packed; compressed-tensors 0.20)."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from safetensors.torch import load_file

    path = made(tmp_path, scheme="int4", group=16, symmetric=symmetric)
    stored = load_file(path / "model.safetensors")
    model = refmodels.load(refmodels.resolve(path))
    name = "model.layers.1.mlp.down_proj"
    shape = torch.Size(stored[f"{name}.weight_shape"].tolist())
    codes = unpack_from_int32(stored[f"{name}.weight_packed"], 4, shape)
    layer = model.get_submodule("blocks.1.mlp.out")
    assert torch.equal(codes, layer.weight)
    if not symmetric:
        scales = layer.scale.shape
        zero = unpack_from_int32(stored[f"{name}.weight_zero_point"], 4, torch.Size(scales), packed_dim=0)
        assert torch.equal(zero, layer.zero)
