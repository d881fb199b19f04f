"""The facts of a tap are in one table, `ModelSpec.taps`: no other code derives them from its name or keeps a table."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.support.paths import ROOT

PACKAGES = ("refmodels", "export", "trt_runtime", "debug")
TABLE = "refmodels/taps.py"
"""The table, and the one function that splits a name."""

_PARTS = (
    "attn_norm", "attn.qkv", "key", "value", "attn.context", "attn.out", "resid_mid", "mlp_norm", "mlp.gate", "mlp.up",
    "mlp.act", "mlp.out",
)  # fmt: skip
_WORDS = {*".".join(_PARTS).split("."), "blocks", "embed", "final_norm", "logits"}
_FRAGMENT = re.compile(rf"\.?(?:{'|'.join(sorted(_WORDS))})(?:\.(?:{'|'.join(sorted(_WORDS))}))*\.?")
_CUTS = ("split", "rsplit", "partition", "rpartition")
_TESTS = ("removeprefix", "removesuffix", "replace", "startswith", "endswith", "find", "rfind", "index")
_MOST_KEYS = 3
"""A dictionary with more parts of a block among its keys is a second table."""

PARAMETERS = "splits a parameter or module of `Decoder` into its owner and its own name"
ALLOWED = {
    ("refmodels/checkpoints/load.py", "name.rpartition('.')"): PARAMETERS,
    ("refmodels/checkpoints/quantized_reader.py", "name.rpartition('.')"): PARAMETERS,
    ("refmodels/checkpoints/quantized_reader.py", "parameter.rpartition('.')"): PARAMETERS,
    (
        "refmodels/checkpoints/quantized_reader.py",
        "self._upstream(f'blocks.{layer}.attn.qkv')[0].rpartition('.')",
    ): "a name of the checkpoint's, not ours",
    ("export/graph/external_data.py", "name.rpartition('.')"): PARAMETERS,
    ("export/precision_plan.py", "name.rpartition('.')"): PARAMETERS,
    ("export/quantization/calibrate.py", "name.startswith('final_norm.')"): "parameters of a module",
    ("export/tensorrt/torch_export.py", "name.rpartition('.')"): PARAMETERS,
    ("refmodels/shadowing.py", "module.partition('.')"): "a module of Python",
    ("refmodels/toys/initialization.py", "'.out.' in name"): "parameters, by how they are drawn",
    ("trt_runtime/torch_gpu/fused.py", "name.rpartition('.')"): PARAMETERS,
    ("debug/bisect.py", "path.rpartition('.')"): PARAMETERS,
    ("debug/capture/streaming.py", "name.startswith('final_norm.')"): "parameters of a module",
    ("debug/capture/streaming.py", "'final_norm.' in prefixes"): "one of several prefixes of parameters",
    (
        "debug/executors/roles.py",
        "role.startswith('blocks.')",
    ): "what a person wrote in a name map, before it is known to be a tap",
    ("debug/golden/case.py", "name.split('.')"): "sorts names by the numbers in them",
}
"""By file and call: why it is none."""


def parsers(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of whatever takes the name of a tap apart, or maps parts of a block to facts."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, method, texts = ast.unparse(node.func.value), node.func.attr, list(_texts(*node.args))
            if (
                (owner == "re" and any("blocks" in text for text in texts))
                or (method in (*_CUTS, *_TESTS) and any(_FRAGMENT.fullmatch(text) for text in texts))
                or (method in _CUTS and "." in texts and not owner.endswith(("__version__", "__module__")))
            ):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            # `".attn." in name`, but not `"key" in mapping`.
            if any(_FRAGMENT.fullmatch(text) and text != text.strip(".") for text in _texts(node.left)):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Dict):
            keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
            short = {part.rpartition(".")[2] for part in _PARTS}
            if max(len(keys.intersection(_PARTS)), len(keys & short)) > _MOST_KEYS:
                yield node.lineno, ast.unparse(node)


def _texts(*nodes: ast.expr) -> Iterator[str]:
    """The strings in an expression, those in f-strings and tuples too."""
    for node in nodes:
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.value


def found() -> dict[tuple[str, str], int]:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    named = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}
    return {(name, text): line for name, code in named.items() if name != TABLE for line, text in parsers(code)}


@pytest.mark.slow
def test_no_code_takes_the_names_of_taps_apart() -> None:
    others = [f"{file}:{line}: {text}" for (file, text), line in found().items() if (file, text) not in ALLOWED]
    assert not others, "look the fact up in ModelSpec.taps (or use refmodels.taps.split_name): " + "; ".join(others)


@pytest.mark.slow
def test_no_exception_is_left_over() -> None:
    assert ALLOWED.keys() <= found().keys()


@pytest.mark.parametrize(
    "code",
    [
        'block, _, part = tap.partition(".attn.")',
        'name.endswith((".key", ".value"))',
        'widths.get(name.rpartition(".")[2], hidden)',
        'name.split(".", 2)[2] if name.count(".") >= 2 else name',
        '_, layer, part = tap.split(".")',
        'tap.removesuffix(".attn.context")',
        'module.endswith("attn.out")',
        'tap.startswith("blocks.")',
        'name.startswith(f"blocks.{i}.")',
        'tap.replace("mlp.up", "mlp.gate")',
        'tap.replace("act", part)',
        '".attn." in tap',
        r're.fullmatch(r"past\.blocks\.(\d+)\.(key|value)", name)',
        '{"attn.qkv": a, "attn.context": b, "attn.out": c, "mlp.up": d}.get(part, 0)',
        '{"qkv": a, "context": b, "gate": c, "up": d}',
    ],
)
def test_every_parser_that_there_was_is_recognized(code: str) -> None:
    assert list(parsers(code))


@pytest.mark.parametrize(
    "code",
    [
        'f"blocks.{i}.attn.qkv"',
        'spec.taps[tap].part == "attn.qkv"',
        '"key" in cache',
        'major = torch.__version__.split(".")',
        'name.endswith(".safetensors")',
        '{"mlp.gate": "up", "mlp.up": "gate"}.get(part)',
        '{"query": q, "key": k, "value": v}',
        "split_name(name)",
    ],
)
def test_looking_up_and_naming_are_allowed(code: str) -> None:
    assert not list(parsers(code))
