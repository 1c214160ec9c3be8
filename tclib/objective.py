"""Losses of a dictionary and their exact gradients, written out by hand.

With e = ŷ − y and a weight w for each token,

    L = mean_tokens [ w ‖e‖² + λ ‖z‖₁ ]        w = 1                   loss "paper"    (paper Eq. 5)
                                               w = 1 / (d_out ‖y‖₂)    loss "authors"

The published λ are in units of the second. Writing the gradients out costs five matrix products and
little more; with topk, only active entries are touched: `embedding_bag` sums the active decoder rows
of each token (decode), and the tokens of each active feature (both weight gradients).
`tests/test_objective.py` holds them against autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from tclib.dictionary import Dictionary, topk_features

Loss = Literal["paper", "authors"]
_EMBEDDING_BAG_SUM = 0
_UINT16_VALUES = 65_536


@dataclass(frozen=True)
class Objective:
    """Which loss, λ, and the auxiliary loss for dead features (AuxK; 0 switches it off)."""

    loss: Loss = "paper"
    l1_coefficient: float = 0.0
    auxk_coefficient: float = 0.0
    auxk_k: int = 64


class StepResult(NamedTuple):
    """Gradients by parameter name, and what is free to report.

    `squared_error` is Σ‖e‖², `acts` is z (of all features, or of the k kept), `fired` marks features
    active on at least one token of the batch.
    """

    gradients: dict[str, Tensor]
    loss: Float[Tensor, ""]
    squared_error: Float[Tensor, ""]
    acts: Float[Tensor, "token n_features_or_k"]
    fired: Bool[Tensor, "n_features"]

    @property
    def l0(self) -> float:
        """Mean number of active features a token."""
        return int((self.acts > 0).sum()) / len(self.acts)


def token_weights(y: Float[Tensor, "token d_out"], loss: Loss) -> Float[Tensor, "token 1"]:
    """The w of the module's equation."""
    if loss == "paper":
        return torch.ones_like(y[:, :1])
    return 1.0 / (y.shape[1] * y.norm(dim=1, keepdim=True))


def step_result(
    dictionary: Dictionary,
    x: Float[Tensor, "token d_in"],
    y: Float[Tensor, "token d_out"],
    objective: Objective,
    dead: Bool[Tensor, "n_features"] | None = None,
) -> StepResult:
    """Loss and gradients on one batch; `dead` features feed the auxiliary loss."""
    compute = _relu_result if dictionary.config.activation == "relu" else _topk_result
    result, error = compute(dictionary, x, y, objective)
    if objective.auxk_coefficient > 0 and dead is not None and bool(dead.any()):
        result = _add_auxk(result, dictionary, x, y, error, objective, dead)
    return result


def _relu_result(
    dictionary: Dictionary, x: Tensor, y: Tensor, objective: Objective
) -> tuple[StepResult, Tensor]:
    """Dense gradients: ∂L/∂z = 2w/n e W_decᵀ + λ/n where z > 0."""
    n_tokens = len(x)
    l1 = objective.l1_coefficient
    z = torch.addmm(dictionary.b_enc, x, dictionary.W_enc).relu_()
    error, grad_out = _output_error(dictionary, torch.mm(z, dictionary.W_dec), x, y, objective)
    grad_pre = torch.mm(grad_out.to(z.dtype), dictionary.W_dec.T).add_(l1 / n_tokens)
    grad_pre = torch.ops.aten.threshold_backward(grad_pre, z, 0)
    gradients = _output_gradients(dictionary, x, grad_out)
    gradients["W_dec"] = torch.mm(z.T, grad_out.to(z.dtype))
    gradients["W_enc"] = torch.mm(grad_pre.T, x.to(z.dtype)).T
    gradients["b_enc"] = grad_pre.sum(0)
    z_sum = z.sum(0, dtype=y.dtype)
    loss, squared_error = _loss(error, y, z_sum.sum(), objective)
    return StepResult(gradients, loss, squared_error, z, z_sum > 0), error


def _topk_result(
    dictionary: Dictionary, x: Tensor, y: Tensor, objective: Objective
) -> tuple[StepResult, Tensor]:
    """Sparse gradients: only the k active features of each token are touched after the encoder."""
    n_tokens, n_features = len(x), dictionary.config.n_features
    assert dictionary.config.k is not None
    pre = torch.addmm(dictionary.b_enc, x, dictionary.W_enc).to(x.dtype)
    top = topk_features(pre, dictionary.config.k)
    acts, indices = top.acts, top.indices
    decoded = embedding_bag(indices, dictionary.W_dec, per_sample_weights=acts, mode="sum")
    error, grad_out = _output_error(dictionary, decoded, x, y, objective)
    grad_acts = _sampled_products(grad_out, dictionary.W_dec, indices)
    grad_pre = (grad_acts + objective.l1_coefficient / n_tokens) * (acts > 0)
    by_feature = _ByFeature.sort(indices, n_features)
    gradients = _output_gradients(dictionary, x, grad_out)
    gradients["W_dec"] = by_feature.sum_tokens(grad_out, acts)
    gradients["W_enc"] = by_feature.sum_tokens(x, grad_pre).T
    flat, active = indices.flatten(), acts.flatten() > 0
    gradients["b_enc"] = torch.zeros_like(dictionary.b_enc).index_add_(0, flat, grad_pre.flatten())
    fired = torch.zeros_like(dictionary.b_enc).index_add_(0, flat, active.to(x.dtype)) > 0
    loss, squared_error = _loss(error, y, acts.sum(), objective)
    return StepResult(gradients, loss, squared_error, acts, fired), error


def _output_error(
    dictionary: Dictionary, decoded: Tensor, x: Tensor, y: Tensor, objective: Objective
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


def _loss(error: Tensor, y: Tensor, l1: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    squared = error.pow(2).sum(1, keepdim=True)
    weighted = (squared * token_weights(y, objective.loss)).sum()
    return (weighted + objective.l1_coefficient * l1) / len(y), squared.sum()


# ---------------------------------------------------------------------------------------------
# Sparse sums


def _sampled_products(
    grad_out: Float[Tensor, "token d_out"],
    W_dec: Float[Tensor, "n_features d_out"],
    indices: Int[Tensor, "token k"],
) -> Float[Tensor, "token k"]:
    """grad_out[t] · W_dec[indices[t, j]], without gathering the rows."""
    n_tokens, k = indices.shape
    token_of_entry = torch.arange(n_tokens, device=indices.device).repeat_interleave(k)
    offsets = torch.arange(0, n_tokens * k, k, device=indices.device)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_out, W_dec, indices.flatten(), offsets, token_of_entry, _EMBEDDING_BAG_SUM
    )
    return products.view(n_tokens, k)


class _ByFeature(NamedTuple):
    """The (token, feature) entries of a batch in feature order: one bag of tokens a feature."""

    order: Int[Tensor, "entry"]
    token: Int[Tensor, "entry"]
    offsets: Int[Tensor, "n_features"]

    @classmethod
    def sort(cls, indices: Int[Tensor, "token k"], n_features: int) -> _ByFeature:
        flat = indices.flatten()
        order = _stable_argsort(flat, n_features)
        counts = torch.bincount(flat, minlength=n_features)
        token = torch.div(order, indices.shape[1], rounding_mode="floor")
        return cls(order, token, counts.cumsum(0) - counts)

    def sum_tokens(
        self, vectors: Float[Tensor, "token d"], weights: Float[Tensor, "token k"]
    ) -> Float[Tensor, "n_features d"]:
        """For each feature, Σ over its tokens of weight × vector."""
        return embedding_bag(
            self.token,
            vectors,
            self.offsets,
            per_sample_weights=weights.flatten()[self.order],
            mode="sum",
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
    objective: Objective,
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
