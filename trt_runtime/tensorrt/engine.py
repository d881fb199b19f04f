"""The GPU engine: a bundle's TensorRT plan, caches updated in place, repeated steps as CUDA graphs.

A plan reads and writes caches of a fixed capacity: the memory of the cache's torch tensors is bound as `past.*` input
and as cache output at once.  A step whose shapes and caches were seen before is captured and replayed; so that decode
steps repeat although the cache grows, the mask is padded to a multiple of `BUCKET` slots.
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refmodels.cache import KVCache, StepInputs
from refmodels.dtypes import DTYPES, torch_name
from refmodels.errors import LogitLockError
from refmodels.recorder import Recorder
from refmodels.taps import is_cache_tap, tap_names
from trt_runtime.bundle import KERNELS_NAME, PLAN_NAME, TAPS_PLAN_NAME, Bundle, EngineInfo, Profile, read_bundle
from trt_runtime.engine import Engine
from trt_runtime.tensorrt.plan import CudaStream, TensorRTPlan, join_messages

BUCKET = 256
"""Masks are padded to a multiple of this number of slots."""
_BOTH_PLANS_BYTES = 2 << 30
"""Maximum size, in bytes, at which the tapped and the untapped plan stay loaded together."""
_HINT = "`--engine onnxruntime` runs the bundle on the CPU"


class TensorRTEngine(Engine):
    """A bundle's TensorRT engine on torch's current CUDA device.

    Args:
        bundle: a bundle or its directory, exported with `--backend tensorrt`.
    Raises:
        LogitLockError: as `read_bundle`; there is no plan, no CUDA device or no TensorRT; the plan is for another
            TensorRT package, version or GPU, calls a plugin that is not there, or is damaged.
    """

    def __init__(self, bundle: Bundle | Path | str) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
        info = self.bundle.info
        if info.engine is None:
            raise LogitLockError(
                f"{self.bundle.directory} has no TensorRT engine; export it with --backend tensorrt, or {_HINT}"
            )
        if not torch.cuda.is_available():
            raise LogitLockError(f"a TensorRT engine needs a CUDA GPU, and PyTorch finds none here; {_HINT}")
        from trt_runtime.tensorrt.api import IS_RTX, package_version, trt

        check_package(info.engine.package, package_version())
        members = trt.ComputeCapability.__members__ if IS_RTX else None
        check_device(info.engine, torch.cuda.get_device_capability(), members)
        self.built: EngineInfo = info.engine
        self.spec, self.max_positions = self.bundle.spec, info.engine.max_seq
        self.dtype = DTYPES[info.precision]
        self.device = current_device()
        self.tap_names = tuple(name for name in tap_names(self.spec) if name in info.taps)
        name = torch_name(self.dtype)
        self.arithmetic = f"TensorRT ({package_version()}) in {name} on {torch.cuda.get_device_name()}"
        self._plans: dict[bool, TensorRTPlan] = {}
        self._plan(tapped=False)

    def new_cache(self, *, batch: int, capacity: int) -> KVCache:
        """An empty cache; its capacity is always `max_positions`, which the plan was built for."""
        if batch > self.built.max_batch:
            raise LogitLockError(
                f"a batch of {batch} rows is more than the {self.built.max_batch} that this engine was built for; "
                "export it with a larger --max-batch"
            )
        if capacity > self.max_positions:
            raise LogitLockError(
                f"a cache of {capacity} tokens is longer than the {self.max_positions} that this engine was built for; "
                "export it with a larger --max-seq"
            )
        return super().new_cache(batch=batch, capacity=self.max_positions)

    def prefill(
        self,
        input_ids: Tensor,
        cache: KVCache,
        attention_mask: Tensor | None = None,
        *,
        last_logits_only: bool = False,
        chunk: int | None = None,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """As `Engine.prefill`; a prompt longer than the engine's `--max-input` runs in chunks."""
        longest = self.built.max_input
        return super().prefill(
            input_ids,
            cache,
            attention_mask,
            last_logits_only=last_logits_only,
            chunk=longest if chunk is None else min(chunk, longest),
            recorder=recorder,
        )

    def run(self, step: StepInputs, cache: KVCache, *, recorder: Recorder | None = None) -> Tensor:
        self._check_cache(cache)
        executor = self._plan(tapped=recorder is not None)
        batch, tokens = step.input_ids.shape
        inputs = step.tensors() | {"attention_mask": pad_slots(step.attention_mask, self.max_positions)}
        caches = cache.by_tap()
        profile = choose_profile(self.bundle.info.profiles, batch=batch, tokens=tokens)
        outputs = executor.run(profile, inputs, caches, repeats=recorder is None)
        cache.advance(step)
        if recorder is not None:
            self._deliver(recorder, outputs | caches, step)
        # The outputs of a captured step are overwritten by its next replay.
        return outputs["logits"].clone()

    def _deliver(self, recorder: Recorder, tensors: Mapping[str, Tensor], step: StepInputs) -> None:
        recorder.live_slots = step.attention_mask.shape[1]
        for name in self.tap_names:
            if recorder(name, tensors[name]) is not tensors[name]:
                raise LogitLockError(f"the recorder substitutes {name}, which only the reference can do")

    def _check_cache(self, cache: KVCache) -> None:
        buffer = cache.key[0]
        if (cache.spec, cache.capacity, buffer.dtype) != (self.spec, self.max_positions, self.dtype) or (
            buffer.device != self.device
        ):
            raise LogitLockError(
                f"this cache ({cache.spec.variant}, {buffer.dtype}, {cache.capacity} tokens, {buffer.device}) is not "
                f"one of {self.spec.variant} in {self.dtype} with {self.max_positions} tokens on {self.device}; use "
                "the engine's new_cache"
            )

    def _plan(self, *, tapped: bool) -> TensorRTPlan:
        if tapped not in self._plans:
            files = self.bundle.info.files
            if tapped and not self.built.taps_plan:
                raise LogitLockError(
                    f"the TensorRT engine in {self.bundle.directory} shows no intermediate tensors; export it with "
                    f"--taps, or {_HINT}"
                )
            sizes = [files[name].bytes for name in (PLAN_NAME, TAPS_PLAN_NAME) if name in files]
            if sum(sizes) > _BOTH_PLANS_BYTES:
                self._plans.clear()
            self._plans[tapped] = self._open(TAPS_PLAN_NAME if tapped else PLAN_NAME, tapped=tapped)
        return self._plans[tapped]

    def _open(self, name: str, *, tapped: bool) -> TensorRTPlan:
        engine = load_plan(self.bundle.directory, name, self.built)
        return TensorRTPlan(
            engine,
            step_inputs=[i.name for i in self.bundle.info.inputs if not i.name.startswith("past.")],
            outputs=["logits", *(t for t in self.tap_names if tapped and not is_cache_tap(t) and t != "logits")],
            caches=[tap.name for tap in self.spec.taps.values() if tap.kind == "cache"],
            device=self.device,
            stream=CudaStream(),
        )


def current_device() -> torch.device:
    """Where a plan runs: torch's current CUDA device."""
    return torch.device("cuda", torch.cuda.current_device())


# Decisions that need no GPU


def check_package(built: str, installed: str) -> None:
    """Compare the TensorRT that built a plan with the one here, each as 'tensorrt_rtx 1.7.1.116'.

    Raises:
        LogitLockError: the package or its version differs: a plan serves one version.
    """
    if built == installed:
        return
    what = "package" if built.split()[0] != installed.split()[0] else "version"
    raise LogitLockError(
        f"the engine was built by another TensorRT {what}: built by {built}, installed is {installed}; export the "
        "bundle again here, or install that one"
    )


def check_device(built: EngineInfo, capability: tuple[int, int], supported: Mapping[str, Any] | None) -> None:
    """Compare the GPUs that a plan was built for with the one here.

    Args:
        capability: of the device, as (8, 9).
        supported: names, such as 'SM89', of all GPUs that the package serves; None: it does not list them (full
            TensorRT).
    Raises:
        LogitLockError: this GPU is not among them.
    """
    here = f"{capability[0]}.{capability[1]}"
    if supported is not None and f"SM{here.replace('.', '')}" not in supported:
        known = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in supported if name[2:].isdigit())
        raise LogitLockError(
            f"TensorRT-RTX does not serve this GPU of compute capability {here}; it serves {known}; use full TensorRT, "
            f"or {_HINT}"
        )
    if built.compute_capabilities and here not in built.compute_capabilities:
        raise LogitLockError(
            f"the engine was built for compute capability {', '.join(built.compute_capabilities)}, this GPU has "
            f"{here}; export it with --compute-capability {here}"
        )


def choose_profile(profiles: Sequence[Profile], *, batch: int, tokens: int) -> int:
    """Index of the narrowest profile that serves a step of `batch` rows and `tokens` tokens per row.

    Raises:
        LogitLockError: no profile does.
    """
    serving = [
        (profile.tokens[1], index)
        for index, profile in enumerate(profiles)
        if profile.batch[0] <= batch <= profile.batch[1] and profile.tokens[0] <= tokens <= profile.tokens[1]
    ]
    if not serving:
        most = " or ".join(f"{p.batch[1]} rows of {p.tokens[1]} tokens ({p.name})" for p in profiles)
        raise LogitLockError(
            f"a step of {batch} rows of {tokens} tokens is more than this engine was built for: {most}; use shorter "
            "chunks, or export it with a larger --max-batch or --max-input"
        )
    return min(serving)[1]


def pad_slots(mask: Tensor, capacity: int) -> Tensor:
    """[batch, slots] padded with zeros (hidden slots) to a multiple of `BUCKET`, at most `capacity`."""
    slots = mask.shape[1]
    wanted = min(-(-slots // BUCKET) * BUCKET, capacity)
    return F.pad(mask, (0, wanted - slots))


def load_plan(directory: Path, name: str, built: EngineInfo) -> Any:
    """Deserialize a plan, with our plugins and the bundle's kernels.

    Raises:
        LogitLockError: a plugin is missing, or TensorRT refuses the plan; with its reason.
    """
    from trt_runtime.tensorrt.api import LOGGER, errors_of
    from trt_runtime.tensorrt.plugins import check_plugins, raise_failure, use_compiled

    check_plugins(built.plugins)
    kernels: Any = nullcontext()
    if built.plugins:
        from trt_runtime.kernels.compiled import CompiledKernels

        kernels = use_compiled(CompiledKernels.load(directory / KERNELS_NAME))
    path = directory / name
    with LOGGER.collect() as messages, kernels, path.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        engine = _runtime().deserialize_cuda_engine(data)
        data.close()
    raise_failure()
    if engine is None:
        reason = join_messages(errors_of(messages))
        raise LogitLockError(f"TensorRT does not load {path}: {reason}; export the bundle again")
    return engine


@functools.cache
def _runtime() -> Any:
    from trt_runtime.tensorrt.api import LOGGER, trt

    return trt.Runtime(LOGGER)
