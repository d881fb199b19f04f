"""The limits of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from refmodels.errors import LogitLockError
from refmodels.spec import MAX_POSITIONS
from trt_runtime.bundle import Profile


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Limits of an engine, and how TensorRT builds it.

    Attributes:
        max_batch: maximum number of rows per step.
        max_input: maximum number of tokens per row and step; longer prompts take several steps.
        max_seq: maximum length of the cache in tokens; TensorRT's caches always have `max_seq` slots.
        workspace: MiB of scratch memory that a kernel may use; None: TensorRT's default.
        optimization_level: TensorRT's builder optimization level, 0 to 5; None: its default.
        compute_capabilities: GPUs to build for, as '8.9' (TensorRT-RTX only); empty: the package's default.
    Raises:
        LogitLockError: a value that no engine can have.
    """

    max_batch: int
    max_input: int
    max_seq: int
    workspace: int | None = None
    optimization_level: int | None = None
    compute_capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_seq", "max_batch", "max_input"):
            if getattr(self, name) < 1:
                raise LogitLockError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.max_seq > MAX_POSITIONS:
            raise LogitLockError(f"--max-seq is {self.max_seq}; it must be at most {MAX_POSITIONS}")
        if self.max_input > self.max_seq:
            raise LogitLockError(f"--max-input is {self.max_input}, more than --max-seq, which is {self.max_seq}")
        if self.workspace is not None and self.workspace < 1:
            raise LogitLockError(f"--workspace is {self.workspace} MiB; it must be at least 1")
        if self.optimization_level not in (None, 0, 1, 2, 3, 4, 5):
            raise LogitLockError(f"--optimization-level is {self.optimization_level}; it must be from 0 to 5")

    def profiles(self) -> list[Profile]:
        """The plan's optimization profiles, in their order."""
        batch, slots = [1, self.max_batch], [self.max_seq, self.max_seq]
        return [
            Profile(name="prefill", batch=batch, tokens=[1, self.max_input], capacity=slots),
            Profile(name="decode", batch=batch, tokens=[1, 1], capacity=slots),
        ]
