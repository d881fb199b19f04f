"""Prompts of `--prompt` and `--prompt-file`, for every verb that has them."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from refmodels.errors import LogitLockError
from refmodels.text.prompts import check_size, read_prompts
from tests.support.command import logitlock


def given(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_texts_come_before_the_lines_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeff first\n\n  \n世界\r\n", encoding="utf-8")
    assert read_prompts(["text"], tmp_path / "p.txt") == ["text", " first", "世界"]
    assert read_prompts(None, None) == []
    assert read_prompts(["a", "b"], None) == ["a", "b"]


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, "one\n\n二\n".encode())
    assert read_prompts(None, Path("-")) == ["one", "二"]
    given(monkeypatch, b"ok\xff")
    with pytest.raises(LogitLockError, match="standard input is not UTF-8: bad byte at 2"):
        read_prompts(None, Path("-"))


def test_files_without_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(LogitLockError, match=r"the prompt file .*empty has no prompt"):
        read_prompts(None, tmp_path / "empty")
    assert read_prompts(["text"], tmp_path / "empty") == ["text"]
    given(monkeypatch, b"")
    with pytest.raises(LogitLockError, match="the prompt file - has no prompt"):
        read_prompts(None, Path("-"))
    for name, said in (("none", "No such file"), (".", "it is a directory")):
        with pytest.raises(LogitLockError, match=f"the prompt file .* cannot be read: {said}"):
            read_prompts(None, tmp_path / name)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--model", "qwen"],
        ["diff", "reference:fp32", "--model", "qwen"],
        ["trace", "reference:fp32", "--model", "qwen", "--out", "never"],
        ["drift", "reference:fp32", "--model", "qwen"],
        ["bisect", "--model", "qwen"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_verb_reads_standard_input(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, b"\xff")
    logitlock(*arguments, "--prompt-file", "-").assert_bad_input("standard input is not UTF-8")


def test_megabytes_are_refused_by_their_start() -> None:
    asked: list[int] = []

    def words(text: str) -> list[str]:
        asked.append(len(text))
        return text.split()

    check_size("word " * 300, 100, words)
    assert asked == []
    with pytest.raises(LogitLockError, match=r"'word word .* has 10000000 characters and far more tokens than the 100"):
        check_size("word " * 2_000_000, 100, words)
    assert asked == [1600]
    # Spaces are few tokens here, so that this text is read in full, and is short enough.
    check_size("word" + " " * 100_000 + "word", 100, words)


@pytest.mark.slow
@pytest.mark.parametrize("verb", [["generate"], ["diff", "reference:fp32"], ["trace", "reference", "--out", "t"]])
def test_verbs_refuse_megabytes_at_once(verb: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("hello " * 1_700_000)
    logitlock(*verb, "--model", "qwen", "--prompt-file", "p.txt").assert_bad_input("far more tokens than the 256")
