"""Claim, paper, ours, verdict."""

from __future__ import annotations

import pandas as pd

Line = dict[str, str]


def claim_line(claim: str, paper: str, ours: str, verdict: str) -> Line:
    """One line of the closing table."""
    return {"claim": claim, "paper": paper, "ours": ours, "verdict": verdict}


def results_table(lines: list[Line]) -> pd.DataFrame:
    """The closing table."""
    return pd.DataFrame(lines, columns=["claim", "paper", "ours", "verdict"])
