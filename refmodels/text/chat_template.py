"""A checkpoint's own chat template: Jinja of tokenizer_config.json or of .jinja files, set up as in transformers.

Upstream: transformers utils/chat_template_utils.py and `PreTrainedTokenizerBase.apply_chat_template` (read at 5.24.0).
A template is data of a checkpoint, so it runs in Jinja's immutable sandbox, and sees plain JSON values only.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from refmodels.errors import LogitLockError
from refmodels.files import read_text

TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates/*.jinja"
_REASONING = ("reasoning_content", "thinking", "reasoning")
_STEPS, _SECONDS, _LENGTH = 200_000, 10.0, 1 << 26
"""Limits of one rendering: rounds of loops and calls of macros, time, and characters or items of any one value."""
_LIMITS = threading.local()


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """`templates` by name, of which `default` and `tool_use` are chosen as upstream does; `where` is their file;
    `variables` are the special tokens, as text."""

    templates: Mapping[str, str]
    where: Path
    variables: Mapping[str, str]

    def render(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The text of a chat that the model is to answer.

        Args:
            messages: at least one, each with a role, and whatever else the template reads.
            tools: JSON schemas of functions that the model may call.
        Raises:
            LogitLockError: no message, one without a role, or a template that is damaged or refuses the messages.
        """
        if not messages:
            raise LogitLockError("a chat prompt needs at least one message, and there is none")
        for number, message in enumerate(messages, 1):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise LogitLockError(f"message {number} of {len(messages)} must be an object with a role")
        name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise LogitLockError(f"{self.where} has no default chat template, only {', '.join(sorted(self.templates))}")
        import jinja2

        chat = {"messages": [_with_reasoning(message) for message in messages], "tools": tools}
        try:
            template = _compiled(self.templates[name])
            _LIMITS.steps, _LIMITS.end = _STEPS, time.monotonic() + _SECONDS
            pieces = template.generate(**self.variables, **_plain(chat), documents=None, add_generation_prompt=True)
            return _joined(pieces)
        except jinja2.TemplateSyntaxError as error:
            raise LogitLockError(
                f"the chat template of {self.where} is damaged: line {error.lineno}: {error}"
            ) from None
        except MemoryError:
            raise LogitLockError(
                f"the chat template of {self.where} makes a text that is larger than the memory"
            ) from None
        except Exception as error:
            # Whatever a template does wrong: raise_exception, an undefined value, a type, an unsafe operation.
            raise LogitLockError(f"the chat template of {self.where} refuses these messages: {error}") from None


def read_template(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    """The template beside a tokenizer: .jinja files, else the text or the list of named texts in tokenizer_config.json.

    Args:
        settings: tokenizer_config.json over special_tokens_map.json.
    Raises:
        LogitLockError: chat_template is neither a text nor a list of objects with name and template.
    """
    files = {"default": folder / TEMPLATE_FILE} if (folder / TEMPLATE_FILE).is_file() else {}
    files |= {file.stem: file for file in sorted(folder.glob(MORE_TEMPLATES))}
    where, said = folder / "tokenizer_config.json", settings.get("chat_template")
    if files:
        where, templates = next(iter(files.values())), {name: read_text(file) for name, file in files.items()}
    elif said is None:
        return None
    else:
        entries = said if isinstance(said, list) else [{"name": "default", "template": said}]
        templates = {}
        for entry in entries:
            named = (entry.get("name"), entry.get("template")) if isinstance(entry, Mapping) else (None, None)
            if not isinstance(named[0], str) or not isinstance(named[1], str):
                raise LogitLockError(
                    f"{where}: chat_template must be a text, or a list of objects with name and template"
                )
            templates[named[0]] = named[1]
    return ChatTemplate(templates=templates, where=where, variables=_special_tokens(settings))


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        token = settings.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str):
            found[f"{kind}_token"] = text
    return found


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that are null, and with the thoughts of a message under each name that templates read."""
    given = {key: value for key, value in message.items() if value is not None}
    thought = next((given[key] for key in _REASONING if key in given), None)
    return given if thought is None else {"thinking": thought, **given, "reasoning_content": thought}


def _plain(value: Any) -> Any:
    """A copy of JSON values without any other object in it, whose methods a template could call."""
    return json.loads(json.dumps(value))


def _step() -> bool:
    """True, or an error once a rendering has taken too many steps or too long."""
    from jinja2.exceptions import SecurityError

    _LIMITS.steps -= 1
    if _LIMITS.steps < 0 or time.monotonic() > _LIMITS.end:
        raise SecurityError(f"its loops take more than {_STEPS} rounds or {_SECONDS:g} seconds")
    return True


def _check_length(length: int) -> None:
    from jinja2.exceptions import SecurityError

    if length > _LENGTH:
        raise SecurityError(f"it makes a value of more than {_LENGTH} characters or items")


def _joined(pieces: Iterable[Any]) -> str:
    length, texts = 0, []
    for piece in pieces:
        texts.append(str(piece))
        length += len(texts[-1])
        _check_length(length)
    return "".join(texts)


@lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks what the model has said; it is text like any other here."""

        tags = {"generation"}  # noqa: RUF012 (Jinja declares a set)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    class Names(Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace cannot hold {name!r}")
            super().__setitem__(name, value)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def call(name: str, *arguments: nodes.Expr) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name), [*arguments], [], None, None)

    class Bounded(NodeTransformer):
        """Every round of a loop and every call of a macro is a step, and every text that is joined has a length."""

        def visit_For(self, node: nodes.For) -> nodes.Node:
            self.generic_visit(node)
            # Rounds that the test leaves out count too.
            if node.test is None:
                node.body.insert(0, nodes.ExprStmt(call("step")))
            else:
                node.test = nodes.And(call("step"), node.test)
            return node

        def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
            self.generic_visit(node)
            node.body.insert(0, nodes.ExprStmt(call("step")))
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
            self.generic_visit(node)
            return call("joined", *node.nodes)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "+"))
        step = staticmethod(_step)
        joined = staticmethod(lambda *parts: _joined(parts))

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree: nodes.Template = Bounded().visit(super()._parse(source, name, filename))
            tree.set_environment(self)
            tree.set_lineno(1)
            return tree

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(value) if isinstance(value, str | list | tuple) else None for value in (left, right)]
            if operator == "+" and None not in sizes:
                _check_length(sum(size or 0 for size in sizes))
            elif operator == "*":
                for size, times in zip(sizes, (right, left), strict=True):
                    _check_length((size or 0) * (times if isinstance(times, int) else 0))
            elif operator == "**" and isinstance(left, int) and isinstance(right, int):
                _check_length(left.bit_length() * right)
            return super().call_binop(context, operator, left, right)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": Names,
        "dict": lambda *entries, **named: dict(*entries, **named),
    }
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes the characters of HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
