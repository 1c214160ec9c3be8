"""An automatic investigator: from circuits and de-embeddings alone it writes a hypothesis as a predicate.

It works through a `BlindSession` like a person: it asks for positions where the feature is active, reads there
which sources make it so (tokens at the position, directly or through features of middle layers, or earlier
tokens through heads), looks up from weights alone which tokens those sources read, and says: the token here is
one of these, or a token before it is one of those, or both. After unblinding the predicate is scored on text that
the session did not hold.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd

from tclib.blind.ledger import Position
from tclib.blind.predicates import Predicate
from tclib.blind.session import BlindSession
from tclib.evaluation.metrics import ACTIVE_SHARE
from tclib.support.statistics import TIE

N_POSITIONS = 6
MIN_SHARE = 0.5  # of the maximum: which activations are looked at, as the paper's thresholds
N_MIDDLE_FEATURES = 3
N_HEADS = 3
N_SOURCES = 1_000  # listed one by one; the rest are summed
N_TOKENS = 40  # of each de-embedding that is read
MIN_Z, KEPT_SCORE = 2.0, 0.5  # tokens far above the vocabulary's mean, and near the best of them


@dataclass
class _Evidence:
    """What has been gathered: scores of tokens at the position and before it, and what is needed."""

    current: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    attended: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    names: dict[int, str] = field(default_factory=dict)
    left_without_current: list[float] = field(default_factory=list)
    left_without_attended: list[float] = field(default_factory=list)
    distances: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    def read(self, where: dict[int, float], table: pd.DataFrame, weight: float) -> None:
        """Take in the tokens that stand far above the vocabulary's mean, relative to the best."""
        top = table[(table["z"] >= MIN_Z) & (table["rank"] > 0)]
        for token_id, token, z in zip(top["id"], top["token"], top["z"], strict=True):
            where[int(token_id)] += weight * float(z) / float(top["z"].max())
            self.names[int(token_id)] = str(token)


@dataclass(frozen=True)
class Hypothesis:
    """What the investigator says: in words, and as a predicate.

    The shares are what is left of the activation without the token itself, and without earlier ones.
    """

    text: str
    predicate: Predicate
    left_without_current: float
    left_without_attended: float


class _Parts(NamedTuple):
    """A pre-activation, and how much of it comes from the token itself and from earlier tokens."""

    value: float
    current: float
    attended: float


def investigate(session: BlindSession) -> Hypothesis:
    """Study a feature and write the hypothesis into the session's ledger."""
    evidence = _Evidence()
    found = session.examples(N_POSITIONS, MIN_SHARE)
    for line in found.to_dict("records"):
        position = Position(int(line["example"]), int(line["pos"]))
        parts = _look_at(session, position, evidence, session.layer, session.feature, 1.0, True)
        evidence.left_without_current.append(1 - parts.current / parts.value)
        evidence.left_without_attended.append(1 - parts.attended / parts.value)
    hypothesis = _conclude(evidence)
    session.hypothesise(hypothesis.text, hypothesis.predicate.as_dict())
    return hypothesis


def _look_at(
    session: BlindSession,
    position: Position,
    evidence: _Evidence,
    layer: int,
    feature: int,
    weight: float,
    follow: bool,
) -> _Parts:
    """Read a feature's sources at one position, and follow its strongest features of middle layers.

    A middle feature that would be silent without earlier tokens counts as theirs as a whole.
    """
    table = session.sources(position, N_SOURCES, layer, feature, rest=True)
    value = max(session.activation(position, layer, feature), 1e-9)
    effect, kind = table["contribution"], table["kind"]
    is_earlier = (kind == "head") & table["pos"].between(1, position.pos - 1)
    attended = float(effect[is_earlier].sum())
    # Features of layer 0 are hidden in a restricted study; they belong to the token itself.
    hidden = value - float(effect.sum())
    at_token = kind.isin(["embedding", "feature"]) & (table["layer"] <= 0)
    own_head = (kind == "head") & (table["pos"] == position.pos)
    current = hidden + float(effect[at_token | own_head].sum())
    _read_tokens(session, position, table[is_earlier], evidence, layer, feature, weight)
    middle = table[(kind == "feature") & (table["layer"] > 0)]
    listed = middle[(middle["feature"] >= 0) & (middle["contribution"] > 0)]
    followed = listed.iloc[: N_MIDDLE_FEATURES if follow else 0]  # strongest first
    current += float(middle["contribution"].drop(followed.index).sum())
    for line in followed.to_dict("records"):
        effect_here = float(line["contribution"])
        place = (int(line["layer"]), int(line["feature"]))
        share = weight * effect_here / value
        inner = _look_at(session, position, evidence, *place, share, False)
        silent_without = inner.value - inner.attended <= 0
        part = 1.0 if silent_without else max(0.0, inner.attended / inner.value)
        attended += effect_here * part
        current += effect_here * (1 - part)
    return _Parts(value, current, attended)


def _read_tokens(
    session: BlindSession,
    position: Position,
    earlier: pd.DataFrame,
    evidence: _Evidence,
    layer: int,
    feature: int,
    weight: float,
) -> None:
    """Which tokens a feature reads, at its own position and through the strongest heads."""
    direct = session.de_embedding(layer, feature, extended=layer > 0, k=N_TOKENS)
    evidence.read(evidence.current, direct, weight / 2)
    evidence.read(evidence.current, session.lone_token(layer, feature, N_TOKENS), weight / 2)
    positive = earlier[(earlier["head"] >= 0) & (earlier["contribution"] > 0)]
    total = float(positive["contribution"].sum()) or 1.0
    for line in positive.head(N_HEADS).to_dict("records"):
        strength = weight * float(line["contribution"]) / total
        head = (int(line["layer"]), int(line["head"]))
        extended = head[0] > 0 and layer > 0
        table = session.de_embedding(layer, feature, head, extended, N_TOKENS)
        evidence.read(evidence.attended, table, strength)
        evidence.distances[position.pos - int(line["pos"])] += strength


def _conclude(evidence: _Evidence) -> Hypothesis:
    """The predicate: the token itself where it is needed, earlier tokens where they are."""
    without_current = float(np.median(evidence.left_without_current))
    without_attended = float(np.median(evidence.left_without_attended))
    current, attended = _strong(evidence.current), _strong(evidence.attended)
    needs_current = bool(current) and without_current < ACTIVE_SHARE
    needs_attended = bool(attended) and without_attended < ACTIVE_SHARE
    if not (needs_current or needs_attended):
        leaves_less = without_current <= without_attended + TIE
        needs_current = bool(current) and (leaves_less or not attended)
        needs_attended = bool(attended) and not needs_current
    predicate = Predicate(
        current if needs_current else None,
        attended if needs_attended else None,
        _reach(evidence.distances) if needs_attended else 0,
    )
    text = _in_words(predicate, evidence.names)
    shares = f"left without the token itself {without_current:.0%}, without earlier ones {without_attended:.0%}"
    return Hypothesis(f"{text} ({shares})", predicate, without_current, without_attended)


def _strong(scores: dict[int, float]) -> frozenset[int]:
    least = KEPT_SCORE * max(scores.values(), default=0.0) * (1 - TIE)
    return frozenset(i for i, value in scores.items() if value >= least and value > 0)


def _reach(distances: dict[int, float]) -> int:
    """How far back the heads look: the distance that covers 80% of what they bring; 0 beyond 8."""
    total, covered = sum(distances.values()), 0.0
    for distance in sorted(distances):
        covered += distances[distance]
        if covered >= 0.8 * total * (1 - TIE):
            return distance if distance <= 8 else 0
    return 0


def _in_words(predicate: Predicate, names: dict[int, str]) -> str:
    def listed(ids: frozenset[int]) -> str:
        # A word with and without its space is one word here; a token of white space stays as it is.
        said = {name.strip() or name for name in (names.get(i, str(i)) for i in ids)}
        shown = ", ".join(map(repr, sorted(said)[:12]))
        return shown + (f" … ({len(ids)} tokens)" if len(said) > 12 else "")

    parts = []
    if predicate.current is not None:
        parts.append(f"the token is one of {listed(predicate.current)}")
    if predicate.attended is not None:
        where = f"within {predicate.reach} tokens before" if predicate.reach else "anywhere before"
        parts.append(f"{where} stands one of {listed(predicate.attended)}")
    return " and ".join(parts)
