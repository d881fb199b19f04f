"""Specs and families: configs that are read, configs that are refused, and the size of a family's file."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from refmodels.errors import LogitLockError
from refmodels.families import FAMILIES, family_of, spec_from_config
from refmodels.model import Decoder
from refmodels.spec import spec_from_dict
from tests.support.goldens import CASES, GOLDENS, case_source
from tests.support.paths import ROOT

FAMILY_FILES = ROOT / "refmodels" / "families"


def config_of(case: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    config = json.loads((GOLDENS / case / "config.json").read_text())
    return config, json.loads((GOLDENS / case / "meta.json").read_text()).get("variant")


@pytest.mark.parametrize("case", CASES)
def test_spec_survives_json_and_names_every_parameter(case: str) -> None:
    import torch

    config, variant = config_of(case)
    spec = spec_from_config(config, variant=variant)
    assert spec_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    weights = family_of(config).weights(spec)
    with torch.device("meta"):
        parameters = dict(Decoder(spec).named_parameters())
    assert set(weights) == set(parameters)
    for name, parts in weights.items():
        assert sum(p.row_count for p in parts) == parameters[name].shape[0], name


def test_variants_are_told_apart() -> None:
    found = {case: spec_from_config(*[config_of(case)[0]], variant=config_of(case)[1]).variant for case in CASES}
    assert {found[c] for c in ("baichuan_7b", "baichuan_13b", "baichuan2_7b", "baichuan2_13b")} == {
        "baichuan-7b", "baichuan-13b", "baichuan2-7b", "baichuan2-13b",
    }  # fmt: skip
    assert found["chatglm3_128k"] == "chatglm3-long" and found["glm4_remote_b1"] == "glm4"
    assert found["chatglm2_32k"] == "chatglm2-32k" and found["qwen2"] == "qwen2" and found["gpt2"] == "gpt2"


def test_real_vocabularies_decide_norm_head_and_others_must_say() -> None:
    config, _ = config_of("baichuan2_7b")
    assert spec_from_config(config | {"vocab_size": 125696}).head_normalized
    assert not spec_from_config(config | {"vocab_size": 64000}).head_normalized
    assert spec_from_config(config | {"norm_head": True}).head_normalized
    with pytest.raises(LogitLockError, match="neither 64000 nor 125696"):
        spec_from_config(config)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("qwen", {"hidden_size": None}, "lacks the key 'hidden_size' or 'n_embd'"),
        ("qwen", {"seq_length": "64"}, "seq_length is '64'; it must be of type int"),
        ("qwen", {"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be at least 1"),
        ("qwen2", {"num_hidden_layers": 2**63}, "num_hidden_layers is 9223372036854775808; it must be at most 10000"),
        ("qwen2", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a finite number"),
        ("qwen", {"rotary_pct": float("inf")}, "rotary_pct is inf; it must be a finite number"),
        ("qwen", {"model_type": "mpt"}, "unknown model_type 'mpt'"),
        ("qwen", {"model_type": None, "architectures": None}, "no model_type"),
        ("qwen", {"use_cache_quantization": True}, "use_cache_quantization = True is not supported"),
        (
            "qwen2",
            {"rope_scaling": {"type": "longrope"}},
            "rope type 'longrope' is not supported; only default, linear",
        ),
        ("qwen2", {"rope_scaling": {"type": "linear"}}, "rope_scaling lacks the key 'factor'"),
        ("qwen2", {"rope_scaling": {"type": "linear", "factor": 0}}, "rope.scaling.factor is 0.0; it must be"),
        ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "needs a factor of at least 1"),
        (
            "qwen2",
            {"rope_scaling": {"rope_type": "default", "mrope_section": [2]}},
            "mrope_section = .* is not supported",
        ),
        (
            "qwen2",
            {"rope_parameters": {"full_attention": {"rope_theta": 1}}},
            "rope_parameters differs by kind of layer",
        ),
        ("qwen2", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "it must be above low_frequency_factor, 1.0"),
        ("qwen2", {"rope_theta": 1, "rope_scaling": {"type": "yarn"}}, "YaRN needs one above 1"),
        ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported; only 1 is"),
        ("qwen2", {"hidden_act": "mish"}, "activation 'mish' is not supported"),
        ("qwen2", {"num_key_value_heads": 3}, "4 heads are not a multiple of 3 kv_heads"),
        ("chatglm2", {"rmsnorm": False}, "rmsnorm = False is not supported"),
        ("gpt2", {"n_head": 5}, "hidden size 64 is not a multiple of 5"),
    ],
)
def test_bad_configs_are_one_clear_error(case: str, change: dict[str, Any], message: str) -> None:
    config, variant = config_of(case)
    with pytest.raises(LogitLockError, match=message):
        spec_from_config(config | change, variant=variant)


def test_qwen2_reads_rope_theta_from_either_place() -> None:
    config, _ = config_of("qwen2")
    moved = {k: v for k, v in config.items() if k != "rope_theta"} | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}
    }
    assert spec_from_config(moved) == spec_from_config(config)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), {"colour": 1}, "spec has an unknown key 'colour'"),
        (("norm",), {"eps": "x"}, "spec.norm.eps is 'x'; it must be of type float"),
        (("norm",), {"kind": "batch"}, "spec.norm.kind is 'batch'; it must be one of"),
        (("attention",), {"heads": True}, "spec.attention.heads is True"),
        (("rope",), {"dim": 7}, "rope dim 7 must be even"),
    ],
)
def test_specs_reject_what_they_do_not_know(path: tuple[str, ...], value: dict[str, Any], message: str) -> None:
    data = spec_from_config(config_of("qwen")[0]).to_dict()
    target = data
    for key in path:
        target = target[key]
    target.update(value)
    with pytest.raises(LogitLockError, match=message):
        spec_from_dict(data)


def test_missing_keys_are_named() -> None:
    data = spec_from_config(config_of("qwen")[0]).to_dict()
    del data["mlp"]["width"]
    with pytest.raises(LogitLockError, match=r"spec.mlp lacks the key 'width'"):
        spec_from_dict(data)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_at_most_two_files_and_300_lines(family: str) -> None:
    files = list(FAMILY_FILES.glob(f"{family}*.py"))
    assert 1 <= len(files) <= 2
    assert sum(len(f.read_text().splitlines()) for f in files) <= 300


def test_an_error_is_one_printable_line() -> None:
    assert str(LogitLockError("the tensor a\nb\x1b[31m of 世界")) == "the tensor a\\nb\\x1b[31m of 世界"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("layers",), 0),
        (("layers",), 10**9),
        (("vocab_size",), 10**12),
        (("hidden_size",), -4),
        (("max_positions",), 0),
        (("norm", "eps"), -1e-6),
        (("norm", "eps"), float("nan")),
        (("norm", "eps"), float("inf")),
        (("rope", "theta"), -1.0),
        (("rope", "theta"), 0.0),
        (("rope", "theta"), float("nan")),
        (("rope", "position_divisor"), 0.0),
        (("attention", "scale"), float("inf")),
        (("attention", "kv_heads"), 0),
    ],
)
def test_numbers_that_no_model_has(path: tuple[str, ...], value: float) -> None:
    data: Any = case_source("qwen2_b1").spec.to_dict()
    record = data
    for key in path[:-1]:
        record = record[key]
    record[path[-1]] = value
    shown = re.escape(str(abs(value) if path[-1] == "scale" else value))
    with pytest.raises(LogitLockError, match=rf"{re.escape('.'.join(path))} is {shown}; it must be"):
        spec_from_dict(data)
