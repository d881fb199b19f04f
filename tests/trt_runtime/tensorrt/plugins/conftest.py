"""No test of the plugins may leave an error of a plugin behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_failure_left() -> Iterator[None]:
    from trt_runtime.tensorrt import plugins
    from trt_runtime.tensorrt.plugins import base

    plugins.raise_failure()
    yield
    base._failures.clear()
