"""Rules of a verdict, written before any result (but for one premise, as it says), and the closing table's lines.

Every claim of the paper that can be decided has one statistic, larger where the claim holds better, with a 95 %
interval. `null` is its value if there is nothing to the claim (or the margin within which it may be missed),
`enough` the value from which it holds as the paper says:

    not applicable   the premise fails: there is nothing to replace, to explain or to compare
    reproduced       the interval lies above null, the estimate at or above enough
    partly           the interval lies above null, the estimate below enough
    no power         the interval holds both null and enough
    not reproduced   the rest
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import pandas as pd

Line = dict[str, str]
Verdict = Literal["reproduced", "partly", "not reproduced", "no power", "not applicable"]
COLUMNS = ("claim", "paper", "ours", "verdict", "power")


@dataclass(frozen=True)
class Rule:
    """How one claim is decided."""

    claim: str
    statistic: str
    null: float
    enough: float
    premise: str


@dataclass(frozen=True)
class Measured:
    """A statistic with its 95 % interval, and whether the rule's premise holds."""

    estimate: float
    low: float
    high: float
    is_applicable: bool = True

    @property
    def in_words(self) -> str:
        return f"{self.estimate:+.3g} ({self.low:+.3g} to {self.high:+.3g})"


_WORTH = "what the MLP adds to the metric: the original's less that of its output bias alone"
_WORTH_PREMISE = "the MLP adds at least 0.05 to the metric, and surely more than nothing"
RULES = {
    "faithfulness": Rule(
        "Fig. 3: at equal L0 transcoders are as faithful as SAEs, or more",
        "SAE's CE − transcoder's, mean over the shared L0, in shares of what mean ablation of the MLP costs",
        -0.02,
        -0.005,
        "mean ablation costs at least 0.01 nats; both kinds share L0s, and recover half of it at one of them",
    ),
    "whole_model": Rule(
        "All transcoders at once stand in for their MLPs",
        "share of the cross-entropy that zero ablation of the same MLPs costs which the transcoders bring back",
        0.5,
        0.9,
        "zero ablation of them costs at least 0.1 nats",
    ),
    "behaviour": Rule(
        "Greater-than: the model puts later years above earlier ones",
        "probability difference of the unmodified model",
        0.0,
        0.8,
        "none",
    ),
    "kept": Rule(
        "Section 5.2: the MLP's transcoder keeps the behaviour",
        f"the replaced model's gain over the output bias alone, in shares of {_WORTH}",
        0.0,
        0.6,
        _WORTH_PREMISE,
    ),
    "first_features": Rule(
        "Fig. 5: a few features do what more neurons are needed for",
        f"features less neurons at equal k, mean over k from 1 to 10, in shares of {_WORTH}",
        0.0,
        0.05,
        _WORTH_PREMISE,
    ),
    "harmful": Rule(
        "Fig. 5: one feature hurts; without it the transcoder does better",
        "gain without the feature that was chosen on one half of the prompts, on the other half, less the gain "
        f"without the neuron that was so chosen, in shares of {_WORTH}",
        0.0,
        0.05,
        f"{_WORTH_PREMISE}; its transcoder surely keeps some of that (added when random directions had passed)",
    ),
    "shift": Rule(
        "Fig. 4: features are excited by years and promote later ones",
        "share of the ten features whose attribution correlates best with their de-embedding at a later year",
        0.5,
        0.8,
        "answers are years, and layer 0 has a transcoder",
    ),
    "interpretability": Rule(
        "Table 1: transcoder features are at least as interpretable as SAE features",
        "share of interpretable transcoder features − that of the SAE's",
        -0.15,
        0.0,
        "a fifth of the features of one kind is interpretable",
    ),
    "case_studies": Rule(
        "Section 5.1: a feature's meaning can be said without seeing text",
        "share of blind studies that succeed, mostly or wholly",
        0.2,
        0.6,
        "every studied feature fires on the held-out text",
    ),
}

# Of ten features, of features that were drawn, of a difference near zero: trained anew, by another seed or on another
# processor, they come out on this side or that (data/reference/demo/08_seeds).
UNSTEADY = ("shift", "case_studies", "interpretability")


def verdict(name: str, measured: Measured) -> Verdict:
    """What the rule of that name says of a statistic; NaN is a premise that fails."""
    rule, numbers = RULES[name], (measured.estimate, measured.low, measured.high)
    if not measured.is_applicable or any(map(math.isnan, numbers)):
        return "not applicable"
    if measured.low > rule.null:
        return "reproduced" if measured.estimate >= rule.enough else "partly"
    return "no power" if measured.high >= rule.enough else "not reproduced"


def smallest_effect(name: str, measured: Measured) -> float:
    """The smallest value of the statistic that would have been told from null, with this interval's width."""
    return RULES[name].null + measured.estimate - measured.low


def decided(name: str, paper: str, ours: str, measured: Measured) -> Line:
    """One line of the closing table, by the rule of that name."""
    rule, least = RULES[name], smallest_effect(name, measured)
    power = "" if math.isnan(least) else f"{least:+.3g} would have been told from {rule.null:+.3g}"
    return claim_line(rule.claim, paper, ours, verdict(name, measured), power)


def claim_line(claim: str, paper: str, ours: str, verdict: str, power: str = "") -> Line:
    """One line of the closing table; `power` is the smallest effect that would have been seen."""
    return dict(zip(COLUMNS, (claim, paper, ours, verdict, power), strict=True))


def steady(lines: Iterable[Line]) -> list[Line]:
    """The lines whose verdicts another seed or processor leaves as they are: what tests of the notebooks hold."""
    moved = {RULES[name].claim for name in UNSTEADY}
    return [line for line in lines if line["claim"] not in moved]


def results_table(lines: list[Line]) -> pd.DataFrame:
    """The closing table."""
    return pd.DataFrame(lines, columns=list(COLUMNS))


def rules_table() -> pd.DataFrame:
    """All rules: claim, statistic, null, enough, premise."""
    return pd.DataFrame([asdict(rule) for rule in RULES.values()])
