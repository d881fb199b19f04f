"""The console that tables and sentences are printed on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_NARROWEST = 40
"""Columns below which a table would lose whole cells; a terminal wraps longer lines."""


def new_console() -> Console:
    """A console on standard output in which no text is markup, at least 40 columns wide."""
    from rich.console import Console

    made = Console(markup=False)
    if made.width < _NARROWEST:
        made.width = _NARROWEST
    return made
