"""The documentation builds without a warning, and its code runs.

Fenced blocks marked `bash` or `python` in README.md and docs/ are executed, page by page, in one directory that has the
bundled toy's bundle as engines/qwen-fp16.  A block that cannot run here follows a comment that says why:

    <!-- not run: needs a GPU -->

A `text` block right after a `bash` block holds lines that the commands print; numbers may differ, and a line that ends
with " …" is the beginning of a printed one.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from export.bundle import export_model
from refmodels.attention import ATTENTION_INPUTS, NODE_ATTRIBUTES
from tests.support.code_blocks import Block, blocks
from tests.support.command import logitlock
from tests.support.paths import ROOT
from tests.support.scripts import load_script

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REASONS = ("needs a GPU", "needs the hub", "needs the package index", "needs a model of yours", "tests/", "make ")
"""Why a block may be left out, as its reason begins or contains."""


_FEWER = {"eval": ["--limit", "5", "--no-speed"], "quantize": ["--samples", "16"]}
"""Options added to commands of pages, so that the test takes seconds."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as a user has it after `make demo`, with the repository's tests and examples beside it."""
    directory = tmp_path_factory.mktemp("docs")
    with torch.no_grad():
        export_model("qwen", precision="fp16", output=directory / "engines" / "qwen-fp16")
    for name in ("tests", "examples", "refmodels", "docs"):
        (directory / name).symlink_to(ROOT / name)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_code_runs(path: Path, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop)
    printed = ""
    for block in blocks(path):
        if block.reason is not None:
            continue
        if block.kind == "python":
            out = io.StringIO()
            with redirect_stdout(out):
                exec(compile(block.code, f"{block}", "exec"), {"__name__": "__doc__"})
            printed = out.getvalue()
        elif block.kind == "bash":
            printed = "".join(_command(line, block) for line in _commands(block.code))
        elif block.kind == "text" and block.after in ("bash", "python"):
            for line in block.code.splitlines():
                assert _masked(line.removesuffix(" …")) in _masked(printed), f"{block}: this is not printed: {line}"


def _commands(code: str) -> list[str]:
    joined = code.replace("\\\n", " ")
    return [line for line in (line.strip() for line in joined.splitlines()) if line and not line.startswith("#")]


def _command(line: str, block: Block) -> str:
    """Run one line: our own commands in this process (importing torch takes seconds), others in a shell."""
    line = re.sub(r"\s+#.*$", "", line)
    words = shlex.split(line.replace("python -m export ", "logitlock export "))
    if words[0] == "logitlock" and not {"&&", "|", ">", "&", ";"} & set(words):
        if words[1] == "export" and "--output" not in words and (Path("engines/qwen-fp16")).exists():
            words.append("--overwrite")
        if words[1] == "export" and "--backend" not in words:
            words += ["--backend", "onnxruntime"]  # plans are built by other tests
        words += _FEWER.get(words[1], [])
        done = logitlock(*[w for word in words[1:] for w in _expanded(word)])
        assert done.code in (0, 1) and (done.code == 0 or words[1] == "diff"), f"{block}: {line}\n{done.out}{done.err}"
        return done.out
    shell = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert shell.returncode == 0, f"{block}: {line}\n{shell.stdout}{shell.stderr}"
    return shell.stdout


def _expanded(word: str) -> list[str]:
    return sorted(map(str, Path().glob(word))) if "*" in word and "/" in word else [word]


def _masked(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[\d.]+(e-?\d+)?", "#", text)).strip()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_blocks_left_out_say_why(path: Path) -> None:
    for block in blocks(path):
        if block.reason is not None:
            assert any(r in block.reason for r in REASONS), f"{block}: not run because {block.reason!r}"
        assert block.kind in ("python", "bash", "text", "json", "diff", ""), f"{block}: what is {block.kind!r}?"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_diffs_are_real(path: Path) -> None:
    """What a `diff` block adds is in the file that it names; a new file is there as a whole."""
    for block in blocks(path):
        if block.kind != "diff":
            continue
        named = re.search(r"^\+\+\+ b/(.*)$", block.code, flags=re.M)
        new = "--- /dev/null" in block.code
        text = (ROOT / (named[1] if named else "refmodels/families/__init__.py")).read_text(encoding="utf-8")
        added = [line[1:] for line in block.code.splitlines() if re.match(r"\+(?!\+\+ )", line)]
        if new:
            assert "\n".join(added) + "\n" == text, f"{block} is not what the file says"
        assert all(line in text.splitlines() for line in added), f"{block} adds what is not there"


def test_few_blocks_are_left_out() -> None:
    all_ = [b for path in PAGES for b in blocks(path) if b.kind in ("python", "bash")]
    left_out = [b for b in all_ if b.reason is not None]
    assert len(left_out) <= 8 and len(all_) > 2 * len(left_out), [str(b) for b in left_out]


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "site").glob("*.html")}
    assert not [name for name, page in pages.items() if "<!-- table:" in page or "<!-- file:" in page]
    # Nothing is fetched from elsewhere when a page is read.
    assert not [n for n, page in pages.items() if re.search(r'<(script|link|img)[^>]+(src|href)="https?://', page)]


def test_cli_reference_has_every_verb_and_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is made from signatures; every option that typer itself lists must be in it."""
    from debug.command import VERBS

    monkeypatch.setenv("COLUMNS", "250")
    page = load_script("docs/hooks/cli.py").cli_page()
    for verb in VERBS:
        section = page.split(f"\n## {verb}\n")[1].split("\n## ")[0]
        listed = re.findall(r"^  (?:-h, )?(--[a-z][a-z-]+)", logitlock(verb, "--help").out, flags=re.M)
        missing = {name for name in listed if f"`{name}`" not in section} - {"--help"}
        assert len(listed) > 1 and not missing, (verb, missing)


def test_schemas_describe_what_is_written(workshop: Path) -> None:
    """Every key of a real bundle.json and of a real diff is on the page."""
    page = load_script("docs/hooks/schemas.py").schemas_page()
    info = json.loads((workshop / "engines" / "qwen-fp16" / "bundle.json").read_text(encoding="utf-8"))
    example = json.loads((ROOT / "docs" / "measured.json").read_text(encoding="utf-8"))["swapped"]["json"]
    spec = {**info["spec"], **info["spec"]["attention"], **info["spec"]["rope"]}
    for key in [*info, *spec, *example["culprits"][0], *example["taps"][0], *example["logits"]]:
        assert f"`{key}`" in page, key


def test_contract_of_attention_has_every_input() -> None:
    """One row per input of the operator, in its order, and every attribute of the node is on the page."""
    lines = load_script("docs/hooks/contract.py").attention_inputs().splitlines()[2:]
    assert [re.match(r"\| `(\w+)`", line)[1] for line in lines] == [row.node for row in ATTENTION_INPUTS]  # type: ignore[index]
    for line, row in zip(lines, ATTENTION_INPUTS, strict=True):
        assert line.count(" | ") == lines[0].count(" | ") and row.when in line and ", ".join(row.axes[:1]) in line
        assert ("| no |" in line) == (row.name in ("key_scale", "value_scale"))
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    assert "<!-- table: attention_inputs -->" in page
    assert all(f"`{name}`" in "\n".join([page, *lines]) for name in NODE_ATTRIBUTES)


def test_measured_numbers_are_those_of_this_code() -> None:
    """docs/measured.json was written by docs/measure.py of a code that still agrees with it."""
    measured = json.loads((ROOT / "docs" / "measured.json").read_text(encoding="utf-8"))
    assert sum(f["cases"] for f in measured["verify"].values()) == len(list((ROOT / "tests/goldens").glob("[a-z]*")))
    assert all(f["passed"] == f["cases"] and f["bf16_exact"] == f["bf16"] for f in measured["verify"].values())
    for dtype, errors in load_script("docs/measure.py").rope_errors().items():
        assert errors == pytest.approx(measured["rope_table"][dtype], rel=1e-3)
