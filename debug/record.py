"""`logitlock record`: make a golden case by running Hugging Face `transformers`.

The case has the tensors, and their names, that `debug.golden.verify` reads: prefill logits, the output of the
embedding, of every block and of the final norm, the cache of layer 0, and greedy decoding with upstream's own KV cache.
"""

from __future__ import annotations

import json
import platform
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from debug.capture.prompts import Prompts, left_padded, random_prompts
from debug.comparison.metrics import top_margin
from debug.executors.huggingface import layer_past, load_model, takes_positions, transformers_package
from debug.golden.case import past_layout
from export.progress import Progress, silent
from refmodels.checkpoints.load import resolve
from refmodels.errors import LogitLockError
from refmodels.files import write_directory
from refmodels.path_kinds import hint
from refmodels.spec import ModelSpec

_BLOCKS = ("model.layers", "transformer.h", "transformer.encoder.layers")
_NORMS = ("model.norm", "transformer.ln_f", "transformer.encoder.final_layernorm")
_AXES = {"B": "B", "S": "S", "H": "kv_heads", "D": "head_dim"}


def record_case(
    hf: Path,
    out: Path,
    *,
    prompts: Sequence[str] = (),
    lengths: Sequence[int] = (20, 13),
    steps: int = 12,
    seed: int = 0,
    half: Sequence[str] = (),
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run a Hugging Face model on the CPU and write a golden case.

    Args:
        hf: local directory in Hugging Face layout.
        out: directory to create; it must be missing or empty.  It appears as a whole or not at all.
        prompts: texts, encoded with the model's own tokenizer; none: random ids.
        lengths: number of tokens of each random prompt; shorter prompts are padded on the left.
        steps: number of greedy decode steps with the KV cache.
        seed: random seed for the random ids.
        half: "bf16", "fp16" or both: also run the prefill in these, with the rounding of upstream.
        trust_remote_code: run the Python code in the model's directory.
        progress: told of each forward.
    Returns: the content of meta.json.
    Raises:
        LogitLockError: transformers is not installed, it or LogitLock cannot read the model, the model needs its own
            code without permission, the output directory is not empty, or a prompt is too long for the model.
    """
    if not (hf / "config.json").is_file():
        raise LogitLockError(f"{hf} has no config.json; --hf takes a local directory in Hugging Face layout{hint(hf)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LogitLockError(f"the output {out} exists and is not an empty directory; choose another one")
    if steps < 1 or not lengths or min(lengths) < 1:
        raise LogitLockError(f"steps and lengths must be at least 1, got {steps} and {', '.join(map(str, lengths))}")
    model = load_model(hf, "fp32", trust_remote_code=trust_remote_code)
    variant = _variant(model)
    spec = resolve(hf, variant=variant).spec
    if not prompts:
        _check_length(max(lengths), steps, spec, hf)
    batch = _from_text(hf, prompts, trust_remote_code) if prompts else random_prompts(spec.vocab_size, lengths, seed)
    _check_length(batch.ids.shape[1], steps, spec, hf)
    with write_directory(out, "case") as directory:
        shutil.copyfile(hf / "config.json", directory / "config.json")
        # Before the first forward pass, which overwrites the weight of Baichuan2's head.
        save_file(_weights(model), directory / "model.safetensors", metadata={"format": "pt"})
        tensors = {"input_ids": batch.ids, "attention_mask": batch.mask} | _run(model, spec, batch, steps, progress)
        save_file(_contiguous(tensors), directory / "io.safetensors", metadata={"format": "pt"})
        meta = _meta(hf, model, spec, batch, tensors) | {"steps": steps, "seed": None if prompts else seed}
        meta["half_precision"] = {}
        for name in half:
            del model
            model = load_model(hf, name, trust_remote_code=trust_remote_code)
            rounded = _run(model, spec, batch, 0, progress)
            save_file(_contiguous(rounded), directory / f"io_{name}.safetensors", metadata={"format": "pt"})
            real = batch.mask != 0
            difference = rounded["logits"][real].double() - tensors["logits"][real].double()
            meta["half_precision"][name] = {"max_abs_logit_diff_to_fp32": float(difference.abs().max())}
        if variant:
            meta["variant"] = variant
        (directory / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return meta


def _variant(model: nn.Module) -> dict[str, Any]:
    """Facts that no config key expresses: which of the four Baichuan architectures this code has."""
    if getattr(model.config, "model_type", None) != "baichuan":
        return {}
    kinds = {type(module).__name__ for module in model.modules()}
    return {
        "position": "rope" if any("Rotary" in kind for kind in kinds) else "alibi",
        "norm_head": "NormHead" in kinds,
    }


def _check_length(tokens: int, steps: int, spec: ModelSpec, hf: Path) -> None:
    if tokens + steps > spec.max_positions:
        raise LogitLockError(
            f"{tokens} prompt tokens and {steps} steps are more than the {spec.max_positions} positions of {hf.name}"
        )


def _from_text(hf: Path, prompts: Sequence[str], trust_remote_code: bool) -> Prompts:
    try:
        tokenizer = transformers_package().AutoTokenizer.from_pretrained(
            str(hf), trust_remote_code=trust_remote_code, local_files_only=True
        )
        rows = [list(tokenizer.encode(text)) for text in prompts]
    except Exception as error:
        raise LogitLockError(f"transformers could not make the tokenizer of {hf}: {error}") from error
    if not all(len(row) for row in rows):
        raise LogitLockError("a prompt is empty: it has no tokens")
    pad = getattr(tokenizer, "pad_token_id", None)
    return left_padded(rows, "text", pad if isinstance(pad, int) else 0)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict in fp32, with each storage once: a tied head is not stored."""
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in seen:
            tensors[name] = tensor.contiguous()
        seen.add(key)
    return tensors


def _run(
    model: nn.Module, spec: ModelSpec, batch: Prompts, steps: int, progress: Progress = silent
) -> dict[str, Tensor]:
    """Prefill and greedy steps of upstream, with every tensor under its upstream name."""
    told = takes_positions(model, spec)
    mask = batch.mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    extra: dict[str, Tensor] = {"position_ids": positions} if told else {}
    result: dict[str, Tensor] = dict(extra)
    progress("prefill", 0, max(steps, 1))
    with _quiet(), _hooks(model, spec, batch.ids.shape, result):
        output = model(input_ids=batch.ids, attention_mask=mask, use_cache=True, **extra)
    logits = output.logits
    if not bool(torch.isfinite(logits[mask != 0]).all()):
        raise LogitLockError("the model gives NaN or Inf logits; such a run cannot be a golden case")
    result["logits"] = logits
    past = output.past_key_values
    for name, tensor in zip(("key", "value"), layer_past(past, 0), strict=True):
        result[f"past.0.{name}"] = tensor.clone()
    if not steps:
        return result
    token, position = logits[:, -1:].argmax(-1), positions[:, -1:]
    ids, step_logits, step_positions = [], [], []
    for step in range(steps):
        progress("decode", step, steps)
        mask = torch.cat((mask, torch.ones_like(token)), 1)
        position = position + 1
        extra = {"position_ids": position} if told else {}
        with _quiet():
            output = model(input_ids=token, attention_mask=mask, past_key_values=past, use_cache=True, **extra)
        past = output.past_key_values
        ids.append(token)
        step_logits.append(output.logits[:, -1:])
        step_positions.append(position)
        token = output.logits[:, -1:].argmax(-1)
    result |= {"decode_ids": torch.cat(ids, 1), "decode_logits": torch.cat(step_logits, 1)}
    if told:
        result["decode_position_ids"] = torch.cat(step_positions, 1)
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Inference without the announcements of transformers about its next versions."""
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextmanager
def _hooks(model: nn.Module, spec: ModelSpec, shape: torch.Size, into: dict[str, Tensor]) -> Iterator[None]:
    """Keep the input of the first block, the output of every block, and the output of the final norm."""
    blocks, norm = _submodule(model, _BLOCKS), _submodule(model, _NORMS)
    layers = list(blocks.children())
    if len(layers) != spec.layers:
        raise LogitLockError(f"the model has {len(layers)} blocks; its config.json says {spec.layers}")

    def keep(name: str, value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        # ChatGLM2 computes sequence first.
        tensor = tensor.transpose(0, 1) if spec.family == "chatglm2" else tensor
        if tensor.shape[:2] != shape:
            raise LogitLockError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)} and the hidden size")
        into[name] = tensor.detach().clone()

    with ExitStack() as stack:

        def hook(handle: Any) -> None:
            stack.callback(handle.remove)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            keep("hidden_states.0", args[0] if args else kwargs["hidden_states"])

        def after(name: str) -> Any:
            return lambda _module, _args, value: keep(name, value)

        hook(layers[0].register_forward_pre_hook(before, with_kwargs=True))
        for i, layer in enumerate(layers):
            hook(layer.register_forward_hook(after(f"hidden_states.{i + 1}")))
        hook(norm.register_forward_hook(after("final_norm")))
        yield


def _submodule(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    for path in paths:
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise LogitLockError(f"{type(model).__name__} has none of the submodules {', '.join(paths)}; it cannot be recorded")


def _meta(hf: Path, model: nn.Module, spec: ModelSpec, batch: Prompts, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    greedy = torch.cat((tensors["logits"][:, -1:], tensors["decode_logits"]), 1)
    kind = type(model)
    return {
        "case": hf.resolve().name,
        "upstream": {"module": kind.__module__.split(".", 1)[-1], "class": kind.__name__},
        "versions": {
            "transformers": transformers_package().__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": "cpu",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "prompts": batch.origin,
        "lengths": batch.mask.sum(1).tolist(),
        "min_top2_margin_greedy": float(top_margin(greedy).min()),
        "past_layout": f"[{', '.join(_AXES[axis] for axis in past_layout({}, spec))}]",
    }


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
