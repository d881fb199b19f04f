"""The verbs generate and inspect: output, stop ids, and one clear line for bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import refmodels
from export.bundle import export_model
from refmodels import toys
from refmodels.checkpoints.load import TOYS, tokenizer_in
from refmodels.command import main
from refmodels.errors import LogitLockError
from refmodels.spec import spec_from_dict
from refmodels.text.prompts import stop_ids_in
from tests.support.checkpoints import read_case, write_model
from tests.support.marks import quick_first
from trt_runtime.__main__ import VERBS
from trt_runtime.generation import GenerationConfig
from trt_runtime.generation import generate as run_generation
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine

Command = Callable[..., tuple[int, str, str]]
MOUNTAIN = "世界上第二高的山峰是哪座？"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["logitlock", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main(VERBS, "Test.")
        out, err = capfd.readouterr()
        return int(left.value.code or 0), out, err

    return call


@pytest.fixture(scope="module")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model("qwen", precision="fp16", output=tmp_path_factory.mktemp("toy") / "qwen-fp16")


@pytest.mark.parametrize("family", quick_first(toys.TOYS))
def test_greedy_tokens_of_fp32_engines_equal_the_references_on_every_toy(
    family: str, tmp_path: Path, command: Command
) -> None:
    export_model(family, precision="fp32", output=tmp_path / "b")
    prompts = ["--prompt", MOUNTAIN, "--prompt", "12+35=", "--prompt", "Once upon a time"]
    shared = [*prompts, "--max-new-tokens", 40, "--json"]
    answers = [
        json.loads(command("generate", *where, *shared)[1])["results"]
        for where in (("--model", family), ("--bundle", tmp_path / "b"))
    ]
    assert answers[0] == answers[1]
    assert [r["prompt"] for r in answers[0]] == prompts[1::2]
    assert all(r.keys() == {"prompt", "text", "token_ids", "finish_reason"} for r in answers[0])


@pytest.mark.slow
def test_the_demo(toy_bundle: Path, command: Command) -> None:
    code, out, err = command("generate", "--bundle", toy_bundle, "--prompt", MOUNTAIN)
    assert (code, out) == (0, "乔戈里峰\n") and "nothing between nodes is rounded" in err
    code, out, err = command("generate", "--bundle", toy_bundle, "--prompt", MOUNTAIN, "--emulate-rounding")
    assert (code, out) == (0, "乔戈里峰\n") and "rounded to float16" in err
    code, out, _ = command("generate", "--bundle", toy_bundle, "--prompt", MOUNTAIN, "--no-stream", "--stop", "里")
    assert (code, out) == (0, "乔戈\n")


@pytest.mark.slow
def test_prompts_of_a_file_run_as_a_batch(toy_bundle: Path, tmp_path: Path, command: Command) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(f"{MOUNTAIN}\n\n12+35=\n", encoding="utf-8")
    code, out, _ = command("generate", "--bundle", toy_bundle, "--prompt-file", path)
    assert (code, out) == (0, f"> {MOUNTAIN}\n乔戈里峰\n> 12+35=\n47\n")


@pytest.mark.slow
def test_sampling_options_reach_the_engine(toy_bundle: Path, command: Command) -> None:
    def tokens(*options: object) -> Any:
        arguments = ["--bundle", toy_bundle, "--prompt", "Once", "--json", "--max-new-tokens", 12, *options]
        (result,) = json.loads(command("generate", *arguments)[1])["results"]
        return result["token_ids"]

    greedy = tokens()
    hot = tokens("--temperature", 3, "--seed", 1)
    assert hot == tokens("--temperature", 3, "--seed", 1) != tokens("--temperature", 3, "--seed", 2)
    assert tokens("--temperature", 3, "--top-k", 1) == greedy == tokens("--temperature", 3, "--top-p", 1e-6)
    assert hot != greedy != tokens("--repetition-penalty", 5)


def test_stop_ids_of_generation_config(tmp_path: Path) -> None:
    source = refmodels.resolve("qwen")
    tokenizer = tokenizer_in(source.directory, source.spec)
    eos = tokenizer.special.eos
    assert eos == 2
    for declared, expected in (({"eos_token_id": [7, 2, 9]}, (7, 2, 9)), ({"eos_token_id": 5}, (5,)), ({}, (2,))):
        (tmp_path / "generation_config.json").write_text(json.dumps(declared))
        assert stop_ids_in(tmp_path, source.spec, tokenizer, chat=False) == expected
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(LogitLockError, match="must be a token id or a list"):
        stop_ids_in(tmp_path, source.spec, tokenizer, chat=False)
    (tmp_path / "generation_config.json").unlink()
    assert stop_ids_in(tmp_path, source.spec, tokenizer, chat=True)[0] == eos
    assert tokenizer.token_id("<|im_end|>") in stop_ids_in(tmp_path, source.spec, tokenizer, chat=True)


@pytest.mark.slow
def test_generation_config_acts_and_is_said(tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "qwen"
    shutil.copytree(TOYS / "qwen", folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "repetition_penalty": 5.0}')
    shared = ["generate", "--model", folder, "--prompt", MOUNTAIN, "--max-new-tokens", 12]
    code, text, said = command(*shared)
    assert code == 0
    acts = "sampling: greedy, repetition_penalty 5 (repetition_penalty of generation_config.json); stop ids: 2\n"
    assert acts in said
    code, plain, said = command(*shared, "--no-generation-config")
    assert text != plain and "sampling: greedy; stop ids: 2\n" in said
    assert command(*shared, "--repetition-penalty", 1)[1] == plain
    document = json.loads(command(*shared, "--json")[1])
    assert document["sampling"]["repetition_penalty"] == 5 and document["stop_ids"] == [2]
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "num_beams": 2}')
    code, _, said = command(*shared)
    assert code == 2 and "sets num_beams to 2, which is not supported: --no-generation-config" in said
    assert command(*shared, "--no-generation-config")[1] == plain
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "max_new_tokens": 3}')
    code, text, said = command(*shared[:-2], "--json")
    assert len(json.loads(text)["results"][0]["token_ids"]) == 3
    assert "; at most 3 new tokens (generation_config.json)\n" in command(*shared[:-2])[2]
    for more in (("--max-new-tokens", 5), ("--no-generation-config",)):
        assert len(json.loads(command(*shared[:-2], "--json", *more)[1])["results"][0]["token_ids"]) > 3


@pytest.mark.slow
def test_generation_ends_at_a_declared_stop_id(tmp_path: Path, command: Command) -> None:
    bundle = export_model("qwen", precision="fp32", output=tmp_path / "b")
    shared = ["generate", "--bundle", bundle, "--prompt", MOUNTAIN, "--json"]
    (result,) = json.loads(command(*shared)[1])["results"]
    third = result["token_ids"][2]
    path = bundle / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, third]}))
    assert "generation_config.json has" in command(*shared)[2], "an edited bundle is refused"
    manifest = json.loads((bundle / "bundle.json").read_text())
    del manifest["files"]["generation_config.json"]
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    (shorter,) = json.loads(command(*shared)[1])["results"]
    expected = result["token_ids"][: result["token_ids"].index(third) + 1]
    assert shorter["token_ids"] == expected != result["token_ids"]
    named = ["generate", "--model", "qwen", "--prompt", MOUNTAIN, "--json", "--stop-id", third, "--stop-id", 9]
    assert json.loads(command(*named)[1])["results"][0]["token_ids"] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x"], "give either --model"),
        (["--prompt", "x", "--model", "qwen", "--bundle", "BUNDLE"], "give either --model"),
        (["--bundle", "BUNDLE"], "there is no prompt"),
        (["--bundle", "BUNDLE", "--prompt", ""], "the prompt is empty"),
        (["--bundle", "BUNDLE", "--prompt", "a", "--prompt", ""], "prompt 2 of 2 is empty"),
        (["--bundle", "BUNDLE", "--prompt", "a", "--stop-id", "99999"], "--stop-id is 99999"),
        (["--bundle", "BUNDLE", "--prompt", "Why? " * 200], "more than the 256 positions of qwen"),
        (["--model", "qwen", "--prompt", "Why? " * 200], "more than the 256 positions of qwen"),
        (["--bundle", "nowhere", "--prompt", "x"], "there is no bundle at nowhere"),
        (["--bundle", "BUNDLE", "--prompt", "x", "--dtype", "fp16"], "--dtype and --device are for --model"),
        (["--model", "qwen", "--prompt", "x", "--emulate-rounding"], "are for --bundle"),
        (["--model", "qwen", "--prompt", "x", "--dtype", "int8"], "--dtype is 'int8'"),
        (["--model", "qwen", "--prompt", "x", "--device", "tpu"], "--device is 'tpu'"),
        (["--bundle", "BUNDLE", "--prompt", "x", "--top-k", "5"], "give a temperature"),
        (["--bundle", "BUNDLE", "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--bundle", "BUNDLE", "--prompt", "x", "--threads", "0"], "threads must be at least 1"),
        (["--bundle", "BUNDLE", "--prompt-file", "nowhere.txt"], "the prompt file nowhere.txt cannot be read: "),
        (["--model", "gpt", "--prompt", "x", "--chat"], "has no chat format"),
    ],
)
def test_bad_input(toy_bundle: Path, arguments: list[str], message: str, command: Command) -> None:
    code, out, err = command("generate", *[toy_bundle if a == "BUNDLE" else a for a in arguments])
    last = err.strip().splitlines()[-1]
    assert code == 2 and out == "" and last.startswith("error: ") and message in last


def test_prompt_file_that_is_not_utf8(toy_bundle: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "p.txt").write_bytes(b"ok\xff")
    code, _, err = command("generate", "--bundle", toy_bundle, "--prompt-file", tmp_path / "p.txt")
    assert code == 2 and "not UTF-8: bad byte at 2" in err


def test_overflow_in_the_engine_is_an_error(tmp_path: Path) -> None:
    config, tensors, variant = read_case("qwen2")
    for name in tensors:
        if "mlp.gate_proj" in name or "mlp.up_proj" in name:
            tensors[name] = tensors[name] * 600
    source = refmodels.resolve(write_model(tmp_path / "hf", config, tensors), variant=variant)
    bundle = export_model(source, precision="fp16", output=tmp_path / "b")
    engine = OnnxRuntimeEngine(bundle, emulate_rounding=True, threads=1)
    with pytest.raises(LogitLockError, match="row 0 at step 0 hold NaN or infinity"):
        run_generation(engine, None, [[1, 2, 3]], GenerationConfig())


def test_inspect(toy_bundle: Path, command: Command) -> None:
    code, out, _ = command("inspect", toy_bundle, "--json")
    found = json.loads(out)
    spec = refmodels.resolve("qwen").spec
    assert code == 0 and spec_from_dict(found["spec"]) == spec and found["precision"] == "fp16"
    assert found["nodes"]["refmodels::CachedAttention"] == spec.layers
    assert found["nodes"]["refmodels::FusedRmsNorm"] == 2 * spec.layers + 1
    sizes = {w["name"]: w["bytes"] for w in found["weights"]}
    assert sizes["embed.weight"] == spec.vocab_size * spec.hidden_size * 2
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert found["taps"]["logits"] == "logits" and found["profiles"] == []
    code, out, _ = command("inspect", toy_bundle)
    assert code == 0 and "refmodels::CachedAttention" in out and "blocks.*.mlp.up.weight" in out
    code, out, err = command("inspect", toy_bundle.parent)
    assert code == 2 and "not a bundle" in err and out == ""


@pytest.mark.slow
def test_package_command(toy_bundle: Path) -> None:
    for arguments in (["generate", "--help"], ["inspect", "--help"]):
        done = subprocess.run([sys.executable, "-m", "trt_runtime", *arguments], capture_output=True, text=True)
        assert done.returncode == 0 and "Example" in done.stdout
