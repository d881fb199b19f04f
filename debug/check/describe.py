"""A model directory before anything of it runs: family, deciding facts, size, and what is left out or refused.

Of the weights only names, shapes and dtypes are read, except where a tied head must be compared with the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch

from export.graph.quantized_rules import check_quantization
from export.precision import SCHEMES
from refmodels.checkpoints.beside import Beside
from refmodels.checkpoints.load import (
    ModelSource,
    parameter_bytes,
    parameter_shapes,
    resolve,
    stream_parameters,
    tokenizer_in,
)
from refmodels.dtypes import BY_TORCH, DTYPE_TABLE, DTYPES, torch_name
from refmodels.errors import LogitLockError, NoTokenizerError
from refmodels.spec import ModelSpec
from refmodels.text.chat_template import read_template
from refmodels.text.generation_defaults import generation_defaults
from refmodels.text.prompts import stop_ids_in
from refmodels.text.tokenizer import Tokenizer
from trt_runtime.bundle import Precision
from trt_runtime.sampling import sampling_of

T = TypeVar("T")

_EXPORTED = get_args(Precision)
_BY_STORED_NAME = {d.safetensors: d.name for d in DTYPE_TABLE.values()} | {
    torch_name(dtype): d.name for dtype, d in BY_TORCH.items()
}


def check_model(model: str | Path, *, tokens: int | None = None) -> dict[str, Any]:
    """Everything that `logitlock check` says, as JSON values.

    Args:
        model: as for `refmodels.resolve`.
        tokens: how many tokens the cache holds of which the size is said; None: the longest that the model has.
    Returns: `refused` is empty where the model can be loaded and generates as its files say.
    Raises:
        LogitLockError: the model cannot be recognized: there is no such directory, its config.json is damaged, or a key
            of it is not supported.
    """
    if tokens is not None and tokens < 1:
        raise LogitLockError(f"--tokens is {tokens}; it must be at least 1")
    source = resolve(model)
    spec, refused = source.spec, list[str]()
    _try(lambda: stream_parameters(source, dtype=torch.float32), refused)
    positions = min(tokens or spec.max_positions, spec.max_positions)
    return {
        "model": source.name,
        "directory": str(source.directory),
        "family": spec.family,
        "variant": spec.variant,
        "facts": _facts(source),
        "spec": spec.to_dict(),
        "parameters": sum(shape.numel() for shape in parameter_shapes(spec).values()),
        "stored": _stored(source, refused),
        "quantization": None if spec.quantization is None else spec.quantization.describe(),
        "weight_bytes": {name: parameter_bytes(spec, DTYPES[name]) for name in _EXPORTED},
        "cache_tokens": positions,
        "cache_bytes": {name: _cache_bytes(spec, positions, DTYPES[name].itemsize) for name in _EXPORTED},
        **_text(source, refused),
        "keys": asdict(source.keys),
        "warnings": list(source.warnings),
        "refused": refused,
        "serves": _serves(spec),
    }


def _try(step: Callable[[], T], refused: list[str]) -> T | None:
    """The result of a step; where it is refused, None and one more sentence."""
    try:
        return step()
    except LogitLockError as error:
        if str(error) not in refused:
            refused.append(str(error))
        return None


def _stored(source: ModelSource, refused: list[str]) -> dict[str, int]:
    """How many elements of each dtype the weight files hold."""
    found: dict[str, int] = {}
    for tensor in (_try(lambda: Beside(source.directory).tensors, refused) or {}).values():
        name = _BY_STORED_NAME.get(tensor.dtype_name, tensor.dtype_name)
        found[name] = found.get(name, 0) + torch.Size(tensor.shape).numel()
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _cache_bytes(spec: ModelSpec, tokens: int, itemsize: int) -> int:
    """Keys and values of one row; a quantized cache has one byte per element."""
    a = spec.attention
    return 2 * spec.layers * tokens * a.kv_heads * a.head_dim * (itemsize if spec.cache_code is None else 1)


def _text(source: ModelSource, refused: list[str]) -> dict[str, Any]:
    """Tokenizer, chat, stop ids and sampling."""
    directory, spec = source.directory, source.spec

    def opened() -> Tokenizer | None:
        try:
            return tokenizer_in(directory, spec)
        except NoTokenizerError:
            return None

    tokenizer = _try(opened, refused)
    defaults = _try(lambda: generation_defaults(directory), refused)
    sampling = None if defaults is None else _try(lambda: sampling_of(defaults), refused)
    found: dict[str, Any] = {
        "tokenizer": None,
        "chat": None,
        "stop_ids": None if defaults is None else list(defaults.eos),
        "chat_stop_ids": None,
        "sampling": None if sampling is None else sampling.describe(),
    }
    if tokenizer is None:
        return found
    found["tokenizer"] = {"class": type(tokenizer).__name__, "vocab_size": tokenizer.vocab_size}
    found["chat"] = _chat(source, tokenizer, refused)
    for key, chat in (("stop_ids", False), ("chat_stop_ids", found["chat"] is not None)):
        stops = _try(lambda chat=chat: stop_ids_in(directory, spec, tokenizer, chat=chat), refused)  # type: ignore[misc]
        found[key] = None if stops is None else list(stops)
    return found


def _chat(source: ModelSource, tokenizer: Tokenizer, refused: list[str]) -> str | None:
    """The source of a chat's prompts; None: there is none."""
    own = tokenizer.chat_template
    if own is not None:
        _try(lambda: own.render([{"role": "user", "content": "hello"}]), refused)
        named = "" if list(own.templates) == ["default"] else f" ({', '.join(own.templates)})"
        return f"the template of {own.where.name}{named}"
    if source.spec.chat_format == "raw":
        return None
    settings = Beside(source.directory).json("tokenizer_config.json")
    unused = read_template(source.directory, settings) is not None
    return f"the built-in format {source.spec.chat_format}" + (
        "; the checkpoint's template is not used, because its tokenizer reads no control tokens from text"
        if unused
        else ""
    )


def _facts(source: ModelSource) -> list[str]:
    """By what the model is known; where config.json lacks model_type, the first fact says by what that is known."""
    said = f"model_type {source.config['model_type']}"
    return [*([] if any(fact.startswith(said) for fact in source.facts) else [said]), *source.facts]


def _serves(spec: ModelSpec) -> list[dict[str, Any]]:
    """Which back ends run the model in which precisions, or why one does not."""
    precisions = [*_EXPORTED, *(SCHEMES if spec.quantization is None else ())]
    refusals: list[str] = []
    _try(lambda: check_quantization(spec), refusals)
    floats = "" if spec.quantization is None else "it takes models that are not quantized"
    return [
        {"back_end": "reference, PyTorch", "precisions": list(DTYPES), "refused": ""},
        {"back_end": "ONNX Runtime", "precisions": precisions, "refused": ""},
        {"back_end": "TensorRT plan", "precisions": [] if refusals else precisions, "refused": " ".join(refusals)},
        {"back_end": "Torch-TensorRT", "precisions": [] if floats else list(_EXPORTED), "refused": floats},
        {"back_end": "kernels, CUDA", "precisions": list(_EXPORTED), "refused": ""},
    ]


def rows(found: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """The result as lines of a table: a name and a text."""
    spec, attention = found["spec"], found["spec"]["attention"]
    yield "model", f"{found['model']}: {found['variant']} ({found['family']}), {found['parameters']:,} parameters"
    yield "known by", "; ".join(found["facts"])
    yield (
        "shape",
        f"{spec['layers']} layers, hidden {spec['hidden_size']}, {attention['heads']} heads "
        f"({attention['kv_heads']} kv) of {attention['head_dim']}, vocabulary {spec['vocab_size']:,}, "
        f"{spec['max_positions']:,} positions ({spec['position']})",
    )
    stored = ", ".join(f"{name} ({count:,})" for name, count in found["stored"].items()) or "no weights"
    yield "stored as", stored + (f"; {found['quantization']}" if found["quantization"] else "")
    yield "weights", _sizes(found["weight_bytes"])
    yield f"cache of {found['cache_tokens']:,} tokens", _sizes(found["cache_bytes"])
    tokenizer = found["tokenizer"]
    yield "tokenizer", "none" if tokenizer is None else f"{tokenizer['class']}, {tokenizer['vocab_size']:,} ids"
    yield "chat", found["chat"] or "none"
    in_chat = f"; in a chat {_ids(found['chat_stop_ids'])}" if found["chat"] else ""
    yield "stop ids", f"{_ids(found['stop_ids'])}{in_chat}"
    yield "sampling", found["sampling"] or "refused"
    keys = found["keys"]
    unknown = f"; unknown, and left out: {', '.join(keys['unknown'])}" if keys["unknown"] else ""
    yield "config.json", f"{len(keys['used'])} keys used, {len(keys['harmless'])} harmless{unknown}"
    for back_end in found["serves"]:
        said = ", ".join(back_end["precisions"]) or f"refused: {back_end['refused']}"
        yield back_end["back_end"], said
    for text in found["warnings"]:
        yield "warning", text
    for text in found["refused"]:
        yield "refused", text


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{_size(size)} in {name}" for name, size in sizes.items())


def _size(size: int) -> str:
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")) if size >= u or u == 1)
    return f"{size / unit:.3g} {name}"


def _ids(ids: list[int] | None) -> str:
    return ", ".join(map(str, ids)) if ids else "none"
