"""A test of another project: its own fp16 kernels against the reference, module by module.

pytest examples/test_my_kernels.py

The kernel gets the inputs that the module really sees, and the tolerance is what fp16 itself costs there.
"""

import pytest
import torch
import torch.nn.functional as F

import refmodels

PROMPT = "Remember: water=27 sky=48 tree=31 fish=75. tree="
FLOORS = 8  # more than this many times what the dtype explains is a bug


def my_gated_mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Stands for the kernel under test: fp16 in, fp16 out."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), out)


def run(dtype: torch.dtype, substitutes: dict[str, torch.Tensor] | None = None):
    """The model in a dtype, and every tensor of a forward by its tap; substitutes replace what flows on."""
    source = refmodels.resolve("qwen")
    model = refmodels.load(source, dtype=dtype)
    ids = torch.tensor([refmodels.load_tokenizer(source).encode(PROMPT)])
    recorder = refmodels.Recorder(substitutes=substitutes)
    with torch.no_grad(), refmodels.recording(recorder):
        model.step(ids, model.new_cache(batch=1, capacity=64))
    return model, recorder.tensors


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("block", range(5))
def test_mlp_is_as_good_as_fp16_allows(block: int) -> None:
    half_model, half = run(torch.float16)
    inputs = half[f"blocks.{block}.mlp_norm"]
    # The fp64 module on the very same inputs is the truth; the fp16 module says what rounding alone costs.
    _, exact = run(torch.float64, substitutes={f"blocks.{block}.mlp_norm": inputs})
    truth = exact[f"blocks.{block}.mlp.out"]
    mlp = half_model.blocks[block].mlp
    mine = my_gated_mlp(inputs, mlp.gate.weight, mlp.up.weight, mlp.out.weight)
    floor = relative(half[f"blocks.{block}.mlp.out"], truth)
    assert relative(mine, truth) <= FLOORS * floor
