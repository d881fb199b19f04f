"""The bundled toys: one trained model of at most 1.5 M parameters per family, and the code that trained it.

Each folder here that is named after a family is a complete checkpoint directory (`config.json` with the upstream keys,
`model.safetensors` in float16 under the upstream tensor names, `tokenizer.json`, `generation_config.json`), with
`report.json` beside it: the measured accuracy of every task, the training command and its seed.
`tasks` generates the examples, `train` is the training script; `debug.evaluate.toys` measures the accuracy.
"""

from pathlib import Path

TOYS = ("chatglm2", "baichuan", "qwen", "gpt")
"""The families that have a toy: also the names of the folders."""


def toy_path(name: str) -> Path:
    """The checkpoint directory of the toy `name` (one of `TOYS`)."""
    if name not in TOYS:
        raise ValueError(f"no toy is called {name!r}; the toys are {', '.join(TOYS)}")
    return Path(__file__).resolve().parent / name
