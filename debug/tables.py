"""What the debug verbs print for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from debug.verify import CaseResult


def print_cases(results: Sequence[CaseResult]) -> None:
    """The worst difference of every tensor of every case, and a line that sums up."""
    console = Console()
    for result in results:
        failed = set(result.failed())
        table = Table("tensor", "worst |difference|", "allowed", "", title=f"{result.case} ({result.dtype})")
        for column in table.columns[1:3]:
            column.justify = "right"
        for name, value in result.worst.items():
            mark = "[red]fail[/red]" if name in failed else "[green]ok[/green]"
            table.add_row(name, f"{value:.3g}", f"{result.tolerance[name]:.3g}", mark)
        table.add_row("greedy ids", "equal" if result.greedy_equal else "differ", "equal",
                      "[green]ok[/green]" if result.greedy_equal else "[red]fail[/red]")  # fmt: skip
        console.print(table)
        if result.not_compared:
            console.print(f"[yellow]not compared:[/yellow] {', '.join(result.not_compared)}")
    passed = sum(result.passed for result in results)
    console.print(f"{passed} of {len(results)} cases passed", style="green" if passed == len(results) else "red")
