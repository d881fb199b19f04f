"""`logitlock diff`: no alarm on clean engines, the right tap on planted faults, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import refmodels
from debug.capture.prompts import Prompts, default_prompts, left_padded, random_prompts
from debug.comparison.compare import MULTIPLE, diff_engine
from debug.comparison.results import DiffResult, verdict_line
from debug.sides import diff_bundle
from export.bundle import export_model
from refmodels.cache import KVCache, StepInputs
from refmodels.errors import LogitLockError
from refmodels.recorder import Recorder
from tests.support import mutate
from tests.support.command import logitlock
from tests.support.goldens import GOLDENS, case_source
from trt_runtime.engine import Engine
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine
from trt_runtime.torch_gpu.engine import TorchEngine

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# One case for each position scheme, mask form and head layout.
CLEAN = ["chatglm2", "baichuan_13b", "baichuan2_7b", "qwen_ntk", "gpt2", "gpt_bigcode", "starcoder2_sliding"]
Bundles = Callable[..., Path]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Exports a golden case or a toy once for each precision and numerics."""
    root = tmp_path_factory.mktemp("bundles")

    def bundle(model: str, precision: str, numerics: str = "exact") -> Path:
        output = root / f"{model}-{precision}-{numerics}"
        if not output.exists():
            source = case_source(model) if (GOLDENS / model).is_dir() else refmodels.resolve(model)
            export_model(source, precision=precision, numerics=numerics, output=output)  # type: ignore[arg-type]
        return output

    return bundle


def run(
    engine: Engine, case: str, *, numerics: str = "exact", prompts: Prompts | None = None, **options: Any
) -> DiffResult:
    source = case_source(case)
    truth = refmodels.load(source, dtype=torch.float64)
    rounded = refmodels.load(source, dtype=engine.dtype, numerics=numerics)  # type: ignore[arg-type]
    if prompts is None:
        prompts = random_prompts(source.spec.vocab_size, (20, 13, 9), seed=0)
    return diff_engine(engine, truth, rounded, prompts, **options)


def engine_of(bundle: Path) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(bundle, emulate_rounding=True, threads=1)


# Clean engines


@pytest.mark.slow
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("case", CLEAN)
def test_clean_engines_give_no_alarm(case: str, precision: str, bundles: Bundles) -> None:
    result = run(engine_of(bundles(case, precision)), case)
    assert result.verdict == "aligned", verdict_line(result)
    assert not result.culprits and result.first_wrong_tap is None
    assert result.logits.margin_flips == 0 and result.logits.nonfinite == 0
    # Half the limit: what clean engines show must stay well below it.
    assert max(e.ratio for e in result.taps) < MULTIPLE / 2
    spec = case_source(case).spec
    assert len(result.taps) == 9 * len(refmodels.tap_names(spec))
    assert [e.tap for e in result.taps[: len(result.taps) // 9]] == list(refmodels.tap_names(spec))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), [("baichuan_13b", torch.float16), ("chatglm2", torch.bfloat16)])
def test_upstream_rounding_is_no_fault_either(case: str, dtype: torch.dtype) -> None:
    """Another correct implementation: Hugging Face's order of rounding against the floor of exact numerics."""
    engine = TorchEngine(refmodels.load(case_source(case), dtype=dtype, numerics="upstream"))
    result = run(engine, case)
    assert result.verdict == "aligned", verdict_line(result)
    assert 1.5 < max(e.ratio for e in result.taps) < MULTIPLE / 2


@pytest.mark.slow
def test_numerics_of_the_bundle_make_the_floor(bundles: Bundles) -> None:
    result = run(engine_of(bundles("chatglm2", "fp16", "upstream")), "chatglm2", numerics="upstream")
    assert result.verdict == "aligned", verdict_line(result)


@pytest.mark.slow
def test_the_floor_is_the_dtype(bundles: Bundles) -> None:
    errors = {}
    for precision, dtype in DTYPES.items():
        result = run(engine_of(bundles("qwen_ntk", precision)), "qwen_ntk")
        errors[precision] = next(e.floor for e in result.taps if e.tap == "blocks.1.mlp_norm")
        assert 0.1 < errors[precision] / (torch.finfo(dtype).eps / 2) < 3
    assert errors["fp32"] < errors["fp16"] < errors["bf16"]


# Planted faults: case, precision, fault, and every tap that is wrong by itself, in order


def _rope_taps(layers: int) -> list[str]:
    return [f"blocks.{i}.{part}" for i in range(layers) for part in ("key", "attn.context")]


CONTEXTS = ["blocks.0.attn.context", "blocks.1.attn.context"]
FAULTS: dict[str, tuple[str, str, mutate.Fault, list[str]]] = {
    "eps": ("qwen_ntk", "fp32", mutate.epsilon("blocks.1.mlp_norm", 1e-5), ["blocks.1.mlp_norm"]),
    "eps, half": ("chatglm2", "fp16", mutate.epsilon("final_norm", 0.1), ["final_norm"]),
    "transposed": ("qwen_ntk", "fp16", mutate.edit("blocks.0.attn.out.weight", np.transpose), ["blocks.0.attn.out"]),
    "one weight": (
        "baichuan2_7b",
        "fp16",
        mutate.edit("blocks.1.mlp.up.weight", lambda w: w + 0.5 * (np.arange(w.size) == 325).reshape(w.shape)),
        ["blocks.1.mlp.up"],
    ),
    "bias dropped": ("qwen_ntk", "bf16", mutate.edit("blocks.1.attn.qkv.bias", lambda b: 0 * b), ["blocks.1.attn.qkv"]),
    "scale": ("gpt2", "fp16", mutate.attention_scale("blocks.1.attn", 1.05), ["blocks.1.attn.context"]),
    "scale doubled": ("gpt_bigcode", "bf16", mutate.attention_scale("blocks.0.attn", 2.0), ["blocks.0.attn.context"]),
    "rope table": ("baichuan2_7b", "fp16", mutate.edit("rope_cos", lambda t: 1.05 * t), _rope_taps(2)),
    "alibi": ("baichuan_13b", "fp16", mutate.edit("alibi_slopes", lambda t: 1.1 * t), CONTEXTS),
    "residual": ("starcoder2_sliding", "fp16", mutate.no_residual("blocks.0.resid_mid"), ["blocks.0.resid_mid"]),
    "gate and up": (
        "chatglm2",
        "bf16",
        mutate.swapped("blocks.1.mlp.gate.weight", "blocks.1.mlp.up.weight"),
        ["blocks.1.mlp.gate", "blocks.1.mlp.up"],
    ),
    "window": (
        "starcoder2_sliding",
        "fp16",
        mutate.attention_window("blocks.1.attn", 1),
        ["blocks.1.attn.context"],
    ),
    "padding seen": ("chatglm2", "fp16", mutate.padding_visible, CONTEXTS),
    # Rope is relative: with query and key both off by one, only the keys are wrong.
    "positions": ("baichuan2_7b", "fp16", mutate.positions_off_by_one, ["blocks.0.key", "blocks.1.key"]),
    "learned positions": ("gpt2", "fp16", mutate.positions_off_by_one, ["embed"]),
    "head": ("baichuan_13b", "fp16", mutate.edit("head.weight", lambda w: 1.05 * w), ["logits"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault(name: str, bundles: Bundles, tmp_path: Path) -> None:
    case, precision, fault, wrong = FAULTS[name]
    result = run(engine_of(mutate.mutated(bundles(case, precision), tmp_path / "m", fault)), case, steps=3)
    assert result.verdict == "diverged"
    assert result.first_wrong_tap == wrong[0], verdict_line(result)
    # Healthy modules after the broken one are not named.
    assert {c.tap for c in result.culprits} == set(wrong)
    first = result.culprits[0]
    assert (first.phase, first.step, first.kind) == ("prefill", 0, "local")
    assert first.ratio > MULTIPLE
    assert result.logits.kl_mean > result.logits.floor_kl_mean


@pytest.mark.slow
def test_nan_is_found_where_it_begins(bundles: Bundles, tmp_path: Path) -> None:
    def poison(weight: np.ndarray) -> np.ndarray:
        weight = weight.copy()
        weight[2] = np.nan
        return weight

    broken = mutate.mutated(
        bundles("qwen_ntk", "fp16"), tmp_path / "m", mutate.edit("blocks.1.attn_norm.weight", poison)
    )
    result = run(engine_of(broken), "qwen_ntk", steps=1)
    assert result.verdict == "nonfinite"
    assert [(c.tap, c.kind) for c in result.culprits] == [("blocks.1.attn_norm", "nonfinite")]
    assert "NONFINITE" in verdict_line(result) and "blocks.1.attn_norm" in verdict_line(result)
    assert result.logits.nonfinite > 0
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["logits"]["kl_mean"] is None


@pytest.mark.slow
def test_overflow_of_the_dtype_is_found(bundles: Bundles, tmp_path: Path) -> None:
    """fp16 ends at 65504: the emulated engine must overflow as a real one would."""
    broken = mutate.mutated(
        bundles("qwen_ntk", "fp16"),
        tmp_path / "m",
        mutate.edit("blocks.0.mlp.up.weight", lambda w: 3e4 * w.clip(-2, 2)),
    )
    result = run(engine_of(broken), "qwen_ntk", steps=1)
    assert result.verdict == "nonfinite"
    assert result.culprits[0].tap == "blocks.0.mlp.up"
    assert result.culprits[0].kind == "nonfinite"


# Engines that misbehave in ways a graph cannot show


class Misbehaving(TorchEngine):
    """The reference in fp16 with something done to its results."""

    def __init__(self, case: str) -> None:
        super().__init__(refmodels.load(case_source(case), dtype=torch.float16))
        self.calls = 0

    def run(self, step: StepInputs, cache: KVCache, *, recorder: Recorder | None = None) -> Tensor:
        if recorder is not None:
            self.calls += 1
            self.before(step, cache)
        logits = super().run(step, cache, recorder=recorder)
        if recorder is not None:
            self.after(step, recorder)
        return self.output(logits, tapped=recorder is not None)

    def before(self, step: StepInputs, cache: KVCache) -> None: ...

    def after(self, step: StepInputs, recorder: Recorder) -> None: ...

    def output(self, logits: Tensor, *, tapped: bool) -> Tensor:
        return logits


def test_stale_cache_is_found_at_its_step() -> None:
    class Corrupting(Misbehaving):
        def after(self, step: StepInputs, recorder: Recorder) -> None:
            if self.calls == 4:
                recorder.tensors["blocks.1.key"][:, :, 12] *= 1.1

    result = run(Corrupting("qwen_ntk"), "qwen_ntk")
    assert [(c.tap, c.phase, c.step, c.worst[1]) for c in result.culprits] == [("blocks.1.key", "decode", 3, 12)]


@pytest.mark.slow
def test_fault_on_one_token_only() -> None:
    class OneToken(Misbehaving):
        def after(self, step: StepInputs, recorder: Recorder) -> None:
            if self.calls == 1:
                recorder.tensors["blocks.1.mlp.out"][0, 7] *= 1.02

    result = run(OneToken("qwen_ntk"), "qwen_ntk", steps=1)
    assert result.first_wrong_tap == "blocks.1.mlp.out"
    assert result.culprits[0].worst == (0, 7)


@pytest.mark.slow
def test_padding_is_left_out() -> None:
    class Padded(Misbehaving):
        def after(self, step: StepInputs, recorder: Recorder) -> None:
            for name, tensor in recorder.tensors.items():
                if self.calls == 1 and tensor.shape[:2] == step.new_mask.shape:
                    tensor[~step.new_mask] = 7.0 if "mlp" in name else float("nan")

    result = run(Padded("baichuan2_7b"), "baichuan2_7b", steps=1)
    assert result.verdict == "aligned", verdict_line(result)


@pytest.mark.slow
def test_observer_effect() -> None:
    class Shy(Misbehaving):
        def output(self, logits: Tensor, *, tapped: bool) -> Tensor:
            return logits if tapped else logits * 1.25

    result = run(Shy("qwen_ntk"), "qwen_ntk", steps=2)
    assert result.observer_effect.changed and result.observer_effect.max_abs > 0.1
    # What ships is wrong although every tap of the tapped engine is right.
    assert result.verdict == "diverged"
    assert [c.kind for c in result.culprits] == ["accumulated"]
    calm = run(Misbehaving("qwen_ntk"), "qwen_ntk", steps=2)
    assert not calm.observer_effect.changed and calm.verdict == "aligned"


# Prompts and the command


def test_default_prompts_pass_the_lengths_that_matter() -> None:
    qwen = refmodels.resolve("qwen")
    prompts = default_prompts(qwen.spec, refmodels.load_tokenizer(qwen), room=248, seed=0)
    seq_length = qwen.spec.attention.logn_seq_length
    assert seq_length is not None and int(prompts.mask.sum(1)[0]) > seq_length
    assert int(prompts.mask.sum(1).min()) >= 8 and len(set(prompts.mask.sum(1).tolist())) > 1
    window = case_source("starcoder2_sliding").spec
    assert window.attention.window is not None
    assert int(default_prompts(window, None, room=50, seed=0).mask.sum(1)[0]) > window.attention.window
    assert left_padded([[5], [6, 7, 8]], "").mask.tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.slow
def test_command(bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles("qwen", "fp16")
    options = ("--model", GOLDENS / "qwen", "--bundle", bundle)
    clean = logitlock("diff", *options, "--json")
    assert clean.code == 0, clean.err
    document = json.loads(clean.out)
    assert document["schema"] == 1
    assert (document["verdict"], document["culprits"], document["first_wrong_tap"]) == ("aligned", [], None)
    assert {"kl_mean", "kl_max", "top1", "margin_flips"} <= set(document["logits"])
    assert {"tap", "phase", "step", "accumulated", "local", "floor", "max_abs", "cosine"} <= set(document["taps"][0])
    assert document["settings"]["steps"] == 8 and "rounded to float16" in document["settings"]["engine"]
    plain = logitlock("diff", *options, "--no-emulate-rounding", "--steps", "2")
    assert (
        plain.code == 0 and "ALIGNED" in plain.out and "nothing between nodes is rounded" in " ".join(plain.out.split())
    )
    broken = mutate.mutated(bundle, tmp_path / "broken", mutate.attention_scale("blocks.1.attn", 1.1))
    found = logitlock("diff", "--model", GOLDENS / "qwen", "--bundle", broken, "--steps", "1")
    assert found.code == 1
    assert "DIVERGED: the first wrong tap is blocks.1.attn.context" in " ".join(found.out.split())


@pytest.mark.slow
def test_bad_input(bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles("qwen", "fp16")
    model = GOLDENS / "qwen"
    logitlock("diff", "--model", model).assert_bad_input("--bundle")
    logitlock("diff", "--model", model, "--bundle", tmp_path / "none").assert_bad_input("no bundle at")
    logitlock("diff", "--model", tmp_path / "none", "--bundle", bundle).assert_bad_input("none")
    logitlock("diff", "--model", GOLDENS / "qwen_ntk", "--bundle", bundle).assert_bad_input("rope")
    logitlock("diff", "--model", model, "--bundle", bundle, "--prompt", "hello").assert_bad_input("tokenizer")
    logitlock("diff", "--model", model, "--bundle", bundle, "--steps", "0").assert_bad_input("--steps")
    logitlock("diff", "--model", model, "--bundle", bundle, "--prompt-file", tmp_path).assert_bad_input("prompt file")
    (tmp_path / "empty.txt").write_text("\n \n")
    logitlock("diff", "--bundle", bundle, "--prompt-file", tmp_path / "empty.txt").assert_bad_input("has no prompt")
    logitlock("diff", "--model", model, "--bundle", bundle, "--steps", "99999").assert_bad_input("positions")


def test_another_checkpoint_is_refused(bundles: Bundles) -> None:
    # Two cases of one architecture with different weights.
    with pytest.raises(LogitLockError, match=r"another checkpoint than qwen_b1.*export it again"):
        diff_bundle(bundles("qwen", "fp16"), str(GOLDENS / "qwen_b1"))


@pytest.mark.slow
def test_toy_with_text(bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles("qwen", "fp16")
    toy = tmp_path / "toy"
    export_model("gpt", precision="fp16", output=toy)
    logitlock("diff", "--bundle", toy, "--prompt", "a").assert_bad_input("needs at least 8")
    (tmp_path / "prompts.txt").write_text("The quick brown fox jumps.\n\n世界上第二高的山峰是哪座？\n")
    result = logitlock("diff", "--bundle", toy, "--prompt-file", tmp_path / "prompts.txt", "--steps", "2", "--json")
    assert result.code == 0, result.err
    settings = json.loads(result.out)["settings"]
    assert settings["prompts"] == "text" and len(settings["prompt_lengths"]) == 2 and settings["model"] == "gpt"
    logitlock("diff", "--model", "gpt", "--bundle", bundle).assert_bad_input("is of another model than gpt")
