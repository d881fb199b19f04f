"""The catalogue of known faults: each a small change of one reference module, by name.

A fault is a function that takes a `Module` and the engine's output, and yields the changed arguments with which the
reference makes the same mistake.  It yields every variant of the mistake (other thetas, off by one in either
direction), each with a few words that describe it.  If the mistake is a number (an epsilon, a scale), it is first
estimated from the engine's output.  A new fault is one decorated function in the file of its kind.
"""

from debug.comparison.faults import (
    attention,
    cache_fit,
    embedding,
    grids,
    heads,
    inputs,
    linear,
    linear_fit,
    masks,
    norm_fit,
    pointwise,
    quantized,
    rotation,
    rotation_fit,
    scores,
    weight_fit,
)
from debug.comparison.faults.catalogue import CATALOGUE, Fault

__all__ = [
    "CATALOGUE",
    "Fault",
    "attention",
    "cache_fit",
    "embedding",
    "grids",
    "heads",
    "inputs",
    "linear",
    "linear_fit",
    "masks",
    "norm_fit",
    "pointwise",
    "quantized",
    "rotation",
    "rotation_fit",
    "scores",
    "weight_fit",
]
