"""Writing the bodies of ONNX functions as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import onnx
import onnx.parser

from refmodels.dtypes import DTYPE_TABLE
from refmodels.quantization.formats import Code

DOMAIN = "refmodels"
OPSET = 24
WIDE = onnx.TensorProto.FLOAT
CODE_ELEMENTS: Mapping[Code, int] = {code: DTYPE_TABLE[code].onnx for code in get_args(Code)}
PLUGIN = 'plugin_namespace: string = "refmodels", plugin_version: string = "1"'


def make_function(
    name: str,
    inputs: Iterable[str],
    outputs: Iterable[str],
    body: Sequence[str],
    *,
    attributes: str = PLUGIN,
    domain: str = DOMAIN,
) -> onnx.FunctionProto:
    """A function from the lines of its body; every line's node is named after its first result."""
    attributes = f"<{attributes}>" if attributes else ""
    function = onnx.parser.parse_function(
        f'<domain: "{domain}", opset_import: ["": {OPSET}]>\n'
        f"{name} {attributes} ({', '.join(inputs)}) => ({', '.join(outputs)})\n{{\n" + "\n".join(body) + "\n}"
    )
    for node in function.node:
        node.name = node.output[0]
    return function


def ints(name: str, *values: int) -> str:
    """The line that defines a constant list of int64."""
    return f"{name} = Constant <value_ints = [{', '.join(map(str, values))}]> ()"
