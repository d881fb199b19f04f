"""`logitlock diff A B`, `trace` and `drift`: any two executors of one model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from debug.sides import diff
from export.bundle import export_model
from refmodels.errors import LogitLockError
from tests.support import mutate
from tests.support.command import logitlock
from tests.support.goldens import GOLDENS, case_source
from trt_runtime.bundle import read_bundle

MODEL = str(GOLDENS / "qwen2")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(case_source("qwen2"), precision="fp16", output=tmp_path_factory.mktemp("sides") / "clean")


@pytest.fixture(scope="module")
def broken(clean: Path) -> Path:
    return mutate.mutated(clean, clean.parent / "broken", mutate.attention_scale("blocks.1.attn", 2.0))


@pytest.mark.slow
def test_both_sides_are_judged(clean: Path, broken: Path) -> None:
    result = diff("reference:bf16", str(broken), model=MODEL, steps=2)
    assert result.verdict == "diverged" and result.first_wrong_tap == "blocks.1.attn.context"
    assert result.culprits[0].diagnosis[0].fault.startswith("wrong attention scale: doubled")
    assert result.other is not None and result.other.verdict == "aligned" and not result.aligned
    # The other way round it is side a that is wrong, and the result says so.
    turned = diff(str(broken), str(clean), model=MODEL, steps=2)
    assert turned.verdict == "aligned" and turned.other is not None and turned.other.verdict == "diverged"
    assert not turned.aligned and turned.between is not None and turned.between.kl_mean > 1e-4
    rel = {tap.tap: tap.rel_l2 for tap in turned.between.taps}
    assert rel["blocks.0"] == 0.0 and rel["blocks.1.attn.context"] > 0.01
    same = diff(str(clean), str(clean), model=MODEL, steps=2)
    assert same.aligned and same.between is not None and same.between.kl_max == 0.0


@pytest.mark.slow
def test_transformers_against_a_bundle(clean: Path) -> None:
    result = diff("hf:fp16", str(clean), model=MODEL, steps=2)
    assert result.aligned and result.other is not None and "transformers" in result.other.engine.lower()


@pytest.mark.slow
def test_the_reference_itself_is_one_side_only(clean: Path) -> None:
    assert diff("reference", str(clean), model=MODEL, steps=1).other is None
    assert diff("reference:fp64", str(clean), model=MODEL, steps=1).other is None


@pytest.mark.slow
def test_golden_case_as_a_side() -> None:
    result = diff(str(GOLDENS / "gpt2"), "reference:fp32:upstream", steps=4)
    assert result.aligned and result.prompts == "those of gpt2" and result.other is not None
    assert {tap.tap for tap in result.other.taps} < {tap.tap for tap in result.taps}


@pytest.mark.slow
def test_traces_meet(clean: Path, broken: Path, tmp_path: Path) -> None:
    for name, bundle, more in (("a", clean, ()), ("b", broken, ("--tokens-of", tmp_path / "a.safetensors"))):
        out = tmp_path / f"{name}.safetensors"
        done = logitlock("trace", bundle, "--out", out, "--model", MODEL, "--steps", 3, *more)
        assert done.code == 0 and out.name in done.out, done.err
    found = logitlock("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--model", MODEL, "--json")
    assert found.code == 1, found.err
    document = json.loads(found.out)
    assert document["verdict"] == "diverged" and document["other"]["verdict"] == "aligned"
    assert document["first_wrong_tap"] == "blocks.1.attn.context" and document["between"]["top1"] <= 1.0
    assert document["settings"]["steps"] == 3
    # A trace and something that runs: the trace's tokens are fed to the other.
    live = logitlock("diff", "--model", MODEL, tmp_path / "a.safetensors", broken)
    assert live.code == 1 and "doubled" in live.out


@pytest.mark.slow
def test_traces_of_other_tokens_do_not_meet(clean: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        out = tmp_path / f"{seed}.safetensors"
        assert logitlock("trace", clean, "--out", out, "--model", MODEL, "--steps", 1, "--seed", seed).code == 0
    logitlock("diff", tmp_path / "0.safetensors", tmp_path / "1.safetensors", "--model", MODEL).assert_bad_input(
        "on other tokens"
    )


@pytest.mark.slow
def test_drift_command(clean: Path, broken: Path) -> None:
    calm = logitlock("drift", clean, "--model", MODEL, "--steps", 4, "--json")
    assert calm.code == 0, calm.err
    document = json.loads(calm.out)
    assert document["schema"] == 1 and len(document["steps"]) == 5
    assert document["steps"][-1]["kl"] < 100 * document["steps"][-1]["floor_kl"]
    off = logitlock("drift", broken, "--model", MODEL, "--steps", 4)
    assert "cache error" in off.out and "free-running" in off.out


def test_bad_input(clean: Path, tmp_path: Path) -> None:
    logitlock("diff", "--model", MODEL).assert_bad_input("--bundle DIR, or one or two executors")
    logitlock("diff", clean, "--bundle", clean).assert_bad_input("--bundle DIR, or one or two executors")
    logitlock("diff", "a", "b", "c").assert_bad_input("one or two executors")
    logitlock("diff", "reference:fp16").assert_bad_input("--model")
    logitlock("diff", "--model", MODEL, "nonsense").assert_bad_input("names no executor")
    logitlock("diff", "--model", "gpt", clean).assert_bad_input("of another model than gpt")
    logitlock("diff", "--model", MODEL, tmp_path / "none.safetensors").assert_bad_input("no such file")
    logitlock("trace", clean, "--model", MODEL, "--out", tmp_path / "no" / "a").assert_bad_input("cannot be written")
    with pytest.raises(LogitLockError, match="say with --model where that model is"):
        diff("reference", str(clean))


@pytest.mark.slow
def test_a_model_near_the_executor_is_found_by_its_name(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = read_bundle(clean).info.model
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "b").symlink_to(clean)
    for place in ("engines", "", "elsewhere"):
        model = tmp_path / place / name
        model.parent.mkdir(exist_ok=True)
        model.symlink_to(MODEL)
        monkeypatch.chdir(model.parent if place == "elsewhere" else "/")
        assert diff(str(tmp_path / "engines" / "b"), steps=1).aligned
        model.unlink()
    # Another model of that name is refused as any other.
    (tmp_path / name).symlink_to(GOLDENS / "gpt2")
    with pytest.raises(LogitLockError, match="of another model than"):
        diff(str(tmp_path / "engines" / "b"))


@pytest.mark.slow
def test_a_wrong_stop_id(tmp_path: Path) -> None:
    """No tensor shows it: the engine is right and answers go on for ever."""
    bundle = export_model("qwen", precision="fp32", output=tmp_path / "b")
    assert logitlock("diff", bundle, "--steps", 1).code == 0
    config = json.loads((bundle / "generation_config.json").read_text())
    config["eos_token_id"] = [7]
    (bundle / "generation_config.json").write_text(json.dumps(config))
    broken = mutate.mutated(bundle, tmp_path / "broken", lambda model: None)
    found = logitlock("diff", broken, "--steps", 1, "--json")
    assert found.code == 1, found.err
    document = json.loads(found.out)
    assert document["verdict"] == "diverged" and document["first_wrong_tap"] == "stop_ids"
    assert document["culprits"][0]["kind"] == "configuration"
    assert document["culprits"][0]["diagnosis"][0]["fault"].startswith("wrong stop id: generation ends at [")
    assert "every tensor is right" in logitlock("diff", broken, "--steps", 1).out


@pytest.mark.slow
def test_library_use(clean: Path, broken: Path) -> None:
    from debug import diff

    assert diff(str(clean), model=MODEL, steps=1).aligned
    result = diff("reference:fp32", str(broken), model=MODEL, steps=1)
    assert result.first_wrong_tap == "blocks.1.attn.context"
    frame = result.to_frame()
    assert set(frame["tap"]) == {tap.tap for tap in result.taps}
    with pytest.raises(LogitLockError, match="one or two executors"):
        diff(model=MODEL)


@pytest.mark.slow
def test_modules_by_themselves(clean: Path, broken: Path) -> None:
    """The engine's modules on the reference's tensors: only the broken one is off, whatever comes before it."""
    right, wrong = (diff("reference", str(b), model=MODEL, steps=1, cut=True) for b in (clean, broken))
    cuts = {tap.tap: tap.cut for tap in right.taps if tap.step == 0}
    assert cuts["blocks.1.mlp.out"] is not None and cuts["blocks.1.key"] is None
    unit = right.unit_roundoff
    assert all(cut < 3 * unit for cut in cuts.values() if cut is not None)
    off = {tap.tap for tap in wrong.taps if tap.cut is not None and tap.cut > 8 * unit}
    assert off == {"blocks.1.attn.context"}
    assert all(tap.cut is None for tap in diff("reference", str(clean), model=MODEL, steps=1).taps)
    found = logitlock("diff", "--model", MODEL, broken, "--steps", 1, "--cut", "--json")
    assert any(tap["cut"] for tap in json.loads(found.out)["taps"])
