"""What a feature reads and writes, from weights alone (paper Sections 3.3 and 4.1; Eq. 7).

With f = P W_enc[:, i] the feature's encoder direction at the stream, and W_E, W_U, W_V, W_O in the
processed basis of `models.weights`:

    de-embedding                W_E f                            which tokens excite it directly
      through a head            W_E W_V W_O f
      extended                  (W_E + MLP_0(norm(W_E))) f       with what MLP 0 makes of a lone token
    pullback                    W_dec f                          which earlier features excite it
      through a head            W_dec W_V W_O f
    direct logit attribution    W_dec[i] W_U                     which tokens it promotes
    OV norms                    ‖W_V W_O f‖ by layer and head    which heads could feed it

Norm scales are left out: they depend on the input and do not change any ranking. The input-dependent
pullback multiplies by activations z, on one input or averaged over a corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary
from tclib.features.examples import feature_activations
from tclib.models.language_model import LanguageModel
from tclib.models.running import Site
from tclib.support.checked import checked
from tclib.support.declared import Count, Whole
from tclib.support.errors import InputError
from tclib.support.progress import progress
from tclib.support.statistics import ranked, to_numpy


class Head(NamedTuple):
    """An attention head."""

    layer: Whole
    head: Whole


def reading_direction(
    lm: LanguageModel, dictionary: Dictionary, feature: int, head: Head | None = None
) -> Float[Tensor, "d_model"]:
    """f = P W_enc[:, i] at the stream, or W_V W_O f at the stream that `head` reads.

    Errors: `InputError` for a dictionary of another model, or one that does not read the stream, a feature
    or a head that does not exist, or a head that comes too late.
    """
    dictionary.check_model(lm)
    if dictionary.config.kind == "sae_mlp_out":
        raise InputError(
            "an sae_mlp_out reads the MLP's output, not the stream: expected a transcoder"
        )
    dictionary.check_features(feature)
    direction = lm.final_norm.centre(dictionary.encoder_direction(feature))
    if head is None:
        return direction
    last = dictionary.config.layer - (1 if lm.is_parallel else 0)
    if not (0 <= head.layer <= last and 0 <= head.head < lm.n_heads):
        raise InputError(
            f"head {head.head} of layer {head.layer}: a feature of layer {dictionary.config.layer} "
            f"can read heads 0 to {lm.n_heads - 1} of layers 0 to {last}"
        )
    weights = lm.attention_weights(head.layer)
    return weights.W_V[head.head] @ (weights.W_O[head.head] @ direction)


@checked
def de_embedding(
    lm: LanguageModel, dictionary: Dictionary, feature: int, head: Head | None = None
) -> Float[Tensor, "d_vocab"]:
    """W_E f, or W_E W_V W_O f through a head."""
    return lm.W_E @ reading_direction(lm, dictionary, feature, head)


@checked
def extended_de_embedding(
    lm: LanguageModel, dictionary: Dictionary, feature: int, head: Head | None = None
) -> Float[Tensor, "d_vocab"]:
    """(W_E + MLP_0(norm(W_E))) f: a lone token, without attention or position, seen through MLP 0.

    Errors: `InputError` for a feature of layer 0, which cannot see MLP 0.
    """
    if dictionary.config.layer == 0 or (head is not None and head.layer == 0):
        raise InputError("layer 0 does not read MLP 0: use de_embedding")
    return lm.extended_embedding @ reading_direction(lm, dictionary, feature, head)


class LoneTokens:
    """Every token of the vocabulary by itself, behind BOS, as dictionaries read it.

    The de-embedding with all layers below in it, and no corpus: what a token brings by itself. The model
    runs over the vocabulary once for all layers up to the one asked for. Takes 4 bytes × d_vocab ×
    d_model a layer.
    """

    def __init__(self, lm: LanguageModel, dictionaries: Iterable[Dictionary]) -> None:
        self._lm = lm
        self._sites = {dictionary.config.input_site for dictionary in dictionaries}
        self._inputs: dict[Site, Float[Tensor, "d_vocab d_model"]] = {}

    def scores(self, dictionary: Dictionary, feature: int) -> Float[Tensor, "d_vocab"]:
        """Pre-activations of one feature. Errors: `InputError` for a feature that does not exist."""
        dictionary.check_model(self._lm)
        dictionary.check_features(feature)
        site = dictionary.config.input_site
        if site not in self._inputs:
            self._read({s for s in self._sites | {site} if s.layer <= site.layer})
        direction = dictionary.encoder_direction(feature).cpu()
        return self._inputs[site] @ direction + dictionary.b_enc[feature].cpu()

    @torch.no_grad()
    def _read(self, sites: set[Site], tokens_per_forward: int = 4096) -> None:
        ids = torch.arange(self._lm.d_vocab)
        prompts = torch.stack([torch.full_like(ids, self._lm.bos_id), ids], dim=1)
        shape = (self._lm.d_vocab, self._lm.d_model)
        found = {site: torch.empty(shape, dtype=self._lm.dtype) for site in sites}
        bar = progress(prompts.split(tokens_per_forward), "lone tokens", unit="batch", leave=False)
        for i, batch in enumerate(bar):
            rows = slice(i * tokens_per_forward, i * tokens_per_forward + len(batch))
            for site, acts in self._lm.read(batch, sites).items():
                found[site][rows] = acts[:, 1].cpu()
        self._inputs |= found


@checked
def pullback(
    lm: LanguageModel,
    later: Dictionary,
    feature: int,
    earlier: Dictionary,
    head: Head | None = None,
) -> Float[Tensor, "n_features"]:
    """W_dec f: how much each feature of an earlier transcoder excites `feature` (Eq. 7), per unit.

    Errors: `InputError` unless `earlier` writes before the feature, or before the head, reads.
    """
    earlier.check_model(lm)
    if earlier.config.kind == "sae_mlp_in":
        raise InputError("an sae_mlp_in writes nothing to the stream: expected a transcoder")
    reader = later.config.layer if head is None else head.layer
    if earlier.config.layer >= reader:
        raise InputError(
            f"pullback onto layer {earlier.config.layer}: expected a layer below {reader}, which reads it"
        )
    return earlier.W_dec @ reading_direction(lm, later, feature, head)


@torch.no_grad()
def mean_pullbacks(
    lm: LanguageModel,
    later: Dictionary,
    features: Sequence[int],
    earlier: Dictionary,
    rows: Int[Tensor, "row pos"],
    min_activations: Sequence[float] | None = None,
    rows_per_forward: int = 16,
) -> Float[Tensor, "feature n_features"]:
    """Mean over tokens where a feature exceeds its minimum of z × pullback / σ, BOS left out.

    This is the paper's mean input-times-gradient, with the norm scale of each token in it. Errors:
    `InputError` for a feature that never exceeds its minimum.
    """
    weights = torch.stack([pullback(lm, later, feature, earlier) for feature in features])
    read = mean_inputs(lm, later, features, [earlier], rows, min_activations, rows_per_forward)
    return weights * read[0]


@torch.no_grad()
def mean_inputs(
    lm: LanguageModel,
    later: Dictionary,
    features: Sequence[int],
    several: Sequence[Dictionary],
    rows: Int[Tensor, "row pos"],
    min_activations: Sequence[float] | None = None,
    rows_per_forward: int = 16,
) -> list[Float[Tensor, "feature _"]]:
    """`mean_pullbacks` without the pullback, for several earlier transcoders: the mean of their z / σ.

    One pass over the rows serves all features and all of them.
    """
    minimum = torch.tensor(list(min_activations or [0.0] * len(features)), device=lm.device)
    totals = [minimum.new_zeros(len(features), one.config.n_features).double() for one in several]
    n_tokens = minimum.new_zeros(len(features)).double()
    reads, writes = later.config.input_site, [earlier.config.input_site for earlier in several]
    for batch in rows.split(rows_per_forward):
        acts, scales = lm.read_with_scale(batch.long(), {reads, *writes})
        is_text = (batch != lm.bos_id).to(lm.device)
        z_later = later.encode(acts[reads])[..., list(features)][is_text]
        fires = (z_later > minimum).to(acts[reads])
        scale = scales[reads][is_text][:, None]
        for total, earlier, site in zip(totals, several, writes, strict=True):
            total += (fires.T @ (earlier.encode(acts[site][is_text]) / scale)).double()
        n_tokens += fires.sum(0)
    for feature, least, n in zip(features, minimum.tolist(), n_tokens.tolist(), strict=True):
        if n == 0:
            raise InputError(
                f"feature {feature} never exceeds {least:g} on these rows: "
                "give more rows, or a live feature"
            )
    return [(total / n_tokens[:, None]).to(lm.dtype) for total in totals]


def activation_quantiles(
    lm: LanguageModel,
    dictionary: Dictionary,
    features: Sequence[int],
    rows: Int[Tensor, "row pos"],
    quantile: float,
) -> list[float]:
    """The quantile of each feature's positive activations, BOS left out.

    0 for one that never fires, and for one whose activations are all the same (up to rounding), such as
    after BOS: none would be above the quantile.
    """
    found = feature_activations(lm, dictionary, features, rows).double()
    return [_quantile(acts[acts > 0], quantile) for acts in found]


def _quantile(positive: Float[Tensor, "token"], quantile: float) -> float:
    if not len(positive):
        return 0.0
    found = float(positive.quantile(quantile))
    return found if float(positive.max()) > found * (1 + 1e-4) else 0.0


@checked
def direct_logit_attribution(
    lm: LanguageModel, dictionary: Dictionary, feature: int
) -> Float[Tensor, "d_vocab"]:
    """W_dec[i] W_U: the logits that one unit of the feature adds, the final norm's gain folded in.

    Relative to their mean over the vocabulary, and before division by the final norm's scale.
    """
    dictionary.check_model(lm)
    return dictionary.decoder_direction(feature) @ lm.W_U


@checked
def ov_norms(
    lm: LanguageModel, dictionary: Dictionary, feature: int
) -> Float[Tensor, "layer head"]:
    """‖W_V W_O f‖ of every head that the feature can read."""
    direction = reading_direction(lm, dictionary, feature)
    norms = []
    for layer in range(dictionary.config.layer + (0 if lm.is_parallel else 1)):
        weights = lm.attention_weights(layer)
        through = torch.einsum("hdk,hk->hd", weights.W_V, weights.W_O @ direction)
        norms.append(through.norm(dim=1))
    return torch.stack(norms) if norms else torch.zeros(0, lm.n_heads, device=lm.device)


# ---------------------------------------------------------------------------------------------
# Tables


@checked
def token_table(lm: LanguageModel, scores: Float[Tensor, "d_vocab"], k: Count = 7) -> pd.DataFrame:
    """The k highest and the k lowest tokens: rank, id, token, score, z (rank −1 is the lowest).

    z is the score in standard deviations above its mean over the vocabulary. Errors: `InputError` for
    scores of anything but the vocabulary, or a k beyond it.
    """
    if len(scores) != lm.d_vocab or not bool(scores.isfinite().all()):
        raise InputError(
            f"{len(scores)} scores: expected a finite one for each of the {lm.d_vocab} tokens"
        )
    if k > lm.d_vocab:
        raise InputError(f"k {k}: expected at most {lm.d_vocab}, the tokens of {lm.name}")
    order = torch.from_numpy(ranked(scores))
    chosen = torch.cat([order[:k], order[-k:]]).to(scores.device)
    ranks = [*range(1, k + 1), *range(-k, 0)]
    return pd.DataFrame(
        {
            "rank": ranks,
            "id": chosen.cpu().numpy(),
            "token": lm.token_strings(chosen.tolist()),
            "score": scores[chosen].double().cpu().numpy(),
            "z": ((scores[chosen] - scores.mean()) / scores.std()).double().cpu().numpy(),
        }
    )


def feature_table(scores: Float[Tensor, "n_features"], k: int = 10) -> pd.DataFrame:
    """The k strongest features by magnitude: feature, score."""
    strongest = ranked(scores.abs())[:k]
    return pd.DataFrame({"feature": strongest, "score": to_numpy(scores)[strongest]})
