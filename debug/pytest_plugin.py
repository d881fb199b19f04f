"""A fixture for the tests of others: `pytest_plugins = ["debug.pytest_plugin"]` in conftest.py, then

    def test_engine(assert_aligned):
        assert_aligned("engines/qwen-fp16", model="qwen")

pytest does not load the plugin by itself: where a project has a `debug.py` of its own, every run of pytest would fail.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from debug.comparison.results import DiffResult


@pytest.fixture
def assert_aligned(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., DiffResult]:
    """A function with the arguments of `debug.diff`: it returns the result if the executors are aligned.

    Otherwise the test fails with the verdict and the culprits, and names a file with the result's JSON.
    """
    from debug.comparison.results import verdict_line
    from debug.report.junit import failure_of
    from debug.sides import diff

    def check(*sides: str | Path, **fields: Any) -> DiffResult:
        __tracebackhide__ = True
        result = diff(*map(str, sides), **fields)
        request.node.user_properties.append(("logitlock_verdict", verdict_line(result)))
        if not result.aligned:
            file = tmp_path / "diff.json"
            file.write_text(json.dumps(result.to_json(), ensure_ascii=False), encoding="utf-8")
            culprits = [f"  {culprit.tap}: {failure_of(culprit)}" for culprit in result.culprits[:5]]
            pytest.fail("\n".join([verdict_line(result), *culprits, f"(whole result: {file})"]), pytrace=False)
        return result

    return check
