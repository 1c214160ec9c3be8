"""What a feature reads and writes, from weights alone (paper Sections 3.3 and 4.1; Eq. 7).

With f = P W_enc[:, i] the feature's encoder direction at the stream, and W_E, W_U, W_V, W_O in the
processed basis of `lm`:

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

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.dictionary import Dictionary
from tclib.lm import LanguageModel, Site
from tclib.runs import InputError


class Head(NamedTuple):
    """An attention head."""

    layer: int
    head: int


def reading_direction(
    lm: LanguageModel, dictionary: Dictionary, feature: int, head: Head | None = None
) -> Float[Tensor, "d_model"]:
    """f = P W_enc[:, i] at the stream, or W_V W_O f at the stream that `head` reads.

    Errors: `InputError` for a feature or a head that does not exist, or a head that comes too late.
    """
    _check_feature(dictionary, feature)
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


def de_embedding(
    lm: LanguageModel, dictionary: Dictionary, feature: int, head: Head | None = None
) -> Float[Tensor, "d_vocab"]:
    """W_E f, or W_E W_V W_O f through a head."""
    return lm.W_E @ reading_direction(lm, dictionary, feature, head)


def extended_de_embedding(
    lm: LanguageModel, dictionary: Dictionary, feature: int, head: Head | None = None
) -> Float[Tensor, "d_vocab"]:
    """(W_E + MLP_0(norm(W_E))) f: a lone token, without attention or position, seen through MLP 0.

    Errors: `InputError` for a feature of layer 0, which cannot see MLP 0.
    """
    if dictionary.config.layer == 0 or (head is not None and head.layer == 0):
        raise InputError("layer 0 does not read MLP 0: use de_embedding")
    extended = lm.W_E + lm.run_mlp(0, lm.mlp_norm(0).normalise(lm.W_E))
    return extended @ reading_direction(lm, dictionary, feature, head)


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
    reader = later.config.layer if head is None else head.layer
    if earlier.config.layer >= reader:
        raise InputError(
            f"pullback onto layer {earlier.config.layer}: expected a layer below {reader}, which reads it"
        )
    return earlier.W_dec @ reading_direction(lm, later, feature, head)


@torch.no_grad()
def mean_pullback(
    lm: LanguageModel,
    later: Dictionary,
    feature: int,
    earlier: Dictionary,
    rows: Int[Tensor, "row pos"],
    min_activation: float = 0.0,
    rows_per_forward: int = 16,
) -> Float[Tensor, "n_features"]:
    """Mean over tokens where `feature` exceeds `min_activation` of z × pullback, BOS left out.

    This is the paper's mean input-times-gradient, with the norm scale of each token in it.
    Errors: `InputError` if the feature never exceeds `min_activation` on these rows.
    """
    weight = pullback(lm, later, feature, earlier)
    reads, writes = Site("mlp_in", later.config.layer), Site("mlp_in", earlier.config.layer)
    total, n_tokens = torch.zeros_like(weight, dtype=torch.float64), 0
    for batch in rows.split(rows_per_forward):
        acts, scales = lm.read_with_scale(batch.long(), {reads, writes})
        is_text = (batch != lm.bos_id).to(lm.device)
        fires = (later.encode(acts[reads])[..., feature] > min_activation) & is_text
        z = earlier.encode(acts[writes][fires])
        total += (z / scales[reads][fires][:, None]).double().sum(0)
        n_tokens += len(z)
    if n_tokens == 0:
        raise InputError(
            f"feature {feature} never exceeds {min_activation} on these rows: "
            "give more rows, or a live feature"
        )
    return (total / n_tokens).to(weight.dtype) * weight


def direct_logit_attribution(
    lm: LanguageModel, dictionary: Dictionary, feature: int
) -> Float[Tensor, "d_vocab"]:
    """W_dec[i] W_U: the logits that one unit of the feature adds, the final norm's gain folded in.

    Relative to their mean over the vocabulary, and before division by the final norm's scale.
    """
    _check_feature(dictionary, feature)
    return dictionary.decoder_direction(feature) @ lm.W_U


def ov_norms(
    lm: LanguageModel, dictionary: Dictionary, feature: int
) -> Float[Tensor, "layer head"]:
    """‖W_V W_O f‖ of every head that the feature can read."""
    direction = reading_direction(lm, dictionary, feature)
    last = dictionary.config.layer + (0 if lm.is_parallel else 1)
    norms = []
    for layer in range(last):
        weights = lm.attention_weights(layer)
        through = torch.einsum("hdk,hk->hd", weights.W_V, weights.W_O @ direction)
        norms.append(through.norm(dim=1))
    return torch.stack(norms) if norms else torch.zeros(0, lm.n_heads, device=lm.device)


# ---------------------------------------------------------------------------------------------
# Tables


def token_table(lm: LanguageModel, scores: Float[Tensor, "d_vocab"], k: int = 7) -> pd.DataFrame:
    """The k highest and the k lowest tokens: rank, token, score (rank −1 is the lowest)."""
    order = scores.argsort(descending=True)
    chosen = torch.cat([order[:k], order[-k:]])
    ranks = [*range(1, k + 1), *range(-k, 0)]
    return pd.DataFrame(
        {
            "rank": ranks,
            "token": lm.token_strings(chosen.tolist()),
            "score": scores[chosen].double().cpu().numpy(),
        }
    )


def feature_table(scores: Float[Tensor, "n_features"], k: int = 10) -> pd.DataFrame:
    """The k strongest features by magnitude: feature, score."""
    strongest = scores.abs().argsort(descending=True)[:k]
    return pd.DataFrame(
        {"feature": strongest.cpu().numpy(), "score": scores[strongest].double().cpu().numpy()}
    )


def top_k_overlap(one: Float[Tensor, "item"], other: Float[Tensor, "item"], k: int) -> float:
    """Share of the k highest of one that are among the k highest of the other (paper: 30/25/14 %)."""
    if not 1 <= k <= len(one):
        raise InputError(f"k {k}: expected 1 to {len(one)}")
    tops = [set(scores.argsort(descending=True)[:k].tolist()) for scores in (one, other)]
    return len(tops[0] & tops[1]) / k


def spearman(one: Float[Tensor, "item"], other: Float[Tensor, "item"]) -> float:
    """Rank correlation; ties share their mean rank."""
    ranks = [pd.Series(_numpy(scores)).rank().to_numpy() for scores in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()


def _check_feature(dictionary: Dictionary, feature: int) -> None:
    if not 0 <= feature < dictionary.config.n_features:
        raise InputError(
            f"feature {feature} is out of range: layer {dictionary.config.layer} has features 0 to "
            f"{dictionary.config.n_features - 1}"
        )
