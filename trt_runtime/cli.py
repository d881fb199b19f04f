"""The verbs `generate` and `inspect`."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

import refmodels
from refmodels.checkpoints.load import tokenizer_in
from refmodels.command import JsonFlag
from refmodels.dtypes import DTYPES
from refmodels.errors import LogitLockError
from refmodels.notices import LOGGER
from refmodels.options import check_device
from refmodels.text.generation_defaults import GenerationDefaults, generation_defaults
from refmodels.text.prompts import check_token_ids, prompt_ids, read_prompts, stop_ids_in
from trt_runtime.engine import Engine
from trt_runtime.generation import MAX_NEW_TOKENS, GenerationConfig, check_prompts
from trt_runtime.generation import generate as run_generation
from trt_runtime.inspect_bundle import inspect_bundle
from trt_runtime.open import EngineChoice, open_engine
from trt_runtime.sampling import Sampling, sampling_of
from trt_runtime.torch_gpu.engine import TorchEngine, kernels_serve

_OF_MODEL = "of generation_config.json, else {}"


def generate(
    model: Annotated[
        str | None,
        typer.Option(
            help="Generate with the reference of this model: a family name (the bundled toy), a Hugging Face "
            "directory, or a hub id."
        ),
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="Generate with the engine in this bundle directory.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; repeat the option for a batch.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="UTF-8 file with one prompt per line; empty lines are skipped; - reads stdin.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Put each prompt into the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message, before the prompt.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Maximum number of new tokens per prompt.", show_default=_OF_MODEL.format(MAX_NEW_TOKENS)),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sampling temperature; 0 takes the most likely token.", show_default=_OF_MODEL.format(0)),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Sample among the k most likely tokens; 0 means all tokens.", show_default=_OF_MODEL.format(0)
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample among the most likely tokens whose probabilities add up to this value.",
            show_default=_OF_MODEL.format(1),
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="Penalty on tokens that have occurred before; a value above 1 makes them less likely.",
            show_default=_OF_MODEL.format(1),
        ),
    ] = None,
    no_generation_config: Annotated[
        bool,
        typer.Option(
            "--no-generation-config",
            help="Leave out the sampling, the repetition penalty and the number of new tokens of the model's "
            "generation_config.json; its stop ids stay.",
        ),
    ] = False,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text, which is cut off; repeatable.")] = None,
    stop_id: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Stop at this token id, in addition to the model's own stop ids; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed for sampling.")] = 0,
    stream: Annotated[bool, typer.Option(help="Print the text while it is generated (one prompt only).")] = True,
    dtype: Annotated[
        str | None, typer.Option(help="With --model: dtype of the reference, one of fp64, fp32 (default), fp16, bf16.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="With --model: device of the reference, cpu (default) or cuda; cuda uses our kernels if "
            "Triton is installed."
        ),
    ] = None,
    emulate_rounding: Annotated[
        bool, typer.Option("--emulate-rounding", help="With --bundle: round every tensor to fp16 or bf16 on the CPU.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(help="With --bundle: number of CPU threads.", show_default="all")
    ] = None,
    engine: Annotated[
        EngineChoice,
        typer.Option(
            help="With --bundle: engine to use; auto chooses TensorRT if the bundle has a plan that this "
            "machine can run, else ONNX Runtime."
        ),
    ] = "auto",
    json_output: JsonFlag = False,
) -> None:
    """Generate text with the reference or with an engine.

    Example: logitlock generate --bundle engines/qwen-fp16 --prompt '世界上第二高的山峰是哪座？'
    """
    asked: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
    }
    # From the options alone, before a model is opened.
    config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens, stop_strings=tuple(stop or ())
    )
    Sampling(**{"temperature": 1.0, **{name: value for name, value in asked.items() if value is not None}})
    prompts = read_prompts(prompt, prompt_file)
    if not prompts:
        raise LogitLockError("there is no prompt: give --prompt TEXT or --prompt-file FILE")
    if (model is None) == (bundle is None):
        raise LogitLockError("give either --model (the reference) or --bundle (an engine)")
    if bundle is not None:
        if dtype is not None or device is not None:
            raise LogitLockError("--dtype and --device are for --model; a bundle has its own precision and an --engine")
        executor: Engine = open_engine(bundle, engine=engine, emulate_rounding=emulate_rounding, threads=threads)
        directory = bundle
    else:
        assert model is not None
        if emulate_rounding or threads is not None or engine != "auto":
            raise LogitLockError(
                "--emulate-rounding, --threads and --engine are for --bundle; for --model give --dtype"
            )
        source = refmodels.resolve(model)
        decoder = refmodels.load(
            source, dtype=_dtype(dtype or "fp32"), device=check_device("cpu" if device is None else device)
        )
        executor = TorchEngine(decoder, kernels=kernels_serve(decoder))
        directory = source.directory
    tokenizer = tokenizer_in(directory, executor.spec)
    check_token_ids(stop_id or (), executor.spec, "--stop-id")
    stops = (*stop_ids_in(directory, executor.spec, tokenizer, chat=chat), *(stop_id or ()))
    defaults = GenerationDefaults() if no_generation_config else generation_defaults(directory)
    sampling = sampling_of(defaults, **asked, seed=seed)
    config = dataclasses.replace(config, stop_ids=stops, sampling=sampling)
    length = ""
    if max_new_tokens is None and defaults.file is not None and defaults.max_new_tokens is not None:
        config = dataclasses.replace(config, max_new_tokens=defaults.max_new_tokens)
        length = f"; at most {config.max_new_tokens} new tokens ({defaults.file.name})"
    ids = [prompt_ids(text, executor.spec, tokenizer, chat=chat, system=system) for text in prompts]
    check_prompts(executor, ids)
    own = [name for name in asked if asked[name] is None and getattr(sampling, name) != getattr(Sampling(), name)]
    origin = f" ({' and '.join(own)} of {defaults.file.name})" if own and defaults.file is not None else ""
    live = stream and len(prompts) == 1 and not json_output
    if not json_output and LOGGER.isEnabledFor(logging.WARNING):
        print(f"engine: {executor.arithmetic}", file=sys.stderr)
        print(f"sampling: {sampling.describe()}{origin}; stop ids: {_numbers(stops)}{length}", file=sys.stderr)
    results = run_generation(
        executor, tokenizer, ids, config, on_text=(lambda _, text: print(text, end="", flush=True)) if live else None
    )
    if json_output:
        rows = [{"prompt": text, **vars(result)} for text, result in zip(prompts, results, strict=True)]
        document = {"engine": executor.arithmetic, "sampling": vars(sampling), "stop_ids": list(stops), "results": rows}
        print(json.dumps(document, ensure_ascii=False, indent=2))
    elif live:
        print()
    else:
        for text, result in zip(prompts, results, strict=True):
            print(result.text if len(prompts) == 1 else f"> {text}\n{result.text}")


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Directory of a bundle.", show_default=False)],
    json_output: JsonFlag = False,
) -> None:
    """Show the contents of a bundle.

    Example: logitlock inspect engines/qwen-fp16
    """
    inspect_bundle(bundle, json_output=json_output)


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, values)) or "none"


def _dtype(name: str) -> Any:
    if name not in DTYPES:
        raise LogitLockError(f"--dtype is {name!r}; it must be one of {', '.join(DTYPES)}")
    return DTYPES[name]
