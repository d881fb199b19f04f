"""The command line as a whole: help, exit codes, one clear line for every kind of bad input, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from debug.command import VERBS
from export.bundle import export_model
from tests.support.command import logitlock
from tests.support.goldens import GOLDENS
from tests.support.marks import quick_first
from tests.support.scripts import load_script

CASE = GOLDENS / "qwen_b1"
parameters = load_script("docs/hooks/cli.py").parameters


def plain(text: str) -> str:
    """Help as one line."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(CASE, precision="fp32", output=tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    target = tmp_path / "model"
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(CASE / name, target / name)
    return target


# Help


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_shows_an_example(verb: str) -> None:
    shown = logitlock(verb, "--help")
    assert shown.code == 0
    text = plain(shown.out)
    assert "Example: " in text and "--json" in text
    where = VERBS[verb]
    # It is read from the source.
    assert where.summary == (where.load().__doc__ or "").splitlines()[0]
    assert where.summary in text
    # The example itself names the verb.
    assert verb in text.partition("Example: ")[2]


def test_help_of_the_whole() -> None:
    for arguments in ([], ["--help"]):
        shown = logitlock(*arguments)
        assert shown.code == (0 if arguments else 2)
        text = plain(shown.out)
        for verb, where in VERBS.items():
            assert f" {verb} {where.summary}" in text
        assert "logitlock diff --model qwen --bundle engines/qwen-fp16" in text
        assert "Exit codes: 0 if all is fine, 1 if the command found a difference, 2 if the input is bad" in text


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_names_whole_at_80_columns(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = logitlock(verb, "-h").out
    for name in (option for p in parameters(VERBS[verb].load()) if not p.argument for option in p.names):
        assert re.search(rf"^  (?:.* / )?{name}\b", shown, flags=re.M), name
    # Only the choices of an option may be longer than a line.
    assert not [line for line in shown.splitlines() if len(line) > 80 and not line.startswith("  --")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("logitlock dr", "drift"),
        ("logitlock diff --ht", "--html"),
        ("logitlock inspect --js", "--json"),
        ("logitlock export --precision sm", "smoothquant"),
        ("logitlock export --model chat", "chatglm2"),
    ],
)
def test_shell_completion_knows_verbs_options_and_values(
    line: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_LOGITLOCK_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    assert logitlock().out.split() == [expected]


def test_version() -> None:
    shown = logitlock("--version")
    assert (shown.code, shown.out.strip()) == (0, f"logitlock {metadata.version('logitlock')}")


@pytest.mark.parametrize("own", [None, "active"])
def test_waiting_threads_do_not_spin_unless_the_user_says_so(own: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that it is put back
    monkeypatch.delenv("OMP_WAIT_POLICY")
    if own is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    logitlock("--version")
    assert os.environ["OMP_WAIT_POLICY"] == (own or "passive")


def test_help_does_not_import_torch() -> None:
    script = (
        "import sys; sys.argv = ['logitlock', '--help']; from debug.command import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["debug", "export", "trt_runtime", "refmodels"])
def test_each_package_is_a_command(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    verbs = [verb for verb, where in VERBS.items() if where.module.startswith(module)]
    assert verbs and all(verb in done.stdout for verb in verbs)


def test_unknown_words() -> None:
    logitlock("frobnicate").assert_bad_input("frobnicate")
    logitlock("verify", "--frobnicate").assert_bad_input("--frobnicate")


@pytest.mark.slow
def test_verbose_and_quiet() -> None:
    """--verbose says each step on stderr, --quiet silences warnings, and neither touches stdout."""
    arguments = ("drift", "reference:fp16", "--model", GOLDENS / "qwen_b1", "--steps", 1, "--json")
    plain_run, verbose, quiet = (logitlock(*arguments, *more) for more in ((), ("-v",), ("-q",)))
    assert plain_run.out == verbose.out == quiet.out
    assert re.search(r"^drift \d+\.\d s: decode$", verbose.err, flags=re.M)
    assert "decode" not in plain_run.err and quiet.err == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "closed", "code"),
    [
        ("models", ">&-", 0),
        ("diff reference:fp16 --model qwen --prompt-file -", "<&-", 2),
        ("diff absent --model qwen", "2>&-", 2),
    ],
)
def test_closed_streams(arguments: str, closed: str, code: int) -> None:
    """No traceback, and an error never goes to standard output."""
    command = f"{sys.executable} -m debug {arguments} {closed}"
    if arguments == "models":
        command = command.replace("-m debug", "-m refmodels")
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "") and "Traceback" not in done.stderr, done


def test_a_narrow_terminal_still_shows_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert "model_type" in logitlock("check", "qwen").out


# Good input: one JSON document on stdout


@pytest.mark.slow
def test_json_documents(bundle: Path, tmp_path: Path) -> None:
    families = json.loads(logitlock("models", "--json").out)
    assert {"chatglm2", "baichuan", "qwen", "gpt"} <= {row["name"] for row in families["families"]}
    target = tmp_path / "exported"
    exported = logitlock("export", "--model", CASE, "--precision", "fp16", "--output", target, "--json")
    assert exported.code == 0, exported.err
    assert json.loads(exported.out)["precision"] == "fp16"
    assert json.loads(logitlock("inspect", target, "--json").out)
    diffed = logitlock("diff", "--model", CASE, "--bundle", target, "--steps", 1, "--json")
    assert diffed.code == 0 and json.loads(diffed.out)["verdict"] == "aligned"


# Bad input


def _truncated(model: Path) -> str:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return "model.safetensors"


def _weights(change: Callable[[dict[str, torch.Tensor]], Any], said: str) -> Callable[[Path], str]:
    def spoil(model: Path) -> str:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors")
        return said

    return spoil


def _config(change: Callable[[dict[str, Any]], Any], said: str) -> Callable[[Path], str]:
    def spoil(model: Path) -> str:
        config = json.loads((model / "config.json").read_text())
        change(config)
        (model / "config.json").write_text(json.dumps(config))
        return said

    return spoil


HEAD = "lm_head.weight"
SPOILED: dict[str, Callable[[Path], str]] = {
    "truncated": _truncated,
    "missing tensor": _weights(lambda t: t.pop(HEAD), HEAD),
    "wrong shape": _weights(lambda t: t.update({HEAD: t[HEAD][:, :-1].contiguous()}), HEAD),
    "NaN": _weights(lambda t: t[HEAD].view(-1)[7].fill_(float("nan")), "NaN"),
    "missing key": _config(lambda c: c.pop("num_attention_heads"), "num_attention_heads"),
    "unknown architecture": _config(lambda c: c.update(model_type="rwkv"), "rwkv"),
}


@pytest.mark.parametrize("name", quick_first(SPOILED))
@pytest.mark.parametrize("verb", quick_first(["export", "generate", "diff"]))
def test_bad_checkpoints(name: str, verb: str, checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    said = SPOILED[name](checkpoint)
    output = tmp_path / "out"
    arguments = {
        "export": ["--output", output],
        "generate": ["--prompt", "x"],
        "diff": ["--bundle", bundle],
    }[verb]
    outcome = logitlock(verb, "--model", checkpoint, *arguments)
    # A diff may stop earlier: the bundle was not made from these weights.
    outcome.assert_bad_input(*([said] if verb != "diff" else []))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def _schema(bundle: Path) -> str:
    data = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(data | {"schema": 99}))
    return "schema 99"


def _changed(bundle: Path) -> str:
    path = bundle / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    return "has changed"


def _missing(bundle: Path) -> str:
    (bundle / "model.onnx.data").unlink()
    return "lacks its file"


def _outside(bundle: Path) -> str:
    data = json.loads((bundle / "bundle.json").read_text())
    data["files"]["../../outside"] = data["files"]["model.onnx"]
    (bundle / "bundle.json").write_text(json.dumps(data))
    return "leaves the bundle's directory"


@pytest.mark.parametrize("spoil", quick_first([_schema, _changed, _missing, _outside]))
@pytest.mark.parametrize("verb", quick_first(["generate", "inspect", "diff"]))
def test_bad_bundles(spoil: Callable[[Path], str], verb: str, bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    said = spoil(copy)
    arguments = {
        "generate": ["--bundle", copy, "--prompt", "x"],
        "inspect": [copy],
        "diff": ["--model", CASE, "--bundle", copy],
    }[verb]
    logitlock(verb, *arguments).assert_bad_input(said)


@pytest.mark.parametrize("device", ["cuda", "gpu", "-1", ""])
@pytest.mark.parametrize("verb", ["generate", "quantize", "eval"])
def test_devices(verb: str, device: str, tmp_path: Path) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    arguments = {
        "generate": ["--model", CASE, "--prompt", "x"],
        "quantize": ["--model", CASE, "--precision", "int8", "--output", tmp_path / "q"],
        "eval": ["reference", "--model", "qwen"],
    }[verb]
    logitlock(verb, *arguments, "--device", device).assert_bad_input("--device is")


def test_output_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    logitlock("export", "--model", CASE, "--output", tmp_path).assert_bad_input("not empty")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_prompt_longer_than_the_cache(tmp_path: Path) -> None:
    export_model("qwen", precision="fp32", output=tmp_path / "small", max_seq=16)
    long = "The quick brown fox jumps over the lazy dog again and again and again."
    logitlock("generate", "--bundle", tmp_path / "small", "--prompt", long).assert_bad_input("16")
    logitlock("diff", "--bundle", tmp_path / "small", "--prompt", long).assert_bad_input("16")
    # Default prompts are cut to fit instead.
    assert logitlock("diff", "--bundle", tmp_path / "small").code == 0


def test_offline_hub_and_missing_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for model in ("nobody/nothing-here", "./no/such/directory"):
        outcome = logitlock("export", "--model", model)
        outcome.assert_bad_input()
    logitlock("inspect", "no-bundle").assert_bad_input("no-bundle")


def test_long_messages_are_cut_in_the_middle() -> None:
    outcome = logitlock("inspect", "a/" * 5000)
    outcome.assert_bad_input("…")
    assert len(outcome.err) < 1300


HUGE = str(10**39)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"drift reference:fp32 --model {CASE} --steps 1 --seed {HUGE}", "--seed is 1"),
        (f"quantize --model {CASE} --precision int8 --output q --samples 99999999", "at most 65536 samples"),
        (f"quantize --model {CASE} --precision int8 --output q --seed {HUGE}", "64 bits"),
        (f"export --model {CASE} --precision fp32 --backend onnxruntime --output b --max-seq {2**31}", "at most"),
        (f"export --model {CASE} --precision fp32 --backend onnxruntime --output b --max-seq {HUGE}", "64 bits"),
        (f"eval reference:fp32 --model {CASE} --shape 99999999x1x1", "at most 4096 rows"),
        (f"record --hf {GOLDENS / 'qwen2_b1'} --out r --lengths {2**63}", "positions of qwen2_b1"),
        (f"generate --model {CASE} --prompt x --stop-id -1", "--stop-id"),
    ],
)
def test_numbers_beyond_reason(line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logitlock(*line.split()).assert_bad_input(said)
    assert not list(tmp_path.iterdir())


def test_memory_that_torch_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_: object, **__: object) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr("trt_runtime.cli.read_prompts", greedy)
    logitlock("generate", "--model", CASE, "--prompt", "x").assert_bad_input("more memory than is available")
