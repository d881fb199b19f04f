"""Initial weights of a toy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from refmodels.model import Decoder


def initialize(model: Decoder, *, seed: int) -> None:
    """Fill a decoder's parameters in place; the same seed gives the same values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif "embed" in name or name.startswith("head"):
                parameter.normal_(std=0.02, generator=generator)
            else:
                # Smaller on the way back into the residual stream, so that depth does not swell it at the start.
                std = (0.3 if ".out." in name else 1.0) / math.sqrt(parameter.shape[1])
                parameter.normal_(std=std, generator=generator)
        if model.spec.position == "learned":
            _start_with_lookup(model, generator)


def _start_with_lookup(model: Decoder, generator: torch.Generator) -> None:
    """Give learned positions what rotary ones have from the start: a notion of "the token before".

    From random positions the offsets between them have to be learned position by position; recall, which looks a token
    up by what stood before it, was then not learned in 5000 steps. So head_dim channels hold positions only, as
    sinusoids, and the rest is three subspaces of head_dim channels. Two heads of the first block copy a part of the
    tokens one and two places back, each to a subspace of its own; two heads of the second block look for the place
    where what stands one (two) places back is what stands here (one place back). Everything is trained from there.
    """
    width = model.spec.attention.head_dim
    heads = [slice(head * width, (head + 1) * width) for head in range(2)]
    angular = torch.logspace(math.log10(2.5), math.log10(0.02), width // 2)
    tokens, positions = model.embed.weight, model.position_embed.weight
    tokens.normal_(std=0.2, generator=generator)
    tokens[:, :width] = 0.0
    positions.zero_()
    angles = torch.outer(torch.arange(len(positions)), angular)
    positions[:, :width] = 0.3 * torch.cat((angles.sin(), angles.cos()), 1)

    basis, _ = torch.linalg.qr(torch.randn(3 * width, 3 * width, generator=generator))
    here, *back = basis.split(width, 1)
    first, second = (model.get_submodule(f"blocks.{block}.attn") for block in (0, 1))
    query, key, value = first.get_parameter("qkv.weight").chunk(3)
    out = first.get_parameter("out.weight")
    for offset, head, place in zip((1, 2), heads, back, strict=True):
        for matrix in (query, key, value):
            matrix[head] = 0.0
        out[:, head] = 0.0
        query[head, :width] = 1.5 * _turn(angular, offset)
        key[head, :width] = 1.5 * torch.eye(width)
        value[head, width:] = here.t()
        out[width:, head] = 0.6 * place
    query, key, _ = second.get_parameter("qkv.weight").chunk(3)
    for head, asked, kept in zip(heads, (here, back[0]), back, strict=True):
        query[head], key[head] = 0.0, 0.0
        query[head, width:], key[head, width:] = asked.t(), kept.t()


def _turn(angular: Tensor, offset: int) -> Tensor:
    """The matrix that takes the sinusoids of position t to those of position t - offset."""
    cos, sin = torch.diag((angular * offset).cos()), torch.diag((angular * offset).sin())
    return torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))
