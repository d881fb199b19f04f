"""The sections of a report, each as HTML; those with plots add them to `plots`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence

from debug.comparison.results import Culprit, DiffResult, Evidence, LogitToken, TapError, verdict_line
from debug.drift import DriftResult
from debug.report import figures
from debug.report.figures import Figure, rank, step_name
from debug.report.markup import bar, escape, facts, mono, number, pair, plot, section, table
from refmodels.taps import is_cache_tap, split_name

_WORST = 12
_OPEN = 1
"""Culprits that are shown open."""


def observer_section(result: DiffResult) -> str:
    effect = result.observer_effect
    if not effect.changed:
        return ""
    return section(
        "Observer effect",
        f"<p>Taking taps changes the logits by up to <strong>{number(effect.max_abs)}</strong>; "
        f"{effect.top1_changed} greedy tokens differ. The tap errors below are those of the tapped engine, the logits "
        "those of the engine as it ships: the shipped engine may differ from what the taps show.</p>",
        kind="observer",
    )


def verdict_section(result: DiffResult) -> str:
    word, _, sentence = verdict_line(result).partition(": ")
    logits = result.logits
    worst = max(result.taps, key=rank)
    tiles = [
        ("Largest local error", _ratio(worst, " floors"), f"{worst.tap}; alarm at {result.multiple:g}"),
        ("KL, mean", f"{number(logits.kl_mean)} nats", f"floor {number(logits.floor_kl_mean)}"),
        ("KL, largest", f"{number(logits.kl_max)} nats", f"floor {number(logits.floor_kl_max)}"),
        ("Same greedy token", f"{logits.top1:.2%}", f"of {logits.tokens}; floor {logits.floor_top1:.2%}"),
        ("Flips beyond rounding", str(logits.margin_flips), f"of {logits.flips} flips"),
    ]
    listed = _listed(result)
    lengths = ", ".join(map(str, result.prompt_lengths))
    return section(
        f'<span class="word">{escape(word)}</span>: {escape(sentence)}',
        listed
        + facts(
            {
                "engine": result.engine,
                "reference": result.reference,
                "floor": result.floor,
                "inputs": f"{result.prompts}: {lengths} tokens, then {result.steps} decode steps",
            }
        )
        + '<dl class="tiles">'
        + "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
            for name, value, note in tiles
        )
        + "</dl>",
        kind="verdict" if result.verdict == "aligned" else "verdict wrong",
    )


def _listed(result: DiffResult) -> str:
    lines = [f"<li>{_summary(c)}</li>" for c in result.culprits[:_WORST]]
    more = len(result.culprits) - len(lines)
    return (f"<ol>{''.join(lines)}</ol>" if lines else "") + (f"<p>and {more} more</p>" if more else "")


def _summary(culprit: Culprit) -> str:
    """A culprit in one line: tap, place, kind of error."""
    where = f"{culprit.phase}" if culprit.phase == "prefill" else f"decode step {culprit.step}"
    what = {
        "nonfinite": "NaN or Inf from finite inputs",
        "accumulated": f"no module is wrong by itself; accumulated error {number(culprit.ratio)} floors",
        "systematic": "within the noise of single tokens, but not over all of them",
        "configuration": "every tensor is right, this setting is not",
        "local": f"local error {number(culprit.local)}, {number(culprit.ratio)} noise floors",
    }[culprit.kind]
    found = culprit.diagnosis[0] if culprit.diagnosis else None
    if found is not None:
        cause = f"<strong>{escape(found.fault)}</strong> ({number(found.local_before)} → {number(found.local_after)})"
    else:
        cause = "cause unknown" if culprit.kind == "local" else ""
    place = f"{where}, row {culprit.worst[0]}, position {culprit.worst[1]}"
    return f'<span class="mono">{escape(culprit.tap)}</span> ({place}): {what}' + (f" — {cause}" if cause else "")


def culprits_section(result: DiffResult) -> str:
    if not result.culprits:
        return ""
    tokens = _tokens_at(result)
    parts = [
        f'<details class="culprit"{" open" if i < _OPEN else ""}><summary>{_summary(c)}</summary>'
        f"<div>{_diagnosis(c, result)}{_evidence(c, result, tokens)}</div></details>"
        for i, c in enumerate(result.culprits)
    ]
    intro = (
        "<p>Taps that are wrong by themselves, in the order of execution. A diagnosis is a known fault: planted in the "
        "reference module, it makes the module reproduce the engine's output up to rounding.</p>"
    )
    shared = "".join(f"<li>{escape(repeat.text)}</li>" for repeat in result.repeats)
    intro += f"<ul>{shared}</ul>" if shared else ""
    more = f"<summary>{len(parts) - _WORST} more</summary>{''.join(parts[_WORST:])}"
    rest = f'<details class="culprit">{more}</details>' if len(parts) > _WORST else ""
    return section("Culprits", intro + "".join(parts[:_WORST]) + rest)


def _diagnosis(culprit: Culprit, result: DiffResult) -> str:
    at = next(t for t in result.taps if (t.tap, t.step) == (culprit.tap, culprit.step))
    floor = number(figures.floor(at))
    if not culprit.diagnosis:
        why = {
            "nonfinite": "NaN and Inf are not diagnosed: look at the inputs' range and at this module's dtype.",
            "accumulated": "There is no single module to diagnose.",
        }.get(culprit.kind, "Unknown: no known fault explains it.")
        return f"<p>{why} Local error {number(culprit.local)}, floor {floor}.</p>"
    systematic = culprit.kind == "systematic"
    rows = [
        [
            escape(d.fault + (f" ({d.note})" if d.note else "")),
            number(d.local_before),
            number(d.local_after),
            (number(d.significance) if d.significance is not None else "") if systematic else number(d.ratio_after),
        ]
        for d in culprit.diagnosis
    ]
    last = "standard deviations of the noise" if systematic else "floors left"
    return (
        table(
            f"Diagnosis (floor {floor})",
            ["fault", "local error before", "with the fault", last],
            rows,
            numbers=(1, 2, 3),
        )
        + f"<p>Seen in {culprit.occurrences} of {result.steps + 1} forward passes.</p>"
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
            rows.append([str(view.row), str(view.position), text, number(view.local), number(view.ratio)])
        columns = ["row", unit, "token", "local error", "floors"]
        parts.append(table(f"Worst {unit}s", columns, rows, numbers=(0, 1, 3, 4)))
    if evidence.heads:
        parts.append(_heads(f"Heads of {culprit.tap}", [(culprit.tap, evidence)]))
    if evidence.channels:
        rows = [[str(index), f"{share:.1%}", bar(share, 1.0)] for index, share in evidence.channels]
        parts.append(table("Channels with most of the squared error", ["channel", "share", ""], rows, numbers=(0, 1)))
    return pair(parts) if parts else ""


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
        [*([mono(tap)] if several else []), escape(name), number(error), bar(error, most)]
        for error, tap, name in heads[:_WORST]
    ]
    columns = [*(["tap"] if several else []), "head", "relative error", ""]
    more = f" (worst {_WORST} of {len(heads)})" if len(heads) > _WORST else ""
    return table(caption + more, columns, rows, numbers=(len(columns) - 2,))


def terms_section(result: DiffResult) -> str:
    terms = {
        "Accumulated error": "The engine's tensor against the fp64 reference, both run from the same token ids. It "
        "grows along the model: everything behind a broken module has it.",
        "Local error": "The engine's tensor against the output of the fp64 reference module for the engine's own "
        "inputs. Only a module that is wrong by itself has it.",
        "Noise floor": "The same two errors of the reference in the engine's dtype: the cost of rounding alone, "
        f"measured on the same inputs; at least one rounding ({number(result.unit_roundoff)}).",
        f"Alarm, {result.multiple:g} floors": "A local error above this many floors, for any token, is a fault: no "
        "order of rounding explains it.",
    }
    return section(
        "How to read this",
        '<dl class="terms">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in terms.items()) + "</dl>",
    )


def heat_map_section(result: DiffResult, plots: dict[str, Figure]) -> str:
    plots["heat"] = figures.heat_map(result)
    text = (
        "Local error of every tap (across) in every forward pass (down), in noise floors. Blue is noise; from orange "
        f"on, it is above the alarm of {result.multiple:g}. A cross alone is NaN or Inf whose inputs already had it."
    )
    return section("Every module in every step", plot("heat", text))


def curves_section(result: DiffResult, plots: dict[str, Figure]) -> str:
    text = (
        "The local error is at its floor if a module computes the same as the reference. If the accumulated error is "
        "above its floor but the local error is not, the fault lies earlier. Errors of exactly 0 are not drawn."
    )
    plots["prefill"] = figures.curves(result, "prefill")
    parts = [f"<h3>Prefill</h3>{plot('prefill', text)}"]
    if result.steps:
        plots["decode"] = figures.curves(result, "decode")
        parts.append(
            "<h3>Decode</h3>" + plot("decode", f"Each tap at the worst of its {result.steps} teacher-forced steps.")
        )
    return section("Local against accumulated error", "".join(parts))


def logits_section(result: DiffResult, plots: dict[str, Figure]) -> str:
    if not result.logit_tokens:
        return ""
    plots["kl"], plots["margins"] = figures.kl_by_position(result), figures.margins(result)
    limit = 2 * result.logits.floor_max_abs
    text = (
        "A greedy token can only flip where the logit error is more than half of the reference's lead (above the "
        f"slanted line). Where the lead is within {number(limit)}, twice the floor's largest error, rounding may flip "
        "it."
    )
    return section(
        "Logits of the engine as it ships",
        '<div class="pair">'
        + plot("kl", "KL divergence of the next-token distribution, reference against engine, by position.")
        + plot("margins", text)
        + "</div>",
    )


def worst_section(result: DiffResult) -> str:
    each: dict[str, TapError] = {}
    for tap in sorted(result.taps, key=rank, reverse=True):
        each.setdefault(tap.tap, tap)
    taps = list(each.values())[:_WORST]
    parts = [
        table(
            "Taps by local error, each at its worst (at row, position)",
            ["tap", "forward", "local", "floor", "floors", "at"],
            [
                [
                    mono(t.tap),
                    step_name(t.step),
                    number(t.local),
                    number(figures.floor(t)),
                    _ratio(t),
                    f"{t.worst[0]}, {t.worst[1]}",
                ]
                for t in taps
            ],
            numbers=(2, 3, 4, 5),
            wrong=[_wrong(t, result) for t in taps],
        )
    ]
    if any(c.evidence.heads for c in result.culprits):
        parts.append(_heads("Heads of the culprits", [(c.tap, c.evidence) for c in result.culprits]))
    text = pair(parts)
    if result.logit_tokens:
        tokens = sorted(result.logit_tokens, key=lambda t: -t.kl if t.kl == t.kl else -math.inf)[:_WORST]
        rows = [
            [
                str(t.row),
                str(t.index),
                _text(result, t.token),
                number(t.kl),
                number(t.floor_kl),
                _text(result, t.expected),
                _text(result, t.chosen) if t.flip else "same",
                number(t.margin),
            ]
            for t in tokens
        ]
        columns = ["row", "position", "token", "KL", "floor", "reference says next", "engine", "lead"]
        flips = [t.beyond_rounding for t in tokens]
        text += table("Tokens by KL", columns, rows, numbers=(0, 1, 3, 4, 7), wrong=flips)
    return section("Worst taps, tokens and heads", text)


def drift_section(drift: DriftResult, result: DiffResult, plots: dict[str, Figure]) -> str:
    plots["drift_kl"], plots["drift_cache"] = figures.drift_kl(drift), figures.drift_cache(drift)
    charts = (
        '<div class="pair">'
        + plot(
            "drift_kl",
            "The engine is fed the reference's tokens. If the cache carried along is worse than a new one at each "
            "step, the fault is in the cache and not in the modules.",
        )
        + plot("drift_cache", "All live keys and values of the engine's cache against the reference's.")
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
        text = table(
            "Free-running: the first token of a row that differs",
            columns,
            [
                [
                    str(d.row),
                    str(d.step),
                    _text(result, d.reference_token),
                    _text(result, d.engine_token),
                    number(d.margin),
                    number(d.error),
                    number(d.floor_error),
                    "yes" if d.explained else "no",
                ]
                for d in drift.differences
            ],
            numbers=(0, 1, 4, 5, 6),
            wrong=[not d.explained for d in drift.differences],
        )
    return section("Drift while decoding", charts + text)


def other_section(result: DiffResult) -> str:
    if result.other is None or result.between is None:
        return ""
    between = result.between
    taps = sorted(between.taps, key=lambda t: -t.rel_l2 if t.rel_l2 == t.rel_l2 else -math.inf)[:_WORST]
    return section(
        "The other executor, judged in the same way",
        f"<p><strong>{escape(verdict_line(result.other))}</strong></p>"
        + _listed(result.other)
        + facts({"engine": result.other.engine, **{k: str(v) for k, v in result.other.context.items()}})
        + f"<p>Directly against each other: KL mean {number(between.kl_mean)}, largest {number(between.kl_max)} nats; "
        f"same greedy token {between.top1:.2%}; largest logit difference {number(between.max_abs)}.</p>"
        + table(
            "Taps in which the two executors differ most",
            ["tap", "relative L2", "largest difference", "cosine"],
            [[mono(t.tap), number(t.rel_l2), number(t.max_abs), f"{t.cosine:.6f}"] for t in taps],
            numbers=(1, 2, 3),
        ),
    )


def tree_section(result: DiffResult) -> str:
    """blocks.N -> taps; groups with a culprit are open."""
    taps: dict[str, list[TapError]] = {}
    for tap in result.taps:
        taps.setdefault(tap.tap, []).append(tap)
    groups: dict[str, list[str]] = {}
    for name in taps:
        layer, _ = split_name(name)
        groups.setdefault("" if layer is None else f"blocks.{layer}", []).append(name)
    named = {c.tap for c in result.culprits}
    parts: list[str] = []
    outside = groups.pop("", [])
    first = [n for n in outside if n not in ("final_norm", "logits")]
    for group, names in (("input", first), *groups.items(), ("output", [n for n in outside if n not in first])):
        if not names:
            continue
        worst = max((t for n in names for t in taps[n]), key=rank)
        wrong = sum(n in named for n in names)
        mark = f' <span class="mark">✗ {wrong} wrong</span>' if wrong else ""
        parts.append(
            f'<details{" open" if wrong else ""}><summary><span class="mono">{escape(group)}</span> '
            f'<span class="ratio">worst {_ratio(worst)} × at {escape(worst.tap)}</span>{mark}</summary>'
            f"{_tree_table(names, taps, named, result)}</details>"
        )
    note = "<p>Local error in noise floors (×): in the prefill, and in the worst decode step.</p>"
    return section("Modules", f'{note}<div class="tree">{"".join(parts)}</div>')


def _tree_table(
    names: Sequence[str], taps: Mapping[str, Sequence[TapError]], named: set[str], result: DiffResult
) -> str:
    rows = []
    for name in names:
        prefill = next((t for t in taps[name] if not t.step), taps[name][0])
        decode = max((t for t in taps[name] if t.step), key=rank, default=None)
        rows.append(
            [
                mono(name) + (" ✗" if name in named else ""),
                number(prefill.local),
                number(figures.floor(prefill)),
                _ratio(prefill),
                "" if decode is None else f"{_ratio(decode)} ({step_name(decode.step)})",
                number(prefill.accumulated),
                number(prefill.accumulated_floor),
            ]
        )
    wrong = [name in named or any(_wrong(t, result) for t in taps[name]) for name in names]
    columns = ["tap", "local", "floor", "×", "× decode", "accumulated", "its floor"]
    return table("", columns, rows, numbers=(1, 2, 3, 4, 5, 6), wrong=wrong)


def environment_section(result: DiffResult, command: str, machine: Mapping[str, str]) -> str:
    setting = {k: str(v) for k, v in result.context.items()}
    packages = [f"{k}=={machine[k]}" for k in ("logitlock", "torch", "onnxruntime") if k in machine]
    commands = [shlex.join(["pip", "install", *packages])] if packages else []
    text = "\n".join([*commands, *([command] if command else [])])
    return section(
        "To repeat this",
        (f"<pre>{escape(text)}</pre>" if text else "")
        + "<h3>What was compared</h3>"
        + facts({**setting, "unit roundoff": number(result.unit_roundoff), "alarm": f"{result.multiple:g} floors"})
        + ("<h3>Environment</h3>" + facts(machine) if machine else ""),
    )


def _ratio(tap: TapError, unit: str = "") -> str:
    return f"{tap.nonfinite} NaN or Inf" if tap.nonfinite else number(tap.ratio) + unit


def _wrong(tap: TapError, result: DiffResult) -> bool:
    return tap.nonfinite > 0 or tap.ratio > result.multiple


def _text(result: DiffResult, token: int) -> str:
    text = result.token_texts.get(token)
    return escape(token) if text is None else f"<code>{escape(repr(text))}</code>"


def _tokens_at(result: DiffResult) -> dict[tuple[int, int], LogitToken]:
    """Tokens by row and column of the whole text, padding counted."""
    width = max(result.prompt_lengths, default=0)
    return {(t.row, width + t.step - 1 if t.step else t.position): t for t in result.logit_tokens}
