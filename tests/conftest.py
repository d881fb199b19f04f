"""Settings of every test: one thread (2-core machines share it with other test processes), examples as in CI."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start

import pytest
import torch
from hypothesis import settings

from debug.golden.verify import add_up_as_recorded

pytest.register_assert_rewrite("tests.support")
add_up_as_recorded()

# A loaded machine must not fail a test by being slow, and CI must try the same examples every time.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_finish() -> None:
    """Imported modules and thousands of tests stay to the end: looking through them for garbage took a tenth of the
    time of tests that build many graphs."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture(autouse=True)
def _no_grad_one_thread() -> object:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
