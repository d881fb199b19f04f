"""Shared fixtures: golden cases, one thread (2-core machines share it with other test processes)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import refmodels
from trt_runtime.older_onnxruntime import has_tensor_scatter

GOLDENS = Path(__file__).parent / "goldens"
CASES = sorted(p.name for p in GOLDENS.iterdir() if (p / "config.json").is_file()) if GOLDENS.is_dir() else []


def case_source(case: str) -> refmodels.ModelSource:
    """A golden case as a model; meta.json says what no config key does."""
    meta = json.loads((GOLDENS / case / "meta.json").read_text())
    return refmodels.resolve(GOLDENS / case, variant=meta.get("variant"))


# A loaded machine must not fail a test by being slow, and CI must try the same examples every time.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

needs_opset_24 = pytest.mark.skipif(
    not has_tensor_scatter(), reason="this ONNX Runtime does not run opset 24; the engine rewrites bundles for it"
)


@pytest.fixture(autouse=True)
def _no_grad_one_thread() -> object:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
