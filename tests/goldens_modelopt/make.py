"""The checkpoints beside this file: a tiny random Qwen2 that nvidia-modelopt quantized and exported.

    pip install nvidia-modelopt==0.47.0 torch==2.13.0 transformers==5.24.0 safetensors      # an environment of its own
    python tests/goldens_modelopt/make.py

Made with these versions, on a CPU.  `source` is the model before; in each of the others are what `export_hf_checkpoint`
writes and `logits.safetensors`: ids [1, 12] and what modelopt's own simulation of the exported model makes of them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).parent
GROUP = 16
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}


def source() -> Qwen2ForCausalLM:
    # A seed that puts no weight in the middle between two codes, where modelopt's simulation and its export differ: one
    # multiplies by 448 / amax, the other divides by amax / 448.
    generator = torch.Generator().manual_seed(2)
    model = Qwen2ForCausalLM(Qwen2Config(**CONFIG)).eval()
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        # A channel in eight is large: work for smoothing.  fp16 holds all values, which keeps `source` small.
        drawn = 1 + 2 * drawn.abs() * (torch.arange(len(drawn)) % 8 == 0) if "norm" in name else drawn * 0.1
        parameter.data = drawn.half().float()
    return model


def config(name: str) -> dict[str, Any]:
    return copy.deepcopy(getattr(mtq, name))


def in_groups(made: dict[str, Any]) -> dict[str, Any]:
    for rule in made["quant_cfg"]:
        if "block_sizes" in rule.get("cfg", {}):
            rule["cfg"]["block_sizes"][-1] = GROUP
    return made


def configs() -> dict[str, dict[str, Any]]:
    fp8_cache = config("FP8_DEFAULT_CFG")
    fp8_cache["quant_cfg"] += config("FP8_KV_CFG")["quant_cfg"]
    mixed = config("FP8_DEFAULT_CFG")
    mixed["quant_cfg"] += [
        {"quantizer_name": "*mlp*", "enable": False},
        {"quantizer_name": "*up_proj*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: GROUP}}},
        {"quantizer_name": "*down_proj*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
    ]
    return {
        "fp8": fp8_cache,
        "fp8_pc_pt": config("FP8_PER_CHANNEL_PER_TOKEN_CFG"),
        "int4_awq": in_groups(config("INT4_AWQ_CFG")),
        "int8_sq": config("INT8_SMOOTHQUANT_CFG"),
        "mixed": mixed,
    }


def main() -> None:
    source().half().save_pretrained(HERE / "source")
    generator = torch.Generator().manual_seed(1)
    data, ids = (torch.randint(0, 16, (rows, 12), generator=generator) for rows in (8, 1))
    for name, quantization in configs().items():
        model = mtq.quantize(source(), quantization, lambda m: m(data))
        # What export does first: linear layers that read the same input get the same scales of it.
        requantize_resmooth_fused_llm_layers(model)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
        export_hf_checkpoint(model, export_dir=HERE / name)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        save_file({"ids": ids, "logits": logits}, HERE / name / "logits.safetensors")
    (HERE / "source" / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
