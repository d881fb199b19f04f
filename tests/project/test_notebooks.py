"""The notebooks run top to bottom, and the committed outputs are those of such a run."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from tests.support.scripts import load_script

script = load_script("notebooks/execute.py")

WORDS_A_MINUTE, LINES_A_MINUTE = 200, 50
"""How fast prose and code are read by somebody who wants to follow."""


@pytest.mark.slow
@pytest.mark.parametrize("path", script.notebooks(), ids=lambda path: path.stem)
def test_runs_top_to_bottom(path: Path) -> None:
    again = script.execute(path)
    committed = nbformat.read(path, as_version=4)
    assert _kinds(again) == _kinds(committed), "the outputs are of other kinds than the committed ones; run execute.py"


def _kinds(notebook: nbformat.NotebookNode) -> list[list[str]]:
    return [[o.output_type for o in cell.get("outputs", [])] for cell in notebook.cells]


@pytest.mark.parametrize("path", script.notebooks(), ids=lambda path: path.stem)
def test_committed_with_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata["logitlock"]["cells_sha256"] == script.digest(notebook), "run: python notebooks/execute.py"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for o in outputs), "no figure"


@pytest.mark.parametrize("path", script.notebooks(), ids=lambda path: path.stem)
def test_names_no_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    text = "\n".join([c.source + str([o for o in c.get("outputs", [])]) for c in notebook.cells])
    text = re.sub(r"'image/png': '[^']*'", "", text)
    assert not re.findall(r"(?:/(?:work|root|home|tmp|mnt|usr)/\S*)|site-packages|[A-Z]:\\\\Users", text)


@pytest.mark.parametrize("path", script.notebooks(), ids=lambda path: path.stem)
def test_is_read_in_fifteen_minutes(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    words = sum(len(c.source.split()) for c in notebook.cells if c.cell_type == "markdown")
    lines = sum(len(c.source.splitlines()) for c in notebook.cells if c.cell_type == "code")
    assert words / WORDS_A_MINUTE + lines / LINES_A_MINUTE <= 15, (words, lines)
