"""Loading: every layout and spelling of a checkpoint gives its tensors; every damaged one gives one clear sentence."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import refmodels
from refmodels.checkpoints import load as checkpoint
from refmodels.checkpoints import shards
from tests.support.checkpoints import LAYOUTS, read_case, stored_again, write_model
from tests.support.goldens import CASES, GOLDENS
from tests.support.marks import quick_first

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Prefix and fused rows; transposed; regrouped heads; `model.` and split qkv, tied; no prefix to speak of.
FEATURES = ["chatglm2_b1", "gpt2_b1", "gpt_bigcode_mha_b1", "qwen2_tied_b1", "qwen_b1"]


def matches(decoder: refmodels.Decoder, tensors: dict[str, Tensor]) -> bool:
    again = stored_again(decoder)
    return all(torch.equal(again[name], tensors[name]) for name in again)


@pytest.mark.parametrize("case", quick_first(CASES, 3))
def test_every_parameter_comes_from_its_tensor(case: str) -> None:
    _, tensors, variant = read_case(case)
    decoder = refmodels.load(GOLDENS / case, variant=variant, dtype=torch.float32)
    again = stored_again(decoder)
    if decoder.spec.head_normalized:
        again["lm_head.weight"] = tensors["lm_head.weight"]
    assert {name for name in tensors if "inv_freq" not in name} == set(again)
    assert all(torch.equal(again[name], tensors[name]) for name in again)


@pytest.mark.parametrize("layout", quick_first(LAYOUTS))
@pytest.mark.parametrize("case", quick_first(FEATURES))
def test_layouts(case: str, layout: str, tmp_path: Path) -> None:
    config, tensors, variant = read_case(case)
    assert matches(refmodels.load(write_model(tmp_path, config, tensors, layout), variant=variant), tensors)


@pytest.mark.slow
@FEW
@given(data=st.data())
def test_any_distribution_over_shards(data: st.DataObject, tmp_path: Path) -> None:
    config, tensors, _ = read_case("chatglm2_b1")
    names = data.draw(st.permutations(sorted(tensors)))
    shards = data.draw(st.integers(1, 9))
    layout = data.draw(st.sampled_from(["sharded safetensors", "sharded bin"]))
    shutil.rmtree(tmp_path)
    write_model(tmp_path, config, {name: tensors[name] for name in names}, layout, shards)
    assert matches(refmodels.load(tmp_path), tensors)


@pytest.mark.parametrize("case", quick_first(["qwen_b1", "chatglm2_b1", "gpt2_b1", "qwen2_b1", "starcoder2_b1"]))
@pytest.mark.parametrize("spelling", quick_first(["without", "twice"]))
def test_prefix_absent_or_too_much(case: str, spelling: str, tmp_path: Path) -> None:
    config, tensors, variant = read_case(case)

    def spell(name: str) -> str:
        return (
            f"transformer.{name}" if spelling == "twice" else name.removeprefix("transformer.").removeprefix("model.")
        )

    respelled = {spell(name): tensor for name, tensor in tensors.items()}
    assert set(respelled) != set(tensors)
    assert matches(refmodels.load(write_model(tmp_path, config, respelled), variant=variant), tensors)


def test_known_buffers_are_ignored(tmp_path: Path) -> None:
    config, tensors, _ = read_case("gpt2_b1")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    # As the published gpt2 has them: no prefix, and causal buffers of an integer dtype.
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    assert matches(refmodels.load(write_model(tmp_path, config, bare)), tensors)


@pytest.mark.parametrize("case", ["gpt2_b1", "qwen2_tied_b1"])
def test_a_stored_tied_head_is_ignored(case: str, tmp_path: Path) -> None:
    config, tensors, _ = read_case(case)
    embedding = tensors["transformer.wte.weight" if case == "gpt2_b1" else "model.embed_tokens.weight"]
    # In another dtype, but with the same values.
    decoder = refmodels.load(write_model(tmp_path, config, tensors | {"lm_head.weight": embedding.double()}))
    assert matches(decoder, tensors)
    assert decoder.head.weight is decoder.embed.weight
    write_model(tmp_path, config, tensors | {"lm_head.weight": torch.full((1, 1), math.nan)})
    with pytest.raises(refmodels.LogitLockError, match=r"lm_head.weight in .* has shape \[1, 1\]; config.json says"):
        refmodels.load(tmp_path)


def test_a_tied_head_may_be_the_only_copy(tmp_path: Path) -> None:
    config, tensors, _ = read_case("gpt2_b1")
    moved = {"lm_head.weight" if name.endswith("wte.weight") else name: tensor for name, tensor in tensors.items()}
    assert matches(refmodels.load(write_model(tmp_path, config, moved)), tensors)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", list(refmodels.DTYPES.values()))
def test_dtypes(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen_b1")
    write_model(tmp_path, config, {name: tensor.to(stored) for name, tensor in tensors.items()})
    expected = {name: tensor.to(stored).to(dtype) for name, tensor in tensors.items()}
    assert matches(refmodels.load(tmp_path, dtype=dtype), expected)


def test_parameters_stored_as_nn_parameters(tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen_b1")
    write_model(tmp_path, config, {n: torch.nn.Parameter(t) for n, t in tensors.items()}, "bin")
    with torch.enable_grad():
        assert not any(value.requires_grad for _, value in stream(tmp_path))
        assert matches(refmodels.load(tmp_path), tensors)


def test_a_loaded_model_is_ready() -> None:
    decoder = refmodels.load(GOLDENS / "gpt2_b1", dtype=torch.bfloat16, numerics="upstream")
    assert decoder.numerics == "upstream"
    assert decoder.dtype is torch.bfloat16
    assert not decoder.training
    for name, parameter in decoder.named_parameters():
        assert parameter.device.type == "cpu", name
        assert parameter.is_contiguous(), name
        assert not parameter.requires_grad, name
    assert not list(decoder.buffers())


def test_loading_by_path_source_and_string_is_the_same() -> None:
    folder = GOLDENS / "qwen_b1"
    source = refmodels.resolve(folder)
    assert source.name == "qwen_b1"
    assert source.spec == refmodels.resolve(str(folder)).spec
    for model in (folder, str(folder), source):
        assert matches(refmodels.load(model), read_case("qwen_b1")[1])


def stream(folder: Path, **options: Any) -> Iterator[tuple[str, Tensor]]:
    options.setdefault("dtype", torch.float32)
    return refmodels.stream_parameters(refmodels.resolve(folder), **options)


def test_the_stream_has_the_order_of_the_decoder_and_no_tied_head() -> None:
    for case in FEATURES:
        names = [name for name, _ in stream(GOLDENS / case)]
        assert names == [name for name, _ in refmodels.load(GOLDENS / case).named_parameters()]
        assert ("head.weight" in names) == (not refmodels.resolve(GOLDENS / case).spec.tied_head)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
@pytest.mark.parametrize("layout", quick_first(LAYOUTS[:4]))
def test_streaming_keeps_no_mapping_of_what_it_has_read(layout: str, tmp_path: Path) -> None:
    config, tensors, _ = read_case("chatglm2_b1")
    write_model(tmp_path, config, tensors, layout)
    held = []
    for _ in stream(tmp_path):
        maps = Path("/proc/self/maps").read_text()
        held.append(len({line.split()[-1] for line in maps.splitlines() if str(tmp_path) in line}))
    # A .bin file stays mapped until enough has been read from it; a safetensors file does not.
    assert max(held) == (1 if layout.endswith("bin") else 0)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_bin_files_are_opened_again_only_where_that_saves_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors, _ = read_case("qwen_b1")
    opened: list[str] = []
    load_bin = shards._load_bin

    def counting(file: Path) -> dict[str, Tensor]:
        opened.append(file.name)
        return load_bin(file)

    monkeypatch.setattr(shards, "_load_bin", counting)

    def count(layout: str, limit: int) -> int:
        opened.clear()
        monkeypatch.setattr(shards, "_REOPEN_BYTES", limit)
        assert matches(refmodels.load(write_model(tmp_path / layout, config, tensors, layout)), tensors)
        return len(opened)

    assert count("bin", 2**30) == 1
    assert count("bin", 1) == len([name for name in tensors if "inv_freq" not in name])
    # Bare pickles are read as a whole: again would only cost time.
    assert count("legacy bin", 1) == 1


# ------------------------------------------------------------------------------------------------ normalized heads


@pytest.mark.parametrize("dtype", quick_first(list(refmodels.DTYPES.values()), 3))
def test_normalized_head(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tensors, variant = read_case("baichuan2_7b_b1")
    rows = tensors["lm_head.weight"]
    monkeypatch.setattr(checkpoint, "_ROWS_AT_ONCE", 7)

    def head(numerics: Any) -> Tensor:
        return refmodels.load(GOLDENS / "baichuan2_7b_b1", variant=variant, dtype=dtype, numerics=numerics).head.weight

    assert torch.equal(head("upstream"), torch.nn.functional.normalize(rows.to(dtype)))
    wide = rows.double()
    exact = (wide / wide.square().sum(1, keepdim=True).sqrt()).to(dtype)
    assert (head("exact") - exact).abs().max() <= (1e-15 if dtype is torch.float64 else 0)
    if dtype in (torch.bfloat16, torch.float16):
        assert not torch.equal(head("upstream"), head("exact"))


def test_zero_rows_of_a_normalized_head_stay_zero(tmp_path: Path) -> None:
    config, tensors, variant = read_case("baichuan2_7b_b1")
    tensors["lm_head.weight"][3] = 0
    write_model(tmp_path, config, tensors)
    for numerics in ("exact", "upstream"):
        assert not refmodels.load(tmp_path, variant=variant, numerics=numerics).head.weight[3].any()


# ------------------------------------------------------------------------------------------------------- identity


def test_hash_follows_the_contents_and_nothing_else(tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen_b1")

    def identity(folder: str, layout: str = "sharded safetensors") -> str:
        return refmodels.checkpoint_hash(refmodels.resolve(write_model(tmp_path / folder, config, tensors, layout)))

    first = identity("first")
    assert first == identity("elsewhere")
    assert len(first) == 64
    assert first != identity("other", "safetensors")
    tensors["lm_head.weight"][5, 5] += 2**-20
    assert first != identity("first")
