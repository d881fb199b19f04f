"""Tables and sentences that the debug verbs print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from debug.bisect import BisectResult
from debug.comparison.baseline import Changes
from debug.comparison.results import Between, Culprit, DiffResult, TapError, verdict_line
from debug.drift import DriftResult
from debug.golden.verify import CaseResult
from refmodels.terminal import new_console

_WORST_ROWS = 12


def print_cases(results: Sequence[CaseResult]) -> None:
    """The worst difference of every tensor of every case, and a summary."""
    console = new_console()
    for result in results:
        failed = set(result.failed())
        console.print(f"{result.case} ({result.dtype})", style="bold")
        table = _table("tensor", "worst |difference|", "allowed", "")
        for name, value in result.worst.items():
            table.add_row(name, f"{value:.3g}", f"{result.tolerance[name]:.3g}", _mark(name not in failed))
        table.add_row("greedy ids", "equal" if result.greedy_equal else "differ", "equal", _mark(result.greedy_equal))
        console.print(table)
        if result.not_compared:
            console.print(Text("not compared:", style="yellow"), ", ".join(result.not_compared))
    passed = sum(result.passed for result in results)
    console.print(f"{passed} of {len(results)} cases passed", style="green" if passed == len(results) else "red")


def print_facts(facts: Mapping[str, str]) -> None:
    """Names and values, one per line."""
    console = new_console()
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table, highlight=False)


def print_diff(result: DiffResult, *, every_tap: bool = False) -> None:
    """The observer effect if there is one, taps in the order of execution, logits, and the verdict."""
    console = new_console()
    lengths = ", ".join(map(str, result.prompt_lengths))
    console.print(f"engine     {result.engine}", highlight=False)
    console.print(f"reference  {result.reference}", highlight=False)
    console.print(f"floor      {result.floor}", highlight=False)
    console.print(f"inputs     {result.prompts}: {lengths} tokens, then {result.steps} teacher-forced decode steps")
    effect = result.observer_effect
    if effect.changed:
        console.print(
            Text("observer effect:", style="yellow"),
            f"taps change the logits by up to {effect.max_abs:.3g} ({effect.top1_changed} greedy tokens differ); tap "
            "errors are of the tapped engine, logits of the untapped",
        )
    shown = _worst_forwards(result.taps)
    title = f"every tap at its worst of {result.steps + 1} forwards"
    if not every_tap and len(shown) > _WORST_ROWS:
        keep = {id(e) for e in sorted(shown, key=lambda e: -_rank(e))[:_WORST_ROWS]}
        named = {c.tap for c in result.culprits}
        title = f"the worst {_WORST_ROWS} of {len(shown)} taps, in order of execution (--every-tap shows all)"
        shown = [e for e in shown if id(e) in keep or e.tap in named]
    console.print(title)
    table = _table("tap", "at", "max|Δ|", "rel.L2", "floor", "cosine", "local", "floor", "×")
    for e in shown:
        wrong = e.ratio > result.multiple or e.nonfinite > 0
        table.add_row(
            e.tap,
            "pre" if e.phase == "prefill" else f"+{e.step}",
            _short(e.max_abs),
            _short(e.accumulated),
            _short(e.accumulated_floor),
            f"{e.cosine:.4f}",
            _short(e.local),
            _short(e.floor),
            f"{e.nonfinite} NaN/Inf" if e.nonfinite else _times(e.ratio) + (" ✗" if wrong else "  "),
            style="red" if wrong else None,
        )
    console.print(table)
    logits = result.logits
    console.print(
        f"logits     KL mean {logits.kl_mean:.3g} max {logits.kl_max:.3g} nats "
        f"(floor {logits.floor_kl_mean:.3g}, {logits.floor_kl_max:.3g}); top-1 {logits.top1:.2%} of {logits.tokens} "
        f"tokens (floor {logits.floor_top1:.2%}); {logits.flips} flips, {logits.margin_flips} beyond rounding"
    )
    if result.other is not None and result.between is not None:
        _print_other(console, result, result.other, result.between)
    console.print(verdict_line(result), style="green" if result.verdict == "aligned" else "bold red", highlight=False)
    said = set()
    for repeat in result.repeats:
        console.print(f"  {repeat.text}", style="bold", highlight=False)
        said.update(repeat.taps[1:])
    for culprit in result.culprits:
        if culprit.tap not in said:
            _print_culprit(console, culprit)


def print_changes(changes: Changes) -> None:
    """The changes between an earlier diff of the same model and this one."""
    console = new_console()
    old, new = changes.verdict
    console.print(
        f"baseline   {old} -> {new}; mean KL {changes.kl_mean[0]:.3g} -> {changes.kl_mean[1]:.3g} nats", highlight=False
    )
    for kind, style in (("fixed", "green"), ("broken", "bold red"), ("better", "green"), ("worse", "red")):
        for change in changes.of(kind):
            text = f"  {kind:7}  {change.tap}: {_times(change.before)} -> {_times(change.now)} noise floors"
            console.print(text, style=style, highlight=False)
    if not changes.taps:
        console.print("  no tap changed by more than rounding", highlight=False)


def _print_culprit(console: Console, culprit: Culprit) -> None:
    """The diagnosis of a culprit, with the numbers before and after, and the place of its error."""
    if culprit.kind in ("accumulated", "nonfinite"):
        return
    console.print(f"  {culprit.tap}", style="bold", highlight=False)
    for found in culprit.diagnosis:
        if culprit.kind == "configuration":
            console.print(f"    {found.fault}", highlight=False)
            continue
        console.print(
            f"    {found.fault}: local error {found.local_before:.3g} -> {found.local_after:.3g}", highlight=False
        )
        if found.note:
            console.print(f"      {found.note}", highlight=False)
    if not culprit.diagnosis:
        console.print("    unknown: no known fault explains it", highlight=False)
    evidence = culprit.evidence
    if evidence.channels:
        named = ", ".join(f"{index} ({share:.0%})" for index, share in evidence.channels[:3])
        console.print(f"    most of the error is in channels {named}", highlight=False)
    if len(evidence.heads) > 1 and max(evidence.heads) > 10 * sorted(evidence.heads)[len(evidence.heads) // 2]:
        console.print(f"    most of the error is in head {evidence.heads.index(max(evidence.heads))}", highlight=False)


def _print_other(console: Console, result: DiffResult, other: DiffResult, between: Between) -> None:
    name = other.context.get("executor") or other.context.get("bundle") or other.context.get("trace")
    console.print(
        f"b against a  KL mean {between.kl_mean:.3g} max {between.kl_max:.3g} nats; top-1 {between.top1:.2%}; "
        f"largest logit difference {between.max_abs:.3g}"
    )
    console.print(f"a ({name}): {verdict_line(other)}", highlight=False)
    console.print(f"b ({result.engine}):", highlight=False)


def print_drift(result: DriftResult) -> None:
    """One row per teacher-forced step, then the first difference of each free-running row."""
    console = new_console()
    console.print(f"engine     {result.engine}", highlight=False)
    console.print(f"reference  {result.reference}", highlight=False)
    table = _table("step", "KL", "floor", "reset cache", "top-1", "cache error", "floor")
    for step in result.steps:
        table.add_row(
            str(step.step),
            _short(step.kl),
            _short(step.floor_kl),
            "" if step.reset_kl is None else _short(step.reset_kl),
            f"{step.top1:.0%}",
            _short(step.cache_error),
            _short(step.floor_cache_error),
        )
    console.print(table)
    if result.nonfinite is not None:
        console.print(f"NaN or infinity in the engine from step {result.nonfinite} on", style="bold red")
    if not result.differences:
        console.print(f"free-running: the same {len(result.steps)} tokens in all {result.rows} rows", style="green")
    for d in result.differences:
        why = "rounding can explain it" if d.explained else "rounding does not explain it"
        console.print(
            f"free-running, row {d.row}: token {d.step} is {d.engine_token} instead of {d.reference_token}; the "
            f"reference leads by {d.margin:.3g}, the engine's logits are off by up to {d.error:.3g} "
            f"(floor {d.floor_error:.3g}): {why}",
            style="yellow" if d.explained else "bold red",
            highlight=False,
        )


def print_bisect(result: BisectResult, path: Path) -> None:
    """The most expensive layers, the plan, and the KL with no layer, every layer and the plan's layers in fp32."""
    console = new_console()
    kept = set(result.plan.float32)
    table = _table("layer", "KL alone", "share", "kept")
    total = sum(result.contributions.values())
    for tap, kl in list(result.contributions.items())[:_WORST_ROWS]:
        table.add_row(tap, _short(kl), f"{kl / total:.0%}" if total else "", "fp32" if tap in kept else "")
    console.print(f"cost of each linear layer in {result.plan.precision} (the worst {_WORST_ROWS})")
    console.print(table)
    console.print(
        f"mean KL: {result.kl_low:.3g} nats with no layer in fp32, {result.kl_high:.3g} with every linear layer in fp32"
    )
    good = result.kl_engine <= result.budget
    console.print(
        f"{path}: {len(kept)} of {len(result.contributions)} linear layers in fp32: mean KL {result.kl:.3g} simulated, "
        f"{result.kl_engine:.3g} exported and run; the budget is {result.budget:g}",
        style="green" if good else "bold red",
        highlight=False,
    )


def _worst_forwards(taps: Sequence[TapError]) -> list[TapError]:
    worst: dict[str, TapError] = {}
    for error in taps:
        if error.tap not in worst or _rank(error) > _rank(worst[error.tap]):
            worst[error.tap] = error
    return list(worst.values())


def _rank(error: TapError) -> float:
    return float("inf") if error.nonfinite or error.ratio != error.ratio else error.ratio


def _table(*columns: str) -> Table:
    table = Table(columns[0], box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _short(value: float) -> str:
    """Two digits in at most six characters: 4.6e-4."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 1000 else _short(ratio)


def _mark(good: bool) -> Text:
    return Text("ok", style="green") if good else Text("wrong", style="red")
