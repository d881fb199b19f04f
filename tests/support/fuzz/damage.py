"""What is done to a sound file: every function damages one file in one way, chosen by a random generator."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

Damage = Callable[[random.Random, Path], str]
"""Damages the file and says how."""

NUMBERS = [-1, 0, 1, 2, 7, -(2**31), 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**12, 10**30, 1e-30, 0.5, -0.5, 1e30, 1e308]
TEXTS = [
    "",
    "x",
    "[/nope]",
    "[bold",
    "\x1b[31m",
    "../../x",
    "/dev/zero",
    "a" * 300,
    "\u2028",
    "𝕏",
    "%s{0}",
    "fp16",
    "-1",
]
RAW = ["NaN", "Infinity", "-Infinity", "1e400", "9" * 41, "1" + "0" * 400, "9" * 5000, '"\\ud800"', "[" * 200000]
RAW += ["[" * 150 + "]" * 150, '{"a":' * 300 + "1" + "}" * 300]
_MARK = "@@raw@@"


# Bytes


def _bytes(rng: random.Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    size, kind = len(data), rng.choice(("cut", "flip", "zero", "noise", "insert", "append", "empty", "twice", "short"))
    at = rng.randrange(size + 1)
    if kind == "cut":
        data = data[:at]
    elif kind == "short":
        data = data[: rng.choice((1, 7, 8, 9, size - 1))]
    elif kind == "flip" and size:
        for _ in range(rng.choice((1, 4, 30))):
            data[rng.randrange(min(size, rng.choice((40, 2000, size))))] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        data[at : at + 200] = bytes(len(data[at : at + 200]))
    elif kind == "noise":
        data[at : at + 64] = rng.randbytes(len(data[at : at + 64]))
    elif kind == "insert":
        data[at:at] = rng.choice((b"\xff\xfe", b"\0" * 9, rng.randbytes(20), b"\xed\xa0\x80", b'"'))
    elif kind == "append":
        data += rng.choice((b"\0", b"\n\n", rng.randbytes(50), b"}"))
    else:
        data = bytearray() if kind == "empty" else data + data
    path.write_bytes(data)
    return f"bytes: {kind} at {at} of {size}"


def _lines(rng: random.Random, path: Path) -> str:
    lines = path.read_bytes().splitlines(keepends=True) or [b""]
    at = rng.randrange(len(lines))
    kind = rng.choice(("remove", "twice", "swap", "empty", "words", "number", "long"))
    if kind == "remove":
        del lines[at]
    elif kind == "twice":
        lines.insert(at, lines[at])
    elif kind == "swap":
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == "long":
        lines[at] = rng.choice((b"a ", b"x", b"\0")) * 100_000 + b"\n"
    else:
        said = {"empty": b"\n", "words": rng.choice((b"a b c d\n", b"null\n", b"{}\n", b"[1]\n"))}
        lines[at] = said.get(kind, lines[at].split(b" ")[0] + b" %d\n" % rng.choice((-1, 2**63, 10**30, 0)))
    path.write_bytes(b"".join(lines))
    return f"lines: {kind} {at}"


# What is no file


def _place(rng: random.Random, path: Path) -> str:
    kind = rng.choice(("missing", "directory", "pipe", "dangling", "loop", "device", "sparse", "file in a file"))
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        with path.open("wb") as stream:
            stream.truncate(20 << 30)
    elif kind == "file in a file":
        path.symlink_to("/etc/passwd/x")
    return f"place: {kind}"


# JSON


def _json(rng: random.Random, path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        damaged, said = damage_json(rng, text)
    except ValueError:
        return _bytes(rng, path)
    path.write_text(damaged, encoding="utf-8", errors="surrogatepass")
    return said


def damage_json(rng: random.Random, text: str) -> tuple[str, str]:
    """A JSON document with one value, key or the whole changed, and what was changed."""
    content = json.loads(text)
    places = list(_places(content))
    if not places or rng.random() < 0.05:
        new = rng.choice([*RAW, "null", "[]", "5", '"x"', "{}", "", "[{}]", "true"])
        return new, f"json: all is {new[:30]}"
    holder, key = rng.choice(places)
    old = holder[key]
    kind = rng.choice(("value", "value", "value", "number", "raw", "remove", "rename", "swap", "twice"))
    if kind == "remove":
        del holder[key]
        return json.dumps(content), f"json: without {key}"
    if kind == "rename" and isinstance(holder, dict):
        new_key = rng.choice((*TEXTS, str(key).upper(), f"{key}x"))
        holder[new_key] = holder.pop(key)
        return json.dumps(content), f"json: {key} is called {new_key[:30]!r}"
    if kind == "twice" and isinstance(old, list) and old:
        old.append(old[0])
        return json.dumps(content), f"json: {key} has its first item twice"
    if kind == "swap":
        other, name = rng.choice(places)
        holder[key], other[name] = other[name], old
        return json.dumps(content, default=str) if _finite_depth(content) else "{}", f"json: {key} and {name} swapped"
    if kind == "raw":
        raw = rng.choice(RAW)
        holder[key] = _MARK
        return json.dumps(content).replace(f'"{_MARK}"', raw), f"json: {key} is {raw[:30]}"
    number = isinstance(old, int | float) and not isinstance(old, bool)
    values: list[Any] = [None, True, False, [], {}, [1], {"a": 1}, [[1]], [None], *TEXTS, *NUMBERS]
    if number and kind == "number":
        values = [old + 1, old - 1, -old, old * 2, old / 2, old * 1_000_000, float(old), str(old), [old], *NUMBERS]
    holder[key] = rng.choice(values)
    return json.dumps(content), f"json: {key} is {str(holder[key])[:40]!r}, was {str(old)[:40]!r}"


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:400]:
        yield value, key
        yield from _places(item)


def _finite_depth(content: Any) -> bool:
    try:
        json.dumps(content)
    except ValueError:
        return False
    return True


def _json_lines(rng: random.Random, path: Path) -> str:
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    lines[at], said = damage_json(rng, lines[at])
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    return said


# Tensors

Shaped = tuple[str, list[int], list[int]]


def _safetensors(rng: random.Random, path: Path) -> str:
    """The header: names, dtypes, shapes, places and texts, whatever the data behind it is."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    texts = header.get("__metadata__") or {}
    name = rng.choice(sorted(header.keys() - {"__metadata__"}))
    entry = header[name]
    kind = rng.choice(("json", "dtype", "shape", "remove", "rename", "swap", "length", *["text"] * 4 * bool(texts)))
    if kind == "text":
        return _metadata(rng, path, header, body)
    if kind == "json":
        text, said = damage_json(rng, json.dumps(header))
        _write_safetensors(path, text, body)
        return f"header {said}"
    if kind == "dtype":
        width = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1, "BOOL": 1}
        same = [d for d in width if width[d] == width.get(entry["dtype"]) and d != entry["dtype"]]
        entry["dtype"] = rng.choice([*same, "F64", "X9"])
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = rng.choice(([*shape, 1], [1, *shape], shape[::-1], [int(np.prod(shape))], [*shape[:-1], 0]))
    elif kind == "remove":
        del header[name]
        return _rewritten(path, header, body, f"tensor {name} is gone")
    elif kind == "rename":
        header[rng.choice((f"{name}x", name.replace("0", "9"), "[/b]", ""))] = header.pop(name)
    elif kind == "swap":
        other = rng.choice(sorted(header.keys() - {"__metadata__"}))
        header[name], header[other] = header[other], entry
    else:
        _write_safetensors(path, json.dumps(header), body, length=rng.choice((0, 1, 2**40, 2**64 - 1, length + 1)))
        return "header: another length"
    return _rewritten(path, header, body, f"tensor {name}: {kind}")


def _metadata(rng: random.Random, path: Path, header: dict[str, Any], body: bytes) -> str:
    texts = header["__metadata__"]
    key = rng.choice(sorted(texts))
    if rng.random() < 0.15:
        del texts[key]
        return _rewritten(path, header, body, f"metadata without {key}")
    said = "another text"
    try:
        texts[key], said = damage_json(rng, texts[key])
    except ValueError:
        texts[key] = rng.choice(TEXTS)
    texts[key] = texts[key].encode("utf-8", "replace").decode()
    return _rewritten(path, header, body, f"metadata {key}: {said}")


def _rewritten(path: Path, header: dict[str, Any], body: bytes, said: str) -> str:
    _write_safetensors(path, json.dumps(header), body)
    return said


def _write_safetensors(path: Path, header: str, body: bytes, length: int | None = None) -> None:
    encoded = header.encode("utf-8", "replace")
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + body)


def _values(rng: random.Random, path: Path) -> str:
    """Sound files whose tensors are not what they should be."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as stream:
        texts = stream.metadata()
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensors[name], said = _changed(rng, tensors[name])
    save_file(tensors, path, texts)
    return f"tensor {name}: {said}"


def _changed(rng: random.Random, tensor: torch.Tensor) -> tuple[torch.Tensor, str]:
    kinds = ["rank", "flat", "narrow", "wide", "none", "scalar", "dtype", "extreme", "extreme", "one", "one"]
    kind = rng.choice(kinds)
    if kind == "rank":
        return rng.choice((tensor[None], tensor[..., None])).contiguous(), kind
    if kind in ("flat", "scalar", "none"):
        flat = tensor.flatten()
        return (flat if kind == "flat" else flat[0].clone() if kind == "scalar" and len(flat) else flat[:0]), kind
    if kind in ("narrow", "wide") and tensor.ndim:
        dim = rng.randrange(tensor.ndim)
        half = tensor.narrow(dim, 0, tensor.shape[dim] - 1) if tensor.shape[dim] else tensor
        return (half if kind == "narrow" else torch.cat([tensor, tensor], dim)).contiguous(), f"{kind} {dim}"
    if kind == "dtype":
        others = (torch.float64, torch.float16, torch.int8, torch.int64, torch.int32, torch.uint8, torch.bool)
        return tensor.to(rng.choice(others)), kind
    if tensor.is_floating_point():
        value = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, -1.0, 0.0, 1e-40))
    else:
        value = rng.choice((-1, 0, 127, -128, 2**31 - 1, -(2**31)))
    tensor = tensor.clone()
    with contextlib.suppress(RuntimeError, OverflowError):
        if kind == "one" and tensor.numel():
            tensor.view(-1)[rng.randrange(tensor.numel())] = value
        else:
            tensor.fill_(value)
    return tensor, f"{kind} {value}"


def _pickled(rng: random.Random, path: Path) -> str:
    tensors = torch.load(path, weights_only=True)
    name = rng.choice(sorted(tensors))
    kind = rng.choice(("value", "list", "none", "meta", "missing", "quantized", "sparse", "not a name", "protocol"))
    if kind == "value":
        tensors[name], kind = _changed(rng, tensors[name])
    elif kind == "missing":
        del tensors[name]
    elif kind == "not a name":
        tensors[7] = tensors.pop(name)
    elif kind == "quantized":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors[name] = torch.quantize_per_tensor(torch.rand(4, 4), 0.1, 0, torch.qint8)
    else:
        given = {"none": None, "meta": torch.empty(4, 4, device="meta"), "sparse": torch.eye(3).to_sparse()}
        tensors[name] = given.get(kind, [1, 2])
    torch.save([tensors] if kind == "list" else tensors, path, pickle_protocol=4 if kind == "protocol" else 2)
    return f"pickle {name}: {kind}"


def _npz(rng: random.Random, path: Path) -> str:
    with np.load(path) as stored:
        arrays = dict(stored)
    if not arrays:
        return _bytes(rng, path)
    name = rng.choice(sorted(arrays))
    kind = rng.choice(("changed", "missing", "object", "text", "renamed", "one"))
    if kind == "changed":
        tensor, kind = _changed(rng, torch.from_numpy(arrays[name]))
        arrays[name] = tensor.numpy()
    elif kind in ("missing", "renamed"):
        array = arrays.pop(name)
        arrays |= {"blocks.9.x": array} if kind == "renamed" else {}
    else:
        arrays[name] = {"object": np.array([{"a": 1}], object), "text": np.array("x")}.get(kind, np.zeros(()))
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    path.write_bytes(stream.getvalue())
    return f"npz {name}: {kind}"


# ONNX


def _onnx(rng: random.Random, path: Path) -> str:
    model = onnx.load(path, load_external_data=False)
    graph = rng.choice((model.graph, *model.functions)) if rng.random() < 0.3 else model.graph
    node = rng.choice(graph.node)
    kinds = ("op", "remove", "twice", "cycle", "input", "attribute", "versions", "functions", "io", "shape", "domain")
    kind = rng.choice((*kinds, *["initializer"] * 4))
    if kind == "op":
        node.op_type = rng.choice(("Nope", "Add", "MatMul", "Gather", ""))
    elif kind == "domain":
        node.domain = rng.choice(("", "x.y", "com.microsoft"))
    elif kind == "remove":
        graph.node.remove(node)
    elif kind == "twice":
        graph.node.append(node)
    elif kind == "cycle" and node.input and node.output:
        node.input[0] = node.output[0]
    elif kind == "input" and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(("", "nowhere", "input_ids"))
    elif kind == "attribute" and node.attribute:
        chosen = rng.choice(node.attribute)
        chosen.i, chosen.f = rng.choice((-1, 2**40, 0)), rng.choice((float("nan"), -1.0))
        chosen.type = rng.choice((1, 2, 3, 7, 0))
    elif kind == "versions":
        model.ir_version = rng.choice((0, 99, model.ir_version))
        del model.opset_import[rng.randrange(len(model.opset_import)) :]
    elif kind == "functions" and model.functions:
        del model.functions[rng.randrange(len(model.functions)) :]
    elif kind in ("io", "shape"):
        value = rng.choice((*model.graph.input, *model.graph.output))
        _change_value(rng, value, kind)
    elif model.graph.initializer:
        _change_initializer(rng, rng.choice(model.graph.initializer))
    path.write_bytes(model.SerializeToString())
    return f"onnx: {kind} of {node.op_type} {node.name}"


def _change_value(rng: random.Random, value: Any, kind: str) -> None:
    kinds = value.type.tensor_type
    if kind == "io":
        value.name, kinds.elem_type = rng.choice((value.name, "x")), rng.choice((0, 1, 7, 8, 10, 99))
    elif kinds.shape.dim:
        rng.choice(kinds.shape.dim).dim_value = rng.choice((-3, 0, 1, 2**40))
    for _ in range(rng.choice((0, 0, 9))):
        kinds.shape.dim.add().dim_value = 1


def _change_initializer(rng: random.Random, tensor: Any) -> None:
    kind = rng.choice(("dims", "type", "name", "external", "data"))
    if kind == "dims":
        tensor.dims.append(rng.choice((-1, 0, 3, 2**40)))
    elif kind == "type":
        tensor.data_type = rng.choice((0, 1, 7, 8, 10, 23, 99))
    elif kind == "name":
        tensor.name = rng.choice(("", "x", "input_ids"))
    elif kind == "data":
        tensor.raw_data = rng.randbytes(3)
    for entry in tensor.external_data if kind == "external" else ():
        values = {"offset": ("-4", "99999999999", "x"), "length": ("3000000000", "-1", "0", "7")}
        entry.value = rng.choice(values.get(entry.key, ("../x", "/etc/passwd", "nothing", "")))


# Which


def damages_of(path: Path) -> list[Damage]:
    """All ways to damage a file of this kind."""
    own: dict[str, list[Damage]] = {
        ".json": [_json] * 8,
        ".jsonl": [_json_lines] * 4 + [_lines] * 2,
        ".safetensors": [_safetensors] * 4 + [_values] * 4,
        ".bin": [_pickled] * 4 if path.name != "kernels.bin" else [],
        ".npz": [_npz] * 4,
        ".onnx": [_onnx] * 6,
    }
    text = path.suffix in (".txt", ".tiktoken") or path.name == "tokenizer.model"
    return [*own.get(path.suffix, []), *([_lines] * 3 if text else []), _bytes, _bytes, _place]


def restore(source: Path, target: Path) -> None:
    """A private copy, without the source's times."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=shutil.copyfile)
    else:
        shutil.copyfile(source, target)
