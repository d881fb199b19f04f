"""The names of executors on the command line, and opening them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from debug.executors.golden import GoldenEngine
from refmodels.checkpoints.load import ModelSource, load
from refmodels.dtypes import DTYPES
from refmodels.errors import LogitLockError
from refmodels.path_kinds import hint
from refmodels.spec import Numerics
from refmodels.toys import TOYS
from trt_runtime.engine import Engine
from trt_runtime.open import open_engine
from trt_runtime.torch_gpu.engine import TorchEngine


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The arguments of `open_executor` besides the text."""

    source: ModelSource
    map: Path | None
    emulate_rounding: bool
    trust_remote_code: bool
    decode: bool
    device: str | None


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to name an executor.

    text, meaning: for people.  word: the first word of the text; None: a path that `matches`.  open: takes the words
    after the first one, split at ':'.
    """

    text: str
    meaning: str
    open: Callable[[list[str], _Options], Engine]
    word: str | None = None
    matches: Callable[[Path], bool] = lambda path: False


def open_executor(
    text: str,
    *,
    source: ModelSource,
    map: Path | None = None,
    emulate_rounding: bool = True,
    trust_remote_code: bool = False,
    decode: bool = False,
    device: str | None = None,
) -> Engine:
    """Open an executor.

    Args:
        text: one of the forms that `forms_help` lists.
        source: the model that both executors are made from.
        map: a name map for an ONNX file.  If the file does not exist, a map is proposed with the help of the reference
            and written there, for a person to check; None: the proposal is not written.
        emulate_rounding: round every node of half-precision graphs on the CPU.
        trust_remote_code: for hf.
        decode: the comparison continues after the prefill (a golden case then has only logits).
        device: for the reference, kernels and hf; None: the CPU, and CUDA for kernels.
    Raises:
        LogitLockError: the text has none of the forms (the error lists them), or the executor raises it.
    """
    options = _Options(
        source=source,
        map=map,
        emulate_rounding=emulate_rounding,
        trust_remote_code=trust_remote_code,
        decode=decode,
        device=device,
    )
    word, *rest = text.split(":")
    for form in FORMS:
        if form.word == word:
            return form.open(rest, options)
    for form in FORMS:
        for path, parameters in ((text, []), (word, rest)):
            if form.word is None and form.matches(Path(path)):
                return form.open([path, *parameters], options)
    found = "; it is a model: name it with --model" if text in TOYS else hint(text)
    raise LogitLockError(f"{text!r} names no executor; it must be one of {_forms()}{found}")


def numerics_of(engine: Engine) -> Numerics:
    """Which numerics an executor rounds by, and so which reference gives its noise floor."""
    if isinstance(engine, TorchEngine):
        return engine.decoder.numerics
    bundle = getattr(engine, "bundle", None)
    # Anything else is upstream's code, run, exported or recorded.
    return "upstream" if bundle is None else bundle.info.numerics


def forms_help() -> str:
    """All forms, one per paragraph."""
    return "\n\n".join(f"{form.text} : {form.meaning}" for form in FORMS)


def _forms() -> str:
    return ", ".join(form.text for form in FORMS)


def _reference(words: list[str], options: _Options) -> Engine:
    dtype, numerics = [*words, *["fp64", "exact"][len(words) :]][:2] if len(words) < 3 else ("", "")
    _check("reference", words, dtype in DTYPES and numerics in get_args(Numerics))
    device = options.device or "cpu"
    exact: Numerics = "upstream" if numerics == "upstream" else "exact"
    return TorchEngine(load(options.source, dtype=DTYPES[dtype], numerics=exact, device=device))


def _kernels(words: list[str], options: _Options) -> Engine:
    dtype = words[0] if words else "fp16"
    _check("kernels", words, len(words) < 2 and dtype in DTYPES)
    # Without a GPU, TorchEngine says what is missing.
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    decoder = load(options.source, dtype=DTYPES[dtype], device=device)
    return TorchEngine(decoder, kernels=True)


def _huggingface(words: list[str], options: _Options) -> Engine:
    from debug.executors.huggingface import HuggingFaceEngine

    dtype, rest = (words[0], words[1:]) if words and words[0] in DTYPES else ("fp32", words)
    _check("hf", words, len(rest) < 2)
    directory = Path(rest[0]) if rest else options.source.directory
    if rest and not directory.exists():
        raise LogitLockError(
            f"{':'.join(['hf', *words])!r} is not understood: {rest[0]} is no directory"
            + (f" and none of the dtypes {', '.join(DTYPES)}" if rest is words else "")
        )
    return HuggingFaceEngine(
        directory,
        options.source.spec,
        dtype,
        trust_remote_code=options.trust_remote_code,
        device=options.device or "cpu",
    )


def _tensorrt(words: list[str], options: _Options) -> Engine:
    _check("tensorrt", words, len(words) == 1)
    return open_engine(words[0], engine="tensorrt")


def _bundle(words: list[str], options: _Options) -> Engine:
    _check(words[0], words[1:], len(words) == 1)
    return open_engine(words[0], engine="onnxruntime", emulate_rounding=options.emulate_rounding)


def _golden(words: list[str], options: _Options) -> Engine:
    dtype = words[1] if len(words) > 1 else "fp32"
    _check(words[0], words[1:], len(words) < 3 and dtype in ("fp32", "bf16", "fp16"))
    return GoldenEngine(words[0], dtype, decode=options.decode)


def _onnx(words: list[str], options: _Options) -> Engine:
    from debug.executors.onnx_file import OnnxFileEngine
    from debug.executors.propose import propose_map

    _check(words[0], words[1:], len(words) == 1)
    spec, rounded = options.source.spec, options.emulate_rounding
    if options.map is not None and options.map.exists():
        return OnnxFileEngine(words[0], spec, options.map, emulate_rounding=rounded)
    proposal = propose_map(words[0], load(options.source))
    if options.map is not None:
        proposal.write(options.map)
    engine = OnnxFileEngine(words[0], spec, proposal.names, emulate_rounding=rounded)
    engine.arithmetic += f"; {proposal.summary()}"
    return engine


def _check(form: str, words: list[str], fits: bool) -> None:
    if not fits:
        raise LogitLockError(f"{':'.join([form, *words])!r} is not understood; the forms are {_forms()}")


FORMS = (
    Form(
        word="reference",
        text="reference[:DTYPE[:NUMERICS]]",
        meaning=f"the PyTorch reference; DTYPE is one of {', '.join(DTYPES)} (default fp64), NUMERICS is exact "
        "(default) or upstream",
        open=_reference,
    ),
    Form(
        word="hf",
        text="hf[:DTYPE][:DIR]",
        meaning="Hugging Face transformers on the model's directory or on DIR; DTYPE is fp32 by default",
        open=_huggingface,
    ),
    Form(
        word="kernels",
        text="kernels[:DTYPE]",
        meaning="the reference with LogitLock's kernels on a CUDA GPU; DTYPE is fp16 by default",
        open=_kernels,
    ),
    Form(
        word="tensorrt",
        text="tensorrt:BUNDLE",
        meaning="the TensorRT engine of a bundle",
        open=_tensorrt,
    ),
    Form(
        text="BUNDLE",
        meaning="a directory with bundle.json, whose graph runs on ONNX Runtime",
        matches=lambda path: (path / "bundle.json").is_file(),
        open=_bundle,
    ),
    Form(
        text="CASE_DIR[:DTYPE]",
        meaning="a golden case, that is, upstream's recorded results; DTYPE is fp32 by default",
        matches=lambda path: (path / "io.safetensors").is_file(),
        open=_golden,
    ),
    Form(
        text="FILE.onnx",
        meaning="any decoder in ONNX, run on ONNX Runtime with the name map of --map or a proposed one",
        matches=lambda path: path.suffix == ".onnx",
        open=_onnx,
    ),
)
"""All ways to name an executor, in the order in which they are tried."""
