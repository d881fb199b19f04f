"""The verb `models`, and the common part of all command lines: one line for bad input, and the exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer

import refmodels
from refmodels import cli
from refmodels.checkpoints import load as checkpoint
from refmodels.command import Verb, main
from refmodels.errors import LogitLockError
from tests.support.checkpoints import read_case, write_model

VERBS = {
    "models": Verb("refmodels.cli", "models"),
    **{name: Verb(__name__, name) for name in ("differ", "refuse", "interrupt", "abort", "bug")},
}


def invoke(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit) as left:
        main(VERBS, "Test.")
    assert isinstance(left.value.code, int)
    return left.value.code


def differ() -> None:
    raise typer.Exit(1)


def refuse() -> None:
    raise LogitLockError("config.json\nlacks a key")


def interrupt() -> None:
    raise KeyboardInterrupt


def abort() -> None:
    raise typer.Abort


def bug() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["differ"], 1, ""),
        (["refuse"], 2, "error: config.json\\nlacks a key\n"),
        (["models", "--jsn"], 2, "error: No such option: --jsn"),
        (["absent"], 2, "error: No such command 'absent'."),
        (["models", "extra"], 2, "error: Got unexpected extra argument"),
        (["interrupt"], 130, ""),
        (["abort"], 130, ""),
        ([], 2, ""),
    ],
)
def test_exit_codes(
    arguments: list[str],
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert invoke(monkeypatch, *arguments) == code
    shown = capsys.readouterr().err
    assert shown.startswith(line)
    assert shown.count("\n") == (1 if line else 0)


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "bug"])
    with pytest.raises(ZeroDivisionError):
        main(VERBS, "Test.")


def test_a_default_verb_needs_no_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        with pytest.raises(SystemExit) as left:
            main(VERBS, "Test.", default="differ")
        return left.value.code, capsys.readouterr().err

    assert said() == said("differ") == (1, "")
    assert said("refuse")[0] == 2
    # What is no verb is an argument of the default one.
    assert "unexpected extra argument" in said("absent")[1]


def test_summaries_are_read_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heavy_module.py").write_text('raise SystemExit\ndef f():\n    """First.\n\n    Second.\n    """\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert Verb("heavy_module", "f").summary == "First."
    with pytest.raises(KeyError, match="g"):
        Verb("heavy_module", "g").summary  # noqa: B018


def test_help_has_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(monkeypatch, "models", "--help") == 0
    assert "Example: logitlock models" in capsys.readouterr().out


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config, tensors, _ = read_case("qwen_b1")
    write_model(tmp_path / "qwen", config, tensors)
    monkeypatch.setattr(checkpoint, "TOYS", tmp_path)
    monkeypatch.setattr(cli, "TOYS", tmp_path)
    assert invoke(monkeypatch, "models", "--json") == 0
    families = {row["name"]: row for row in json.loads(capsys.readouterr().out)["families"]}
    assert list(families) == list(refmodels.FAMILIES)
    assert families["gpt"]["toy"] is None
    assert "StarCoder2" in families["gpt"]["covers"]
    toy = families["qwen"]["toy"]
    assert toy["parameters"] == sum(t.numel() for n, t in tensors.items() if "inv_freq" not in n)
    assert (toy["vocab_size"], toy["layers"]) == (config["vocab_size"], config["num_hidden_layers"])
    assert invoke(monkeypatch, "models") == 0
    shown = capsys.readouterr().out
    assert f"{toy['parameters']:,}" in shown
    assert all(name in shown for name in families)
