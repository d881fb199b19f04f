"""Where the project and the files of its tests are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens"
GOLDENS_MODELOPT = ROOT / "tests" / "goldens_modelopt"
REAL = ROOT.parent / "shared" / "real"
"""Config and index files of published models; not a part of the repository."""
