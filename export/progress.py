"""The progress bar of the verbs that take a while."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from refmodels.notices import LOGGER

Progress = Callable[[str, int, int], None]
"""Called with the name of the task, how much of it is done, and its total."""


def silent(step: str, done: int, total: int) -> None:
    """No progress is shown."""


@contextmanager
def progress_bar(title: str, *, quiet: bool) -> Iterator[Progress]:
    """A bar on stderr while the block runs; none where `quiet`, where stderr is no terminal, or with --quiet.

    With --verbose, each step is a line with the time since the start instead.
    """
    if LOGGER.isEnabledFor(logging.INFO):
        yield _lines(title)
        return
    quiet = quiet or not LOGGER.isEnabledFor(logging.WARNING)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bars:
        task = bars.add_task(title, total=None)
        yield lambda step, done, total: bars.update(task, description=step, completed=done, total=total or None)


def _lines(title: str) -> Progress:
    start, last = time.perf_counter(), ""

    def report(step: str, done: int, total: int) -> None:
        nonlocal last
        if step != last:
            LOGGER.info("%s %.1f s: %s", title, time.perf_counter() - start, step)
            last = step

    return report
