"""Public names of a package, imported on first use (PEP 562).

A package lists each of its names once, where type checkers and editors look for it:

    if TYPE_CHECKING:
        from refmodels.checkpoints.load import load as load
    else:
        __all__, __getattr__, __dir__ = public_names(globals())
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from refmodels.shadowing import check_ours


def public_names(module: dict[str, Any]) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """The `__all__`, `__getattr__` and `__dir__` of a module, read from the TYPE_CHECKING block of its source.

    Args:
        module: its `globals()`; a name is stored there on first use.
    """
    homes = declared(Path(module["__file__"]))

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module['__name__']!r} has no attribute {name!r}")
        check_ours(homes[name])
        module[name] = value = getattr(import_module(homes[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*homes, *(name for name in module if name.startswith("__"))})

    return sorted(homes), __getattr__, __dir__


def declared(source: Path) -> dict[str, str]:
    """The module that each name is imported from in the TYPE_CHECKING block of a source file.

    A star stands for the names that the `__init__` of a package beside the file declares.
    """
    blocks = [node for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.If)]
    imports = [node for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING" for node in block.body]
    homes: dict[str, str] = {}
    for node in imports:
        if isinstance(node, ast.ImportFrom):
            package = source.parent / f"{node.module}" / "__init__.py"
            for name in (alias.name for alias in node.names):
                homes |= declared(package) if name == "*" else {name: f"{node.module}"}
    return homes
