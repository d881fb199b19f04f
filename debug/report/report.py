"""The page: verdict, culprits with their diagnosis and evidence, plots, tables, module tree, environment."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template

from debug.comparison.metrics import json_number
from debug.comparison.results import DiffResult
from debug.drift import DriftResult
from debug.environment import environment as here
from debug.report import sections
from debug.report.figures import Figure
from debug.report.markup import escape
from refmodels.errors import LogitLockError
from refmodels.files import check_file_output, write_text

_MARK = '<meta name="generator" content="LogitLock">'


def check_report(path: Path) -> None:
    """Raise LogitLockError if `write_report` would: plotly is not installed, or `path` cannot be written."""
    _plotly_js()
    check_file_output(path, "report", _MARK)


def write_report(
    result: DiffResult,
    path: Path,
    *,
    drift: DriftResult | None = None,
    command: str = "",
    environment: Mapping[str, str] | None = None,
) -> None:
    """Write one self-contained HTML file; it appears whole or not at all.

    Args:
        result: the result of a diff.
        path: the file; it is overwritten.
        drift: a drift result of the same engine, to show as well.
        command: the command that was run, so that the reader can repeat it.
        environment: names and values to show; None: those of the result, or else versions and machine of this process.
    Raises:
        LogitLockError: plotly is not installed, or the file cannot be written.
    """
    check_report(path)
    text = _page(result, drift, command, (result.environment or here()) if environment is None else environment)
    write_text(path, text, "report", _MARK)


def _plotly_js() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise LogitLockError("a report needs plotly: pip install 'logitlock[report]'") from error
    return str(get_plotlyjs())


def _page(result: DiffResult, drift: DriftResult | None, command: str, facts: Mapping[str, str]) -> str:
    plots: dict[str, Figure] = {}
    body = [
        "<h1>LogitLock diff</h1>",
        sections.observer_section(result),
        sections.verdict_section(result),
        sections.culprits_section(result),
        sections.terms_section(result),
        sections.heat_map_section(result, plots),
        sections.curves_section(result, plots),
        sections.logits_section(result, plots),
        sections.worst_section(result),
        "" if drift is None else sections.drift_section(drift, result, plots),
        sections.other_section(result),
        sections.tree_section(result),
        sections.environment_section(result, command, facts),
    ]
    files = resources.files("debug.report")
    page, style, script = ((files / n).read_text("utf-8") for n in ("page.html", "style.css", "plots.js"))
    library = _plotly_js()
    # Nothing can be loaded, and only these two scripts run, even if the escaping misses something.
    scripts = " ".join(f"'sha256-{_sha256(text)}'" for text in (library, script))
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {scripts}"
    about = result.context.get("bundle") or result.context.get("model") or "LogitLock diff"
    return Template(page).substitute(
        policy=policy,
        title=escape(f"{result.verdict}: {about}"),
        style=style,
        body="\n".join(part for part in body if part),
        figures=_script_json(plots),
        plotly=library,
        plots=script,
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _script_json(value: object) -> str:
    """JSON that cannot end the script element which holds it."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _finite(value: object) -> object:
    if isinstance(value, float):
        return json_number(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
