"""Options as frozen dataclasses: a function takes one, or its fields by keyword, and so does its verb."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from refmodels.errors import LogitLockError

T = TypeVar("T")


def with_fields(kind: type[T], options: T | None, changes: Mapping[str, Any]) -> T:
    """`options` with some fields changed; without `options` they are all that is said.

    Raises:
        TypeError: a name that is no field, or without `options` a field without default that is not given.
    """
    known = _names(kind)
    for name in changes:
        if name not in known:
            raise TypeError(f"{kind.__name__} has no field {name!r}; it has {', '.join(known)}")
    return kind(**changes) if options is None else dataclasses.replace(options, **changes)  # type: ignore[type-var]


def fields_in(kind: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a verb (its `locals()`) that are fields of `kind`, lists as tuples; None leaves the field's
    default."""
    chosen = {name: given[name] for name in _names(kind) if given.get(name) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}


def check_choice(option: str, value: object, kind: Any) -> None:
    """Raises LogitLockError where a value is not one of the words of `kind`, a Literal."""
    known = get_args(kind)
    if value not in known:
        raise LogitLockError(f"--{option} is {value!r}; it must be one of {', '.join(known)}")


def check_device(name: str) -> str:
    """The name of a device on which PyTorch can compute here.

    Raises:
        LogitLockError: neither cpu nor cuda, or cuda where there is no GPU.
    """
    import torch

    if name not in ("cpu", "cuda"):
        raise LogitLockError(f"--device is {name!r}; it must be cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise LogitLockError("--device is cuda, but PyTorch finds no CUDA GPU here")
    return name


def _names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]
