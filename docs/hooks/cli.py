"""The CLI reference, from the signatures and docstrings of the functions behind the verbs."""

from __future__ import annotations

import enum
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer.models
from markdown_of import cell, fenced, table

from debug.__main__ import help_of
from debug.command import VERBS

_EXAMPLE = re.compile(r"^Example: (.*)", re.S)


@dataclass(frozen=True)
class Parameter:
    """An option or argument: how it is written, the kind of its value, its help, its default."""

    names: list[str]
    kind: str
    help: str
    default: str
    argument: bool


def cli_page() -> str:
    """One section a verb."""
    head = """# Command line

Every verb of the `logitlock` command, as its own `--help` says it. Exit codes: 0 fine, 1 ran and found a difference,
2 bad input (one line on stderr that says what). `--json` prints one JSON document; see [schemas](schemas.md).

"""
    rows = [(f"[`{verb}`](#{verb})", where.summary) for verb, where in VERBS.items()]
    sections = [_section(verb) for verb in VERBS]
    return head + table(("verb", "what it does"), rows) + "\n\n" + "\n\n".join(sections) + "\n"


def parameters(function: Callable[..., None]) -> list[Parameter]:
    """The parameters from which typer makes options and arguments, in the order of the signature."""
    hints = typing.get_type_hints(function, include_extras=True)
    return [_parameter(p, hints[name]) for name, p in inspect.signature(function).parameters.items()]


def _parameter(parameter: inspect.Parameter, hint: Any) -> Parameter:
    assert typing.get_origin(hint) is Annotated, f"{parameter} is not annotated for typer"
    value, *_ = typing.get_args(hint)
    info = next(m for m in hint.__metadata__ if isinstance(m, typer.models.ParameterInfo))
    argument = isinstance(info, typer.models.ArgumentInfo)
    kind, repeatable = _kind(value)
    flag = kind == "bool"
    name = parameter.name.replace("_", "-")
    # Within Annotated, typer.Option takes the first name in the place of the default.
    declared = [info.default, *(getattr(info, "param_decls", None) or ())]
    names = [n for decl in declared if isinstance(decl, str) and decl.startswith("-") for n in decl.split("/")]
    if not names:
        names = [parameter.name.upper()] if argument else [f"--{name}", f"--no-{name}"] if flag else [f"--{name}"]
    if argument:
        names = [info.metavar or names[0]]
    shown = "" if flag else (info.metavar or kind) if not argument else ""
    return Parameter(
        names=names,
        kind=shown + (", repeatable" if repeatable and not argument else ""),
        help=info.help or "",
        default=_default(parameter.default, info.show_default, flag=flag),
        argument=argument,
    )


def _kind(value: Any) -> tuple[str, bool]:
    """The form of a value, and whether there may be several."""
    if isinstance(value, types.UnionType) or typing.get_origin(value) is typing.Union:
        (value,) = (a for a in typing.get_args(value) if a is not type(None))
    if typing.get_origin(value) is list:
        return _kind(typing.get_args(value)[0])[0], True
    if typing.get_origin(value) is Literal:
        return " | ".join(map(str, typing.get_args(value))), False
    if isinstance(value, type) and issubclass(value, enum.Enum):
        return " | ".join(str(member.value) for member in value), False
    return {Path: "path", str: "text", int: "number", float: "number", bool: "bool"}[value], False


def _default(value: Any, shown: Any, *, flag: bool) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if isinstance(shown, str):
        return shown
    if value is None or value is False or value == ():
        return ""
    return "on" if flag else f"{getattr(value, 'value', value)}"


def _section(verb: str) -> str:
    function = VERBS[verb].load()
    found = parameters(function)
    parts = [f"## {verb}", *_prose(help_of(function))]
    if arguments := [p for p in found if p.argument]:
        parts.append(table(("argument", "meaning"), [(f"`{p.names[0]}`", cell(p.help)) for p in arguments]))
    rows = [
        (" / ".join(f"`{n}`" for n in p.names), cell(p.kind), cell(p.help), cell(p.default))
        for p in found
        if not p.argument
    ]
    parts.append(table(("option", "value", "meaning", "default"), rows))
    return "\n\n".join(parts)


def _prose(text: str) -> Iterator[str]:
    """Paragraphs; examples as commands, `form : meaning` as a list."""
    for paragraph in re.split(r"\n\s*\n", text.replace("\b", "")):
        joined = " ".join(paragraph.split())
        if found := _EXAMPLE.match(joined):
            yield fenced(found[1], "bash")
        elif re.match(r"^\S+ : ", joined):
            form, _, meaning = joined.partition(" : ")
            yield f"- `{form}`: {cell(meaning)}"
        elif joined:
            yield cell(joined)
