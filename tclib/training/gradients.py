"""Losses of a dictionary and their exact gradients, written out by hand.

With e = ŷ − y and a weight w for each token,

    L = mean_tokens [ w ‖e‖² + λ ‖z‖₁ ]        w = 1                   loss "paper"    (paper Eq. 5)
                                               w = 1 / (d_out ‖y‖₂)    loss "authors"

The published λ are in units of the second. Writing the gradients out costs five matrix products and
little more; with topk and batch_topk, only active entries are touched: `embedding_bag` sums the active
decoder rows of each token (decode), and the tokens of each active feature (both weight gradients).

    topk        the k largest of relu(pre) at each token
    batch_topk  the n k largest of the batch of n tokens; the smallest that is kept is its threshold θ,
                whose running mean serves once training is over (Bussmann et al. 2024)
    jumprelu    λ₀ ‖z‖₀ instead of λ ‖z‖₁, and straight-through gradients for θ, with a rectangle
                K(u) = 1[|u| < ½] of bandwidth ε (Rajamanoharan et al. 2024):
                ∂z/∂θ = −θ/ε K((pre − θ)/ε),   ∂‖z‖₀/∂θ = −1/ε K((pre − θ)/ε)

`tests/training/test_gradients.py` holds them against autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from tclib.dictionaries.dictionary import Dictionary, topk_features
from tclib.evaluation import metrics
from tclib.training.spec import Loss, Recipe

_SUM = 0  # embedding_bag's code of its mode
_UINT16_VALUES = 65_536
_FEW = 0.06  # of the entries of a batch, active: above it dense products are about as fast


class StepResult(NamedTuple):
    """Gradients by parameter name, and what is free to report.

    `squared_error` is Σ‖e‖², `acts` is z (of all features, or only the entries kept), `fired` marks
    features active on at least one token of the batch, `threshold` is batch_topk's smallest entry.
    """

    gradients: dict[str, Tensor]
    loss: Float[Tensor, ""]
    squared_error: Float[Tensor, ""]
    acts: Float[Tensor, "*entry"]
    fired: Bool[Tensor, "n_features"]
    n_tokens: int
    threshold: Float[Tensor, ""] | None = None

    @property
    def l0(self) -> float:
        """Mean number of active features a token."""
        return int(metrics.is_active(self.acts).sum()) / self.n_tokens


def token_weights(y: Float[Tensor, "token d_out"], loss: Loss) -> Float[Tensor, "token 1"]:
    """The w of the module's equation."""
    if loss == "paper":
        return torch.ones_like(y[:, :1])
    return torch.reciprocal(y.shape[1] * y.norm(dim=1, keepdim=True))


def step_result(
    dictionary: Dictionary,
    x: Float[Tensor, "token d_in"],
    y: Float[Tensor, "token d_out"],
    objective: Recipe,
    dead: Bool[Tensor, "n_features"] | None = None,
) -> StepResult:
    """Loss and gradients on one batch; `dead` features feed the auxiliary loss."""
    compute = _RESULTS[dictionary.config.activation]
    result, error = compute(dictionary, x, y, objective)
    if objective.auxk_coefficient > 0 and dead is not None and bool(dead.any()):
        result = _add_auxk(result, dictionary, x, y, error, objective, dead)
    return result


def _relu_result(
    dictionary: Dictionary, x: Tensor, y: Tensor, objective: Recipe
) -> tuple[StepResult, Tensor]:
    """Gradients ∂L/∂z = 2w/n e W_decᵀ + λ/n where z > 0: dense, or of those entries alone if they are few."""
    z = torch.addmm(dictionary.b_enc, x, dictionary.W_enc).relu_()
    entries = _few_entries(z)
    if entries is not None:
        return _sparse_result(dictionary, x, y, objective, entries)
    error, grad_out = _output_error(dictionary, torch.mm(z, dictionary.W_dec), x, y, objective)
    grad_z = torch.mm(grad_out.to(z.dtype), dictionary.W_dec.T)
    grad_pre = grad_z.add_(objective.l1_coefficient / len(x))
    grad_pre = torch.ops.aten.threshold_backward(grad_pre, z, 0)
    gradients = _dense_gradients(dictionary, x, z, grad_out, grad_pre)
    z_sum = z.sum(0, dtype=y.dtype)
    loss, squared_error = _loss(error, y, objective.l1_coefficient * z_sum.sum(), objective)
    return StepResult(gradients, loss, squared_error, z, z_sum > 0, len(x)), error


def _few_entries(z: Tensor) -> _Entries | None:
    """The active entries, if so few of them are that sums over them are faster than products, on a CPU."""
    if z.is_cuda or z.dtype not in (torch.float32, torch.float64) or torch.compiler.is_compiling():
        return None
    # numpy finds what is true in a tenth of the time in which either finds what is not 0.
    place = torch.from_numpy(np.flatnonzero((z > 0).numpy()))
    if len(place) > _FEW * z.numel():
        return None
    token = torch.div(place, z.shape[1], rounding_mode="floor")
    return _Entries.of(token, place % z.shape[1], z.flatten()[place], len(z))


def _jumprelu_result(
    dictionary: Dictionary, x: Tensor, y: Tensor, objective: Recipe
) -> tuple[StepResult, Tensor]:
    """Dense gradients behind the jump, and straight-through ones for the thresholds."""
    assert dictionary.threshold is not None
    n_tokens, l0 = len(x), objective.l0_coefficient
    threshold, bandwidth = dictionary.threshold, objective.bandwidth
    pre = torch.addmm(dictionary.b_enc, x, dictionary.W_enc)
    z = torch.where(pre > threshold, pre, 0.0)
    error, grad_out = _output_error(dictionary, torch.mm(z, dictionary.W_dec), x, y, objective)
    grad_z = torch.mm(grad_out.to(z.dtype), dictionary.W_dec.T)
    grad_z = grad_z + objective.l1_coefficient / n_tokens
    gradients = _dense_gradients(dictionary, x, z, grad_out, grad_z * (z > 0))
    is_near = (pre - threshold).abs() < bandwidth / 2
    through = ((grad_z * threshold + l0 / n_tokens) * is_near).sum(0)
    gradients["threshold"] = through / -bandwidth
    n_active = (z > 0).sum(0)
    penalty = objective.l1_coefficient * z.sum(dtype=y.dtype) + l0 * n_active.sum()
    loss, squared_error = _loss(error, y, penalty, objective)
    return StepResult(gradients, loss, squared_error, z, n_active > 0, n_tokens), error


def _dense_gradients(
    dictionary: Dictionary, x: Tensor, z: Tensor, grad_out: Tensor, grad_pre: Tensor
) -> dict[str, Tensor]:
    gradients = _output_gradients(dictionary, x, grad_out)
    gradients["W_dec"] = torch.mm(z.T, grad_out.to(z.dtype))
    gradients["W_enc"] = torch.mm(grad_pre.T, x.to(z.dtype)).T
    gradients["b_enc"] = grad_pre.sum(0)
    return gradients


def _topk_result(
    dictionary: Dictionary, x: Tensor, y: Tensor, objective: Recipe
) -> tuple[StepResult, Tensor]:
    """Sparse gradients: only the k active features of each token are touched after the encoder."""
    k = dictionary.config.k
    assert k is not None
    pre = torch.addmm(dictionary.b_enc, x, dictionary.W_enc).to(x.dtype)
    top = topk_features(pre, k)
    token = torch.arange(len(x), device=x.device).repeat_interleave(k)
    entries = _Entries.of(token, top.indices.flatten(), top.acts.flatten(), len(x))
    return _sparse_result(dictionary, x, y, objective, entries)


def _batch_topk_result(
    dictionary: Dictionary, x: Tensor, y: Tensor, objective: Recipe
) -> tuple[StepResult, Tensor]:
    """As topk, but the n k largest entries of the whole batch are kept."""
    k, n_features = dictionary.config.k, dictionary.config.n_features
    assert k is not None
    pre = torch.addmm(dictionary.b_enc, x, dictionary.W_enc).to(x.dtype)
    top = pre.relu_().flatten().topk(k * len(x), sorted=False)
    place, order = top.indices.sort()
    token = torch.div(place, n_features, rounding_mode="floor")
    entries = _Entries.of(token, place % n_features, top.values[order], len(x))
    result, error = _sparse_result(dictionary, x, y, objective, entries)
    return result._replace(threshold=entries.acts.min()), error


def _sparse_result(
    dictionary: Dictionary, x: Tensor, y: Tensor, objective: Recipe, entries: _Entries
) -> tuple[StepResult, Tensor]:
    """Loss and gradients from the kept entries alone."""
    n_tokens, acts = len(x), entries.acts
    decoded = embedding_bag(
        entries.feature, dictionary.W_dec, entries.offsets, per_sample_weights=acts, mode="sum"
    )
    error, grad_out = _output_error(dictionary, decoded, x, y, objective)
    # grad_out[token] · W_dec[feature] of every entry, without gathering the rows.
    grad_acts = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_out, dictionary.W_dec, entries.feature, entries.offsets, entries.token, _SUM
    )
    grad_pre = (grad_acts + objective.l1_coefficient / n_tokens) * (acts > 0)
    by_feature = _ByFeature.sort(entries, dictionary.config.n_features)
    gradients = _output_gradients(dictionary, x, grad_out)
    gradients["W_dec"] = by_feature.sum_tokens(grad_out, acts)
    gradients["W_enc"] = by_feature.sum_tokens(x, grad_pre).T
    zero = torch.zeros_like(dictionary.b_enc)
    gradients["b_enc"] = zero.index_add(0, entries.feature, grad_pre)
    fired = zero.index_add(0, entries.feature, (acts > 0).to(x.dtype)) > 0
    loss, squared_error = _loss(error, y, objective.l1_coefficient * acts.sum(), objective)
    return StepResult(gradients, loss, squared_error, acts, fired, n_tokens), error


_RESULTS = {
    "relu": _relu_result,
    "topk": _topk_result,
    "batch_topk": _batch_topk_result,
    "jumprelu": _jumprelu_result,
}


def _output_error(
    dictionary: Dictionary, decoded: Tensor, x: Tensor, y: Tensor, objective: Recipe
) -> tuple[Tensor, Tensor]:
    """(e, ∂L/∂ŷ) from z W_dec; ∂L/∂ŷ = 2w/n e."""
    error = decoded.to(y.dtype) + dictionary.b_dec - y
    if dictionary.W_skip is not None:
        error += torch.mm(x, dictionary.W_skip).to(y.dtype)
    return error, error * (token_weights(y, objective.loss) * (2.0 / len(y)))


def _output_gradients(dictionary: Dictionary, x: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
    gradients = {"b_dec": grad_out.sum(0)}
    if dictionary.W_skip is not None:
        gradients["W_skip"] = torch.mm(x.T, grad_out)
    return gradients


def _loss(error: Tensor, y: Tensor, penalty: Tensor, objective: Recipe) -> tuple[Tensor, Tensor]:
    squared = error.pow(2).sum(1, keepdim=True)
    weighted = (squared * token_weights(y, objective.loss)).sum()
    return (weighted + penalty) / len(y), squared.sum()


# ---------------------------------------------------------------------------------------------
# Sparse sums


class _Entries(NamedTuple):
    """The kept (token, feature) pairs of a batch, in the order of tokens: one bag a token."""

    token: Int[Tensor, "entry"]
    feature: Int[Tensor, "entry"]
    acts: Float[Tensor, "entry"]
    offsets: Int[Tensor, "token"]

    @classmethod
    def of(cls, token: Tensor, feature: Tensor, acts: Tensor, n_tokens: int) -> _Entries:
        counts = torch.bincount(token, minlength=n_tokens)
        return cls(token, feature, acts, counts.cumsum(0) - counts)


class _ByFeature(NamedTuple):
    """The entries of a batch in feature order: one bag of tokens a feature."""

    order: Int[Tensor, "entry"]
    token: Int[Tensor, "entry"]
    offsets: Int[Tensor, "n_features"]

    @classmethod
    def sort(cls, entries: _Entries, n_features: int) -> _ByFeature:
        order = _stable_argsort(entries.feature, n_features)
        counts = torch.bincount(entries.feature, minlength=n_features)
        return cls(order, entries.token[order], counts.cumsum(0) - counts)

    def sum_tokens(
        self, vectors: Float[Tensor, "token d"], weights: Float[Tensor, "entry"]
    ) -> Float[Tensor, "n_features d"]:
        """For each feature, Σ over its tokens of weight × vector."""
        sorted_weights = weights[self.order]
        return embedding_bag(
            self.token, vectors, self.offsets, per_sample_weights=sorted_weights, mode="sum"
        )


def _stable_argsort(feature_idx: Int[Tensor, "entry"], n_features: int) -> Int[Tensor, "entry"]:
    """Argsort; on the CPU numpy's radix sort, which 16-bit keys get, is many times faster."""
    if feature_idx.is_cuda or n_features > _UINT16_VALUES:
        return feature_idx.argsort(stable=True)
    return torch.from_numpy(feature_idx.numpy().astype(np.uint16).argsort(kind="stable"))


# ---------------------------------------------------------------------------------------------
# Dead features


def _add_auxk(
    result: StepResult,
    dictionary: Dictionary,
    x: Tensor,
    y: Tensor,
    error: Tensor,
    objective: Recipe,
    dead: Tensor,
) -> StepResult:
    """AuxK: the strongest dead features are asked to predict what the living ones missed.

    L_aux = coefficient · mean_tokens [ w ‖z_aux W_dec − (−e)‖² ], with e detached. Autograd is good
    enough here: it touches dead features only.
    """
    dead_idx = dead.nonzero().squeeze(1)
    W_enc = dictionary.W_enc.T[dead_idx].requires_grad_()
    b_enc = dictionary.b_enc[dead_idx].requires_grad_()
    W_dec = dictionary.W_dec[dead_idx].requires_grad_()
    with torch.enable_grad():
        pre = x @ W_enc.T + b_enc
        top = topk_features(pre, min(objective.auxk_k, len(dead_idx)))
        z = torch.zeros_like(pre).scatter(1, top.indices, top.acts)
        missed = (z @ W_dec + error.detach()).pow(2).sum(1, keepdim=True)
        loss = objective.auxk_coefficient * (missed * token_weights(y, objective.loss)).mean()
        grad_W_enc, grad_b_enc, grad_W_dec = torch.autograd.grad(loss, (W_enc, b_enc, W_dec))
    result.gradients["W_enc"].T.index_add_(0, dead_idx, grad_W_enc)
    result.gradients["b_enc"].index_add_(0, dead_idx, grad_b_enc)
    result.gradients["W_dec"].index_add_(0, dead_idx, grad_W_dec)
    return result._replace(loss=result.loss + loss.detach())
