"""Faults drawn at random: a site of the model, an operator, and its parameters from wide distributions.

They are edits of an exported graph (`tests.support.mutate`), written from the ways in which engines go wrong, not from
the catalogue of the diagnosis.  Half of the kinds are hidden by a seed: `results` reports them as counts only.
"""

from __future__ import annotations

from tests.support.fault_generator import attention, cache, linear, norm, pointwise, rotation

SITES = (attention, cache, linear, norm, pointwise, rotation)
"""Importing them registers their kinds."""
