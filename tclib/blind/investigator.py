"""An automatic investigator: from circuits and de-embeddings alone it writes a hypothesis as a predicate.

It works through a `BlindSession` like a person: it asks for positions where the feature is active, reads there
which sources make it so (tokens at the position, directly or through features of middle layers, or earlier
tokens through heads), looks up from weights alone which tokens those sources read and what these have in common, and
says: the token here is one of these or of this class, or one before it is, or both. After unblinding the hypothesis
is scored on text that the session did not hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tclib.blind.answers import DEEPER, EARLIER, GROUPS, TOKEN
from tclib.blind.generalise import generalise
from tclib.blind.language import After, Condition, Every, OneOf
from tclib.blind.ledger import Position
from tclib.blind.session import BlindSession
from tclib.blind.vocabulary import Vocabulary
from tclib.evaluation.metrics import ACTIVE_SHARE
from tclib.support.statistics import TIE

N_POSITIONS = 6
MIN_SHARE = 0.5  # of the maximum: which activations are looked at, as the paper's thresholds
N_MIDDLE_FEATURES = 3
N_HEADS = 3
N_LOW_FEATURES = 3
N_SOURCES = 20  # of each kind that is listed
N_TOKENS = 40  # of each de-embedding that is read
COMMON = 0.8  # how much more of the listed scores than of other tokens a class must hold
MIN_Z, KEPT_SCORE = 2.0, 0.5  # tokens far above the vocabulary's mean, and near the best of them


@dataclass
class _Evidence:
    """What has been gathered: scores of tokens at the position and before it, and what is needed."""

    current: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    attended: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    left_without_current: list[float] = field(default_factory=list)
    left_without_attended: list[float] = field(default_factory=list)
    distances: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    known: dict[tuple[str, tuple[Any, ...]], dict[int, float]] = field(default_factory=dict)

    def read(
        self,
        where: dict[int, float],
        weight: float,
        ask: Callable[..., pd.DataFrame],
        *about: Any,
    ) -> None:
        """Take in the tokens that a question about weights names; it is asked once a study."""
        if (ask.__name__, about) not in self.known:
            self.known[ask.__name__, about] = _high_tokens(ask(*about, k=N_TOKENS))
        for token_id, part in self.known[ask.__name__, about].items():
            where[token_id] += weight * part


def _high_tokens(table: pd.DataFrame) -> dict[int, float]:
    """The tokens that stand far above the vocabulary's mean, relative to the best."""
    top = table[(table["z"] >= MIN_Z) & (table["rank"] > 0)]
    parts = top["z"] / top["z"].max()
    return {int(i): float(part) for i, part in zip(top["id"], parts, strict=True)}


@dataclass(frozen=True)
class Hypothesis:
    """What the investigator says: in words, and as a predicate.

    The shares are what is left of the activation without the token itself, and without earlier ones.
    """

    text: str
    predicate: Condition
    left_without_current: float
    left_without_attended: float


class _Parts(NamedTuple):
    """Shares of a pre-activation that come from the token itself, and from earlier tokens."""

    current: float
    attended: float


def investigate(session: BlindSession, vocabulary: Vocabulary) -> Hypothesis:
    """Study a feature and write the hypothesis into the session's ledger; `vocabulary` is the model's."""
    evidence = _Evidence()
    found = session.examples(N_POSITIONS, MIN_SHARE)
    for line in found.to_dict("records"):
        position = Position(int(line["example"]), int(line["pos"]))
        parts = _look_at(session, position, evidence, session.layer, session.feature, 1.0, True)
        evidence.left_without_current.append(1 - parts.current)
        evidence.left_without_attended.append(1 - parts.attended)
    hypothesis = _conclude(evidence, vocabulary)
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
    table = session.sources(position, N_SOURCES, layer, feature)
    value = max(session.activation(position, layer, feature), 1e-9)
    share = table.set_index("kind")["share"]
    current, attended = float(share[GROUPS[TOKEN]]), float(share[GROUPS[EARLIER]])
    is_feature = table["kind"] == "feature"
    at_token = table[is_feature & (table["layer"] == 0)]
    heads = table[table["kind"] == "head"]
    _read_tokens(session, position, heads, evidence, layer, feature, weight)
    _read_layer_0(session, at_token, evidence, weight)
    middle = table[is_feature & (table["layer"] > 0) & (table["contribution"] > 0)]
    followed = middle.iloc[: N_MIDDLE_FEATURES if follow else 0]  # strongest first
    parts = followed["contribution"] / value
    current += float(share[GROUPS[DEEPER]]) - float(parts.sum())
    for part, line in zip(parts, followed.to_dict("records"), strict=True):
        place = (int(line["layer"]), int(line["feature"]))
        inner = _look_at(session, position, evidence, *place, weight * part, False)
        brought = min(max(0.0, inner.attended), 1.0)
        attended += part * brought
        current += part * (1 - brought)
    return _Parts(current, attended)


def _read_layer_0(
    session: BlindSession, active: pd.DataFrame, evidence: _Evidence, weight: float
) -> None:
    """Which tokens the strongest active features of layer 0 stand for; a restricted study lists none."""
    for line in active.head(N_LOW_FEATURES).to_dict("records"):
        part = weight / N_LOW_FEATURES
        evidence.read(evidence.current, part, session.de_embedding, 0, int(line["feature"]))


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
    own, current = (layer, feature), evidence.current
    evidence.read(current, weight / 2, session.de_embedding, *own, None, layer > 0)
    evidence.read(current, weight / 2, session.lone_token, *own)
    for place, line in enumerate(earlier.head(N_HEADS).to_dict("records")):
        strength = weight / (place + 2)  # by rank: how much each brings is not to be had
        head = (int(line["layer"]), int(line["head"]))
        through = (head, head[0] > 0 and layer > 0)
        evidence.read(evidence.attended, strength, session.de_embedding, *own, *through)
        evidence.distances[position.pos - int(line["pos"])] += strength


def _conclude(evidence: _Evidence, vocabulary: Vocabulary) -> Hypothesis:
    """The predicate: the token itself where it is needed, earlier tokens where they are."""
    without_current = float(np.median(evidence.left_without_current))
    without_attended = float(np.median(evidence.left_without_attended))
    current, attended = _strong(evidence.current), _strong(evidence.attended)
    needs_current = bool(current) and without_current <= ACTIVE_SHARE + TIE
    needs_attended = bool(attended) and without_attended <= ACTIVE_SHARE + TIE
    if not (needs_current or needs_attended):
        leaves_less = without_current <= without_attended + TIE
        needs_current = bool(current) and (leaves_less or not attended)
        needs_attended = bool(attended) and not needs_current
    parts: list[Condition] = []
    if needs_current:
        parts.append(_said_of(current, evidence.current, vocabulary))
    if needs_attended:
        earlier = _said_of(attended, evidence.attended, vocabulary)
        parts.append(After(earlier, _reach(evidence.distances)))
    if not parts:
        parts.append(OneOf(frozenset()))  # nothing was read: a hypothesis that holds nowhere
    predicate = parts[0] if len(parts) == 1 else Every(tuple(parts))
    text = predicate.in_words(vocabulary)
    shares = f"left without the token itself {without_current:.0%}, without earlier ones {without_attended:.0%}"
    return Hypothesis(f"{text} ({shares})", predicate, without_current, without_attended)


def _said_of(
    listed: frozenset[int], scores: Mapping[int, float], vocabulary: Vocabulary
) -> Condition:
    """The tokens, or the class or spelling that they have in common and few others share."""
    named = {i: scores[i] for i in listed if i != vocabulary.bos_id}  # no text holds a BOS
    found = generalise(named, vocabulary, least=COMMON, n=1) if named else []
    return found[0].condition if found else OneOf(frozenset(named))


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
