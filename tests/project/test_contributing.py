"""The files that CONTRIBUTING.md, README and other front pages name exist; the project's YAML files are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ROOT

PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/design.md", "notebooks/README.md")
FOLDERS = ("benchmarks", "debug", "docs", "examples", "export", "notebooks", "refmodels", "tests", "trt_runtime")
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def missing(page: str, text: str) -> set[str]:
    """Relative links, and paths in backticks, that do not exist as seen from the page."""
    links = {link.split("#")[0] for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)}
    dead = {link for link in links if link and not (ROOT / page).parent.joinpath(link).exists()}
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text)
    # A test by its name, `tests/test_x.py::test_y`, is not in backticks but in a block.
    tests = re.findall(r"(tests/[\w./]+\.py)(?:::(\w+))?", text)
    for path, name in tests:
        if not (ROOT / path).is_file() or f"def {name}" not in (ROOT / path).read_text(encoding="utf-8"):
            dead.add(f"{path}::{name}" if name else path)
    return dead | {path for path in named if not (ROOT / path).exists()}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_points_to_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not missing(page, text)


@pytest.mark.parametrize(
    ("text", "dead"),
    [
        ("[a](docs/none.md) [b](docs/index.md#x) [c](https://example.org/none)", {"docs/none.md"}),
        ("`debug/none.py`, `debug/cli.py`, `tests/goldens/`, `my/none.py`", {"debug/none.py"}),
        ("pytest tests/project/test_none.py", {"tests/project/test_none.py"}),
        ("pytest tests/project/test_cli.py::test_none", {"tests/project/test_cli.py::test_none"}),
        ("pytest tests/project/test_cli.py::test_version", set()),
    ],
)
def test_the_check_of_paths_sees(text: str, dead: set[str]) -> None:
    assert missing("README.md", text) == dead


def test_every_marker_and_target_is_explained() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    configured = re.search(r"^markers = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)
    assert configured is not None
    markers = re.findall(r'"(\w+):', configured[1])
    assert "gpu" in markers and all(f"| `{marker}` |" in guide for marker in markers)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = set(re.findall(r"^make (\w+)|`make (\w+)`", guide, re.M))
    assert {"test"} <= {a or b for a, b in named} <= targets


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_issue_forms_are_valid(form: Path) -> None:
    """By GitHub's rules: a name, a description, and elements with labels and ids of their own."""
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(content)
    ids = [element["id"] for element in content["body"]]
    assert len(ids) == len(set(ids)) > 1
    for element in content["body"]:
        assert element["type"] in ("textarea", "input", "dropdown", "checkboxes")
        assert element["attributes"]["label"]
        assert element["type"] not in ("dropdown", "checkboxes") or element["attributes"]["options"]


def test_an_accuracy_report_asks_for_the_diff_as_json() -> None:
    assert "logitlock diff --model MODEL --bundle BUNDLE --json" in FORMS[0].read_text(encoding="utf-8")
    assert [form.stem for form in FORMS] == ["accuracy-report", "bug", "new-family"]


def test_ci_runs_the_same_script_on_the_oldest_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    [job] = workflow["jobs"].values()
    assert ".ci/run" in [step.get("run") for step in job["steps"]] and (ROOT / ".ci" / "run").is_file()
    oldest = job["strategy"]["matrix"]["python"][0]
    assert f'requires-python = ">={oldest}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_hooks_are_those_of_make_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"].split()[0] for repo in hooks["repos"] for hook in repo["hooks"]]
    recipe = re.search(r"^lint:.*?\n\n", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M | re.S)
    assert recipe is not None
    assert entries == [line.split("/")[-1].split()[0] for line in recipe[0].splitlines() if "$(BIN)" in line]
