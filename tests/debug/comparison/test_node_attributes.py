"""Attributes of plugin nodes that the function body does not read are compared with the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from debug.comparison.node_attributes import wrong_attributes
from export.bundle import export_model
from tests.support.goldens import case_source
from tests.support.mutate import Fault, attribute, mutated, node
from trt_runtime.bundle import Bundle, read_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("attributes") / "clean"
    return export_model(case_source("chatglm2"), precision="fp32", attention="plugin", output=directory)


def changed(name: str, attribute_name: str, value: int) -> Fault:
    def fault(model) -> None:  # type: ignore[no-untyped-def]
        attribute(node(model, name), attribute_name).i = value

    return fault


def names(bundle: Bundle) -> list[str]:
    return [c.diagnosis[0].fault for c in wrong_attributes(bundle, bundle.spec)]


def test_a_clean_bundle_has_no_contradiction(bundle: Path) -> None:
    assert names(read_bundle(bundle)) == []


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("blocks.1.attn", "rotary_interleaved", 0),
        ("blocks.0.attn", "rotary_dim", 16),
        ("blocks.0.attn", "kv_heads", 1),
        ("blocks.0.mlp_norm", "weight_in_float", 0),
    ],
)
def test_a_contradiction_names_node_attribute_and_both_values(
    bundle: Path, tmp_path: Path, where: str, name: str, value: int
) -> None:
    clean = read_bundle(bundle)
    (found,) = names(read_bundle(mutated(clean.directory, tmp_path / "wrong", changed(where, name, value))))
    assert found.startswith(f"wrong node attribute {name}: {value} instead of ") and where in found
