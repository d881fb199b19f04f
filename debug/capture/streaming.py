"""A reference that holds the weights of one stage at a time.

A diff needs each weight once in fp64 and once in the engine's dtype.  Loading stage by stage, in the order of
execution, needs memory for one stage instead of 8 + 2 bytes per parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from refmodels.checkpoints.load import ModelSource, empty_decoder, put_parameter, stream_parameters
from refmodels.model import Decoder
from refmodels.spec import ModelSpec, Numerics


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Modules that run one after another, and the taps that they make.

    first, last: names of the first and the last module to run.  prefixes: name prefixes of their parameters.
    """

    first: str
    last: str
    prefixes: tuple[str, ...]
    taps: tuple[str, ...]


def stages(spec: ModelSpec) -> list[Stage]:
    """All stages in the order of execution: embedding, blocks, and final norm with head."""
    learned = spec.position == "learned"
    found = [
        Stage(
            first="embed",
            last="position_embed" if learned else "embed",
            prefixes=("embed.", "position_embed."),
            taps=("embed",),
        )
    ]
    for i in range(spec.layers):
        block = f"blocks.{i}"
        taps = tuple(tap.name for tap in spec.taps.values() if tap.layer == i)
        found.append(Stage(first=block, last=block, prefixes=(f"{block}.",), taps=taps))
    head = ("final_norm.", "embed." if spec.tied_head else "head.")
    found.append(Stage(first="final_norm", last="head", prefixes=head, taps=("final_norm", "logits")))
    return found


class StreamedDecoder:
    """A decoder whose weights are loaded from a checkpoint stage by stage.

    Args:
        source: the model.
        dtype, numerics: as for `refmodels.load`.
    Raises:
        LogitLockError: as `refmodels.checkpoints.load.stream_parameters`, when a stage is loaded.
    """

    def __init__(self, source: ModelSource, *, dtype: torch.dtype, numerics: Numerics = "exact") -> None:
        self.source, self.dtype, self.numerics = source, dtype, numerics
        self.decoder = empty_decoder(source.spec, numerics=numerics).eval()
        self._load(("final_norm.",))

    @contextmanager
    def running(self) -> Iterator[Decoder]:
        """Inside this context, forward passes of the decoder load each stage before it runs and drop it afterwards."""
        with ExitStack() as hooks, ExitStack() as weights:
            for stage in stages(self.decoder.spec):
                first, last = self.decoder.get_submodule(stage.first), self.decoder.get_submodule(stage.last)

                def enter(*_: object, stage: Stage = stage) -> None:
                    weights.enter_context(self.holding(stage))

                hooks.callback(first.register_forward_pre_hook(enter).remove)
                hooks.callback(last.register_forward_hook(lambda *_: weights.close()).remove)
            yield self.decoder

    @contextmanager
    def holding(self, stage: Stage) -> Iterator[Decoder]:
        """The weights of `stage` are loaded inside this context."""
        self._load(stage.prefixes)
        try:
            yield self.decoder
        finally:
            for name, value in list(self.decoder.named_parameters(remove_duplicate=False)):
                if name.startswith((*stage.prefixes, "head.")) and not name.startswith("final_norm."):
                    put_parameter(self.decoder, name, torch.empty_like(value, device="meta"))

    def _load(self, prefixes: tuple[str, ...]) -> None:
        for name, value in stream_parameters(
            self.source, dtype=self.dtype, numerics=self.numerics, prefixes=prefixes
        ):  # fmt: skip
            put_parameter(self.decoder, name, value)
        if self.source.spec.tied_head and "final_norm." in prefixes:
            self.decoder.head.weight = self.decoder.embed.weight


Reference = Decoder | StreamedDecoder
"""The reference with all its weights in memory, or with those of one stage at a time."""


@contextmanager
def ready(reference: Reference) -> Iterator[Decoder]:
    """A decoder whose forward passes can run inside this context."""
    if isinstance(reference, StreamedDecoder):
        with reference.running() as decoder:
            yield decoder
    else:
        yield reference


@contextmanager
def ready_at(reference: Reference, tap: str, *, alone: bool = False) -> Iterator[Decoder]:
    """A decoder that has, inside this context, the weights of the stage that makes `tap`; `alone`: only the tap's
    own."""
    if isinstance(reference, StreamedDecoder):
        stage = next(s for s in stages(reference.decoder.spec) if tap in s.taps)
        with reference.holding(replace(stage, prefixes=(f"{tap}.",)) if alone else stage) as decoder:
            yield decoder
    else:
        yield reference


def decoder_of(reference: Reference) -> Decoder:
    """The decoder for its facts (spec, dtype, numerics); its weights may not be loaded."""
    return reference.decoder if isinstance(reference, StreamedDecoder) else reference
