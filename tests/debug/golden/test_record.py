"""`logitlock record`: cases made by running transformers, which `verify` must accept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import refmodels
from debug.capture.prompts import Prompts
from debug.golden.verify import verify_case
from debug.record import _run, record_case
from refmodels.errors import LogitLockError
from tests.support.command import logitlock
from tests.support.marks import quick_first

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"vocab_size": 101}
GPT = {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT),
    "gpt2_upcast": (
        "GPT2Config",
        GPT | {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    ),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT),
    "gpt_bigcode_mha": ("GPTBigCodeConfig", GPT | {"multi_query": False}),
    "starcoder2": ("Starcoder2Config", LLAMA | {"sliding_window": 9}),
    "qwen2": ("Qwen2Config", LLAMA),
    "qwen2_window": (
        "Qwen2Config",
        LLAMA
        | {
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
        },
    ),
}
# Baichuan's layout in a directory of its own: one fused projection, the rest is Llama.  Our own code, for this test.
REMOTE = """
import functools
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

class TestBaichuanConfig(LlamaConfig):
    model_type = "baichuan"

class TestBaichuanForCausalLM(LlamaForCausalLM):
    config_class = TestBaichuanConfig

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        for layer in self.model.layers:
            attention = layer.self_attn
            attention.W_pack = nn.Linear(width, 3 * width, bias=False)
            for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
                delattr(attention, name)
                setattr(attention, name, functools.partial(project, attention.W_pack, part * width, width))

def project(pack, start, width, x):
    return pack(x)[..., start : start + width]
"""


def randomized(model: Any) -> Any:
    """Weights large enough that logits, attention and margins are far from uniform."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        size = 0.15 if parameter.ndim > 1 else 0.1
        norm = parameter.ndim == 1 and "weight" in name
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * size + float(norm))
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def make(name: str) -> Path:
        if not (root / name).exists():
            config, settings = MODELS[name]
            built = getattr(transformers, config)(**SIZES, **settings)
            randomized(transformers.AutoModelForCausalLM.from_config(built)).save_pretrained(root / name)
        return root / name

    return make


@pytest.mark.parametrize("name", quick_first(MODELS))
def test_recorded_cases_verify(name: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    case = tmp_path / "case"
    meta = record_case(models(name), case, lengths=(21, 12, 17), steps=5, seed=5, half=("bf16",))
    assert sorted(p.name for p in case.iterdir()) == sorted(
        ("config.json", "io.safetensors", "io_bf16.safetensors", "meta.json", "model.safetensors")
    )
    assert not list(tmp_path.glob(".case*"))
    assert json.loads((case / "meta.json").read_text()) == meta
    assert str(tmp_path) not in (case / "meta.json").read_text()
    for dtype in ("fp32", "bf16"):
        result = verify_case(case, dtype=dtype)
        assert result.passed, (dtype, result.failed(), result.worst)
        assert not result.not_compared
    layers = refmodels.resolve(case).spec.layers
    io = load_file(case / "io.safetensors")
    assert {
        "logits",
        "final_norm",
        "past.0.key",
        "past.0.value",
        "decode_ids",
        "decode_logits",
        f"hidden_states.{layers}",
    } <= set(io)
    assert io["attention_mask"].sum(1).tolist() == [21, 12, 17] == meta["lengths"]
    assert io["attention_mask"][1, 0] == 0 and io["attention_mask"][:, -1].all()
    assert io["decode_logits"].shape == (3, 5, 101)
    assert torch.equal(io["decode_ids"][:, 1:], io["decode_logits"][:, :-1].argmax(-1))


def test_right_padding_keeps_its_slots(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Upstream decodes behind trailing pads, and a sliding window counts them."""
    model = models("starcoder2")
    case = tmp_path / "case"
    record_case(model, case, steps=1)
    ids = load_file(case / "io.safetensors")["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    prompts = Prompts(ids=ids, mask=mask, origin="")
    found = _run(loaded, refmodels.resolve(model).spec, prompts, 6, lambda step, done, total: None)
    tensors = {"input_ids": ids, "attention_mask": mask} | found
    save_file({n: t.contiguous() for n, t in tensors.items()}, case / "io.safetensors")
    result = verify_case(case)
    assert result.passed, result.worst


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.slow
def test_seed_and_command(models: Callable[[str], Path], tmp_path: Path) -> None:
    model = models("qwen2")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        done = logitlock("record", "--hf", model, "--out", tmp_path / name, "--steps", 2, "--seed", seed, "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["meta"]["lengths"] == [20, 13]
    a, b, c = (load_file(tmp_path / name / "io.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["input_ids"], c["input_ids"])
    # The case is a checkpoint of the same model.
    assert logitlock("verify", tmp_path / "a", tmp_path / "c").code == 0


def test_text_prompts(models: Callable[[str], Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(models("gpt2"), model)
    words = {f"w{i}": i for i in range(101)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    record_case(model, tmp_path / "case", prompts=["w5 w6 w7 w8", "w9 w10"], steps=2)
    io = load_file(tmp_path / "case" / "io.safetensors")
    assert io["input_ids"].tolist() == [[5, 6, 7, 8], [0, 0, 9, 10]]
    assert io["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert verify_case(tmp_path / "case").passed


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A model whose code lies in its own directory, in the architecture of Baichuan 7B."""
    model = tmp_path / "remote"
    settings = LLAMA | {"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "hidden_act": "silu", "norm_head": False}
    namespace: dict[str, Any] = {"__name__": "remote_baichuan"}
    exec(REMOTE, namespace)
    config = namespace["TestBaichuanConfig"](**SIZES, **settings)
    randomized(namespace["TestBaichuanForCausalLM"](config)).save_pretrained(model)
    data = json.loads((model / "config.json").read_text())
    data["auto_map"] = {
        "AutoConfig": "modeling_test.TestBaichuanConfig",
        "AutoModelForCausalLM": "modeling_test.TestBaichuanForCausalLM",
    }
    (model / "config.json").write_text(json.dumps(data))
    (model / "modeling_test.py").write_text(REMOTE)
    return model


def test_remote_code(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    refused = logitlock("record", "--hf", remote, "--out", tmp_path / "case")
    refused.assert_bad_input("--trust-remote-code")
    assert not (tmp_path / "case").exists() and not (tmp_path / "modules").exists()
    done = logitlock("record", "--hf", remote, "--out", tmp_path / "case", "--steps", 4, "--trust-remote-code")
    assert done.code == 0, done.err
    meta = json.loads((tmp_path / "case" / "meta.json").read_text())
    assert meta["variant"] == {"position": "rope", "norm_head": False}
    assert meta["upstream"]["class"] == "TestBaichuanForCausalLM"
    result = verify_case(tmp_path / "case")
    assert result.passed, result.worst


def test_bad_input(models: Callable[[str], Path], tmp_path: Path) -> None:
    model = models("gpt2")
    out = tmp_path / "case"
    logitlock("record", "--hf", tmp_path, "--out", out).assert_bad_input("has no config.json")
    logitlock("record", "--hf", model).assert_bad_input("--out")
    logitlock("record", "--hf", model, "--out", out, "--lengths", "20,x").assert_bad_input("--lengths")
    logitlock("record", "--hf", model, "--out", out, "--lengths", "0").assert_bad_input("at least 1")
    logitlock("record", "--hf", model, "--out", out, "--lengths", "60").assert_bad_input("64 positions")
    logitlock("record", "--hf", model, "--out", out, "--lengths", "999999999").assert_bad_input("64 positions")
    logitlock("record", "--hf", model, "--out", out, "--half", "int8").assert_bad_input("--half")
    logitlock("record", "--hf", model, "--out", out, "--prompt", "hi").assert_bad_input("prompt")
    assert not out.exists()
    out.mkdir()
    (out / "kept").write_text("mine")
    logitlock("record", "--hf", model, "--out", out).assert_bad_input("is not an empty directory")
    assert [p.name for p in out.iterdir()] == ["kept"]
    with mock.patch.dict("sys.modules", {"transformers": None}):
        logitlock("record", "--hf", model, "--out", tmp_path / "x").assert_bad_input("logitlock[record]")


def test_nothing_is_left_after_a_failure(models: Callable[[str], Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(models("qwen2"), model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LogitLockError, match="NaN or Inf"):
        record_case(model, tmp_path / "case", steps=1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(LogitLockError, match=r"has the unknown tensors model.layers.0.self_attn.k_proj.bias"):
        record_case(model, tmp_path / "case", steps=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "lacks the tensor model.layers.1.mlp.up_proj.weight"),
        (lambda w: w.update({"model.extra": torch.zeros(2)}), "has the unknown tensor model.extra"),
    ],
)
def test_tensors_that_transformers_would_make_up(
    models: Callable[[str], Path], tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], object], said: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(models("qwen2"), model)
    weights = load_file(model / "model.safetensors")
    edit(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LogitLockError, match=said):
        record_case(model, tmp_path / "case", steps=1)
