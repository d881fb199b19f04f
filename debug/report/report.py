"""The page: verdict, culprits with their diagnosis and evidence, plots, tables, module tree, environment."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template

from debug.drift import DriftResult
from debug.metrics import json_number
from debug.report import figures
from debug.report.environment import environment as here
from debug.report.figures import Figure, rank, step_name
from debug.results import Culprit, DiffResult, Evidence, LogitToken, TapError
from debug.tables import verdict_line
from refmodels.errors import LogitLockError
from refmodels.taps import is_cache_tap

_WORST = 12
_OPEN = 1
"""Culprits that are shown open."""


def check_report(path: Path) -> None:
    """Raise LogitLockError where `write_report` would: plotly is not installed, or `path` cannot be written."""
    _plotly_js()
    parent = path.absolute().parent
    if path.is_dir():
        raise LogitLockError(f"the report {path} is a directory; name a file")
    if not parent.is_dir():
        raise LogitLockError(f"the report {path} cannot be written: there is no directory {path.parent}")
    if not os.access(parent, os.W_OK):
        raise LogitLockError(f"the report {path} cannot be written: the directory {path.parent} is read-only")


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
        result: what a diff found.
        path: the file; overwritten.
        drift: of the same engine, to be shown as well.
        command: what was run, to be repeated by the reader.
        environment: names and values to show; None: versions and machine of this process.
    Raises:
        LogitLockError: plotly is not installed, or the file cannot be written.
    """
    check_report(path)
    text = _page(result, drift, command, here() if environment is None else environment)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise LogitLockError(f"the report {path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


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
        _observer(result),
        _verdict(result),
        _culprits(result),
        _terms(result),
        _heat_map(result, plots),
        _curves(result, plots),
        _logits(result, plots),
        _worst(result),
        "" if drift is None else _drift(drift, result, plots),
        _other(result),
        _tree(result),
        _environment(result, command, facts),
    ]
    files = resources.files("debug.report")
    page, style, script = ((files / n).read_text("utf-8") for n in ("page.html", "style.css", "plots.js"))
    library = _plotly_js()
    # Nothing can be loaded, and no script runs but these two, even if something slipped through the escaping.
    scripts = " ".join(f"'sha256-{_sha256(text)}'" for text in (library, script))
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {scripts}"
    return Template(page).substitute(
        policy=policy,
        title=_e(
            f"{result.verdict}: {result.context.get('bundle') or result.context.get('model') or 'LogitLock diff'}"
        ),
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


# Sections


def _observer(result: DiffResult) -> str:
    effect = result.observer_effect
    if not effect.changed:
        return ""
    return _section(
        "Observer effect",
        f"<p>Taking taps changes the logits by up to <strong>{_n(effect.max_abs)}</strong>; "
        f"{effect.top1_changed} greedy tokens differ. The tap errors below are those of the tapped engine, the logits "
        "those of the engine as it ships: what the taps show need not be what ships.</p>",
        kind="observer",
    )


def _verdict(result: DiffResult) -> str:
    word, _, sentence = verdict_line(result).partition(": ")
    logits = result.logits
    worst = max(result.taps, key=rank)
    tiles = [
        ("Largest local error", _ratio(worst, " floors"), f"{worst.tap}; alarm at {result.multiple:g}"),
        ("KL, mean", f"{_n(logits.kl_mean)} nats", f"floor {_n(logits.floor_kl_mean)}"),
        ("KL, largest", f"{_n(logits.kl_max)} nats", f"floor {_n(logits.floor_kl_max)}"),
        ("Same greedy token", f"{logits.top1:.2%}", f"of {logits.tokens}; floor {logits.floor_top1:.2%}"),
        ("Flips beyond rounding", str(logits.margin_flips), f"of {logits.flips} flips"),
    ]
    culprits = "".join(f"<li>{_summary(c)}</li>" for c in result.culprits)
    listed = f"<ol>{culprits}</ol>" if result.culprits else ""
    lengths = ", ".join(map(str, result.prompt_lengths))
    return _section(
        f'<span class="word">{_e(word)}</span>: {_e(sentence)}',
        listed
        + _facts(
            {
                "engine": result.engine,
                "reference": result.reference,
                "floor": result.floor,
                "inputs": f"{result.prompts}: {lengths} tokens, then {result.steps} decode steps",
            }
        )
        + '<dl class="tiles">'
        + "".join(
            f"<div><dt>{_e(name)}</dt><dd>{_e(value)}<small>{_e(note)}</small></dd></div>"
            for name, value, note in tiles
        )
        + "</dl>",
        kind="verdict" if result.verdict == "aligned" else "verdict wrong",
    )


def _summary(culprit: Culprit) -> str:
    """A culprit in a line: tap, place, what it is."""
    where = f"{culprit.phase}" if culprit.phase == "prefill" else f"decode step {culprit.step}"
    what = {
        "nonfinite": "NaN or Inf from finite inputs",
        "accumulated": f"no module is wrong by itself; accumulated error {_n(culprit.ratio)} floors",
        "systematic": "within the noise of single tokens, but not over all of them",
        "local": f"local error {_n(culprit.local)}, {_n(culprit.ratio)} noise floors",
    }[culprit.kind]
    found = culprit.diagnosis[0] if culprit.diagnosis else None
    if found is not None:
        cause = f"<strong>{_e(found.fault)}</strong> ({_n(found.local_before)} → {_n(found.local_after)})"
    else:
        cause = "cause unknown" if culprit.kind == "local" else ""
    place = f"{where}, row {culprit.worst[0]}, position {culprit.worst[1]}"
    return f'<span class="mono">{_e(culprit.tap)}</span> ({place}): {what}' + (f" — {cause}" if cause else "")


def _culprits(result: DiffResult) -> str:
    if not result.culprits:
        return ""
    tokens = _tokens_at(result)
    parts = [
        f'<details class="culprit"{" open" if i < _OPEN else ""}><summary>{_summary(c)}</summary>'
        f"<div>{_diagnosis(c, result)}{_evidence(c, result, tokens)}</div></details>"
        for i, c in enumerate(result.culprits)
    ]
    intro = (
        "<p>Taps that are wrong by themselves, in the order of execution. A diagnosis is a known fault that was "
        "planted in the reference module: with it, the module gives what the engine gave, up to what rounding "
        "leaves.</p>"
    )
    return _section("Culprits", intro + "".join(parts))


def _diagnosis(culprit: Culprit, result: DiffResult) -> str:
    at = next(t for t in result.taps if (t.tap, t.step) == (culprit.tap, culprit.step))
    floor = _n(figures.floor(at))
    if not culprit.diagnosis:
        why = {
            "nonfinite": "NaN and Inf are not diagnosed: look at the inputs' range and at this module's dtype.",
            "accumulated": "There is no single module to diagnose.",
        }.get(culprit.kind, "Unknown: no fault of the catalogue explains it.")
        return f"<p>{why} Local error {_n(culprit.local)}, floor {floor}.</p>"
    systematic = culprit.kind == "systematic"
    rows = [
        [
            _e(d.fault),
            _n(d.local_before),
            _n(d.local_after),
            (_n(d.significance) if d.significance is not None else "") if systematic else _n(d.ratio_after),
        ]
        for d in culprit.diagnosis
    ]
    last = "standard deviations of the noise" if systematic else "floors left"
    return (
        _table(
            f"Diagnosis (floor {floor})",
            ["fault", "local error before", "with the fault", last],
            rows,
            numbers=(1, 2, 3),
        )
        + f"<p>Seen in {culprit.occurrences} of {result.steps + 1} forwards.</p>"
    )


def _evidence(culprit: Culprit, result: DiffResult, tokens: Mapping[tuple[int, int], LogitToken]) -> str:
    evidence = culprit.evidence
    parts = []
    if evidence.tokens:
        unit = "slot" if is_cache_tap(culprit.tap) else "position"
        width = max(result.prompt_lengths, default=0)
        before = width + culprit.step - 1 if culprit.step and not is_cache_tap(culprit.tap) else 0
        rows = []
        for view in evidence.tokens:
            token = tokens.get((view.row, before + view.position))
            text = "" if token is None else _text(result, token.token)
            rows.append([str(view.row), str(view.position), text, _n(view.local), _n(view.ratio)])
        columns = ["row", unit, "token", "local error", "floors"]
        parts.append(_table(f"Worst {unit}s", columns, rows, numbers=(0, 1, 3, 4)))
    if evidence.heads:
        parts.append(_heads(f"Heads of {culprit.tap}", [(culprit.tap, evidence)]))
    if evidence.channels:
        rows = [[str(index), f"{share:.1%}", _bar(share, 1.0)] for index, share in evidence.channels]
        parts.append(_table("Channels with most of the squared error", ["channel", "share", ""], rows, numbers=(0, 1)))
    return _pair(parts) if parts else ""


def _heads(caption: str, found: Iterable[tuple[str, Evidence]]) -> str:
    """The worst heads, by relative error."""
    heads = [
        (error, tap, e.head_names[i] if i < len(e.head_names) else f"head {i}")
        for tap, e in found
        for i, error in enumerate(e.heads)
    ]
    heads = sorted(heads, key=lambda h: -h[0] if h[0] == h[0] else -math.inf)
    most = max((h[0] for h in heads if math.isfinite(h[0])), default=1.0)
    several = len({tap for _, tap, _ in heads}) > 1
    rows = [
        [*([_mono(tap)] if several else []), _e(name), _n(error), _bar(error, most)]
        for error, tap, name in heads[:_WORST]
    ]
    columns = [*(["tap"] if several else []), "head", "relative error", ""]
    more = f" (worst {_WORST} of {len(heads)})" if len(heads) > _WORST else ""
    return _table(caption + more, columns, rows, numbers=(len(columns) - 2,))


def _terms(result: DiffResult) -> str:
    terms = {
        "Accumulated error": "The engine's tensor against the fp64 reference, both run from the same token ids. It "
        "grows along the model: everything behind a broken module has it.",
        "Local error": "The engine's tensor against what the fp64 reference module makes of the engine's own inputs. "
        "Only a module that is wrong by itself has it.",
        "Noise floor": "The same two errors of the reference run in the engine's dtype: what rounding alone costs, "
        f"measured on the same inputs, and at least one rounding ({_n(result.unit_roundoff)}).",
        f"Alarm, {result.multiple:g} floors": "A local error above this many floors, for any token, is a fault: no "
        "order of rounding explains it.",
    }
    return _section(
        "How to read this",
        '<dl class="terms">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in terms.items()) + "</dl>",
    )


def _heat_map(result: DiffResult, plots: dict[str, Figure]) -> str:
    plots["heat"] = figures.heat_map(result)
    text = (
        "Local error of every tap (across) in every forward (down), in noise floors. Blue is noise; from orange on it "
        f"is above the alarm of {result.multiple:g}. A cross alone: NaN or Inf, from inputs that were so already."
    )
    return _section("Every module in every step", _plot("heat", text))


def _curves(result: DiffResult, plots: dict[str, Figure]) -> str:
    text = (
        "Local error is at its floor wherever a module does what the reference does. Accumulated error above its own "
        "floor while local error is at the floor means: the fault came in earlier. Errors of exactly 0 are not drawn."
    )
    plots["prefill"] = figures.curves(result, "prefill")
    parts = [f"<h3>Prefill</h3>{_plot('prefill', text)}"]
    if result.steps:
        plots["decode"] = figures.curves(result, "decode")
        parts.append(
            "<h3>Decode</h3>" + _plot("decode", f"Each tap at the worst of its {result.steps} teacher-forced steps.")
        )
    return _section("Local against accumulated error", "".join(parts))


def _logits(result: DiffResult, plots: dict[str, Figure]) -> str:
    if not result.logit_tokens:
        return ""
    plots["kl"], plots["margins"] = figures.kl_by_position(result), figures.margins(result)
    limit = 2 * result.logits.floor_max_abs
    text = (
        "A greedy token can only flip where the logit error is more than half of the reference's lead (above the "
        f"slanted line). Where the lead is within {_n(limit)}, twice the floor's largest error, rounding may flip it."
    )
    return _section(
        "Logits of the engine as it ships",
        '<div class="pair">'
        + _plot("kl", "KL divergence of the next-token distribution, reference against engine, by position.")
        + _plot("margins", text)
        + "</div>",
    )


def _worst(result: DiffResult) -> str:
    each: dict[str, TapError] = {}
    for tap in sorted(result.taps, key=rank, reverse=True):
        each.setdefault(tap.tap, tap)
    taps = list(each.values())[:_WORST]
    parts = [
        _table(
            "Taps by local error, each at its worst",
            ["tap", "forward", "local", "floor", "floors", "row", "position"],
            [
                [
                    _mono(t.tap),
                    step_name(t.step),
                    _n(t.local),
                    _n(figures.floor(t)),
                    _ratio(t),
                    str(t.worst[0]),
                    str(t.worst[1]),
                ]
                for t in taps
            ],
            numbers=(2, 3, 4, 5, 6),
            wrong=[_wrong(t, result) for t in taps],
        )
    ]
    if any(c.evidence.heads for c in result.culprits):
        parts.append(_heads("Heads of the culprits", [(c.tap, c.evidence) for c in result.culprits]))
    text = _pair(parts)
    if result.logit_tokens:
        tokens = sorted(result.logit_tokens, key=lambda t: -t.kl if t.kl == t.kl else -math.inf)[:_WORST]
        rows = [
            [
                str(t.row),
                str(t.index),
                _text(result, t.token),
                _n(t.kl),
                _n(t.floor_kl),
                _text(result, t.expected),
                _text(result, t.chosen) if t.flip else "same",
                _n(t.margin),
            ]
            for t in tokens
        ]
        columns = ["row", "position", "token", "KL", "floor", "reference says next", "engine", "lead"]
        flips = [t.beyond_rounding for t in tokens]
        text += _table("Tokens by KL", columns, rows, numbers=(0, 1, 3, 4, 7), wrong=flips)
    return _section("Worst taps, tokens and heads", text)


def _drift(drift: DriftResult, result: DiffResult, plots: dict[str, Figure]) -> str:
    plots["drift_kl"], plots["drift_cache"] = figures.drift_kl(drift), figures.drift_cache(drift)
    charts = (
        '<div class="pair">'
        + _plot(
            "drift_kl",
            "Fed the reference's tokens. If the carried cache is worse than one made anew at each step, the fault is "
            "in the cache and not in the modules.",
        )
        + _plot("drift_cache", "All live keys and values of the engine's cache against the reference's.")
        + "</div>"
    )
    first = drift.steps[0], drift.steps[-1]
    text = (
        f"<p>Free-running, the greedy tokens of all {drift.rows} rows are the same for {first[1].step + 1} tokens.</p>"
    )
    if drift.differences:
        columns = [
            "row",
            "token",
            "reference",
            "engine",
            "lead",
            "logit error",
            "floor's error",
            "rounding explains it",
        ]
        text = _table(
            "Free-running: the first token of a row that differs",
            columns,
            [
                [
                    str(d.row),
                    str(d.step),
                    _text(result, d.reference_token),
                    _text(result, d.engine_token),
                    _n(d.margin),
                    _n(d.error),
                    _n(d.floor_error),
                    "yes" if d.explained else "no",
                ]
                for d in drift.differences
            ],
            numbers=(0, 1, 4, 5, 6),
            wrong=[not d.explained for d in drift.differences],
        )
    return _section("Drift while decoding", charts + text)


def _other(result: DiffResult) -> str:
    if result.other is None or result.between is None:
        return ""
    between = result.between
    taps = sorted(between.taps, key=lambda t: -t.rel_l2 if t.rel_l2 == t.rel_l2 else -math.inf)[:_WORST]
    culprits = "".join(f"<li>{_summary(c)}</li>" for c in result.other.culprits)
    return _section(
        "The other side, judged in the same way",
        f"<p><strong>{_e(verdict_line(result.other))}</strong></p>"
        + (f"<ol>{culprits}</ol>" if culprits else "")
        + _facts({"engine": result.other.engine, **{k: str(v) for k, v in result.other.context.items()}})
        + f"<p>Directly against each other: KL mean {_n(between.kl_mean)}, largest {_n(between.kl_max)} nats; "
        f"same greedy token {between.top1:.2%}; largest logit difference {_n(between.max_abs)}.</p>"
        + _table(
            "Taps in which the two sides differ most",
            ["tap", "relative L2", "largest difference", "cosine"],
            [[_mono(t.tap), _n(t.rel_l2), _n(t.max_abs), f"{t.cosine:.6f}"] for t in taps],
            numbers=(1, 2, 3),
        ),
    )


def _tree(result: DiffResult) -> str:
    """blocks.N -> taps; what holds a culprit is open."""
    taps: dict[str, list[TapError]] = {}
    for tap in result.taps:
        taps.setdefault(tap.tap, []).append(tap)
    groups: dict[str, list[str]] = {}
    for name in taps:
        groups.setdefault(".".join(name.split(".")[:2]) if name.startswith("blocks.") else "", []).append(name)
    named = {c.tap for c in result.culprits}
    parts: list[str] = []
    outside = groups.pop("", [])
    first = [n for n in outside if not n.startswith(("final_norm", "logits"))]
    for group, names in (("input", first), *groups.items(), ("output", [n for n in outside if n not in first])):
        if not names:
            continue
        worst = max((t for n in names for t in taps[n]), key=rank)
        wrong = sum(n in named for n in names)
        mark = f' <span class="mark">✗ {wrong} wrong</span>' if wrong else ""
        parts.append(
            f'<details{" open" if wrong else ""}><summary><span class="mono">{_e(group)}</span> '
            f'<span class="ratio">worst {_ratio(worst)} × at {_e(worst.tap)}</span>{mark}</summary>'
            f"{_tree_table(names, taps, named, result)}</details>"
        )
    note = "<p>Local error in noise floors (×): in the prefill, and in the worst decode step.</p>"
    return _section("Modules", f'{note}<div class="tree">{"".join(parts)}</div>')


def _tree_table(
    names: Sequence[str], taps: Mapping[str, Sequence[TapError]], named: set[str], result: DiffResult
) -> str:
    rows = []
    for name in names:
        prefill = next((t for t in taps[name] if not t.step), taps[name][0])
        decode = max((t for t in taps[name] if t.step), key=rank, default=None)
        rows.append(
            [
                _mono(name) + (" ✗" if name in named else ""),
                _n(prefill.local),
                _n(figures.floor(prefill)),
                _ratio(prefill),
                "" if decode is None else f"{_ratio(decode)} ({step_name(decode.step)})",
                _n(prefill.accumulated),
                _n(prefill.accumulated_floor),
            ]
        )
    wrong = [name in named or any(_wrong(t, result) for t in taps[name]) for name in names]
    columns = ["tap", "local", "floor", "×", "× decode", "accumulated", "its floor"]
    return _table("", columns, rows, numbers=(1, 2, 3, 4, 5, 6), wrong=wrong)


def _environment(result: DiffResult, command: str, facts: Mapping[str, str]) -> str:
    setting = {k: str(v) for k, v in result.context.items()}
    packages = [f"{k}=={facts[k]}" for k in ("logitlock", "torch", "onnxruntime") if k in facts]
    commands = [shlex.join(["pip", "install", *packages])] if packages else []
    text = "\n".join([*commands, *([command] if command else [])])
    return _section(
        "To repeat this",
        (f"<pre>{_e(text)}</pre>" if text else "")
        + "<h3>What was compared</h3>"
        + _facts({**setting, "unit roundoff": _n(result.unit_roundoff), "alarm": f"{result.multiple:g} floors"})
        + ("<h3>Environment</h3>" + _facts(facts) if facts else ""),
    )


# Parts


def _e(text: object) -> str:
    return html.escape(str(text))


def _mono(text: str) -> str:
    return f'<span class="mono">{_e(text)}</span>'


def _n(value: float) -> str:
    if not math.isfinite(value):
        return "NaN" if value != value else "∞"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _ratio(tap: TapError, unit: str = "") -> str:
    return f"{tap.nonfinite} NaN or Inf" if tap.nonfinite else _n(tap.ratio) + unit


def _wrong(tap: TapError, result: DiffResult) -> bool:
    return tap.nonfinite > 0 or tap.ratio > result.multiple


def _bar(value: float, most: float) -> str:
    share = value / most if most and math.isfinite(value) else 0.0
    return f'<span class="bar" style="width:{max(1.0, 110 * share):.0f}px"></span>'


def _text(result: DiffResult, token: int) -> str:
    text = result.token_texts.get(token)
    return _e(token) if text is None else f"<code>{_e(repr(text))}</code>"


def _tokens_at(result: DiffResult) -> dict[tuple[int, int], LogitToken]:
    """Tokens by row and column of the whole text, padding counted."""
    width = max(result.prompt_lengths, default=0)
    return {(t.row, width + t.step - 1 if t.step else t.position): t for t in result.logit_tokens}


def _section(title: str, body: str, *, kind: str = "") -> str:
    classes = f' class="{kind}"' if kind else ""
    return f"<section{classes}><h2>{title}</h2>{body}</section>"


def _pair(parts: Iterable[str]) -> str:
    """Beside each other where there is room."""
    return '<div class="pair">' + "".join(f"<div>{part}</div>" for part in parts) + "</div>"


def _plot(name: str, caption: str) -> str:
    return (
        f'<figure><figcaption>{caption}</figcaption><div class="plot" data-figure="{name}" role="img" '
        f'aria-label="{_e(caption)}"></div></figure>'
    )


def _facts(facts: Mapping[str, object]) -> str:
    return '<dl class="facts">' + "".join(f"<dt>{_e(k)}</dt><dd>{_e(v)}</dd>" for k, v in facts.items()) + "</dl>"


def _table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Sequence[int] = (),
    wrong: Sequence[bool] = (),
) -> str:
    """Cells are HTML already."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if i in numbers else ''}{' scope=col' if tag == 'th' else ''}>{v}</{tag}>"
            for i, v in enumerate(values)
        )

    head = f"<thead><tr>{cells('th', [_e(c) for c in columns])}</tr></thead>"
    lines = "".join(
        f"<tr{' class=wrong' if i < len(wrong) and wrong[i] else ''}>{cells('td', row)}</tr>"
        for i, row in enumerate(rows)
    )
    title = f"<caption>{_e(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}{head}<tbody>{lines}</tbody></table></div>'
