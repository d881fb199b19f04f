"""From a model's name to a `Decoder` with its weights: resolve, check, stream, load.

`resolve` reads the configuration only.  `stream_parameters` checks every name, shape and dtype first and then makes
one parameter at a time, so that neither loading nor exporting needs memory for a second copy of the model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from refmodels import toys
from refmodels.checkpoints.beside import Beside
from refmodels.checkpoints.quantized_config import read_config
from refmodels.checkpoints.quantized_files import MODELOPT_NAME, bitsandbytes, of_bitsandbytes, said_of_quantization
from refmodels.checkpoints.quantized_layouts import Storage
from refmodels.checkpoints.quantized_reader import QuantizedReader
from refmodels.checkpoints.shards import StoredTensor, WeightFiles
from refmodels.checkpoints.weights import WeightMap
from refmodels.dtypes import DTYPES, torch_name
from refmodels.errors import LogitLockError
from refmodels.families import family_of, model_type_of, read_spec
from refmodels.families.config import Config, Family
from refmodels.families.config_keys import ConfigKeys, sort_keys
from refmodels.json_records import read_json
from refmodels.model import Decoder
from refmodels.notices import say_once
from refmodels.path_kinds import hint
from refmodels.spec import ModelSpec, Numerics
from refmodels.text.chat_template import MORE_TEMPLATES, TEMPLATE_FILE

if TYPE_CHECKING:
    from refmodels.text.tokenizer import Tokenizer

COMPANION_FILES = (
    "generation_config.json",
    "qwen.tiktoken",
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    TEMPLATE_FILE,
    MORE_TEMPLATES,
    MODELOPT_NAME,
)
"""Patterns of the files beside config.json and the weights that belong into a bundle or a copy of a model."""

TOYS = Path(__file__).parents[1] / "toys"
_PREFIXES = ("transformer.", "model.")
_TIED_HEAD = "lm_head.weight"
_ROWS_AT_ONCE = 4096
_SHOWN_KEYS = 8
_QUANTIZED = ("qweight", "weight_packed", "weight_scale")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that has been found: its directory, its parsed config.json, and the spec made from them.

    `name` is for people (family name, directory name or hub id).  `storage` says how quantized modules are stored, if
    `spec.quantization` has any.  `facts`: sentences that say how the model was recognized, if config.json alone does
    not say it; `warnings`: those that were said.  `keys`: what became of each key of config.json.
    """

    directory: Path
    config: dict[str, Any]
    spec: ModelSpec
    family: Family
    name: str
    storage: Storage | None = None
    facts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    keys: ConfigKeys = field(default_factory=ConfigKeys)


def resolve(model: str | Path, *, variant: Mapping[str, Any] | None = None) -> ModelSource:
    """Find a model and read its configuration; of the weights at most what the configuration leaves open.

    Args:
        model: a family name (the bundled toy), a directory in Hugging Face layout, or a hub id.  A family name wins
            over a directory of the same name; write ./qwen for the directory.
        variant: facts that no config key says (see `spec_from_config`); None: those in the meta.json of a golden case.
    Raises:
        LogitLockError: no model is found, its config is missing, damaged or not supported, or its weights are damaged.
    """
    directory, name = _find(model)
    where = directory / "config.json"
    if not where.is_file():
        raise LogitLockError(
            f"{directory} has no config.json; a model directory in Hugging Face layout has one{hint(directory)}"
        )
    data = read_json(where)
    typed = {**data, "model_type": model_type_of(data, str(where))}
    family = family_of(typed, str(where))
    variant = _recorded_facts(directory) if variant is None else variant
    config = Config(typed, variant, str(where), Beside(directory))
    if data.get("model_type") is None:
        config.facts.append(f"model_type {typed['model_type']}, because architectures is {data['architectures']}")
    spec = read_spec(config)
    keys = sort_keys(config, family)
    if keys.unknown:
        shown = ", ".join(keys.unknown[:_SHOWN_KEYS])
        more = f" and {len(keys.unknown) - _SHOWN_KEYS} more" if len(keys.unknown) > _SHOWN_KEYS else ""
        config.warnings.append(f"{where} has keys that LogitLock does not know and leaves out: {shown}{more}")
    if spec.tied_head and _stores_own_head(spec, family, config.beside):
        spec = replace(spec, tied_head=False)
        config.warnings.append(
            f"{where} says tie_word_embeddings, but the head that is stored is not the embedding: it is used as it is, "
            'as transformers 5 does; write "tie_word_embeddings": false'
        )
    source = ModelSource(
        directory=directory,
        config=typed,
        spec=spec,
        family=family,
        name=name,
        facts=tuple(config.facts),
        warnings=tuple(config.warnings),
        keys=keys,
    )
    found = with_directory(source, directory)
    for text in config.warnings:
        say_once(text)
    return found


def _recorded_facts(directory: Path) -> Mapping[str, Any]:
    """The variant in the meta.json of a golden case; {} for any other directory."""
    meta = directory / "meta.json"
    if not ((directory / "io.safetensors").is_file() and meta.is_file()):
        return {}
    facts = read_json(meta).get("variant")
    if facts is not None and not isinstance(facts, dict):
        raise LogitLockError(f"{meta}: variant is {facts!r}; it must be an object")
    return facts or {}


def _stores_own_head(spec: ModelSpec, family: Family, beside: Beside) -> bool:
    """Whether a head is stored that differs from the embedding, as after merging an adapter into one of the two, or
    after quantizing the head alone."""
    if beside.weights is None:
        return False
    table = family.weights(replace(spec, tied_head=False))
    module = table["head.weight"][0].name.removesuffix(".weight")
    if any(s in (f"{module}.{part}" for part in _QUANTIZED) for name in beside.tensors for s in _spellings(name)):
        return True
    pair = [
        next((t for name, t in beside.tensors.items() if table[parameter][0].name in _spellings(name)), None)
        for parameter in ("head.weight", "embed.weight")
    ]
    if None in pair:
        return False
    head, embedding = (beside.weights.read(tensor) for tensor in pair if tensor is not None)
    if head.shape != embedding.shape:
        return True
    if head.data_ptr() == embedding.data_ptr():
        return False
    rows = range(0, len(head), _ROWS_AT_ONCE)
    return any(bool((head[i : i + _ROWS_AT_ONCE] != embedding[i : i + _ROWS_AT_ONCE]).any()) for i in rows)


def with_directory(source: ModelSource, directory: Path) -> ModelSource:
    """The same model with the weights of another directory, and with the quantization that its config.json declares.

    Raises:
        LogitLockError: no readable config.json there.
    """
    where = directory / "config.json"
    config = {**read_json(where), "model_type": source.config["model_type"]}
    plain, beside = replace(source.spec, quantization=None), Beside(directory)
    said = said_of_quantization(config, str(where), beside)
    found = None
    if said is not None:
        modules = upstream_modules(plain, source.family)
        found = read_config(said[0], modules, said[1], tensors=lambda: beside.tensors)
    quantization, storage = found or (None, None)
    spec = replace(plain, quantization=quantization)
    return replace(source, directory=directory, config=config, spec=spec, storage=storage)


def upstream_modules(spec: ModelSpec, family: Family) -> dict[str, tuple[str, ...]]:
    """For every linear layer, the checkpoint modules whose rows make it up."""
    table = family.weights(spec)
    return {
        module: tuple(part.name.removesuffix(".weight") for part in table[f"{module}.weight"])
        for module in spec.linears
    }


def _find(model: str | Path) -> tuple[Path, str]:
    if isinstance(model, str) and model in toys.TOYS:
        toy = TOYS / model
        if not (toy / "config.json").is_file():
            raise LogitLockError(
                f"the bundled toy {model!r} is not in this installation; `python -m refmodels.toys.train` makes it"
            )
        return toy, model
    directory = Path(model)
    if directory.is_dir():
        return directory, directory.resolve().name
    if directory.exists():
        raise LogitLockError(f"{model} is a file; a model is a directory with config.json and the weights{hint(model)}")
    if directory.is_symlink():
        raise LogitLockError(f"{model} is a link that leads nowhere, or to itself")
    if isinstance(model, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model):
        raise LogitLockError(
            f"there is no directory {str(model)!r}; a model is one of {', '.join(toys.TOYS)}, a directory, or a hub id "
            "owner/name"
        )
    from refmodels.checkpoints.hub import download

    return download(model), model


def load(
    model: str | Path | ModelSource,
    *,
    dtype: torch.dtype = torch.float32,
    numerics: Numerics = "exact",
    device: torch.device | str = "cpu",
    variant: Mapping[str, Any] | None = None,
) -> Decoder:
    """The reference model with its weights, in eval mode; parameters do not require grad.

    Args:
        model: as for `resolve`, or its result.
        dtype: fp64, fp32, fp16 or bf16; weights are cast to it.
        numerics: "exact" or "upstream" (see `Decoder`).
        variant: as for `resolve`.
    Raises:
        LogitLockError: as `resolve` and `stream_parameters`.
    """
    source = model if isinstance(model, ModelSource) else resolve(model, variant=variant)
    decoder = empty_decoder(source.spec, numerics=numerics)
    for name, value in stream_parameters(source, dtype=dtype, numerics=numerics):
        put_parameter(decoder, name, value.to(device))
    if source.spec.tied_head:
        decoder.head.weight = decoder.embed.weight
    return decoder.eval()


def put_parameter(decoder: Decoder, name: str, value: Tensor) -> None:
    """Make `value` the decoder's parameter of that name, without grad."""
    owner, _, leaf = name.rpartition(".")
    setattr(decoder.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def empty_decoder(spec: ModelSpec, *, numerics: Numerics = "exact") -> Decoder:
    """A decoder whose parameters have shapes but no memory (device "meta")."""
    with on_meta_device():
        return Decoder(spec, numerics=numerics)


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Modules made in this context have parameters with shapes but no memory."""
    with torch.device("meta"), _WithoutInitialization():
        yield


@lru_cache(maxsize=8)
def empty_parameters(spec: ModelSpec) -> Mapping[str, Tensor]:
    """Every parameter of a decoder, in order, without memory; a tied head is left out.  Parameters of dtype fp32 have
    the working dtype in a loaded model; quantized weights and indices keep their own dtype."""
    return dict(empty_decoder(spec).named_parameters())


def parameter_shapes(spec: ModelSpec) -> Mapping[str, torch.Size]:
    """Name and shape of every parameter of a decoder, in order; a tied head is left out."""
    return {name: parameter.shape for name, parameter in empty_parameters(spec).items()}


def parameter_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Memory of all parameters in a working dtype, in bytes, with one int4 value per byte."""
    return sum(
        value.numel() * (dtype if value.dtype == torch.float32 else value.dtype).itemsize
        for value in empty_parameters(spec).values()
    )


class _WithoutInitialization(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device, `normal_` imports sympy, which costs a second and 70 MB for nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" and "tensor" in kwargs:
            return kwargs["tensor"]
        return func(*args, **kwargs)


def load_tokenizer(model: str | Path | ModelSource) -> Tokenizer:
    """The tokenizer of a model: as for `load`.  Errors as `resolve` and `tokenizer_in`."""
    source = model if isinstance(model, ModelSource) else resolve(model)
    return tokenizer_in(source.directory, source.spec)


def tokenizer_in(directory: Path, spec: ModelSpec) -> Tokenizer:
    """The tokenizer whose files are in a checkpoint or a bundle.

    Raises:
        LogitLockError: no tokenizer files, damaged ones, or the library they need is not installed.
    """
    from refmodels.text.tokenizer import read_tokenizer

    return read_tokenizer(directory, family=spec.family if spec.chat_format == "raw" else spec.chat_format)


def stream_parameters(
    source: ModelSource, *, dtype: torch.dtype, numerics: Numerics = "exact", prefixes: tuple[str, ...] = ("",)
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the decoder, in order and one at a time, as a contiguous CPU tensor of `dtype` of its own;
    quantized weights keep their own dtype.

    `prefixes` keeps the parameters whose name begins with one of them.  A tied head is left out.  Names, shapes and
    dtypes of the whole checkpoint are checked before this returns; values are checked as they are read.

    Raises:
        LogitLockError: a tensor is missing, left over, of the wrong shape, quantized although config.json does not say
            so, damaged, holds NaN or Inf, or is too large for `dtype`.
    """
    if dtype not in DTYPES.values():
        raise LogitLockError(f"{dtype} is not a working dtype of the reference; use one of {', '.join(DTYPES)}")
    if source.spec.tied_head and source.spec.head_normalized:
        raise LogitLockError(f"{source.directory}: a normalized head (NormHead) that is tied is not supported")
    files = WeightFiles(source.directory)
    table = source.family.weights(source.spec)
    reader = None if source.storage is None else QuantizedReader(source.spec, table, source.storage)
    stored = match_names(files.tensors, table, source, reader)
    return _stream(files, table, stored, source.spec, dtype, numerics, prefixes, reader)


def match_names(
    tensors: Mapping[str, StoredTensor], table: WeightMap, source: ModelSource, reader: QuantizedReader | None = None
) -> dict[str, StoredTensor]:
    """The stored tensor for each name in the weight map.

    The prefix `transformer.` (or `model.`) may be missing or superfluous.  Known buffers, and the head of a model that
    ties it, are left out.  `reader` reads quantized modules, whose tensors are taken as they are stored.

    Raises:
        LogitLockError: a tensor is missing, left over, stored twice, of the wrong shape, or quantized without a reader.
    """
    wanted = {part.name: part for parts in table.values() for part in parts}
    if reader is not None:
        wanted = {name: part for name, part in wanted.items() if not reader.replaces(name)}
    ignored = re.compile("|".join(source.family.ignored) or r"(?!)")
    found: dict[str, StoredTensor] = {}
    head: StoredTensor | None = None
    left_over = []
    for name, tensor in tensors.items():
        spellings = _spellings(name)
        coded = next((s for s in spellings if s not in wanted and reader.owns(s)), None) if reader is not None else None
        known = coded or next((s for s in spellings if s in wanted or ignored.fullmatch(s)), None)
        if known is not None and (known == coded or known in wanted):
            if known in found:
                raise LogitLockError(f"{source.directory} holds {known} twice: as {found[known].name} and as {name}")
            found[known] = tensor
        elif known is None and source.spec.tied_head and _TIED_HEAD in spellings:
            head = tensor
        elif known is None:
            left_over.append(name)
    embedding = table["embed.weight"][0].name
    if head is not None and embedding not in found:
        found[embedding] = head
    if of_bitsandbytes(left_over):
        raise bitsandbytes(str(source.directory))
    if left_over:
        raise LogitLockError(
            f"{source.directory} holds {_several(left_over)} that {source.spec.variant} has no place for"
        )
    missing = [name for name in wanted if name not in found] + ([] if reader is None else reader.missing(found))
    if missing:
        raise LogitLockError(f"{source.directory} lacks {_several(missing)} of {source.spec.variant}")
    for name, part in wanted.items():
        tensor = found[name]
        if tensor.dtype is None:
            raise LogitLockError(
                f"{tensor.name} in {tensor.file} has dtype {tensor.dtype_name}; weights must be fp64, fp32, fp16 or "
                "bf16, where quantization_config in config.json does not say how they are quantized"
            )
        if tensor.shape != part.shape:
            raise LogitLockError(
                f"{tensor.name} in {tensor.file} has shape {list(tensor.shape)}; config.json says {list(part.shape)}"
            )
    return found


def _spellings(name: str) -> list[str]:
    """The names that a stored tensor may stand for: the prefix of the decoder may be absent or too much."""
    return [name, *(p + name for p in _PREFIXES), *(name.removeprefix(p) for p in _PREFIXES)]


def _several(names: list[str]) -> str:
    return f"the tensor {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _stream(
    files: WeightFiles,
    table: WeightMap,
    stored: Mapping[str, StoredTensor],
    spec: ModelSpec,
    dtype: torch.dtype,
    numerics: Numerics,
    prefixes: tuple[str, ...],
    reader: QuantizedReader | None,
) -> Iterator[tuple[str, Tensor]]:
    for name, shape in parameter_shapes(spec).items():
        if not name.startswith(prefixes):
            continue
        if reader is not None and reader.provides(name):
            yield from reader.read(files, stored, name, dtype)
            continue
        value = torch.empty(shape, dtype=dtype)
        normalized = name == "head.weight" and spec.head_normalized
        start = 0
        for part in table[name]:
            tensor = stored[part.name]
            rows = part.read(files.read(tensor))
            target = value[start : start + part.row_count]
            start += part.row_count
            if normalized and numerics == "exact":
                _copy_normalized(target, rows, torch.float64)
            else:
                target.copy_(rows)
            _check_finite(target, rows, tensor)
            del rows
        if normalized and numerics == "upstream":
            _copy_normalized(value, value, dtype)
        yield name, value


def _copy_normalized(target: Tensor, rows: Tensor, arithmetic: torch.dtype) -> None:
    """Rows divided by max(L2 norm, 1e-12), computed in `arithmetic`, one block at a time to save memory."""
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        block = slice(start, start + _ROWS_AT_ONCE)
        target[block] = torch.nn.functional.normalize(rows[block].to(arithmetic))


def _check_finite(value: Tensor, rows: Tensor, tensor: StoredTensor) -> None:
    if _finite(value):
        return
    if _finite(rows):
        largest = float(rows.abs().max())
        raise LogitLockError(
            f"{tensor.name} in {tensor.file} does not fit in {torch_name(value.dtype)}: "
            f"it holds values up to {largest:.3g}"
        )
    kind = "NaN" if bool(rows.isnan().any()) else "Inf"
    raise LogitLockError(f"{tensor.name} in {tensor.file} holds {kind}; weights must be finite")


def _finite(value: Tensor) -> bool:
    # Minimum and maximum propagate NaN and Inf, and need no temporary of the tensor's size.
    return value.numel() == 0 or all(bool(bound.isfinite()) for bound in torch.aminmax(value))


def checkpoint_hash(source: ModelSource) -> str:
    """SHA-256 over the names and contents of the weight files: unchanged by copying, changed by any edit."""
    digest = hashlib.sha256()
    buffer = bytearray(2**20)
    view = memoryview(buffer)
    for file in WeightFiles(source.directory).files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(view[:count])
    return digest.hexdigest()
