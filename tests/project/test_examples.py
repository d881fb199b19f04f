"""The examples, run as a user would run them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from export.bundle import export_model
from tests.support import foreign
from tests.support.goldens import GOLDENS
from tests.support.paths import ROOT
from tests.support.scripts import load_script

EXAMPLES = ROOT / "examples"


def _scaled_gate(model: nn.Module) -> None:
    model.model.layers[1].mlp.gate_proj.weight.data.mul_(1.5)  # type: ignore[union-attr, operator, index]


@pytest.mark.slow
def test_aligns_a_foreign_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    align = load_script("examples/align_onnx.py").align

    model = str(GOLDENS / "qwen2")
    good = foreign.export(foreign.huggingface("qwen2"), tmp_path / "good.onnx")
    bad = foreign.export(foreign.huggingface("qwen2", _scaled_gate), tmp_path / "bad.onnx")
    names = str(tmp_path / "names.json")
    assert align(model, str(good), names)
    assert "was proposed" in capsys.readouterr().out
    assert not align(model, str(bad), names)
    assert "-> blocks.1.mlp.gate: " in capsys.readouterr().out


def test_reference_in_another_projects_test() -> None:
    """The example is a pytest file; a kernel with a fault fails it."""
    example = load_script("examples/test_my_kernels.py")

    example.test_mlp_is_as_good_as_fp16_allows(2)
    with pytest.MonkeyPatch.context() as patch:
        right = example.my_gated_mlp
        patch.setattr(example, "my_gated_mlp", lambda x, gate, up, out: right(x, up, gate, out))
        with pytest.raises(AssertionError):
            example.test_mlp_is_as_good_as_fp16_allows(2)


def test_serves_tokens(tmp_path: Path) -> None:
    from fastapi.testclient import TestClient

    make_app = load_script("examples/serve.py").make_app

    bundle = export_model("qwen", precision="fp32", output=tmp_path / "bundle")
    with torch.inference_mode(), TestClient(make_app(str(bundle))) as client:
        with client.stream("POST", "/generate", json={"prompt": "Sort: t j e r o ->"}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            text = "".join(response.iter_text())
        pieces = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n") if event]
        assert "".join(pieces) == " e j o r t" and len(pieces) > 1
        assert client.post("/generate", json={}).status_code == 422
        assert client.post("/generate", json={"prompt": "a b " * 300}).status_code == 400


def test_listens_on_the_loopback_interface_only() -> None:
    assert 'host="127.0.0.1"' in (EXAMPLES / "serve.py").read_text()
