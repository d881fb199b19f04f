"""Which parameters of a test the quick tests take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def quick_first(values: Iterable[Any], quick: int = 1) -> list[Any]:
    """The first `quick` values as they are, the further ones marked slow; a tuple is one value for each argument."""
    return [
        value if i < quick else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for i, value in enumerate(values)
    ]
