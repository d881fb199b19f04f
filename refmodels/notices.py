"""Notices to the user that are no errors: each sentence once per process, through the logger `logitlock`.

Without any set-up of logging Python writes it to stderr; the command line puts "warning: " before it.
"""

from __future__ import annotations

import logging
from functools import cache

from refmodels.errors import LogitLockError

LOGGER = logging.getLogger("logitlock")


@cache
def say_once(text: str) -> None:
    """Say one sentence, unless it has been said."""
    # The error's text is the same one with what cannot be printed escaped.
    LOGGER.warning("%s", LogitLockError(text))
