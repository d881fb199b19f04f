"""Hugging Face `transformers` as an executor: taps from module hooks, its own cache filled from the caller's.

The family's checkpoint layout (`refmodels.checkpoints.weights.Layout`) names every module, and so the place of every
tap: the outputs of norms and projections; the input of a norm or the output of a block for the residual stream; the
input of the output projections for the attention's context and the MLP's activation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from debug.executors.step import CacheAxes, ForeignStep, regroup_heads
from debug.golden.case import past_layout
from refmodels.cache import KVCache, StepInputs
from refmodels.checkpoints.weights import Layout
from refmodels.dtypes import DTYPES, torch_name
from refmodels.errors import LogitLockError
from refmodels.families import FAMILIES
from refmodels.json_records import read_json
from refmodels.path_kinds import hint
from refmodels.recorder import Recorder
from refmodels.spec import ModelSpec
from refmodels.taps import is_cache_tap, tap_names
from trt_runtime.engine import Engine

_SEQUENCE_FIRST = ("chatglm2",)
"""Families whose upstream code computes [tokens, batch, width]."""


def load_model(directory: Path, dtype: str, *, trust_remote_code: bool = False) -> nn.Module:
    """A model of `transformers` on the CPU, in eval mode, with eager attention.

    Args:
        directory: in Hugging Face layout.
        dtype: fp64, fp32, fp16 or bf16.
        trust_remote_code: run the Python code in the model's directory, if transformers has no own code for the model.
    Raises:
        LogitLockError: transformers is not installed, the model needs its own code without permission, or it cannot be
            loaded.
    """
    transformers = transformers_package()
    settings: dict[str, Any] = {}
    if not (directory / "config.json").is_file():
        raise LogitLockError(
            f"{directory} has no config.json; a model directory in Hugging Face layout has one{hint(directory)}"
        )
    config = read_json(directory / "config.json")
    remote = "auto_map" in config and config.get("model_type") not in transformers.CONFIG_MAPPING
    if remote and not trust_remote_code:
        raise LogitLockError(
            f"{directory} needs the Python code in its own directory; read that code and pass --trust-remote-code to "
            "run it"
        )
    if not remote:
        settings["attn_implementation"] = "eager"
    if config.get("model_type") == "qwen":
        # Its constructor casts the model according to these flags, and probes a GPU if none is set.
        settings |= {name: name == dtype for name in ("fp32", "bf16", "fp16")}
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            **settings,
        )
    except Exception as error:
        # The loader of transformers, or remote code, may raise anything.
        raise LogitLockError(f"transformers could not load {directory}: {error}") from error
    assert isinstance(model, nn.Module)
    _check_loaded(loaded, directory)
    return model.eval()


_BUFFERS = (".inv_freq", ".attn.bias", ".attn.masked_bias", "future_mask")
"""Constant tensors of published checkpoints; the modeling code recomputes them."""


def _check_loaded(loaded: Mapping[str, Any], directory: Path) -> None:
    """Refuse a checkpoint if transformers initialized missing tensors, or ignored some."""
    kinds = {"lacks the": "missing_keys", "has the unknown": "unexpected_keys", "misfits in the": "mismatched_keys"}
    for what, key in kinds.items():
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in loaded.get(key) or ())
        names = [name for name in names if not name.endswith(_BUFFERS)]
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise LogitLockError(
                f"{directory} {what} tensor{'s' if len(names) > 1 else ''} {some}; transformers would run another "
                "model than the stored one"
            )


def transformers_package() -> Any:
    """The package `transformers`; if it is not installed, an error that says how to install it."""
    try:
        import transformers
    except ImportError as error:
        raise LogitLockError(
            "this runs Hugging Face transformers, which is not installed: pip install 'logitlock[record]'"
        ) from error
    return transformers


def takes_positions(model: nn.Module, spec: ModelSpec) -> bool:
    """Whether the model takes positions; the others count cache slots, or have no positions."""
    parameters = inspect.signature(model.forward).parameters
    return spec.uses_position_ids and spec.position_origin == "token" and "position_ids" in parameters


def layer_past(past: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Key and value of a layer, from a Cache object of transformers or the older tuple of tuples.

    Raises:
        LogitLockError: it is neither of them.
    """
    if hasattr(past, "layers"):
        return past.layers[layer].keys, past.layers[layer].values
    if isinstance(past, (tuple, list)) and len(past[layer]) >= 2:
        return past[layer][0], past[layer][1]
    raise LogitLockError(f"the model returned a cache of an unknown kind: {type(past).__name__}")


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of a tap upstream.

    Attributes:
        modules: paths; the tensors of several are joined along the last axis.
        entering: the tap is the input of the module, not its output.
        half: 0 or 1: the tap is this half of the last axis (gate and up in one projection).
        by_head: the last axis is grouped by head, (query, key, value) of each head together.
    """

    modules: tuple[str, ...]
    entering: bool = False
    half: int | None = None
    by_head: bool = False


def places(spec: ModelSpec, layout: Layout) -> dict[str, Place]:
    """The place of every tap that a module has; cache tensors and logits come from the model's own result."""
    fused_mlp = layout.gate == layout.up
    found: dict[str, Place] = {}
    for i in range(spec.layers):
        ours, theirs = f"blocks.{i}", layout.block.format(i=i)

        def at(*names: str, prefix: str = theirs, **facts: Any) -> Place:
            return Place(modules=tuple(f"{prefix}.{name}" for name in names), **facts)

        if i == 0:
            found["embed"] = Place(modules=(theirs,), entering=True)
        found[f"{ours}.attn_norm"] = at(layout.attn_norm)
        found[f"{ours}.attn.qkv"] = at(*layout.qkv, by_head=layout.fused_by_head)
        if spec.attention.head_norms:
            found[f"{ours}.attn.query_norm"] = at(layout.query_norm)
            found[f"{ours}.attn.key_norm"] = at(layout.key_norm)
        found[f"{ours}.attn.context"] = at(layout.attn_out, entering=True)
        found[f"{ours}.attn.out"] = at(layout.attn_out)
        found[f"{ours}.resid_mid"] = at(layout.mlp_norm, entering=True)
        found[f"{ours}.mlp_norm"] = at(layout.mlp_norm)
        if layout.gate is not None:
            found[f"{ours}.mlp.gate"] = at(layout.gate, half=0 if fused_mlp else None)
        found[f"{ours}.mlp.up"] = at(layout.up, half=1 if fused_mlp else None)
        found[f"{ours}.mlp.act"] = at(layout.mlp_out, entering=True)
        found[f"{ours}.mlp.out"] = at(layout.mlp_out)
        if spec.sandwich_norms:
            found[f"{ours}.attn_post_norm"] = at(layout.attn_post_norm)
            found[f"{ours}.mlp_post_norm"] = at(layout.mlp_post_norm)
        found[ours] = Place(modules=(theirs,))
    return found | {"final_norm": Place(modules=(layout.final_norm,))}


class HuggingFaceEngine(Engine):
    """A model of `transformers` as an executor, with the attention implementation that it was loaded with (eager).

    The caller's cache is the state: for each step, it is converted to upstream's kind of cache, so that a caller may
    change it between steps; upstream's dynamic-NTK state (Qwen), which is in its module, is the exception.  Taps whose
    module does not exist upstream are missing in `tap_names`, and `arithmetic` says which.

    Args:
        model: a directory in Hugging Face layout, or a loaded model for causal language modelling.
        spec: architecture facts; they must be the model's.
        dtype: fp64, fp32, fp16 or bf16; a loaded model keeps its own.
        trust_remote_code: as `load_model`.
        device: where to run.
    Raises:
        LogitLockError: as `load_model`; or the model and the spec have different numbers of layers.
    """

    def __init__(
        self,
        model: Path | str | nn.Module,
        spec: ModelSpec,
        dtype: str = "fp32",
        *,
        trust_remote_code: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(model, nn.Module):
            model = load_model(Path(model), dtype, trust_remote_code=trust_remote_code)
        self.model = model.to(device).eval()
        self.spec, self.max_positions = spec, spec.max_positions
        parameter = next(model.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        layout = FAMILIES[spec.family].layout(spec)
        modules = dict(model.named_modules())
        layers = sum(1 for path in modules if path in {layout.block.format(i=i) for i in range(spec.layers + 1)})
        if layers != spec.layers:
            raise LogitLockError(
                f"{type(model).__name__} is not the {spec.variant} of the spec: it has {layers or 'no'} modules "
                f"{layout.block.format(i='N')}, the spec says {spec.layers} layers"
            )
        self._places = {
            tap: place for tap, place in places(spec, layout).items() if all(m in modules for m in place.modules)
        }
        names = tap_names(spec)
        absent = [n for n in names if n not in self._places and n != "logits" and not is_cache_tap(n)]
        self.tap_names = tuple(n for n in names if n not in absent)
        self._takes_positions = takes_positions(model, spec)
        self._axes = CacheAxes("".join(past_layout({}, spec)))
        self._legacy = self._returns_tuples()
        self.arithmetic = self._describe(absent)

    def _describe(self, absent: list[str]) -> str:
        attention = getattr(getattr(self.model, "config", None), "_attn_implementation", None)
        text = f"transformers {transformers_package().__version__} {type(self.model).__name__} on {self.device.type} "
        text += f"in {torch_name(self.dtype)}" + (f", {attention} attention" if attention else "")
        return text + (f"; it shows no {', '.join(absent)}" if absent else "")

    def _returns_tuples(self) -> bool:
        """Whether the cache is the tuple of tuples of older code: found by running one token, since no config says
        it."""
        if type(self.model).__module__.startswith("transformers.models."):
            return False
        one = torch.ones(1, 1, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            past = self.model(input_ids=0 * one, attention_mask=one, use_cache=True).past_key_values
        return not hasattr(past, "layers")

    def run(self, step: StepInputs, cache: KVCache, *, recorder: Recorder | None = None) -> Tensor:
        foreign = ForeignStep(step, cache, recorder)
        foreign.check_appended("transformers")
        inputs = {"input_ids": step.input_ids, "attention_mask": foreign.appended_mask()}
        if self._takes_positions and step.position_ids is not None:
            inputs["position_ids"] = step.position_ids
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        with torch.no_grad(), ExitStack() as stack:
            if recorder is not None:
                self._hook(stack, foreign)
            output = self.model(**inputs, past_key_values=self._past(foreign), use_cache=True)
        if self._legacy:
            for i in range(self.spec.layers):
                for part, tensor in zip(("key", "value"), layer_past(output.past_key_values, i), strict=True):
                    foreign.write(f"blocks.{i}.{part}", self._axes.to_ours(tensor)[:, :, foreign.past_slots :])
        logits = foreign.logits_of(output.logits)
        foreign.deliver("logits", logits)
        cache.advance(step)
        return logits

    def _past(self, foreign: ForeignStep) -> Any:
        """Upstream's cache, filled from the caller's; it reports additions to `foreign`."""
        length, cache = foreign.past_slots, foreign.cache
        if self._legacy:
            if not length:
                return None
            pairs = zip(cache.key, cache.value, strict=True)
            return tuple(tuple(self._axes.from_ours(t[:, :, :length]) for t in pair) for pair in pairs)
        past = transformers_package().DynamicCache(config=self.model.config)
        if length:
            for i, (key, value) in enumerate(zip(cache.key, cache.value, strict=True)):
                past.update(key[:, :, :length].clone(), value[:, :, :length].clone(), i)
        update = past.update

        def updated(key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            # Only here are all new tokens visible: a sliding layer keeps only the last ones.
            foreign.write(f"blocks.{layer_idx}.key", key)
            foreign.write(f"blocks.{layer_idx}.value", value)
            return update(key, value, layer_idx, *args, **kwargs)

        past.update = updated
        return past

    def _hook(self, stack: ExitStack, foreign: ForeignStep) -> None:
        for tap, place in self._places.items():
            seen = self._watch(foreign, tap, place)
            for path in place.modules:
                module = self.model.get_submodule(path)
                if place.entering:
                    handle = module.register_forward_pre_hook(_entering(path, seen), with_kwargs=True)
                else:
                    handle = module.register_forward_hook(_leaving(path, seen))
                stack.callback(handle.remove)

    def _watch(self, foreign: ForeignStep, tap: str, place: Place) -> _Seen:
        """A hook that takes a module's path and tensor; the tap is reported when all its modules have run."""
        parts: dict[str, Tensor] = {}

        def seen(path: str, value: Any) -> None:
            tensor = value[0] if isinstance(value, tuple) else value
            parts[path] = tensor.transpose(0, 1) if self.spec.family in _SEQUENCE_FIRST else tensor
            if len(parts) < len(place.modules):
                return
            whole = parts[path] if len(parts) == 1 else torch.cat([parts[m] for m in place.modules], -1)
            parts.clear()
            if place.half is not None:
                whole = whole.chunk(2, -1)[place.half]
            if place.by_head:
                whole = regroup_heads(whole, self.spec.attention.heads)
            # The norms of heads see [batch, tokens, heads, head_dim].
            whole = whole.flatten(2)
            foreign.deliver(tap, foreign.logits_of(whole) if tap == "final_norm" else whole)

        return seen


_Seen = Callable[[str, Any], None]


def _entering(path: str, seen: _Seen) -> Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], None]:
    return lambda _, args, kwargs: seen(path, args[0] if args else next(iter(kwargs.values())))


def _leaving(path: str, seen: _Seen) -> Callable[[nn.Module, Any, Any], None]:
    return lambda _, args, value: seen(path, value)
