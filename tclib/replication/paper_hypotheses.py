"""The hypotheses of the paper's nine blind studies (Table 4), said in the language of ours, to be graded by our rules.

data/paper/hypotheses.json has one condition a feature, written from the paper's words alone, with the part of them
that the language cannot say; layers, words and grades stand in case_studies.csv.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from tclib.blind.language import Condition, from_dict
from tclib.blind.vocabulary import Vocabulary
from tclib.replication.paper import paper_table
from tclib.support.places import DATA


@dataclass(frozen=True)
class PaperHypothesis:
    """What the paper says of one feature of GPT-2, before and after it saw the text, and its own grade."""

    layer: int
    feature: int
    kind: str  # blind, restricted
    text: str
    truth: str
    grade: str
    condition: Condition
    unsaid: str


def paper_hypotheses(vocabulary: Vocabulary) -> list[PaperHypothesis]:
    """The nine, in the order of case_studies.csv, with lists of tokens of this vocabulary.

    A text that is no single token of it is left out. Errors: `InputError` for a vocabulary with none of a
    list, as no vocabulary but GPT-2's needs to have.
    """
    path = DATA / "paper" / "hypotheses.json"
    said = {one["feature"]: one for one in json.loads(path.read_text(encoding="utf-8"))}
    found = []
    for row in paper_table("case_studies"):
        feature = int(row["feature"])
        condition = from_dict(said[feature]["condition"], vocabulary)
        found.append(
            PaperHypothesis(
                layer=int(row["layer"]),
                feature=feature,
                kind=row["kind"],
                text=row["hypothesis"],
                truth=row["truth"],
                grade=row["grade"],
                condition=condition,
                unsaid=said[feature]["unsaid"],
            )
        )
    return found
