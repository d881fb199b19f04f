"""Modules of the user that have the name of one of our packages: a `debug.py` or `export.py` comes first on `sys.path`.

Python then imports that file in the place of our package, and even runs it.  `check_ours` notices it before.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from refmodels.errors import LogitLockError

PACKAGES = ("refmodels", "trt_runtime", "export", "debug")
"""Each imports only those before it."""
_ROOT = Path(__file__).resolve().parents[1]


def check_ours(module: str) -> None:
    """Raise a `LogitLockError` if a module of ours (by dotted name) cannot be imported, or only without our packages.

    Nothing is imported.  A package that is not installed at all is left to Python's own message.
    """
    package = module.partition(".")[0]
    for name in PACKAGES[: PACKAGES.index(package) + 1] if package in PACKAGES else ():
        spec = find_spec(name)
        if spec is None:
            continue
        # A directory without `__init__.py` has no origin.
        found = Path(spec.origin or next(iter(spec.submodule_search_locations or []))).resolve()
        if found != _ROOT / name / "__init__.py":
            raise LogitLockError(
                f"{found} hides LogitLock's package {name} ({_ROOT / name}): rename it or run from another directory; "
                "the command `logitlock` works from any directory"
            )


def main() -> None:
    """The `logitlock` command, with our packages even where others of these names come first on `sys.path`.

    It is in this package because `debug` itself may be hidden.
    """
    sys.path.insert(0, str(_ROOT))
    for package in PACKAGES:
        import_module(package)
    sys.path.remove(str(_ROOT))
    command = import_module(f"{PACKAGES[-1]}.command")
    command.main()
