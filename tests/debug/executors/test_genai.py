"""Files of onnxruntime-genai, as its own builder writes them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from debug.executors.name_map import NameMap, read_name_map
from debug.executors.onnx_file import OnnxFileEngine
from refmodels.errors import LogitLockError
from tests.support import foreign
from tests.support.executors import diff, first_wrong, proposed
from tests.support.goldens import GOLDENS, case_source

pytest.importorskip("transformers")
pytest.importorskip("onnxruntime_genai", reason="its builder makes the files of this test")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("genai")

    def make(precision: str) -> Path:
        path = root / precision / "model.onnx"
        return path if path.exists() else foreign.genai(GOLDENS / "qwen2", root / precision, precision)

    return make


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_clean_file_is_aligned(
    precision: str, built: Callable[[str], Path], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    path = built(precision)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        proposal, engine = proposed(path, "qwen2")
        # The last residual is inside SkipSimplifiedLayerNormalization.
        assert proposal.unmatched == ["blocks.1"] and not proposal.ambiguous
        rounded = OnnxFileEngine(path, engine.spec, proposal.names, emulate_rounding=True)
        for side in (engine, rounded) if precision == "fp16" else (engine,):
            result = diff(side, "qwen2")
            assert first_wrong(result) is None, result.culprits
    assert not caplog.records and not any(capfd.readouterr())


def test_a_planted_epsilon_is_found(built: Callable[[str], Path], tmp_path: Path) -> None:
    model = onnx.load(built("fp32"))
    norms = [node for node in model.graph.node if "SimplifiedLayerNormalization" in node.op_type]
    next(a for a in norms[1].attribute if a.name == "epsilon").f = 1e-3
    onnx.save(model, tmp_path / "model.onnx")
    result = diff(proposed(tmp_path / "model.onnx", "qwen2")[1], "qwen2")
    assert result.first_wrong_tap == "blocks.0.mlp_norm"
    assert "epsilon" in result.culprits[0].diagnosis[0].fault


def test_axes_of_the_name_map(built: Callable[[str], Path], tmp_path: Path) -> None:
    """Sizes that no number gives away: their names are those of the map."""
    spec, model = case_source("qwen2").spec, onnx.load(built("fp32"))
    for value in (*model.graph.input, *model.graph.output):
        if "key" in value.name or "value" in value.name:
            for axis, name in zip(value.type.tensor_type.shape.dim, "rsht", strict=True):
                axis.dim_param = name
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "names.json").write_text('{"axes": {"r": "batch", "s": "slots", "h": "kv_heads", "t": "head_dim"}}')
    names = read_name_map(tmp_path / "names.json", spec)
    assert OnnxFileEngine(tmp_path / "model.onnx", spec, names).roles.axes.order == "BSHD"
    assert NameMap(**{"axes": names.axes}).to_json()["axes"] == names.axes
    with pytest.raises(LogitLockError, match=r"calls the axis s 'tokens'; it must be one of batch, kv_heads"):
        NameMap(axes={"s": "tokens"})
    with pytest.raises(LogitLockError, match="not understood"):
        OnnxFileEngine(tmp_path / "model.onnx", spec, NameMap(axes={"r": "slots", "s": "slots"}))


def test_one_value_serves_one_tap(built: Callable[[str], Path]) -> None:
    """Against the float weights, an int4 file fits badly; no residual may then be taken for its own branch."""
    proposal, _ = proposed(built("int4"), "qwen2")
    sources = list(proposal.names.taps.values())
    assert all(source not in sources[:i] for i, source in enumerate(sources))
    assert "guessed: " in proposal.summary()
