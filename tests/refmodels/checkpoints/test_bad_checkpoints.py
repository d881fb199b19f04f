"""Every bad checkpoint, config and model name is refused in one clear sentence that names the culprit."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import refmodels
from refmodels import toys
from refmodels.checkpoints import load as checkpoint
from refmodels.errors import LogitLockError
from tests.support.checkpoints import read_case, write_index, write_model
from tests.support.goldens import GOLDENS
from tests.support.marks import quick_first
from tests.support.paths import ROOT

DAMAGE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TENSOR = "transformer.h.1.mlp.w1.weight"
Tensors = dict[str, Tensor]


def refusal(model: str | Path, **options: Any) -> str:
    """The one sentence with which a model is refused."""
    with pytest.raises(LogitLockError) as caught:
        refmodels.load(model, **options)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def with_tensor(tensors: Tensors, position: int, value: float) -> None:
    tensors[TENSOR].view(-1)[position] = value


def quantize(tensors: Tensors, dtype: torch.dtype) -> None:
    tensors[TENSOR] = torch.ones(tensors[TENSOR].shape).to(dtype)


def remove(tensors: Tensors, *names: str) -> None:
    for name in names:
        del tensors[name]


@pytest.mark.parametrize(
    "layout", quick_first(["safetensors", "sharded safetensors", "bin", "sharded bin", "legacy bin"])
)
@pytest.mark.parametrize(
    ("edit", "expected"),
    quick_first(
        [
            (lambda t: remove(t, TENSOR), [f"lacks the tensor {TENSOR} of qwen"]),
            (lambda t: remove(t, TENSOR, "lm_head.weight"), [f"lacks the tensor {TENSOR} and 1 more"]),
            (lambda t: t.update({"transformer.h.1.mlp.w9.weight": torch.ones(2)}), ["h.1.mlp.w9.weight", "no place"]),
            (lambda t: t.update({"h.1.mlp.w1.weight": t[TENSOR].clone()}), [TENSOR, "twice", " h.1.mlp.w1.weight"]),
            (lambda t: t.update({TENSOR: t[TENSOR][1:]}), [TENSOR, "[95, 64]", "[96, 64]", "FILE"]),
            (lambda t: t.update({TENSOR: t[TENSOR].t().contiguous()}), [TENSOR, "[64, 96]", "[96, 64]"]),
            (lambda t: with_tensor(t, -1, float("nan")), [TENSOR, "NaN", "FILE"]),
            (lambda t: with_tensor(t, 0, float("inf")), [TENSOR, "Inf", "FILE"]),
            (lambda t: with_tensor(t, 700, -float("inf")), [TENSOR, "Inf", "FILE"]),
            (lambda t: quantize(t, torch.int8), [TENSOR, "quantized", "FILE"]),
            (lambda t: quantize(t, torch.uint8), [TENSOR, "quantized"]),
            (lambda t: quantize(t, torch.float8_e4m3fn), [TENSOR, "quantized"]),
        ]
    ),
    ids=["missing", "two-missing", "left-over", "twice", "short", "turned", "nan", "inf", "-inf", "i8", "u8", "f8"],
)
def test_bad_tensors(layout: str, edit: Callable[[Tensors], None], expected: list[str], tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen_b1")
    assert tensors[TENSOR].shape == (96, 64)
    edit(tensors)
    if layout == "legacy bin" and tensors.get(TENSOR, torch.empty(0)).dtype == torch.float8_e4m3fn:
        pytest.skip("the legacy format is older than fp8 and cannot hold it")
    write_model(tmp_path, config, tensors, layout)
    message = refusal(tmp_path)
    for part in expected:
        assert part in message or (part == "FILE" and file_of(tmp_path, TENSOR) in message), message


def file_of(folder: Path, tensor: str) -> str:
    for index in folder.glob("*.index.json"):
        name: str = json.loads(index.read_text())["weight_map"][tensor]
        return name
    return next(file.name for file in folder.iterdir() if file.name != "config.json")


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [(7e4, torch.float16, "7e+04"), (-1e39, torch.float32, "1e+39"), (3.4e38 * 1.01, torch.bfloat16, "3.43e+38")],
)
def test_values_too_large_for_the_dtype(value: float, dtype: torch.dtype, said: str, tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen_b1")
    tensors[TENSOR] = tensors[TENSOR].double()
    with_tensor(tensors, 5, value)
    write_model(tmp_path, config, tensors)
    message = refusal(tmp_path, dtype=dtype)
    for part in (TENSOR, "model.safetensors", "does not fit", str(dtype).removeprefix("torch."), said):
        assert part in message
    refmodels.load(tmp_path, dtype=torch.float64)


def test_everything_but_values_is_checked_before_the_first_parameter(tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen_b1")
    remove(tensors, "lm_head.weight")
    source = refmodels.resolve(write_model(tmp_path, config, tensors))
    with pytest.raises(LogitLockError, match="lm_head"):
        refmodels.stream_parameters(source, dtype=torch.float32)


def test_working_dtypes_only() -> None:
    assert "float8" in refusal(GOLDENS / "qwen_b1", dtype=torch.float8_e5m2)


def test_a_tied_normalized_head_is_refused(tmp_path: Path) -> None:
    config, tensors, variant = read_case("baichuan2_7b_b1")
    remove(tensors, "lm_head.weight")
    write_model(tmp_path, config | {"tie_word_embeddings": True}, tensors)
    assert "NormHead" in refusal(tmp_path, variant=variant)


# ------------------------------------------------------------------------------------------------------ damaged files


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["safetensors", "bin", "legacy bin", "sharded safetensors", "sharded bin"])
@DAMAGE
@given(data=st.data())
def test_truncated_anywhere(layout: str, data: st.DataObject, tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen_b1")
    victim = sorted(f for f in write_model(tmp_path, config, tensors, layout).iterdir() if f.suffix != ".json")[-1]
    content = victim.read_bytes()
    victim.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    message = refusal(tmp_path)
    assert victim.name in message
    assert "damaged" in message


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["safetensors", "bin", "legacy bin"])
@DAMAGE
@given(data=st.data())
def test_altered_anywhere_never_crashes(layout: str, data: st.DataObject, tmp_path: Path) -> None:
    config, tensors, _ = read_case("gpt2_b1")
    write_model(tmp_path, config, tensors, layout)
    victim = next(file for file in tmp_path.iterdir() if file.suffix != ".json")
    content = bytearray(victim.read_bytes())
    # Mostly in what describes the tensors: the head of a safetensors file, the pickle inside a .bin file.
    near = data.draw(st.integers(0, 6000) | st.integers(0, len(content) - 16))
    content[near : near + 4] = data.draw(st.binary(min_size=4, max_size=4))
    victim.write_bytes(bytes(content))
    try:
        refmodels.load(tmp_path)
    except LogitLockError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("layout", ["sharded safetensors", "sharded bin"])
def test_missing_shards(layout: str, tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen_b1")
    second = sorted(f for f in write_model(tmp_path, config, tensors, layout).iterdir() if "-00002-of" in f.name)[0]
    second.unlink()
    message = refusal(tmp_path)
    assert second.name in message
    assert "not there" in message


class Payload:
    ran = False

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (setattr, (Payload, "ran", True))


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_not_run(legacy: bool, tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen_b1")
    write_model(tmp_path, config, tensors, "bin")
    content: dict[str, object] = {**tensors, "payload": Payload()}
    torch.save(content, tmp_path / "pytorch_model.bin", pickle_protocol=2, _use_new_zipfile_serialization=not legacy)
    assert "LogitLock never executes" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(), protocol=2))
    assert "pytorch_model.bin" in refusal(tmp_path)
    assert not Payload.ran


@pytest.mark.parametrize(
    "content",
    [[torch.ones(2)], {"state_dict": {"a": torch.ones(2)}}, {1: torch.ones(2)}, 5, {"a": torch.eye(2).to_sparse()}],
)
def test_bin_files_hold_tensors_by_name(content: object, tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen_b1")
    write_model(tmp_path, config, tensors, "bin")
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert "dictionary of dense tensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "below/model.safetensors",
        "..",
        "",
        "..\\outside.safetensors",
        "C:outside.safetensors",
        "model.bin",
        3,
        None,
    ],
)
def test_an_index_stays_in_its_directory(shard: object, tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen_b1")
    folder = write_model(tmp_path / "model", config, tensors)
    # What the index points at exists and is sound: only where it lies is wrong.
    (folder / "below").mkdir()
    for place in (tmp_path / "outside.safetensors", folder / "below" / "model.safetensors"):
        shutil.copy(folder / "model.safetensors", place)
    (folder / "model.safetensors").unlink()
    write_index(folder, dict.fromkeys(tensors, shard))
    message = refusal(folder)
    assert "must be" in message
    assert "model.safetensors.index.json" in message


def test_an_index_that_contradicts_its_files(tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen_b1")
    folder = write_model(tmp_path, config, tensors, "sharded safetensors")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map[TENSOR])
    write_index(folder, weight_map | {TENSOR: other})
    assert f"says that {TENSOR} is in {other}" in refusal(folder)
    write_index(folder, weight_map | {"ghost": other})
    assert "says that ghost" in refusal(folder)
    # A file that is complete under another name as well: each of its tensors is there twice.
    shutil.copy(folder / other, folder / "copy.safetensors")
    write_index(folder, weight_map | {TENSOR: "copy.safetensors"})
    assert "stored twice" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": []}', '{"weight_map": {}}', "{}", "\x00", "null"])
def test_damaged_index(text: str, tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen_b1")
    folder = write_model(tmp_path, config, tensors, "sharded safetensors")
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(folder)


# ------------------------------------------------------------------------------------------------------------ configs


@DAMAGE
@given(content=st.binary(max_size=40))
@example(content=b'{"model_type": "qwen"')
@example(content=b"\xff\xfe")
@example(content=b"[1]")
@example(content=b'{"model_type": ["qwen"]}')
@example(content=b'{"model_type": "qwen"}')
def test_damaged_config(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert "config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("chatglm2_b1", "num_layers"),
        ("baichuan_7b_b1", "intermediate_size"),
        ("qwen_b1", "seq_length"),
        ("qwen2_b1", "hidden_size"),
        ("gpt2_b1", "n_head"),
        ("starcoder2_b1", "intermediate_size"),
    ],
)
def test_config_without_a_needed_key(case: str, key: str, tmp_path: Path) -> None:
    config, tensors, variant = read_case(case)
    del config[key]
    message = refusal(write_model(tmp_path, config, tensors), variant=variant)
    assert key in message
    assert "config.json" in message


@pytest.mark.parametrize("model_type", ["mpt", None, "", 7])
def test_unknown_architecture(model_type: object, tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen_b1")
    message = refusal(write_model(tmp_path, config | {"model_type": model_type, "architectures": None}, tensors))
    assert "model_type" in message
    assert "gpt_bigcode" in message


def test_directories_that_are_no_models(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)
    shutil.copy(GOLDENS / "qwen_b1" / "config.json", tmp_path)
    message = refusal(tmp_path)
    assert "no weights" in message
    assert "pytorch_model.bin.index.json" in message
    assert "is a file" in refusal(tmp_path / "config.json")
    assert "no directory" in refusal(tmp_path / "absent")
    assert "no directory" in refusal(str(tmp_path / "absent"))
    assert "no directory" in refusal("./absent")
    assert "no directory" in refusal("a/b/c")


# -------------------------------------------------------------------------------------------------- toys and the hub


def test_names_of_toys_are_the_bundled_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "TOYS", tmp_path)
    # A directory of that name in the working directory does not get in the way.
    monkeypatch.chdir(tmp_path)
    for name in toys.TOYS:
        assert "toy" in refusal(name)
    config, tensors, _ = read_case("qwen_b1")
    write_model(tmp_path / "qwen", config, tensors)
    source = refmodels.resolve("qwen")
    assert (source.name, source.directory) == ("qwen", tmp_path / "qwen")


def http(kind: type[Exception], status: int = 404) -> Exception:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("first line\nsecond line", response=response)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (http(hub_errors.RepositoryNotFoundError), "nor a model on the hub"),
        (http(hub_errors.GatedRepoError, 403), "gated"),
        (hub_errors.HFValidationError("bad id"), "nor a model on the hub"),
        (hub_errors.LocalEntryNotFoundError("offline"), "cannot be reached"),
        (http(hub_errors.HfHubHTTPError, 500), "failed"),
        (OSError(28, "No space left on device"), "No space left"),
        (RuntimeError("connection\nreset"), "failed: connection reset"),
    ],
)
def test_hub_errors(error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = refusal("owner/name")
    assert expected in message
    assert "owner/name" in message


@pytest.mark.parametrize("layout", ["safetensors", "sharded bin"])
def test_hub_models(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors, _ = read_case("qwen_b1")
    asked: list[str] = []

    def snapshot_download(repository: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert repository == "owner/name"
        assert ignore_patterns == ["*/*"]
        assert not any(pattern.endswith((".py", "*")) for pattern in allow_patterns)
        asked.extend(allow_patterns)
        folder = tmp_path / "snapshot"
        if any(pattern.endswith(".bin") for pattern in allow_patterns) == layout.endswith("bin"):
            write_model(folder, config, tensors, layout)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert refmodels.resolve("owner/name").name == "owner/name"
    assert "*.tiktoken" in asked
    assert any(pattern.endswith(".bin") for pattern in asked) == layout.endswith("bin")


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_offline(setting: dict[str, str], tmp_path: Path) -> None:
    code = "import refmodels\ntry: refmodels.resolve('owner/name')\nexcept refmodels.LogitLockError as e: print(e)"
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), **setting}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert "offline" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
