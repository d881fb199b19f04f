"""The table of taps: every tap of every toy has the kind, module, inputs and shape that a run of the model shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import refmodels
from refmodels.model import Attention, Block, Decoder, Mlp, RmsNorm
from refmodels.recorder import Recorder, recording
from refmodels.taps import Tap, is_cache_tap, split_name, tap_names
from refmodels.toys import TOYS

_MODULES: Mapping[str, type[nn.Module] | tuple[type[nn.Module], ...]] = {
    "embed": nn.Embedding,
    "norm": (RmsNorm, nn.LayerNorm),
    "linear": nn.Linear,
    "cache": Attention,
    "attention": Attention,
    "activation": Mlp,
    "residual": Block,
}
_BATCH, _TOKENS, _CAPACITY = 2, 5, 8


@pytest.fixture(scope="module", params=TOYS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return refmodels.load(request.param)


@torch.no_grad()
def run(decoder: Decoder, recorder: Recorder) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.spec.vocab_size, (_BATCH, _TOKENS), generator=generator)
    with recording(recorder):
        decoder.step(ids, decoder.new_cache(batch=_BATCH, capacity=_CAPACITY), last_logits_only=True)


class _Placed(Recorder):
    """Records as well which module was running, and what the modules returned."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self.places: dict[str, str] = {}
        self.outputs: dict[str, Tensor] = {}

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        self.places[name] = self.running[-1]
        return super().__call__(name, tensor)

    @contextmanager
    def watching(self, decoder: Decoder) -> Iterator[None]:
        def leave(name: str, output: object) -> None:
            assert self.running.pop() == name
            if isinstance(output, Tensor):
                self.outputs[name] = output

        hooks = []
        for name, module in decoder.named_modules():
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name)))
            hooks.append(module.register_forward_hook(lambda *given, name=name: leave(name, given[-1])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def wrong_facts(decoder: Decoder, table: Mapping[str, Tap]) -> list[str]:
    """The taps whose kind, module or shape a run contradicts."""
    recorder = _Placed()
    with recorder.watching(decoder):
        run(decoder, recorder)
    sizes = {"batch": _BATCH, "tokens": _TOKENS, "logit_tokens": 1, "capacity": _TOKENS}  # only live slots are recorded
    wrong = []
    for name, tensor in recorder.tensors.items():
        tap, module = table[name], decoder.get_submodule(table[name].module)
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in tap.shape]
        if tap.kind in ("norm", "linear"):
            made = torch.equal(recorder.outputs[tap.module], tensor)
        elif tap.kind == "embed":
            made = tap.module in recorder.outputs and recorder.places[name] == ""
        else:
            made = recorder.places[name] == tap.module
        per_token = tensor.numel() // (shape[0] * (shape[2] if tap.kind == "cache" else shape[1]))
        right = made and isinstance(module, _MODULES[tap.kind]) and list(tensor.shape) == shape
        if not right or tap.width != per_token:
            wrong.append(name)
    return wrong


def readers(decoder: Decoder, of: str) -> set[str]:
    """The taps that change when the tap `of` does, while every module runs on the recorded tensors."""
    before = Recorder()
    run(decoder, before)
    noise = torch.randn(before.tensors[of].shape, generator=torch.Generator().manual_seed(1))
    after = Recorder(substitutes=before.tensors | {of: before.tensors[of] + noise})
    run(decoder, after)
    return {name for name, tensor in after.tensors.items() if not torch.equal(tensor, before.tensors[name])}


def test_order_kind_module_and_shape(decoder: Decoder) -> None:
    recorder = Recorder()
    run(decoder, recorder)
    assert tuple(recorder.tensors) == tap_names(decoder.spec) == tuple(decoder.spec.taps)
    assert wrong_facts(decoder, decoder.spec.taps) == []


@pytest.mark.slow
def test_what_every_tap_reads(decoder: Decoder) -> None:
    """A cache tensor is not read: attention reads the cache that it was given, which holds the new tokens already."""
    spec = decoder.spec
    edges = {name: {tap.name for tap in spec.taps.values() if name in tap.reads} for name in spec.taps}
    for name, tap in spec.taps.items():
        # All blocks are alike; the last one's output is read by the final norm.
        if tap.kind != "cache" and (tap.layer in (None, 0) or name == f"blocks.{spec.layers - 1}"):
            assert readers(decoder, name) == edges[name], name
        assert [*sorted(tap.reads, key=list(spec.taps).index)] == [*tap.reads]


def test_terms_of_the_dot_products(decoder: Decoder) -> None:
    spec = decoder.spec
    for tap in spec.taps.values():
        if tap.kind == "linear":
            layer = decoder.get_submodule(tap.module)
            assert isinstance(layer, nn.Linear) and tap.sums == (layer.weight.shape[1],), tap.name
        elif tap.kind == "attention":
            assert tap.sums == (spec.attention.head_dim, "slots")
        elif tap.kind == "norm":
            # Of the squares of what it reads.
            assert tap.sums == (decoder.get_submodule(tap.module).weight.shape[0],), tap.name
        else:
            assert tap.sums == ()


def test_a_wrong_table_is_noticed() -> None:
    """The comparison above is itself able to fail."""
    decoder = refmodels.load(TOYS[0])
    right = dict(decoder.spec.taps)
    for name, fact in (
        ("blocks.1.attn.qkv", {"kind": "norm"}),
        ("blocks.1.attn.context", {"module": "blocks.0.attn"}),
        ("blocks.1.key", {"kind": "attention", "module": "blocks.1"}),
        ("blocks.1.mlp.out", {"module": "blocks.0.mlp.out"}),
        ("blocks.1", {"module": "blocks.0"}),
        ("final_norm", {"shape": ("batch", "tokens", decoder.spec.hidden_size)}),
        ("blocks.0.mlp.act", {"shape": ("batch", "tokens", decoder.spec.hidden_size + 1)}),
    ):
        facts = {**vars(right[name]), **fact}
        assert wrong_facts(decoder, {**right, name: Tap(**facts)}) == [name]


def test_linears_are_the_modules_of_linear_taps(decoder: Decoder) -> None:
    own = {name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    assert set(decoder.spec.linears) == own - ({"head"} if decoder.spec.tied_head else set())
    order = [tap.module for tap in decoder.spec.taps.values()]
    assert list(decoder.spec.linears) == sorted(decoder.spec.linears, key=order.index)


def test_names_say_layer_and_part(decoder: Decoder) -> None:
    for name, tap in decoder.spec.taps.items():
        assert split_name(name) == (tap.layer, tap.part)
        assert is_cache_tap(name) == (tap.kind == "cache")


@pytest.mark.parametrize("name", ["blocks", "blocks.x.key", "key", "past.blocks.0.key", "head", ""])
def test_other_names_are_outside_blocks(name: str) -> None:
    assert split_name(name) == (None, name)
    assert not is_cache_tap(name)
