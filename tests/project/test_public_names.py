"""Each package has a handful of public names, which are imported when they are asked for."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from refmodels.lazy import declared, public_names
from tests.support.paths import ROOT

PACKAGES = ("refmodels", "trt_runtime", "export", "debug")


def named(package: str) -> dict[str, str]:
    return declared(ROOT / package / "__init__.py")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there(package: str) -> None:
    module = import_module(package)
    names = named(package)
    assert module.__all__ == sorted(names) and set(names) <= set(dir(module))
    for name, home in names.items():
        assert home.startswith(f"{package}."), f"{name} is another package's"
        assert getattr(module, name) is getattr(import_module(home), name)


def test_no_name_is_public_twice() -> None:
    names = [name for package in PACKAGES for name in named(package)]
    assert sorted(names) == sorted(set(names))


def submodules(package: str) -> set[str]:
    return {path.stem for path in (ROOT / package).iterdir() if path.suffix in ("", ".py")}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_public_name_is_that_of_a_module(package: str) -> None:
    """Importing the module would put it in the place of the name."""
    assert not set(named(package)) & submodules(package)


def test_importing_the_packages_imports_nothing_else() -> None:
    code = (
        f"import sys; before = set(sys.modules); import {', '.join(PACKAGES)}\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sorted(PACKAGES))


def module_of(source: str, tmp_path: Path) -> ModuleType:
    file = tmp_path / "sample.py"
    file.write_text(source)
    module = ModuleType("sample")
    module.__file__ = str(file)
    namespace: dict[str, Any] = vars(module)
    namespace["__all__"], namespace["__getattr__"], namespace["__dir__"] = public_names(namespace)
    return module


def test_a_name_is_imported_when_it_is_asked_for(tmp_path: Path) -> None:
    sample = module_of(
        "from typing import TYPE_CHECKING\nimport json\nif TYPE_CHECKING:\n"
        "    from json.decoder import JSONDecoder as JSONDecoder\n    from no.such_module import absent as absent\n"
        "if 1:\n    from os import path\n",
        tmp_path,
    )
    assert sample.__all__ == ["JSONDecoder", "absent"] and set(sample.__all__) <= set(dir(sample))
    assert "JSONDecoder" not in vars(sample)
    assert sample.JSONDecoder is import_module("json.decoder").JSONDecoder and "JSONDecoder" in vars(sample)
    with pytest.raises(ModuleNotFoundError, match="no"):
        sample.absent  # noqa: B018
    with pytest.raises(AttributeError, match=r"module 'sample' has no attribute 'path'"):
        sample.path  # noqa: B018
