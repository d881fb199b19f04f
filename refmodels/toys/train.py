"""Train a toy: `python -m refmodels.toys.train --model qwen`, to be measured by `python -m debug.evaluate.toys`.

The examples, their order and the initial weights follow from `--seed`; on the CPU so do the trained weights (a GPU adds
gradients up in an order of its own). `report.json` beside each bundled toy has the command that made it and its
cost. Measured on CPUs, Qwen with full steps: 0.87 s per step on 2 cores, 0.34 s on 8, so 4000 steps are about an hour
or 23 minutes; `--rows 0.5 --steps 2400`, with which the GPT toy was made, took 26 minutes on 2 cores that other work
shared. The seconds in the reports made on a GPU are those of one run among six to eight that shared it.

Recall is learned late and suddenly, and with rotary positions not from every seed: of four seeds of ChatGLM2 (0 and 2
for 4000 steps, 1 and 3 for 2000) only 2 got there. The accuracies in the report, which measuring adds, say
whether a run did.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from refmodels.checkpoints.weights import to_checkpoint
from refmodels.families import FAMILIES, family_of, spec_from_config
from refmodels.model import Decoder
from refmodels.positions import ntk_table_index
from refmodels.spec import ModelSpec
from refmodels.text.tokenizer import read_tokenizer
from refmodels.toys import TOYS, toy_path
from refmodels.toys.batches import IGNORED, Batch, Sampler
from refmodels.toys.configs import CONFIGS, generation_config
from refmodels.toys.initialization import initialize
from refmodels.toys.vocabulary import train_tokenizer

LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
WARMUP, COOLDOWN = 0.03, 0.5
"""Shares of the run in which the learning rate rises from 0, and falls to 0 again."""
STEPS = 4000


class UnitRows(nn.Module):
    """Each row divided by its L2 norm: loading does this once to the head of a NormHead model, training at every
    step."""

    def forward(self, weight: Tensor) -> Tensor:
        return F.normalize(weight)


def new_model(spec: ModelSpec, *, seed: int) -> Decoder:
    """A decoder with random weights; a NormHead is normalized in every forward, so that it can be trained."""
    model = Decoder(spec)
    initialize(model, seed=seed)
    if spec.head_normalized:
        parametrize.register_parametrization(model.head, "weight", UnitRows())
    return model


def logits_of(model: Decoder, batch: Batch) -> Tensor:
    """Logits [rows, supervised, vocab] of whole sequences in one pass, differentiable.

    Dynamic NTK follows upstream: a row's table is chosen by the length of its prompt, as a prefill would.
    """
    spec, ids = model.spec, batch.input_ids
    model.prepare_tables(spec.max_positions)
    rows, tokens = ids.shape
    shape = (rows, spec.attention.kv_heads, tokens, spec.attention.head_dim)
    past = [ids.new_zeros(shape, dtype=model.dtype) for _ in range(2 * spec.layers)]
    tables = torch.zeros_like(batch.prompt_lengths)
    if spec.rope is not None and spec.rope.ntk_seq_length is not None:
        seq_length = spec.rope.ntk_seq_length
        chosen = [ntk_table_index(n, seq_length) for n in range(tokens + 1)]
        tables = torch.tensor(chosen, device=ids.device)[batch.prompt_lengths]
    logits: Tensor = model(
        input_ids=ids,
        cache_lengths=torch.zeros_like(batch.prompt_lengths),
        attention_mask=torch.ones_like(ids),
        logit_index=batch.logit_index,
        past_key=past[: spec.layers],
        past_value=past[spec.layers :],
        position_ids=torch.arange(tokens, device=ids.device).expand(rows, tokens),
        ntk_table=tables,
    )[0]
    return logits


def rate(step: int, steps: int) -> float:
    """Factor on the learning rate: up, level, down."""
    return min(1.0, (step + 1) / (WARMUP * steps + 1), (1 - step / steps) / COOLDOWN)


def fit(model: Decoder, sampler: Sampler, *, steps: int, log_every: int = 0) -> float:
    """Train in place; returns the time in seconds, without making the data."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, foreach=True
    )
    began = time.perf_counter()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate(step, steps)
        batches = sampler.step()
        tokens = torch.stack([(batch.targets != IGNORED).sum() for batch in batches]).sum()
        losses = []
        for batch in batches:
            logits = logits_of(model, batch).flatten(0, 1)
            loss = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED, reduction="sum") / tokens
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if log_every and (step + 1) % log_every == 0:
            parts = " ".join(f"{float(loss):.4f}" for loss in losses)
            print(
                f"step {step + 1}/{steps} {time.perf_counter() - began:.0f} s, loss by bucket {parts}", file=sys.stderr
            )
    return time.perf_counter() - began


def trained_parameters(model: Decoder) -> dict[str, Tensor]:
    """The float16 parameters on the CPU, by name, as a checkpoint holds them."""
    if parametrize.is_parametrized(model.head):
        parametrize.remove_parametrizations(model.head, "weight")
    return {name: parameter.detach().half().cpu() for name, parameter in model.named_parameters()}


def write_weights(folder: Path, parameters: dict[str, Tensor], spec: ModelSpec) -> None:
    """Write model.safetensors under the upstream tensor names."""
    from safetensors.torch import save_file

    tensors = to_checkpoint(FAMILIES[spec.family].weights(spec), parameters)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def train_toy(
    name: str, folder: Path, *, steps: int, seed: int, device: str, rows: float = 1.0, log_every: int = 100
) -> dict[str, Any]:
    """Train the toy `name` into `folder` and return its report (also written there)."""
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(name).save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", CONFIGS[name])
    _write_json(folder / "generation_config.json", generation_config(name))
    spec = spec_from_config(CONFIGS[name])
    tokenizer = read_tokenizer(folder, family=family_of(CONFIGS[name]).name)
    model = new_model(spec, seed=seed).to(device)
    seconds = fit(model, Sampler(tokenizer, seed=seed, device=device, rows=rows), steps=steps, log_every=log_every)
    parameters = trained_parameters(model)
    write_weights(folder, parameters, spec)
    report = {
        "model": name,
        "command": f"python -m refmodels.toys.train --model {name} --steps {steps} --rows {rows:g} --seed {seed} "
        f"--device {device}",
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "seed": seed,
        "steps": steps,
        "hardware": _hardware(device),
        "seconds": round(seconds, 1),
        "seconds_per_step": round(seconds / steps, 4),
    }
    _write_json(folder / "report.json", report)
    return report


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=TOYS, required=True)
    parser.add_argument("--output", type=Path, help="checkpoint directory; default: the bundled toy's own")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rows", type=float, default=1.0, help="size of a step; smaller is faster on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    folder = given.output or toy_path(given.model)
    report = train_toy(given.model, folder, steps=given.steps, seed=given.seed, device=given.device, rows=given.rows)
    print(json.dumps(report, ensure_ascii=False, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
