"""Every metric, defined once: pure functions of tensors, and sums for what does not fit in memory.

BOS positions are left out of l0, fvu and firing frequencies (their activations are outliers that
say nothing about text); they stay in the cross-entropy, where BOS predicts a document's first token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LIVE_LOG10_FREQUENCY = -4.0
ACTIVE_SHARE = 0.25  # of its maximum: above it a feature counts as strongly active


def is_active(feature_acts: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Where z > 0: what L0, firing frequencies and dead features count."""
    return feature_acts > 0


def strong_threshold(feature_acts: Float[Tensor, "*shape"]) -> float:
    """A quarter of the maximum: above it a feature counts as active where meanings are graded."""
    return ACTIVE_SHARE * float(feature_acts.max())


def l0(feature_acts: Float[Tensor, "token n_features"]) -> float:
    """Mean number of active features a token."""
    return int(is_active(feature_acts).sum()) / len(feature_acts)


def variation(y: Float[Tensor, "token d_out"]) -> Float[Tensor, ""]:
    """Σ‖y − ȳ‖², ȳ the mean over all tokens: what FVU divides by."""
    return (y - y.mean(0)).pow(2).sum()


def fvu(y: Float[Tensor, "token d_out"], reconstruction: Float[Tensor, "token d_out"]) -> float:
    """Fraction of variance unexplained: Σ‖y − ŷ‖² / Σ‖y − ȳ‖², ȳ the mean over all tokens."""
    y, reconstruction = y.double(), reconstruction.double()
    return float((y - reconstruction).pow(2).sum() / variation(y))


def next_token_losses(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos_minus_1"]:
    """−log p(next token) in nats at every position but the last."""
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )
    return losses.view(len(tokens), -1)


def kl_from(
    log_p: Float[Tensor, "*batch d_vocab"], logits: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(p ‖ softmax(logits)) in nats, from the log-probabilities of p."""
    return (log_p.exp() * (log_p - logits.float().log_softmax(-1))).sum(-1)


def ce_recovered(ce: float, ce_original: float, ce_mean_ablated: float) -> float:
    """(ce_mean_ablated − ce) / (ce_mean_ablated − ce_original): 1 is perfect, 0 is mean ablation."""
    return (ce_mean_ablated - ce) / (ce_mean_ablated - ce_original)


def log10_frequency(
    n_fired: Int[Tensor, "n_features"], n_tokens: int
) -> Float[Tensor, "n_features"]:
    """log10 of the share of tokens on which a feature fires; −inf for one that never does."""
    return (n_fired.double() / n_tokens).log10()


def is_dead(n_fired: Int[Tensor, "n_features"]) -> Bool[Tensor, "n_features"]:
    """Never fired on the evaluation set."""
    return n_fired == 0


def is_live(n_fired: Int[Tensor, "n_features"], n_tokens: int) -> Bool[Tensor, "n_features"]:
    """log10 frequency above −4: fires more than once in 10,000 tokens."""
    return log10_frequency(n_fired, n_tokens) > LIVE_LOG10_FREQUENCY


@dataclass
class ReconstructionSums:
    """l0, fvu and firing counts over a stream of batches, in float64, where the batches are.

    Uses Σ‖y − ȳ‖² = Σ‖y − c‖² − n‖ȳ − c‖², with c the first batch's mean against cancellation. Nothing is
    brought to the host before it is asked for: a batch on a GPU would wait for it.
    """

    n_tokens: int = 0
    n_fired: Int[Tensor, "n_features"] | None = None
    # c, Σ (y − c), and Σ‖y − c‖² beside Σ‖y − ŷ‖²
    _sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(
        self,
        y: Float[Tensor, "token d_out"],
        reconstruction: Float[Tensor, "token d_out"],
        feature_acts: Float[Tensor, "token n_features"],
    ) -> None:
        """Add a batch."""
        y = y.double()
        if self._sums is None or self.n_fired is None:
            self._sums = y.mean(0), torch.zeros_like(y[0]), y.new_zeros(2)
            self.n_fired = torch.zeros_like(feature_acts[0], dtype=torch.int64)
        shift, total, squares = self._sums
        shifted, error = y - shift, y - reconstruction.double()
        total += shifted.sum(0)
        squares += torch.stack([shifted.pow(2).sum(), error.pow(2).sum()])
        self.n_fired += is_active(feature_acts).sum(0)
        self.n_tokens += len(y)

    @property
    def l0(self) -> float:
        assert self.n_fired is not None
        return int(self.n_fired.sum()) / self.n_tokens

    @property
    def dead_share(self) -> float:
        assert self.n_fired is not None
        return float(is_dead(self.n_fired).double().mean())

    @property
    def fvu(self) -> float:
        assert self._sums is not None
        _, total, squares = self._sums
        shifted_square, squared_error = squares.tolist()
        variation = shifted_square - float(total.pow(2).sum()) / self.n_tokens
        return float(squared_error / variation) if variation else math.nan
