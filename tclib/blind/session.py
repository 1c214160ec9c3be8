"""Blinded studies of a feature: the rules of Section 5.1 kept by code, not by promise.

A session hands out positions of a corpus as opaque (example, pos) pairs and answers the questions that the
paper's rules allow: activations, circuits, and anything that needs no input (de-embeddings, pullbacks, logits).
Tokens and text of the corpus cannot be had before `unblind()`; a hypothesis must be written before it, and no
question after it counts as blind. The *restricted* variant also refuses input-dependent facts about features of
layer 0. Every question and answer goes into a ledger whose entries are chained by hashes, so that a changed,
dropped or reordered one is found; a ledger can be replayed.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from pydantic import JsonValue
from torch import Tensor

from tclib.blind.ledger import GENESIS, BlindnessError, Entry, Position, digest_of, plain
from tclib.circuits.frozen import FrozenPrompts, by_layer
from tclib.circuits.paths import greedy_paths
from tclib.circuits.sources import sources
from tclib.dictionaries.dictionary import Dictionary
from tclib.features import from_weights as weights
from tclib.features.dashboard import Dashboard, build_dashboard
from tclib.features.examples import check_acts, feature_activations, sample_in_bands
from tclib.models.language_model import LanguageModel
from tclib.support.checked import checked
from tclib.support.declared import Count, Natural, Share
from tclib.support.errors import InputError
from tclib.support.files import new_file
from tclib.support.statistics import ranked, to_numpy


@dataclass
class _Secret:
    """What only this module touches while a session is blind."""

    lm: LanguageModel
    transcoders: dict[int, Dictionary]
    rows: Int[Tensor, "row pos"]
    acts: Float[Tensor, "row pos"]
    frozen: dict[Position, FrozenPrompts]
    lone: weights.LoneTokens


# Kept apart from the sessions, so that nothing that walks over a session's attributes finds it.
_SECRETS: WeakKeyDictionary[BlindSession, _Secret] = WeakKeyDictionary()
_QUESTIONS: set[str] = set()
OWN: Any = None  # the layer or the feature under study

_Asked = ParamSpec("_Asked")
_Answer = TypeVar("_Answer")


def question(
    method: Callable[Concatenate[BlindSession, _Asked], _Answer],
) -> Callable[Concatenate[BlindSession, _Asked], _Answer]:
    """A method whose every answer goes into the ledger, with all arguments, defaults filled in."""
    signature = inspect.signature(method)

    @wraps(method)
    def asked(session: BlindSession, /, *args: _Asked.args, **kwargs: _Asked.kwargs) -> _Answer:
        bound = signature.bind(session, *args, **kwargs)
        bound.apply_defaults()
        arguments = {name: bound.arguments[name] for name in list(bound.arguments)[1:]}
        for name in ("layer", "feature"):
            if name in arguments and arguments[name] is OWN:
                bound.arguments[name] = arguments[name] = getattr(session, name)
        answer = method(*bound.args, **bound.kwargs)
        if "position" in arguments:
            arguments = {**vars(arguments.pop("position")), **arguments}
        if arguments.get("head") is not None:
            arguments["head"] = list(arguments["head"])
        session._record("question", method.__name__, arguments, plain(answer))
        return answer

    _QUESTIONS.add(method.__name__)
    return checked(asked)


def is_question(name: str) -> bool:
    """Whether a session has a question of this name."""
    return name in _QUESTIONS


class BlindSession:
    """A blind study of one feature.

    Args:
        lm: the model.
        transcoders: by any names; one of them holds the feature.
        rows: the corpus, which stays hidden.
        layer, feature: what is studied.
        restricted: refuse input-dependent facts about layer 0's features.
        acts, lone: the feature's activations on `rows`, and lone tokens of these transcoders; whoever
            studies several features computes them once and shares them.

    Errors: `InputError` for a layer without a transcoder, activations of another shape than the rows, or
    a feature that never fires here.
    """

    __slots__ = (
        "__weakref__",
        "_has_hypothesis",
        "_is_blind",
        "_ledger",
        "feature",
        "layer",
        "restricted",
    )

    @checked
    def __init__(
        self,
        lm: LanguageModel,
        transcoders: Mapping[str, Dictionary],
        rows: Int[Tensor, "row pos"],
        layer: int,
        feature: int,
        restricted: bool = False,
        *,
        acts: Float[Tensor, "row pos"] | None = None,
        lone: weights.LoneTokens | None = None,
    ) -> None:
        found = by_layer(lm, transcoders.values())
        lm.check_text(rows)
        if layer not in found:
            raise InputError(f"no transcoder at layer {layer}: there is one at {sorted(found)}")
        found[layer].check_features(feature)
        if acts is None:
            acts = feature_activations(lm, found[layer], [feature], rows)[0]
        check_acts(acts, rows)
        lone = weights.LoneTokens(lm, transcoders.values()) if lone is None else lone
        if not bool((acts > 0).any()):
            raise InputError(
                f"feature {feature} of layer {layer} never fires on this corpus: draw a live one"
            )
        self.layer, self.feature, self.restricted = layer, feature, restricted
        self._is_blind, self._has_hypothesis = True, False
        self._ledger: list[Entry] = []
        _SECRETS[self] = _Secret(lm, found, rows, acts, {}, lone)
        corpus = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
        subject = {"layer": layer, "feature": feature, "restricted": restricted, "corpus": corpus}
        self._record("begin", "begin", subject, None)

    # -- what can be seen of it -------------------------------------------------------------

    @property
    def is_blind(self) -> bool:
        """Whether nothing has been unblinded yet."""
        return self._is_blind

    @property
    def ledger(self) -> tuple[Entry, ...]:
        """Everything so far, in order; copies, so that nothing can be changed through them."""
        return copy.deepcopy(tuple(self._ledger))

    def __repr__(self) -> str:
        variant = "restricted" if self.restricted else "full"
        state = "blind" if self._is_blind else "unblinded"
        n_questions = sum(entry.kind == "question" for entry in self._ledger)
        return (
            f"BlindSession(layer {self.layer}, feature {self.feature}, {variant}, {state}, "
            f"{n_questions} questions)"
        )

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise BlindnessError("a blind session cannot be pickled or copied: save its ledger instead")

    # -- questions that need the corpus -----------------------------------------------------

    @question
    def examples(self, n_examples: Count = 10, min_share: Share = 0.0) -> pd.DataFrame:
        """Positions where the feature is active, evenly over its range: example, pos, activation.

        Only those above `min_share` of the maximum.
        """
        secret = _SECRETS[self]
        strong = torch.where(secret.acts > min_share * secret.acts.max(), secret.acts, 0.0)
        n = min(n_examples, int((strong > 0).sum()))
        table = sample_in_bands(strong, n)[["row", "pos", "activation"]]
        return table.rename(columns={"row": "example"})

    @question
    def activation(self, position: Position, layer: int = OWN, feature: int = OWN) -> float:
        """Activation of a feature at a position; of the one under study by default."""
        self._refuse_layer_0(layer)
        frozen = self._frozen(position)
        return max(0.0, frozen.value(frozen.feature_target(layer, feature, position.pos)))

    @question
    def sources(
        self,
        position: Position,
        n_sources: Natural = 20,
        layer: int = OWN,
        feature: int = OWN,
        rest: bool = False,
    ) -> pd.DataFrame:
        """The strongest sources of a feature at a position, with shares of the sum of sizes.

        Of the feature under study by default, or of one that feeds it. With `rest`, lines with head and
        feature −1 sum up the sources that are not listed, so that all lines add up to the pre-activation
        (restricted: less what layer 0's features bring).
        """
        self._refuse_layer_0(layer)
        frozen = self._frozen(position)
        (found,) = sources(frozen, [frozen.feature_target(layer, feature, position.pos)])
        size = np.abs(found.contribution)
        table = found.table.assign(share=size / size.sum())
        if self.restricted:
            table = table[~((table["kind"] == "feature") & (table["layer"] == 0))]
        by_size = table.iloc[ranked(table["contribution"].abs())]
        answer = by_size.head(n_sources)
        if rest:
            answer = pd.concat([answer, _summed(by_size.iloc[n_sources:])])
        return answer.reset_index(drop=True)

    @question
    def paths(
        self, position: Position, n_iterations: Count = 3, n_branches: Count = 10
    ) -> pd.DataFrame:
        """The greedy search from the feature at a position: path, contribution.

        Restricted: without paths that end in a feature of layer 0, as in the paper.
        """
        frozen = self._frozen(position)
        root = frozen.feature_target(self.layer, self.feature, position.pos)
        lines = [
            (" <- ".join(map(str, path.nodes)), path.contribution)
            for level in greedy_paths(frozen, root, n_iterations, n_branches)
            for path in level
            if not self.restricted
            or not any(node.kind == "feature" and node.layer == 0 for node in path.nodes)
        ]
        return pd.DataFrame(lines, columns=["path", "contribution"])

    # -- questions that need no input -------------------------------------------------------

    @question
    def de_embedding(
        self,
        layer: int = OWN,
        feature: int = OWN,
        head: tuple[int, int] | None = None,
        extended: bool = False,
        k: Count = 10,
    ) -> pd.DataFrame:
        """Tokens of the vocabulary that excite a feature, from weights alone: rank, token, score."""
        function = weights.extended_de_embedding if extended else weights.de_embedding
        through = None if head is None else weights.Head(*head)
        lm = _SECRETS[self].lm
        return weights.token_table(lm, function(lm, self._transcoder(layer), feature, through), k)

    @question
    def lone_token(self, layer: int = OWN, feature: int = OWN, k: Count = 10) -> pd.DataFrame:
        """Tokens of the vocabulary that excite a feature by themselves, behind BOS: rank, token, score.

        The model runs on single tokens, not on the corpus: no input of the study is in it.
        """
        secret = _SECRETS[self]
        scores = secret.lone.scores(self._transcoder(layer), feature)
        return weights.token_table(secret.lm, scores, k)

    @question
    def pullback(
        self,
        earlier_layer: int,
        layer: int = OWN,
        feature: int = OWN,
        head: tuple[int, int] | None = None,
        k: Count = 10,
    ) -> pd.DataFrame:
        """Earlier features that excite a feature, from weights alone: feature, score."""
        dictionary, earlier = self._transcoder(layer), self._transcoder(earlier_layer)
        through = None if head is None else weights.Head(*head)
        lm = _SECRETS[self].lm
        return weights.feature_table(weights.pullback(lm, dictionary, feature, earlier, through), k)

    @question
    def logits(self, k: Count = 10) -> pd.DataFrame:
        """Tokens that the feature promotes and suppresses: rank, token, score."""
        lm, dictionary = _SECRETS[self].lm, self._transcoder(self.layer)
        scores = weights.direct_logit_attribution(lm, dictionary, self.feature)
        return weights.token_table(lm, scores, k)

    @question
    def ov_norms(self) -> pd.DataFrame:
        """How strongly each head could feed the feature: a line a layer, a column a head."""
        norms = weights.ov_norms(_SECRETS[self].lm, self._transcoder(self.layer), self.feature)
        return pd.DataFrame(to_numpy(norms))

    # -- the end of blindness ---------------------------------------------------------------

    @checked
    def hypothesise(self, text: str, predicate: dict[str, JsonValue] | None = None) -> None:
        """Write down what the feature means; the last one before `unblind` counts."""
        if not text.strip():
            raise BlindnessError("an empty hypothesis: say what the feature means")
        if not self._is_blind:
            raise BlindnessError("the session is unblinded: a hypothesis comes before that")
        self._has_hypothesis = True
        self._record("hypothesis", "hypothesise", {"text": text, "predicate": predicate}, None)

    @checked
    def unblind(self, n_examples: Count = 50) -> Dashboard:
        """End the blind part and show the feature. Errors: `BlindnessError` without a hypothesis."""
        if not self._has_hypothesis:
            raise BlindnessError("no hypothesis yet: call hypothesise() before unblind()")
        if self._is_blind:
            self._is_blind = False
            self._record("unblind", "unblind", {}, None)
        lm, every = _SECRETS[self].lm, _SECRETS[self].transcoders
        rows, acts = _SECRETS[self].rows, _SECRETS[self].acts
        return build_dashboard(lm, every[self.layer], self.feature, rows, every, acts, n_examples)

    @checked
    def text(self, position: Position) -> str:
        """The text up to a position; only after `unblind()`."""
        if self._is_blind:
            raise BlindnessError("text is hidden until unblind()")
        self._check(position)
        ids = _SECRETS[self].rows[position.example, : position.pos + 1]
        return "".join(_SECRETS[self].lm.token_strings(ids.tolist()))

    @checked
    def save_ledger(self, path: Path) -> None:
        """Write the ledger as JSON lines. Errors: `InputError` if something is there: nothing is overwritten."""
        if path.is_file():
            raise InputError(
                f"{path} exists, and a ledger is never overwritten: choose another name"
            )
        with new_file(path) as temporary:
            lines = [json.dumps(vars(entry), ensure_ascii=False) for entry in self._ledger]
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")

    # -- inside -----------------------------------------------------------------------------

    def _frozen(self, position: Position) -> FrozenPrompts:
        self._check(position)
        secret = _SECRETS[self]
        if position not in secret.frozen:
            tokens = secret.rows[[position.example], : position.pos + 1].long()
            transcoders = secret.transcoders.values()
            secret.frozen[position] = FrozenPrompts(secret.lm, tokens, transcoders)
        return secret.frozen[position]

    def _check(self, position: Position) -> None:
        n_rows, n_pos = _SECRETS[self].rows.shape
        if not (0 <= position.example < n_rows and 0 < position.pos < n_pos):
            raise BlindnessError(
                f"position ({position.example}, {position.pos}) is outside the corpus: expected "
                f"example 0 to {n_rows - 1}, pos 1 to {n_pos - 1}"
            )

    def _refuse_layer_0(self, layer: int) -> None:
        if self.restricted and layer == 0:
            raise BlindnessError(
                "restricted: activations of layer 0's features are not to be asked for; "
                "de_embedding and pullback need no input"
            )

    def _transcoder(self, layer: int) -> Dictionary:
        transcoders = _SECRETS[self].transcoders
        if layer not in transcoders:
            raise BlindnessError(
                f"no transcoder at layer {layer}: there is one at {sorted(transcoders)}"
            )
        return transcoders[layer]

    def _record(self, kind: str, question: str, arguments: dict[str, Any], answer: Any) -> None:
        before = self._ledger[-1].digest if self._ledger else GENESIS
        index = len(self._ledger)
        body = Entry(index, kind, self._is_blind, question, arguments, answer, "").body()
        self._ledger.append(Entry(**body, digest=digest_of(before, body)))


def _summed(sources: pd.DataFrame) -> pd.DataFrame:
    """A line a kind, layer and position; the heads of all layers that read one token are one line."""
    layer = sources["layer"].where(sources["kind"] != "head", -1)
    groups = sources.groupby([sources["kind"], layer, sources["pos"]], sort=False)
    sums = groups[["contribution", "share"]].sum().reset_index()
    lines = sums.assign(head=-1, feature=-1, activation=1.0, weight=sums["contribution"])
    return lines[list(sources.columns)]
