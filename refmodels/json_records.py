"""Reading JSON: objects from files, and frozen dataclasses, without unknown, missing or wrong keys."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from refmodels.errors import LogitLockError
from refmodels.files import parse_json, read_text

R = TypeVar("R")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        LogitLockError: as `read_text` and `parse_json`, or not an object.
    """
    content = parse_json(read_text(file), file)
    if not isinstance(content, dict):
        raise LogitLockError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content


def read_record(kind: type[R], data: object, where: str, *, null_is_nan: bool = False) -> R:
    """Make a dataclass from parsed JSON.

    Args:
        kind: a dataclass whose fields are JSON values, lists, dicts, Literals, optional values or such dataclasses.
        data: what `dataclasses.asdict` gave, through JSON.
        where: how errors name the object.
        null_is_nan: null in the place of a float is NaN, which JSON does not have.
    Raises:
        LogitLockError: an unknown or missing key (one with a default may be missing) or a value of another type.
    """
    if not isinstance(data, dict):
        raise LogitLockError(f"{where} must be an object, got {type(data).__name__}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, kind))}
    for key in data:
        if key not in fields:
            raise LogitLockError(f"{where} has an unknown key {key!r}; known keys: {', '.join(fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], f"{where}.{name}", null_is_nan)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise LogitLockError(f"{where} lacks the key {name!r}")
    return kind(**values)


def _value(hint: Any, value: Any, where: str, nan: bool) -> Any:
    if hint is Any:
        return value
    if hint is float and value is None and nan:
        return math.nan
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in options:
            raise LogitLockError(f"{where} is {value!r}; it must be one of {', '.join(map(repr, options))}")
        return value
    if origin is list and isinstance(value, list):
        return [_value(options[0], item, f"{where}[{i}]", nan) for i, item in enumerate(value)]
    if origin is tuple and isinstance(value, list | tuple):
        kinds = options[:1] * len(value) if Ellipsis in options else options
        if len(value) != len(kinds):
            raise LogitLockError(f"{where} has {len(value)} values; it must have {len(kinds)}")
        return tuple(
            _value(k, item, f"{where}[{i}]", nan) for i, (k, item) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict and isinstance(value, Mapping):
        return {key: _value(options[1], item, f"{where}.{key}", nan) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return read_record(typing.cast(type[Any], hint), value, where, null_is_nan=nan)
    allowed = options if origin in (typing.Union, types.UnionType) else (origin or hint,)
    if value is None and type(None) in allowed:
        return None
    inner = next((o for o in allowed if dataclasses.is_dataclass(o) or typing.get_origin(o) is Literal), None)
    if inner is not None and inner is not hint:
        return _value(inner, value, where, nan)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join(o.__name__ for o in allowed)
        raise LogitLockError(f"{where} is {value!r}; it must be of type {names}")
    return value
