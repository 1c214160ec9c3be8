"""Where notebooks, presets, bundled data and runs are, in a checkout and in an installed package."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_IS_CHECKOUT = all((_ROOT / name).exists() for name in ("pyproject.toml", "notebooks", "data/demo"))
# The checkout that this package lies in; None where it is installed from a wheel.
CHECKOUT = _ROOT if _IS_CHECKOUT else None
# What users open stands in a checkout's notebooks/ and data/; a wheel has copies in tclib/assets.
_ASSETS = CHECKOUT or Path(str(importlib.resources.files("tclib"))) / "assets"
NOTEBOOKS = _ASSETS / "notebooks"
PRESETS = NOTEBOOKS / "presets"
DATA = _ASSETS / "data"


def default_runs() -> Path:
    """Where runs go: data/runs of a checkout; for an installed package, runs in the current folder."""
    return CHECKOUT / "data" / "runs" if CHECKOUT else Path.cwd() / "runs"
