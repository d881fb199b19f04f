"""Files of the repository that belong to no package, as modules: scripts, examples, hooks of the documentation."""

from __future__ import annotations

import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from tests.support.paths import ROOT


@lru_cache
def load_script(path: str) -> ModuleType:
    """A file at a path from the root; while it is loaded, and no longer, it can import the files beside it."""
    file = ROOT / path
    name = "_".join(Path(path).with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module
