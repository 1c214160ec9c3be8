"""What a run holds: the result of each notebook's step, made once and then loaded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from tclib.blind.ratings import Item, RatingStore, pages_hash, ratings_path
from tclib.circuits.frozen import FrozenPrompts, Target
from tclib.circuits.graph import AttributionGraph
from tclib.dictionaries.dictionary import Dictionary
from tclib.support.steps import Step


@dataclass(frozen=True)
class Trained:
    """Trained dictionaries by name, their training log, and where they lie."""

    dictionaries: dict[str, Dictionary]
    log: pd.DataFrame
    step: Step
    hashes: dict[str, str]  # of the step's files: what a step made from them depends on

    def only(self, names: Collection[str]) -> Trained:
        """Some of the dictionaries, and their files."""
        kept = {name: one for name, one in self.dictionaries.items() if name in names}
        hashes = {f: value for f, value in self.hashes.items() if f.rsplit(".", 1)[0] in names}
        return Trained(kept, self.log[self.log["dictionary"].isin(kept)], self.step, hashes)


class Explained(NamedTuple):
    """A frozen prompt and the target that its graph explains."""

    frozen: FrozenPrompts
    root: Target


@dataclass(frozen=True)
class Circuits:
    """Step 03: the full graph of a prompt, the pruned one, connections, ablations, circuits kept alone."""

    graph: AttributionGraph
    small: AttributionGraph
    connections: pd.DataFrame
    ablations: pd.DataFrame
    faithfulness: pd.DataFrame
    step: Step


def study_name(feature: int, variant: str, dictionary: str = "transcoder") -> str:
    """How files call a study, or without a variant its feature."""
    parts = ("" if dictionary == "transcoder" else "sae", str(feature), variant)
    return "_".join(part for part in parts if part)


@dataclass(frozen=True)
class CaseStudies:
    """Step 04: the table of studies, the attack on their ledgers, the paper's own hypotheses graded, and the folder."""

    table: pd.DataFrame
    leaks: pd.DataFrame
    papers: pd.DataFrame
    folder: Path

    def ledger_path(self, study: str) -> Path:
        """The ledger of one study."""
        return self.folder / f"ledger_{study}.jsonl"

    def dashboard(self, feature: int, dictionary: str = "transcoder") -> str:
        """One feature's dashboard, as HTML."""
        name = study_name(feature, "", dictionary)
        return (self.folder / f"dashboard_{name}.html").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Comparison:
    """Step 05: the pairs, the proxy's table, the latents' (empty off the demo world), and the hidden origins."""

    pairs: pd.DataFrame
    items: pd.DataFrame
    latents: pd.DataFrame
    origin: dict[int, str]
    folder: Path

    def pages(self) -> list[Item]:
        """The dashboards of the features that are rated by hand, in their shuffled order, without origin."""
        numbers = sorted(self.items.loc[self.items["has_page"], "number"].tolist())
        return [
            Item(i, (self.folder / f"item_{i}.html").read_text(encoding="utf-8")) for i in numbers
        ]

    def ratings(self, rater: str) -> RatingStore:
        """A rater's answers on these pages, kept beside them. Errors: `InputError` for those on other pages."""
        pages = self.pages()
        path = ratings_path(self.folder, rater)
        return RatingStore(path, len(pages), rater, pages_hash(pages))


@dataclass(frozen=True)
class GreaterThanResults:
    """Step 06: its tables, and the single figures by name."""

    components: pd.DataFrame
    reading_heads: pd.DataFrame
    feature_curves: pd.DataFrame
    curves: pd.DataFrame
    ahead: pd.DataFrame
    harmful: pd.DataFrame
    held_out_harm: pd.DataFrame
    controls: pd.DataFrame
    summary: dict[str, Any]
    step: Step
