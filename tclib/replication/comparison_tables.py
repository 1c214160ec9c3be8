"""What the ratings of step 05 say: Table 1 line by line, its power, and how far the proxy can be trusted.

Pure functions of tables: of the proxy's ratings or of a person's. A line counts features of a transcoder against those
of an SAE; the difference of the shares has Newcombe's 95 % interval, and Fisher's test gives p.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from tclib.dictionaries.kinds import Kind
from tclib.replication.artifacts import Comparison
from tclib.replication.paper import paper_table
from tclib.replication.verdicts import Measured
from tclib.support.statistics import fisher_p, n_for_power, newcombe_interval, wilson_interval

# Whose features a transcoder's are held against; the first that there is takes the paper's place.
COMPARATORS: tuple[Kind, ...] = ("sae_mlp_in", "sae_mlp_out")
INTERPRETABLE_F1 = 0.6
MIN_INTERPRETABLE = 0.2  # of the features of one kind, for a difference to mean anything
SENSITIVITY = (0.4, 0.5, 0.6, 0.7, 0.8)
FEW_TOKENS = 2
STANDS_FOR = 0.5  # F1 with a known latent from which a feature stands for it
# The lines of Table 1, and one more: the paper's context-free features fire on one or two tokens, the proxy's on a list.
ON_FEW_TOKENS = "of these, on one or two tokens"
LINES = (
    "interpretable",
    "maybe",
    "not",
    "interpretable and context-free",
    ON_FEW_TOKENS,
    "interpretable, not context-free",
)


class Hits(NamedTuple):
    """How many of a kind's features are of a sort, of how many."""

    n_hits: int
    n: int


def paper_table_1() -> pd.DataFrame:
    """The paper's Table 1."""
    return pd.DataFrame(paper_table("table1"))


def relative_l0() -> float:
    """L0 of the paper's transcoder in shares of d_model, by which other models' L0 are chosen.

    Of d_model, not of the number of features: what the active features must write has d_model numbers,
    while the width is a choice of the training, and over half of the paper's 32,768 features never fire.
    """
    (line,) = (one for one in paper_table("table1") if one["kind"] == "transcoder")
    return float(line["l0"]) / int(line["d_model"])


def paper_hits(line: str, kind: str) -> Hits:
    """The paper's count of a line of `LINES`, of its fifty features of that kind."""
    (own,) = (one for one in paper_table("table1") if one["kind"] == kind)
    counts = {name: int(own[name]) for name in ("interpretable", "maybe", "context_free")}
    found = {
        "interpretable": counts["interpretable"],
        "maybe": counts["maybe"],
        "not": int(own["uninterpretable"]),
        "interpretable, not context-free": counts["interpretable"] - counts["context_free"],
    }
    n = found["interpretable"] + found["maybe"] + found["not"]
    return Hits(found.get(line, counts["context_free"]), n)


def comparators(comparison: Comparison) -> list[Kind]:
    """The SAEs of this comparison, that of the paper's place first."""
    kinds = set(comparison.origin.values())
    return [kind for kind in COMPARATORS if kind in kinds]


# ---------------------------------------------------------------------------------------------
# Table 1


def table_1(ratings: pd.DataFrame, origin: Mapping[int, str]) -> pd.DataFrame:
    """A line for each SAE and each of `LINES`: our counts beside the paper's.

    `ratings` has number, rating and context_free, the proxy's also n_tokens. Columns: sae, line,
    transcoder, of, sae_count, sae_of, difference, low, high, p, and where the SAE is the paper's the same
    with paper_ before it (of fifty each).
    """
    table = ratings.assign(kind=ratings["number"].map(origin))
    lines = [
        _line(line, sae, hits(table, line, "transcoder"), hits(table, line, sae))
        for sae in COMPARATORS
        if sae in set(table["kind"])
        for line in LINES
        if "n_tokens" in table or line != ON_FEW_TOKENS
    ]
    return pd.DataFrame(lines)


def hits(table: pd.DataFrame, line: str, kind: str) -> Hits:
    """How many features of a kind are of a line of `LINES`; `table` has a column kind."""
    own = table[table["kind"] == kind]
    passes, free = own["rating"] == "interpretable", own["context_free"].astype(bool)
    if line in ("maybe", "not"):
        found = own["rating"] == line
    elif line == ON_FEW_TOKENS:
        found = passes & free & (own["n_tokens"] <= FEW_TOKENS)
    else:
        found = {
            "interpretable": passes,
            "interpretable and context-free": passes & free,
            "interpretable, not context-free": passes & ~free,
        }[line]
    return Hits(int(found.sum()), len(own))


def _line(line: str, sae: str, own: Hits, other: Hits) -> dict[str, object]:
    measured = difference(own, other)
    found: dict[str, object] = {"sae": sae, "line": line, "transcoder": own.n_hits, "of": own.n}
    found |= {"sae_count": other.n_hits, "sae_of": other.n, "difference": measured.estimate}
    found |= {"low": measured.low, "high": measured.high, "p": fisher_p(*own, *other)}
    if sae == COMPARATORS[0]:
        paper = paper_hits(line, "transcoder"), paper_hits(line, sae)
        papers = difference(*paper)
        found |= {"paper_transcoder": paper[0].n_hits, "paper_sae_count": paper[1].n_hits}
        found |= {"paper_difference": papers.estimate, "paper_low": papers.low}
        found |= {"paper_high": papers.high, "paper_p": fisher_p(*paper[0], *paper[1])}
    return found


def difference(one: Hits, other: Hits) -> Measured:
    """The difference of two shares with Newcombe's interval; NaN where there are no features."""
    if not (one.n and other.n):
        return Measured(np.nan, np.nan, np.nan, False)
    low, high = newcombe_interval(*one, *other)
    return Measured(one.n_hits / one.n - other.n_hits / other.n, low, high)


def interpretability(one: Hits, other: Hits) -> Measured:
    """`difference`, applicable if enough of either kind is interpretable."""
    found = difference(one, other)
    share = max(one.n_hits / one.n, other.n_hits / other.n)
    return Measured(found.estimate, found.low, found.high, share >= MIN_INTERPRETABLE)


def proxy_hits(comparison: Comparison, line: str, sae: str | None = None) -> tuple[Hits, Hits]:
    """A line's features of the transcoder and of an SAE (by default that of the paper's place), by the proxy."""
    kinds = comparison.items["number"].map(comparison.origin)
    table = comparison.items.assign(kind=kinds)
    own = hits(table, line, "transcoder")
    return own, hits(table, line, sae or comparators(comparison)[0])


def power_table(comparison: Comparison) -> pd.DataFrame:
    """Features a kind at which the paper's own differences would be seen with 80 % power.

    Columns: line, transcoder and sae_count (of 50), p, needed, and drawn (ours, of the kind with fewest).
    """
    drawn = min(pd.Series(comparison.origin).value_counts())
    lines = []
    for line in ("interpretable", "interpretable and context-free"):
        own, other = (paper_hits(line, kind) for kind in ("transcoder", COMPARATORS[0]))
        needed = n_for_power(own.n_hits / own.n, other.n_hits / other.n)
        counts = {"transcoder": own.n_hits, "sae_count": other.n_hits, "p": fisher_p(*own, *other)}
        lines.append({"line": line, **counts, "needed": needed, "drawn": drawn})
    return pd.DataFrame(lines)


# ---------------------------------------------------------------------------------------------
# The proxy


def proxy_shares(comparison: Comparison) -> pd.DataFrame:
    """Share interpretable by kind, with 95 % intervals (Wilson), at several thresholds.

    Columns: kind, threshold, interpretable, low, high, and its two parts: context_free, with_context
    (passes without being context-free).
    """
    kinds = comparison.items["number"].map(comparison.origin)
    lines = []
    for kind, own in comparison.items.assign(kind=kinds).groupby("kind"):
        f1, free = own["f1"].fillna(0.0).to_numpy(), own["context_free"].to_numpy(dtype=bool)
        for threshold in SENSITIVITY:
            passes = f1 >= threshold
            low, high = wilson_interval(int(passes.sum()), len(passes))
            line = {"kind": kind, "threshold": threshold, "interpretable": passes.mean()}
            parts = {
                "context_free": (passes & free).mean(),
                "with_context": (passes & ~free).mean(),
            }
            lines.append({**line, "low": low, "high": high, **parts})
    return pd.DataFrame(lines)


def calibration(comparison: Comparison) -> pd.DataFrame:
    """How the proxy rates features that stand for a known latent, and those that do not.

    Sensitivity is the share of the first that it calls interpretable, specificity the share of the
    others that it does not, agreement the share of all on which it is right in this sense. Columns: kind
    (or all), measure, n_hits, n, share, low, high (Wilson); empty off the demo world.
    """
    kinds = comparison.items["number"].map(comparison.origin)
    table = comparison.items.assign(kind=kinds).dropna(subset=["latent_f1"])
    groups = {"all": table, **{str(kind): own for kind, own in table.groupby("kind")}}
    lines = [
        {"kind": kind, "measure": measure, **_share(found)}
        for kind, own in groups.items()
        if len(own)
        for measure, found in _measures(own).items()
    ]
    return pd.DataFrame(lines, columns=["kind", "measure", "n_hits", "n", "share", "low", "high"])


def _measures(items: pd.DataFrame) -> dict[str, Hits]:
    stands = (items["latent_f1"] >= STANDS_FOR).to_numpy()
    passes = (items["rating"] == "interpretable").to_numpy()
    return {
        "agreement": Hits(int((stands == passes).sum()), len(items)),
        "sensitivity": Hits(int((stands & passes).sum()), int(stands.sum())),
        "specificity": Hits(int((~stands & ~passes).sum()), int((~stands).sum())),
    }


def _share(found: Hits) -> dict[str, float]:
    low, high = wilson_interval(*found)
    share = found.n_hits / found.n if found.n else np.nan
    return {"n_hits": found.n_hits, "n": found.n, "share": share, "low": low, "high": high}
