"""Which verb reads which files: command lines over the corpus, and senseless values for every option."""

from __future__ import annotations

import os
import random
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.models import OptionInfo

from debug.command import VERBS
from tests.support.fuzz.corpus import TOKENIZER_MODELS
from tests.support.fuzz.damage import NUMBERS, TEXTS


@dataclass(frozen=True)
class Scenario:
    """A command line.

    Attributes:
        line: its words; `@NAME` is a file or directory of the corpus, and `+NAME` is written by the command.
        ignored: files of the corpus that the command does not read, as a pattern.
    """

    line: str
    ignored: str = "$"

    @property
    def verb(self) -> str:
        return self.line.split()[0]

    @property
    def reads(self) -> list[str]:
        """Names in the corpus."""
        return list(dict.fromkeys(re.findall(r"@([\w.-]+)", self.line)))

    @property
    def writes(self) -> list[str]:
        """Names that the command may create."""
        return re.findall(r"\+([\w.-]+)", self.line)

    def words(self) -> list[str]:
        return [re.sub(r"^((?:\w+:)*)[@+]", r"\1", word) for word in self.line.split()]


_SHORT = "--samples 1 --tokens 8"
_CHECKPOINTS = ("bpe", "bin", "compressed-tensors", "gptq", "awq", "modelopt", "case")
SCENARIOS = [
    Scenario("models"),
    Scenario("env"),
    *(Scenario(f"trace reference:fp32 --model @{name} --steps 1 --out +t.safetensors") for name in _CHECKPOINTS),
    *(
        Scenario(f"generate --model @{name} --prompt Hello --max-new-tokens 2")
        for name in (*TOKENIZER_MODELS, "awq", "bin")
    ),
    Scenario("generate --model @bpe --chat --prompt-file @prompts.txt --max-new-tokens 2"),
    Scenario("generate --bundle @bundle --prompt-file @prompts.txt --max-new-tokens 2"),
    Scenario("generate --bundle @planned --prompt Hello --max-new-tokens 2 --engine onnxruntime"),
    Scenario("check @bpe"),
    Scenario("inspect @bundle"),
    Scenario("inspect @bundle8 --json"),
    Scenario("inspect @planned"),
    Scenario("export --model @bpe --precision fp16 --backend onnxruntime --output +out"),
    Scenario("export --model @awq --precision fp16 --backend onnxruntime --output +out"),
    Scenario("export --model @gptq --precision fp32 --backend onnxruntime --output +out --json"),
    Scenario("export --model @case --precision bf16 --precision-plan @plan.json --backend onnxruntime --output +out"),
    Scenario("export --model @pieces --precision int8 --backend onnxruntime --output +out"),
    Scenario(f"quantize --model @bpe --precision int8 --calibration @calibration.jsonl {_SHORT} --output +out"),
    Scenario(f"quantize --model @case --precision int8 --precision-plan @schemes.json {_SHORT} --output +out"),
    Scenario(f"quantize --model @bin --precision int4-awq --group 16 --calibration @text.txt {_SHORT} --output +out"),
    Scenario(f"quantize --model @chatglm --kv-cache int8 {_SHORT} --output +out"),
    Scenario("diff --model @bpe --bundle @bundle --steps 1"),
    Scenario("diff --model @case --bundle @bundle8 --steps 1 --json"),
    Scenario("diff --model @awq reference:fp16 --steps 1 --html +report.html"),
    Scenario("diff --model @case @trace.safetensors --steps 1"),
    Scenario("diff --model @case @trace.safetensors reference:bf16 --steps 1 --every-tap"),
    Scenario("diff --model @case @case"),
    Scenario("diff --model @case @third/third.onnx --map @map.json --steps 1"),
    Scenario("diff --model @case hf:fp32 reference:fp32 --steps 1", ignored=r"io.*|meta.json"),
    Scenario("trace reference:fp32 --model @case --tokens-of @trace.safetensors --steps 1 --out +t.safetensors"),
    Scenario("trace @bundle --model @bpe --prompt-file @prompts.txt --steps 1 --out +t.safetensors"),
    Scenario("drift reference:bf16 --model @case --steps 1"),
    Scenario("drift @bundle --model @bpe --steps 2 --json"),
    Scenario("bisect --model @case --precision bf16 --out +p.json"),
    Scenario("record --hf @case --out +out --steps 1 --lengths 8"),
    Scenario("verify @case"),
    Scenario("verify @case --dtype bf16 --json"),
    Scenario("eval reference:fp32 --model @bpe --text @text.txt --tasks @tasks.jsonl --max-new-tokens 2 --no-speed"),
    Scenario("eval @bundle --model @bpe --against reference:fp32 --tasks @tasks.jsonl --max-new-tokens 2 --no-speed"),
    Scenario("eval reference:fp32 --model @vocab --text @text.txt --no-speed --markdown +page.md"),
]


def kind_of(path: Path) -> str:
    """Under which name the rate counts a damaged file of the corpus."""
    name, root = path.name, path.parts[0]
    if path.suffix == ".safetensors":
        if root in ("gptq", "awq", "compressed-tensors", "modelopt", "bundle8"):
            return "quantized tensors"
        return {"io": "golden case", "trace": "trace"}.get(re.split(r"[._]", name)[0], "safetensors")
    if root in ("bundle", "bundle8", "planned") and name in ("model.onnx", "model.onnx.data", "bundle.json"):
        return name
    groups = {
        "tokenizer": r"tokenizer.*|vocab.*|merges.*|added_tokens.*|qwen.tiktoken",
        "checkpoint index": r".*index\.json",
        "third-party ONNX": r"third\.onnx",
        "engine files": r"engine.*|kernels.bin",
        "texts": r".*\.(txt|jsonl)",
        "plan": r"plan.json|schemes.json",
        "golden case": r"meta.json",
        "name map": r"map.json",
        "quantization files": r"quantization.*|hf_quant.*",
        "pickle": r".*\.bin",
    }
    return next((kind for kind, pattern in groups.items() if re.fullmatch(pattern, name)), name)


# Arguments

_WORDS = [
    "cuda",
    "cuda:9",
    "fp16",
    "int4",
    "hf",
    "hf:x",
    "reference:fp64:x",
    "kernels",
    "tensorrt:x",
    "no/such",
    "qwen",
]
_PLACES = ["/proc/x/y", "/dev/null/x", "prompts", ".", "..", "", "/", "pipe", "loop", "device", "a" * 300, "d/" * 3000]


@dataclass(frozen=True)
class Option:
    """An option of a verb, as its function's parameter says."""

    name: str
    kind: Any

    def value(self, rng: random.Random) -> str:
        """Values that users should not give, or hardly ever."""
        if self.kind in (int, float):
            extreme = rng.choice([*NUMBERS, 10**40, 99999999, 3])
            return rng.choice([*[str(int(extreme))] * 4, str(extreme), "nan", "inf", "-inf", "", "x", "1e400"])
        if self.kind is Path:
            return rng.choice([*_PLACES, "missing", "missing/x"])
        long = "hello " * 1_700_000 if self.name == "--prompt" else "x" * 5000
        lists = ["8,-1", "8," * 2000, "1x2", "0x0x0", "1x99999999x1", "9" * 40]
        return rng.choice([*TEXTS, *_WORDS, *_PLACES, *lists, "\udcff", long])


def options_of(verb: str) -> list[Option]:
    """All options with a name but the one that would run code of a checkpoint."""
    function = VERBS[verb].load()
    found = []
    for name, hint in typing.get_type_hints(function, include_extras=True).items():
        info = next((i for i in getattr(hint, "__metadata__", ()) if isinstance(i, OptionInfo)), None)
        if info is None or name == "trust_remote_code":
            continue
        kind = typing.get_args(hint)[0]
        while typing.get_origin(kind) in (typing.Union, types.UnionType, list):
            kind = typing.get_args(kind)[0]
        declared = next(iter(info.param_decls or ()), "").split("/")[0]
        found.append(Option(declared or "--" + name.replace("_", "-"), kind))
    return found


def damage_arguments(rng: random.Random, scenario: Scenario) -> tuple[list[str], str]:
    """The words of the command line with one option given anew, added or an argument replaced."""
    words = scenario.words()
    if rng.random() < 0.25 and len(words) > 1:
        at = rng.randrange(1, len(words))
        new = rng.choice([*TEXTS, *_WORDS, *_PLACES, "--", "-x"])
        return [*words[:at], new, *words[at + 1 :]], f"argument {at} is {new[:40]!r}"
    option = rng.choice(options_of(scenario.verb))
    if option.kind is bool:
        return [*words, option.name], option.name
    value = option.value(rng)
    if option.name in words:
        at = words.index(option.name)
        words = [*words[:at], *words[at + 2 :]]
    return [*words, f"{option.name}={value}"], f"{option.name} {value[:40]!r}"


def special_places(folder: Path) -> None:
    """What stands in the working directory beside the files of the corpus, for arguments that are paths."""
    (folder / "prompts").mkdir()
    (folder / "prompts" / "mine.txt").write_text("not to be touched")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "device").symlink_to("/dev/zero")
