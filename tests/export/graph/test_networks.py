"""Networks that TensorRT's parser makes from our graphs compute the reference's results: every layer, run here.

The builder's layer list shows what a plan is made of, not that the parser read every attribute and input as meant.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from torch import Tensor

from export.bundle import export_model
from tests.support.goldens import FEATURES, source_of
from tests.support.mutate import Fault, mutated
from trt_runtime.bundle import AttentionMode, Precision

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
from export.tensorrt.build import fix_capacity
from tests.support.network_interpreter import TOLERANCE, Interpreter, random_step, worst_difference
from trt_runtime.tensorrt.api import LOGGER, trt
from trt_runtime.tensorrt.plugins import raise_failure, register_plugins

pytestmark = pytest.mark.tensorrt

SLOTS = 48


def outputs_of(bundle: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parsed as for a plan, and run."""
    register_plugins()
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    fix_capacity(model, SLOTS)
    builder = trt.Builder(LOGGER)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, LOGGER)
    assert parser.parse(model.SerializeToString(), str(bundle / "model.onnx"))
    raise_failure()
    return Interpreter(network, wide=True).run(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["plugin", "native", "decomposed"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("case", FEATURES)
def test_the_network_computes_what_the_reference_does(
    case: str, precision: Precision, attention: AttentionMode, tmp_path: Path
) -> None:
    source = source_of(case)
    bundle = export_model(source, precision=precision, attention=attention, max_seq=SLOTS, output=tmp_path / "bundle")
    inputs = random_step(source.spec, slots=SLOTS)
    assert worst_difference(bundle, inputs, outputs_of(bundle, inputs)) < TOLERANCE


def attribute(op: str, name: str, value: float) -> Fault:
    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for given in node.attribute:
                if node.op_type == op and given.name == name:
                    given.CopyFrom(onnx.helper.make_attribute(name, value))

    return change


def rename(op: str, other: str, *, where: str) -> Fault:
    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == op and node.name.endswith(where):
                node.op_type = other

    return change


@pytest.mark.parametrize(
    ("case", "attention", "fault"),
    [
        ("starcoder2_sliding", "plugin", attribute("CachedAttention", "window", 9)),
        ("chatglm2", "plugin", attribute("CachedAttention", "rotary_interleaved", 0)),
        ("chatglm2", "plugin", attribute("FusedRmsNorm", "epsilon", 1e-4)),
        ("chatglm2", "native", attribute("RotaryEmbedding", "interleaved", 0)),
        ("gpt_bigcode", "native", rename("And", "Or", where=".seen")),
        ("baichuan_13b", "decomposed", rename("Sub", "Mul", where=".distance")),
    ],
)
def test_the_check_sees(case: str, attention: AttentionMode, fault: Fault, tmp_path: Path) -> None:
    source = source_of(case)
    options = {"precision": "fp32", "attention": attention, "max_seq": SLOTS}
    bundle = mutated(export_model(source, output=tmp_path / "bundle", **options), tmp_path / "mutated", fault)
    inputs = random_step(source.spec, slots=SLOTS)
    assert worst_difference(bundle, inputs, outputs_of(bundle, inputs)) > 100 * TOLERANCE
