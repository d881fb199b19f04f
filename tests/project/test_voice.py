"""Docs, help and docstrings are plain English: the clearest private turns of phrase do not come back.

Taste cannot be tested; these patterns can.  "Per" is the word for a rate ("one scale per row"), a number has a name
("maximum number of tokens", not "so many"), and the help of an option is a sentence that says what the option does.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import tokenize
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pytest
import typer.models

from debug.__main__ import help_of
from debug.command import VERBS
from tests.support.paths import ROOT

_UNITS = "row|token|layer|block|step|prompt|family|case|verb|pair|node|head|group|task|channel|tensor|byte|bucket"
_RATED = "scales?|lengths?|launch(?:es)?|files?|lists?|entr(?:y|ies)|results?|threads?|bytes?|blocks?"
_LINKS = "(?:of|in|on|at|to|by|as|is|be|may|after|before|from|for|with|into|than|or|and|that)"
ODD = {
    "a rate says per": re.compile(
        rf"\b(?:(?:an|one|two|four|[0-9.]+)(?: (?!{_LINKS}\b)[a-z-]+){{1,2}}|{_RATED})"
        rf" an? (?:{_UNITS})\b(?! (?:of|that))"
    ),
    "a quantity has a name": re.compile(r"\bso many\b"),
    "a verb has a subject": re.compile(r"\b(?:is|are|was|were) (?:led back|at hand)\b|\bthat (?:is|are) to be\b"),
    "a sentence says who acts": re.compile(r"\b(?:whoever|nobody(?!/)|everybody|none of its business)\b", re.I),
    "quantized values have their name": re.compile(r"\b(?:layers?|models?|products?|sums?) of (?:codes|floats)\b"),
}

PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "examples").glob("*.md"),
    *(ROOT / "notebooks").glob("*.md"),
    *(ROOT / "notebooks").glob("*.ipynb"),
]
FOLDERS = ("refmodels", "trt_runtime", "export", "debug", "benchmarks", "docs", "examples", "notebooks", "tests")
SOURCES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py")) if file != Path(__file__)]
"""Files whose docstrings, comments and messages are checked as well."""


def odd(text: str) -> list[str]:
    """The rules that a text breaks, each with the words that break it."""
    joined = re.sub(r"\s+(?:# )?", " ", text)
    return [f"{rule}: {found[0]}" for rule, pattern in ODD.items() for found in pattern.finditer(joined)]


def prose(path: Path) -> str:
    """The prose of a page: Markdown without code blocks, or a notebook's Markdown cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.S | re.M)


def words_of(source: str) -> Iterator[str]:
    """Strings (docstrings, messages) and runs of comments of a Python file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
    run: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if run and token.start[0] != run[-1].start[0] + 1:
                yield "\n".join(t.string for t in run)
                run = []
            run.append(token)
    yield "\n".join(t.string for t in run)


def helps(verb: str) -> Iterator[tuple[str, str]]:
    """Name and help of every option and argument of a verb."""
    hints = typing.get_type_hints(VERBS[verb].load(), include_extras=True)
    for name in inspect.signature(VERBS[verb].load()).parameters:
        assert typing.get_origin(hints[name]) is Annotated
        [info] = [m for m in hints[name].__metadata__ if isinstance(m, typer.models.ParameterInfo)]
        yield name, info.help or ""


def is_sentence(text: str) -> bool:
    """Begins with a capital letter, ends with a full stop, has a subject or a verb: not "Of the draws."."""
    return re.match(r"(?!Of\b)[A-Z][\w'’-]*[,:]? \S", text) is not None and text.endswith(".")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page: Path) -> None:
    assert not odd(prose(page))


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=pytest.mark.slow if ROOT / "tests" in file.parents else ()) for file in SOURCES],
    ids=lambda file: file.relative_to(ROOT).as_posix(),
)
def test_sources(file: Path) -> None:
    found = [rule for words in words_of(file.read_text(encoding="utf-8")) for rule in odd(words)]
    assert not found


def docstrings(source: str) -> Iterator[str]:
    """Docstrings of modules, classes, functions and constants."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


def names_a_thing(docstring: str) -> bool:
    """Does not begin with a clause in the place of a noun ("What a page says") or with a fragment ("Of a page")."""
    return re.match(r"(?:What|Of)\b", docstring) is None


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "tests"])
def test_docstrings_name_what_they_describe(folder: str) -> None:
    files = [file for file in SOURCES if file.is_relative_to(ROOT / folder)]
    texts = [(file, text) for file in files for text in docstrings(file.read_text(encoding="utf-8"))]
    assert texts and not [(file, text) for file, text in texts if not names_a_thing(text)]


def test_the_check_of_docstrings_sees() -> None:
    source = '"""What this is."""\nA = 1\n"""Of A."""\n\n\ndef f() -> None:\n    """Offsets."""\n    return "What"\n'
    assert [names_a_thing(text) for text in docstrings(source)] == [False, False, True]


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb: str) -> None:
    assert not odd(help_of(VERBS[verb].load()))
    for name, text in helps(verb):
        assert is_sentence(text) and not odd(text), f"{verb} {name}: {text!r}"


@pytest.mark.parametrize(
    "text",
    [
        "int8, one scale a row",
        "two launches a\nblock",
        "UTF-8 file with one prompt a line or 4 tokens a pair",
        "At most so many tokens.",
        "layers are led back to taps",
        "no GPU was at hand",
        "against what noise that is to be judged",
        "a scale a row",
        "whoever has no kernel runs the body",
        "products of codes",
    ],
)
def test_the_check_sees(text: str) -> None:
    assert odd(text)


@pytest.mark.parametrize(
    "text",
    [
        "int8, one scale per row",
        "one module upstream may be a block here",
        "as one layer of a block",
        "two halves of a batch",
        "the norm of a row",
        "one step after a block",
        "a scale of a row",
        "the hub id nobody/nothing-here",
    ],
)
def test_the_check_lets_pass(text: str) -> None:
    assert not odd(text)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("Of the draws.", False),
        ("At most 5", False),
        ("int8 or fp8: keys and values too.", False),
        ("Seed.", False),
        ("", False),
        ("Random seed for sampling.", True),
        ("GPTQ: quantize the columns with the largest inputs first.", True),
        ("UTF-8 text file for perplexity; repeatable.", True),
    ],
)
def test_the_check_of_help_sees(text: str, good: bool) -> None:
    assert is_sentence(text) is good


def test_words_of_a_source() -> None:
    source = 'x = f"one scale a {y}"  # one\n# scale a row\n\n\ndef f() -> None:\n    """Two."""\n'
    assert list(words_of(source)) == ["one scale a ", "Two.", "# one\n# scale a row"]
    assert [odd(words) != [] for words in words_of(source)] == [False, False, True]
