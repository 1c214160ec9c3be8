"""Blinded studies of a feature: the rules of Section 5.1 kept by code, not by promise.

A session hands out positions of a corpus as opaque (example, pos) pairs and answers the questions that the
paper's rules allow: activations, circuits, and anything that needs no input (de-embeddings, pullbacks, logits).
Tokens and text of the corpus cannot be had before `unblind()`; a hypothesis must be written before it, and no
question after it counts as blind, nor any about a feature that has been unblinded before. The *restricted* variant
also refuses input-dependent facts about features of layer 0. Every question and answer goes into a ledger whose
entries are chained by hashes; a ledger can be replayed.

Numbers and signs can name tokens: W_E[token] · u is another for every token. So an answer gives, of what hangs on the
input, activations of features above layer 0 to two significant digits; of the sources, in which quarter of the
pre-activation each group lies, the deeper features by rank (three of them with a contribution, to one digit), and which
heads raise it most from earlier tokens; and only of the feature under study, or of one that such an answer has listed at
that position. `leakage` measures what that still tells.

What Python cannot keep from its own user: another process does not know what this one has unblinded; and who reads
the secrets' own module (`secret`), walks the garbage collector, patches classes or hands in
models and dictionaries of its own making, runs the model on the
corpus beside the session, or asks for the activations of thousands of features at one place and decodes them, sees
the text. The rules hold for answers; for the rest a session is a lock on a door, not a wall.
"""

from __future__ import annotations

import copy
import hashlib
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import torch
from jaxtyping import Float, Int
from pydantic import JsonValue
from torch import Tensor

from tclib.blind.answers import coarse, group_shares, path_lines, source_lines
from tclib.blind.ledger import (
    BlindnessError,
    Entry,
    Position,
    example_order,
    key_hash,
    save_ledger,
    sealed,
)
from tclib.blind.secret import (
    OWN,
    SECRETS,
    Secret,
    check_own,
    dictionary_hashes,
    held_dictionaries,
    question,
    record,
    remember,
    studied_dictionary,
)
from tclib.circuits.frozen import FrozenPrompts, Target, by_layer
from tclib.circuits.paths import greedy_paths
from tclib.circuits.sources import sources
from tclib.dictionaries.dictionary import Dictionary
from tclib.features import from_weights as weights
from tclib.features.dashboard import Dashboard, build_dashboard
from tclib.features.examples import check_acts, feature_activations, sample_in_bands
from tclib.models.checks import check_hooks
from tclib.models.language_model import LanguageModel
from tclib.support.checked import checked
from tclib.support.declared import Count, Natural, Share
from tclib.support.errors import InputError
from tclib.support.statistics import to_numpy


class BlindSession:
    """A blind study of one feature.

    Args:
        lm: the model.
        transcoders: by any names; that of the layer holds the feature, unless `dictionary` does.
        rows: the corpus, which stays hidden.
        layer, feature: what is studied.
        restricted: refuse input-dependent facts about layer 0's features.
        dictionary: an SAE on the same mlp_in, one of whose features is studied in the transcoders' place; its
            number is understood wherever its layer is asked for.
        fresh_eyes: whoever asks is a program that remembers nothing, so that an earlier unblinding of the
            feature does not count; the ledger says so.
        key: by which the examples are numbered, a secret that the ledger shows at the unblinding; drawn if
            it is not given.
        acts, lone: the feature's activations on `rows`, and lone tokens of these transcoders; whoever
            studies several features computes them once and shares them.

    Errors: `InputError` for a layer without a transcoder, a restricted study of layer 0, a model with hooks
    on it, activations that are not the feature's, or a feature that never fires here.
    """

    __slots__ = ("__weakref__",)

    def __init_subclass__(cls) -> NoReturn:
        raise BlindnessError(
            "a blind session is not to be subclassed: another class could say that it is not blind"
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
        dictionary: Dictionary | None = None,
        fresh_eyes: bool = False,
        key: str | None = None,
        acts: Float[Tensor, "row pos"] | None = None,
        lone: weights.LoneTokens | None = None,
    ) -> None:
        found = by_layer(lm, transcoders.values())
        lm.check_text(rows)
        if layer not in found:
            raise InputError(f"no transcoder at layer {layer}: there is one at {sorted(found)}")
        if restricted and layer == 0:
            raise InputError(
                "restricted study of layer 0: all facts about its features that need the input are refused; "
                "expected a layer above it, or restricted=False"
            )
        studied = studied_dictionary(lm, found[layer], dictionary)
        studied.check_features(feature)
        check_hooks(lm.model, lm.name)
        is_given = acts is not None
        if acts is None:
            acts = feature_activations(lm, studied, [feature], rows)[0]
        check_acts(acts, rows)
        if not bool((acts > 0).any()):
            raise InputError(
                f"feature {feature} of layer {layer} never fires on this corpus: draw a live one"
            )
        if is_given:
            check_own(acts, lm, studied, feature, rows)
        lone = weights.LoneTokens(lm, transcoders.values()) if lone is None else lone
        key = secrets.token_hex(16) if key is None else key
        corpus = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
        subject: dict[str, Any] = {"layer": layer, "feature": feature, "restricted": restricted}
        subject |= {"kind": studied.config.kind, "fresh_eyes": fresh_eyes}
        subject |= {"model": lm.known_hash, "corpus": corpus, "key": key_hash(key)}
        order = example_order(key, len(rows))
        hidden = (rows[order], acts[order])
        secret = Secret(lm, found, studied, *hidden, lone, subject, key, fresh_eyes, {})
        secret.hashes = dictionary_hashes(held_dictionaries(secret))
        subject["dictionaries"] = hashlib.sha256(str(secret.hashes).encode()).hexdigest()
        SECRETS[self] = secret
        record(self, "begin", "begin", subject, None)

    # -- what can be seen of it -------------------------------------------------------------

    @property
    def layer(self) -> int:
        """The layer of the feature under study."""
        return SECRETS[self].own[0]

    @property
    def feature(self) -> int:
        """The feature under study."""
        return SECRETS[self].own[1]

    @property
    def restricted(self) -> bool:
        """Whether input-dependent facts about layer 0's features are refused."""
        return SECRETS[self].restricted

    @property
    def is_blind(self) -> bool:
        """Whether nothing of this feature has been unblinded yet, here or in an earlier session."""
        return SECRETS[self].is_blind

    @property
    def ledger(self) -> tuple[Entry, ...]:
        """Everything so far, in order; copies, so that nothing can be changed through them."""
        return copy.deepcopy(tuple(SECRETS[self].ledger))

    @property
    def n_questions(self) -> int:
        """How many questions have been answered."""
        return sum(entry.kind == "question" for entry in SECRETS[self].ledger)

    @property
    def seal(self) -> str:
        """The hash of everything so far: print it where others see it, and the ledger cannot change."""
        return sealed(SECRETS[self].ledger).digest

    def __repr__(self) -> str:
        variant = "restricted" if self.restricted else "full"
        state = "blind" if self.is_blind else "unblinded"
        return (
            f"BlindSession(layer {self.layer}, feature {self.feature}, {variant}, {state}, "
            f"{self.n_questions} questions)"
        )

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise BlindnessError("a blind session cannot be pickled or copied: save its ledger instead")

    # -- questions that need the corpus -----------------------------------------------------

    @question
    def examples(self, n_examples: Count = 10, min_share: Share = 0.0) -> pd.DataFrame:
        """Positions where the feature is active, evenly over its range: example, pos, activation.

        Only those above `min_share` of the maximum. Examples have numbers of their own, not the corpus's.
        """
        secret = SECRETS[self]
        strong = torch.where(secret.acts > min_share * secret.acts.max(), secret.acts, 0.0)
        n = min(n_examples, int((strong > 0).sum()))
        table = sample_in_bands(strong, n)[["row", "pos", "activation"]]
        table["activation"] = [coarse(value) for value in table["activation"]]
        return table.rename(columns={"row": "example"})

    @question
    def activation(self, position: Position, layer: int = OWN, feature: int = OWN) -> float:
        """Activation of a feature above layer 0 at a position; of the one under study by default.

        Two significant digits. Layer 0's features are listed among the sources, by rank.
        """
        _check_place(self, position)
        _check_met(self, position, layer, feature)
        if layer == 0 and (layer, feature) != SECRETS[self].own:
            raise BlindnessError(
                "activations of layer 0's features name the token: sources() lists the active ones by rank"
            )
        frozen = SECRETS[self].at(position)
        target = _target(self, frozen, layer, feature, position)
        return coarse(max(0.0, frozen.value(target)))

    @question
    def sources(
        self, position: Position, n_sources: Natural = 20, layer: int = OWN, feature: int = OWN
    ) -> pd.DataFrame:
        """In which quarter each group's part lies, and what is listed of the sources, each kind by rank.

        Of the feature under study by default, or of one that an answer has listed at this position. The first
        lines are groups (`GROUPS`), with `share`: the pre-activation's quarters that they bring, rounded down,
        between −0.25 (less than nothing) and 1 (all of it or more). Then features above layer 0 (the three
        strongest with their contributions, to one digit), features of layer 0 that raise it (not in a
        restricted study), and the five lines of heads that raise it most from earlier tokens.
        """
        _check_place(self, position)
        _check_met(self, position, layer, feature)
        secret = SECRETS[self]
        frozen = secret.at(position)
        (found,) = sources(frozen, [_target(self, frozen, layer, feature, position)])
        shares = group_shares(found, position.pos)
        table = source_lines(found, shares, n_sources, secret.restricted, position.pos)
        is_feature = table["feature"] >= 0
        for at, index in table.loc[is_feature, ["layer", "feature"]].itertuples(index=False):
            secret.met.add((position, int(at), int(index)))
        return table

    @question
    def paths(
        self, position: Position, n_iterations: Count = 3, n_branches: Count = 10
    ) -> pd.DataFrame:
        """The greedy search from the feature at a position: path, contribution.

        Contributions (one digit) of the three strongest paths of each length that end in a feature above layer
        0. Restricted: without paths through a feature of layer 0.
        """
        _check_place(self, position)
        secret = SECRETS[self]
        frozen = secret.at(position)
        root = _target(self, frozen, *secret.own, position)
        found = greedy_paths(frozen, root, n_iterations, n_branches)
        every = [path for level in found for path in level]
        for node in (path.nodes[-1] for path in every):
            if node.kind == "feature" and node.pos == position.pos:
                secret.met.add((position, node.layer, node.feature))
        return path_lines(every, secret.restricted)

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
        lm = SECRETS[self].lm
        return weights.token_table(
            lm, function(lm, _holder(self, layer, feature), feature, through), k
        )

    @question
    def lone_token(self, layer: int = OWN, feature: int = OWN, k: Count = 10) -> pd.DataFrame:
        """Tokens of the vocabulary that excite a feature by themselves, behind BOS: rank, token, score.

        The model runs on single tokens, not on the corpus: no input of the study is in it.
        """
        secret = SECRETS[self]
        scores = secret.lone.scores(_holder(self, layer, feature), feature)
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
        dictionary, earlier = _holder(self, layer, feature), _transcoder(self, earlier_layer)
        through = None if head is None else weights.Head(*head)
        lm = SECRETS[self].lm
        return weights.feature_table(weights.pullback(lm, dictionary, feature, earlier, through), k)

    @question
    def logits(self, k: Count = 10) -> pd.DataFrame:
        """Tokens that the feature promotes and suppresses: rank, token, score."""
        lm, dictionary = SECRETS[self].lm, SECRETS[self].studied
        if dictionary.config.kind != "transcoder":
            raise BlindnessError(
                "an SAE on the MLP's input writes nothing to the stream: no logits"
            )
        scores = weights.direct_logit_attribution(lm, dictionary, self.feature)
        return weights.token_table(lm, scores, k)

    @question
    def ov_norms(self) -> pd.DataFrame:
        """How strongly each head could feed the feature: a line a layer, a column a head."""
        norms = weights.ov_norms(SECRETS[self].lm, SECRETS[self].studied, self.feature)
        return pd.DataFrame(to_numpy(norms))

    # -- the end of blindness ---------------------------------------------------------------

    @checked
    def hypothesise(self, text: str, predicate: dict[str, JsonValue] | None = None) -> None:
        """Write down what the feature means; the last one before `unblind` counts."""
        if not text.strip():
            raise BlindnessError("an empty hypothesis: say what the feature means")
        if text != text.encode("utf-8", "replace").decode("utf-8"):
            raise BlindnessError("a hypothesis with half a surrogate pair: expected text")
        if SECRETS[self].is_unblinded:
            raise BlindnessError("the session is unblinded: a hypothesis comes before that")
        if not self.is_blind:
            warnings.warn(
                "this feature was unblinded before: the ledger says that the study is not blind",
                stacklevel=2,
            )
        SECRETS[self].has_hypothesis = True
        SECRETS[self].frozen.clear()  # which takes the memory of a forward pass a position
        record(self, "hypothesis", "hypothesise", {"text": text, "predicate": predicate}, None)

    @checked
    def unblind(self, n_examples: Count = 50) -> Dashboard:
        """End the blind part and show the feature. Errors: `BlindnessError` without a hypothesis."""
        secret = SECRETS[self]
        if not secret.has_hypothesis:
            raise BlindnessError("no hypothesis yet: call hypothesise() before unblind()")
        secret.is_unblinded = True
        remember(secret)
        record(self, "unblind", "unblind", {"n_examples": n_examples, "key": secret.key}, None)
        lm, every = secret.lm, secret.transcoders
        earlier = every if secret.studied.config.kind == "transcoder" else None
        own = (secret.studied, self.feature, secret.rows)
        return build_dashboard(lm, *own, earlier, secret.acts, n_examples)

    @checked
    def text(self, position: Position) -> str:
        """The text up to a position; only after `unblind()`. That it was read goes into the ledger."""
        if not SECRETS[self].is_unblinded:
            raise BlindnessError("text is hidden until unblind()")
        _check_place(self, position)
        record(self, "text", "text", vars(position), None)
        ids = SECRETS[self].rows[position.example, : position.pos + 1]
        return "".join(SECRETS[self].lm.token_strings(ids.tolist()))

    @checked
    def save_ledger(self, path: Path) -> str:
        """Write the ledger as JSON lines, the last of which seals it: the seal.

        Errors: `InputError` if something is there: nothing is overwritten.
        """
        return save_ledger(path, SECRETS[self].ledger)


# ---------------------------------------------------------------------------------------------
# Not on the session, from which nothing is to be had but answers


def _check_place(session: BlindSession, position: Position) -> None:
    n_rows, n_pos = SECRETS[session].rows.shape
    if not (0 <= position.example < n_rows and 0 < position.pos < n_pos):
        raise BlindnessError(
            f"position ({position.example}, {position.pos}) is outside the corpus: expected "
            f"example 0 to {n_rows - 1}, pos 1 to {n_pos - 1}"
        )


def _check_met(session: BlindSession, position: Position, layer: int, feature: int) -> None:
    """Refuse to be asked about any feature anywhere: that many answers could be decoded."""
    secret = SECRETS[session]
    if secret.restricted and layer == 0:
        raise BlindnessError(
            "restricted: activations of layer 0's features are not to be asked for; "
            "de_embedding and pullback need no input"
        )
    _holder(session, layer, feature).check_features(feature)
    if (layer, feature) != secret.own and (position, layer, feature) not in secret.met:
        raise BlindnessError(
            f"feature {feature} of layer {layer} has not been met at this position: sources() and paths() list "
            "what feeds the feature there"
        )


def _target(
    session: BlindSession, frozen: FrozenPrompts, layer: int, feature: int, position: Position
) -> Target:
    dictionary = _holder(session, layer, feature)
    return frozen.feature_target(layer, feature, position.pos, dictionary=dictionary)


def _holder(session: BlindSession, layer: int, feature: int) -> Dictionary:
    """The dictionary of a feature: the one under study for its own."""
    is_own = (layer, feature) == SECRETS[session].own
    return SECRETS[session].studied if is_own else _transcoder(session, layer)


def _transcoder(session: BlindSession, layer: int) -> Dictionary:
    transcoders = SECRETS[session].transcoders
    if layer not in transcoders:
        raise BlindnessError(
            f"no transcoder at layer {layer}: there is one at {sorted(transcoders)}"
        )
    return transcoders[layer]
