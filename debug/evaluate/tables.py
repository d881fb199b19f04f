"""An evaluation as tables: for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from debug.evaluate.results import Agreement, EvaluationResult
from debug.evaluate.rouge import KINDS
from debug.evaluate.statistics import Estimate

_FILE_WIDTH = 200


@dataclass(frozen=True, kw_only=True)
class Table:
    """`words` is the number of leading columns that are words; the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int


def tables(result: EvaluationResult) -> list[Table]:
    """Executors, tasks, ROUGE, texts and speed, as far as they were measured."""
    found = [_summary(result), _tasks(result), _rouge(result), _texts(result), _speed(result)]
    return [_without_empty_columns(table) for table in found if table.rows]


def print_evaluation(result: EvaluationResult) -> None:
    """Print the tables to standard output."""
    console = Console()
    if not console.is_terminal:
        # A file or a pipe has no width; nothing is truncated there.
        console = Console(width=_FILE_WIDTH)
    for side in result.all_sides:
        console.print(f"{side.side}: {side.engine}", highlight=False, markup=False)
    for table in tables(result):
        console.print(f"\n{table.title}", style="bold", highlight=False, markup=False)
        shown = RichTable(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for number, column in enumerate(table.columns):
            words = number < table.words
            shown.add_column(column, justify="left" if words else "right", overflow="fold", no_wrap=not words)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown, highlight=False)
    for note in result.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}", highlight=False)


MARK = "# Evaluation of "


def markdown(result: EvaluationResult, *, command: str) -> str:
    """The same as a Markdown page; `command` is the command that made it."""
    parts = [f"{MARK}{result.model}", f"`{command}`"]
    parts.append("\n".join(f"- `{side.side}`: {side.engine}" for side in result.all_sides))
    for table in tables(result):
        parts += [f"## {table.title}", _markdown_table(table)]
    parts += [f"Note: {note}" for note in result.notes]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    marks = ["---" if number < table.words else "---:" for number in range(len(table.columns))]
    lines = [table.columns, marks, *table.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _without_empty_columns(table: Table) -> Table:
    """Leave out columns that were not measured for any executor."""
    kept = [i for i in range(len(table.columns)) if any(row[i] for row in table.rows)]
    return Table(
        title=table.title,
        columns=[table.columns[i] for i in kept],
        rows=[[row[i] for i in kept] for row in table.rows],
        words=sum(i < table.words for i in kept),
    )


def _names(result: EvaluationResult) -> dict[str, str]:
    """Executors by the last part of their paths, if that distinguishes them."""
    texts = [side.side for side in result.all_sides]
    short = [text.rstrip("/").rsplit("/", 1)[-1] for text in texts]
    return dict(zip(texts, short if len(set(short)) == len(set(texts)) else texts, strict=True))


def _summary(result: EvaluationResult) -> Table:
    rows = []
    for side in result.all_sides:
        rows.append(
            (
                _names(result)[side.side],
                "" if side.weight_bytes is None else f"{side.weight_bytes / 1e6:.2f}",
                "" if side.accuracy is None else f"{100 * side.accuracy:.2f}",
                *_points(side.loss),
                *_predictions(side.agreement),
            )
        )
    return Table(
        title="Executors" if result.against is None else f"Executors, against {result.against.side}",
        columns=("side", "weights MB", "accuracy %", "loss", "95 %", *_PREDICTIONS),
        rows=rows,
        words=1,
    )


def _tasks(result: EvaluationResult) -> Table:
    rows = []
    for task in result.sides[0].tasks:
        for side in result.all_sides:
            found = side.tasks[task]
            interval = found.accuracy
            mean, _, _, top = _predictions(found.agreement)
            rows.append(
                (
                    task,
                    _names(result)[side.side],
                    str(found.count),
                    f"{100 * interval.value:.1f}",
                    f"{100 * interval.low:.1f}–{100 * interval.high:.1f}",
                    *_points(found.loss),
                    mean,
                    top,
                )
            )
    return Table(
        title="Tasks: exact match; loss in points on the same examples; KL after the answers' tokens",
        columns=("task", "side", "n", "right %", "95 %", "loss", "95 %", "KL mean", "top-1 %"),
        rows=rows,
        words=2,
    )


def _rouge(result: EvaluationResult) -> Table:
    rows = []
    for task in result.sides[0].tasks:
        for side in result.all_sides:
            scores = side.tasks[task].rouge
            if scores is not None:
                rows.append((task, _names(result)[side.side], *(f"{100 * scores[kind]:.2f}" for kind in KINDS)))
    return Table(
        title="ROUGE, F-measure", columns=("task", "side", "ROUGE-1", "ROUGE-2", "ROUGE-L"), rows=rows, words=2
    )


def _texts(result: EvaluationResult) -> Table:
    rows = []
    for text in result.sides[0].texts:
        for side in result.all_sides:
            found = side.texts[text]
            rows.append(
                (
                    Path(text).name,
                    _names(result)[side.side],
                    str(found.tokens),
                    f"{found.perplexity:.6g}",
                    f"{found.bits_per_byte:.4f}",
                    *_predictions(found.agreement),
                )
            )
    settings = result.settings
    return Table(
        title=f"Texts, in windows of {settings['window']} tokens with a stride of {settings['stride']}",
        columns=("text", "side", "tokens", "perplexity", "bits/byte", *_PREDICTIONS),
        rows=rows,
        words=2,
    )


def _speed(result: EvaluationResult) -> Table:
    rows = []
    for number in range(len(result.sides[0].speeds)):
        for side in result.all_sides:
            found = side.speeds[number]
            rows.append(
                (
                    f"{found.shape.batch}x{found.shape.prompt}x{found.shape.new}",
                    _names(result)[side.side] + (" *" if found.rounding_emulated else ""),
                    f"{found.prefill_tokens_per_second:.1f}",
                    f"{found.decode_tokens_per_second:.1f}",
                    f"{1000 * found.shape.batch / found.decode_tokens_per_second:.2f}",
                    found.device,
                )
            )
    title = "Tokens per second, warm"
    if any(speed.rounding_emulated for side in result.all_sides for speed in side.speeds):
        title += "; *: without the rounding emulation of the other results"
    return Table(
        title=title,
        columns=("rows x prompt x new", "side", "prefill", "decode", "ms/step", "on"),
        rows=rows,
        words=2,
    )


def _points(loss: Estimate | None) -> tuple[str, str]:
    """The loss in hundredths, so that 0.995 against 0.99 is 0.5, and its interval."""
    if loss is None:
        return ("", "")
    return (f"{100 * loss.value:+.2f}", f"{100 * loss.low:+.2f} to {100 * loss.high:+.2f}")


_PREDICTIONS = ("KL mean", "KL p99", "KL max", "top-1 %")


def _predictions(found: Agreement | None) -> tuple[str, str, str, str]:
    if found is None:
        return ("", "", "", "")
    return (_short(found.kl_mean), _short(found.kl_p99), _short(found.kl_max), f"{100 * found.top1:.2f}")


def _short(value: float) -> str:
    """Three digits: 4.62e-4."""
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"
