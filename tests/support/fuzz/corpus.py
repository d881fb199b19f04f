"""Sound files of every kind that a command reads, small and made once: the fuzzer copies and damages them."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import torch

from debug.executors.propose import propose_map
from export.bundle import export_model
from refmodels.checkpoints.load import load, parameter_shapes, resolve
from refmodels.checkpoints.weights import to_checkpoint
from refmodels.families import FAMILIES
from tests.support import foreign
from tests.support.checkpoints import write_model
from tests.support.command import logitlock
from tests.support.paths import GOLDENS
from trt_runtime.bundle import (
    INFO_NAME,
    KERNELS_NAME,
    LAYERS_NAME,
    PLAN_NAME,
    BundleDraft,
    BundleInfo,
    EngineInfo,
    Profile,
    read_bundle,
)

TEXTS = ["Hello, world! The quick brown fox jumps over the lazy dog.", "def f(x): return x ** 2", "1234 你好，世界！"]
VOCABULARY, POSITIONS = 640, 128
TOKENIZER_MODELS = {"bpe": "qwen2_b1", "tiktoken": "qwen_b1", "glm4": "glm4_remote_b1"} | {
    "pieces": "baichuan2_7b_b1",
    "chatglm": "chatglm2_b1",
    "vocab": "gpt2_b1",
}
"""Models with a tokenizer of each kind, and the golden case whose config they have."""


def make_corpus(root: Path) -> Path:
    """Write all of it below `root`, which must not exist."""
    root.mkdir()
    _tokenizer_files(root / "tokenizers")
    for name, case in TOKENIZER_MODELS.items():
        _model(root / name, case, root / "tokenizers" / name, layout="sharded safetensors" if name == "bpe" else "")
    shutil.rmtree(root / "tokenizers")
    bpe = root / "bpe"
    shutil.copytree(GOLDENS / "qwen2_b1", root / "case")
    _short(root / "case")
    _texts(root)
    _without_index(bpe, root / "bin", "sharded bin")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bpe / name, root / "bin" / name)
    for layout, scheme in (("compressed-tensors", "int8"), ("gptq", "int4-gptq"), ("awq", "int4-awq")):
        _run("quantize", "--model", bpe, "--precision", scheme, "--group", 0 if scheme == "int8" else 16)(
            "--layout", layout, "--samples", 2, "--tokens", 8, "--output", root / layout
        )
    _run("quantize", "--model", bpe, "--precision", "fp8", "--samples", 2, "--tokens", 8)(
        "--kv-cache", "fp8", "--layout", "modelopt", "--output", root / "modelopt"
    )
    _bundles(root)
    _run("trace", "reference:fp32", "--model", root / "case", "--steps", 1, "--seed", 3)(
        "--out", root / "trace.safetensors"
    )
    _run("bisect", "--model", root / "case", "--precision", "bf16")("--out", root / "plan.json")
    plan = {"schema": 1, "precision": "int8", "schemes": {"blocks.0.*": "int4", "blocks.*.mlp.out": None}}
    (root / "schemes.json").write_text(json.dumps(plan))
    _third_party(root)
    return root


def _run(*arguments: object) -> Callable[..., None]:
    def run(*more: object) -> None:
        outcome = logitlock(*arguments, *more)
        assert outcome.code in (0, 1), outcome.err

    return run


def _model(folder: Path, case: str, tokenizer: Path, layout: str) -> None:
    config: dict[str, Any] = json.loads((GOLDENS / case / "config.json").read_text())
    for key in ("vocab_size", "padded_vocab_size"):
        if key in config:
            config[key] = VOCABULARY
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} if "bos_token_id" in config else {}
    if case == "glm4_remote_b1":
        config |= {"eos_token_id": 256, "pad_token_id": 256}
    if case.startswith("baichuan"):
        config |= {"norm_head": True, "position": "rope"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    _short(folder)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    spec = resolve(folder).spec
    write_model(
        folder,
        json.loads((folder / "config.json").read_text()),
        to_checkpoint(FAMILIES[spec.family].weights(spec), _random(spec)),
        layout,
    )


def _short(folder: Path) -> None:
    """With few positions: as many steps as there may be are soon done."""
    config = json.loads((folder / "config.json").read_text())
    for key in ("max_position_embeddings", "seq_length", "n_positions", "n_ctx"):
        if key in config:
            config[key] = POSITIONS
    (folder / "config.json").write_text(json.dumps(config))


def _random(spec: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * 0.05 + (1 if "norm" in name and name.endswith("weight") else 0)
        for name, shape in parameter_shapes(spec).items()
    }


def _without_index(model: Path, folder: Path, layout: str) -> None:
    """The same model with its weights in another layout."""
    source = resolve(model)
    parameters = dict(load(source).named_parameters())
    tensors = to_checkpoint(FAMILIES[source.spec.family].weights(source.spec), parameters)
    write_model(folder, json.loads((model / "config.json").read_text()), tensors, layout, shards=2)


def _tokenizer_files(root: Path) -> None:
    for name in TOKENIZER_MODELS:
        (root / name).mkdir(parents=True)
    ranks = [bytes([b]) for b in range(256)]
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    (root / "tiktoken" / "qwen.tiktoken").write_bytes(lines)
    (root / "tiktoken" / "generation_config.json").write_text('{"eos_token_id": 256, "top_p": 0.8, "do_sample": true}')
    (root / "glm4" / "tokenizer.model").write_bytes(lines)
    for name in ("pieces", "chatglm"):
        corpus = root / name / "corpus.txt"
        corpus.write_text("\n".join(TEXTS * 40), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(root / name / "tokenizer"),
            model_type="bpe",
            vocab_size=360,
            hard_vocab_limit=False,
            byte_fallback=True,
            minloglevel=2,
        )
        corpus.unlink()
        (root / name / "tokenizer.vocab").unlink()
    settings = {"add_bos_token": False, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (root / "pieces" / "tokenizer_config.json").write_text(json.dumps(settings))
    _byte_bpe(root / "bpe", root / "vocab")


def _byte_bpe(whole: Path, bare: Path) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    model.train_from_iterator(TEXTS * 4, trainer)
    model.save(str(whole / "tokenizer.json"))
    (whole / "tokenizer_config.json").write_text(
        json.dumps(
            {"eos_token": "<|im_end|>", "added_tokens_decoder": {"2": {"content": "<|im_end|>", "special": True}}}
        )
    )
    (whole / "generation_config.json").write_text(json.dumps({"eos_token_id": [2], "temperature": 0.7, "top_k": 20}))
    model.model.save(str(bare))
    size = model.get_vocab_size()
    (bare / "added_tokens.json").write_text(json.dumps({"<|extra|>": size}))


def _texts(root: Path) -> None:
    (root / "prompts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    (root / "text.txt").write_text("\n".join(TEXTS * 4), encoding="utf-8")
    tasks = [{"prompt": text, "answer": "a"} for text in TEXTS]
    (root / "tasks.jsonl").write_text("\n".join(json.dumps(task) for task in tasks))
    (root / "calibration.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))


def _bundles(root: Path) -> None:
    """With a tokenizer, quantized, and one that says it has a TensorRT plan (which is none)."""
    export_model(root / "bpe", precision="fp16", output=root / "bundle", max_seq=64)
    export_model(root / "case", precision="int8", dtype="fp32", output=root / "bundle8", max_seq=64)
    planned = root / "planned"
    shutil.copytree(root / "bundle", planned)
    for name in (PLAN_NAME, KERNELS_NAME):
        (planned / name).write_bytes(b"no plan")
    tensor = {"name": "x", "dtype": "fp16", "shape": [-1, 8]}
    layer = {
        "name": "a",
        "type": "gemm",
        "profile": 0,
        "inputs": [tensor],
        "refs": ["node | block"],
        "taps": ["logits"],
    }
    plan = {"plan": PLAN_NAME, "weight_bytes": 10, "activation_bytes": [5], "layers": [layer], "warnings": ["[/b] x"]}
    (planned / LAYERS_NAME).write_text(json.dumps({"plans": [plan]}))
    info = read_bundle(planned).info
    engine = EngineInfo(
        backend="tensorrt", package="tensorrt 11.0", plugins={"A": "1"}, max_batch=2, max_input=8, max_seq=16
    )
    profile = Profile(name="decode", batch=[1, 2], tokens=[1, 1], capacity=[16, 16])
    rewrite(planned, {**vars(info), "engine": engine, "profiles": [profile]})


def rewrite(bundle: Path, facts: Mapping[str, Any]) -> None:
    """Write bundle.json anew, with the hashes of the files as they are."""
    (bundle / INFO_NAME).unlink()
    BundleDraft(bundle).finish(BundleInfo(**facts))


def _third_party(root: Path) -> None:
    """A graph of another exporter, and its name map."""
    (root / "third").mkdir()
    path = foreign.export(foreign.huggingface("qwen2_b1"), root / "third" / "third.onnx")
    propose_map(path, load(resolve(root / "case"))).write(root / "map.json")
