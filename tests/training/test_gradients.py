"""The hand-written gradients against autograd."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor

from tclib.dictionaries.dictionary import (
    TAKES_K,
    TAKES_THRESHOLD,
    Activation,
    Dictionary,
    DictionaryConfig,
    activate,
)
from tclib.training import gradients
from tclib.training.gradients import _stable_argsort, step_result
from tclib.training.spec import Loss, Recipe

N_TOKENS, D_IN, D_OUT, N_FEATURES = 40, 6, 5, 24


def random_dictionary(activation: str, skip: bool) -> Dictionary:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    config = DictionaryConfig(
        "transcoder",
        0,
        D_IN,
        D_OUT,
        N_FEATURES,
        activation,
        4 if activation in TAKES_K else None,
        skip,
    )  # type: ignore[arg-type]
    weights = (
        normal(D_IN, N_FEATURES),
        normal(N_FEATURES),
        normal(N_FEATURES, D_OUT),
        normal(D_OUT),
    )
    threshold = normal(N_FEATURES).abs() if activation in TAKES_THRESHOLD else None
    return Dictionary(config, *weights, normal(D_IN, D_OUT) if skip else None, threshold)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N_TOKENS, D_IN, generator=generator, dtype=torch.float64)
    y = torch.randn(N_TOKENS, D_OUT, generator=generator, dtype=torch.float64) + 1
    return x, y


def loss_by_definition(
    p: dict[str, Tensor], d: Dictionary, x: Tensor, y: Tensor, o: Recipe
) -> Tensor:
    pre = x @ p["W_enc"] + p["b_enc"]
    penalty = 0.0
    if d.config.activation == "batch_topk":
        kept = pre.relu().flatten().topk(d.config.k * len(x)).values.min()  # type: ignore[operator]
        z = torch.where(pre >= kept, pre, 0.0)
    elif d.config.activation == "jumprelu":
        z = _Jump.apply(pre, p["threshold"], o.bandwidth)
        penalty = o.l0_coefficient * _Step.apply(pre, p["threshold"], o.bandwidth).sum(1)
    else:
        z = activate(pre, d.config.k)
    error = z @ p["W_dec"] + p["b_dec"] - y
    if "W_skip" in p:
        error = error + x @ p["W_skip"]
    if o.loss == "paper":
        fit = error.pow(2).sum(1)
    else:
        fit = (error.pow(2) / y.norm(dim=1, keepdim=True)).mean(1)
    return (fit + o.l1_coefficient * z.sum(1) + penalty).mean()


class _Jump(torch.autograd.Function):
    """JumpReLU with the straight-through gradient of Rajamanoharan et al. (2024), Eq. 11."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        pre, threshold = ctx.saved_tensors
        kernel = (((pre - threshold) / ctx.bandwidth).abs() < 0.5).to(pre) / ctx.bandwidth
        return grad * (pre > threshold), (-threshold * kernel * grad).sum(0), None


class _Step(torch.autograd.Function):
    """The Heaviside step of pre − θ, with the straight-through gradient of Eq. 12."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        pre, threshold = ctx.saved_tensors
        kernel = (((pre - threshold) / ctx.bandwidth).abs() < 0.5).to(pre) / ctx.bandwidth
        return None, (-kernel * grad).sum(0), None


@pytest.mark.parametrize(
    ("activation", "skip", "loss"),
    list(itertools.product(get_args(Activation), (False, True), ("paper", "authors"))),
)
def test_loss_and_gradients_equal_autograd(activation: str, skip: bool, loss: str) -> None:
    dictionary, (x, y) = random_dictionary(activation, skip), batch()
    objective = Recipe(loss=loss, l1_coefficient=0.03, l0_coefficient=0.2, bandwidth=0.7)  # type: ignore[arg-type]
    result = step_result(dictionary, x, y, objective)
    leaves = {n: t.detach().clone().requires_grad_() for n, t in dictionary.parameters().items()}
    expected = loss_by_definition(leaves, dictionary, x, y, objective)
    expected.backward()
    torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-10, atol=1e-12)
    # batch_topk's threshold is measured, not learned.
    learned = {name: leaf for name, leaf in leaves.items() if leaf.grad is not None}
    assert set(result.gradients) == set(learned)
    assert ("threshold" in learned) == (activation == "jumprelu")
    for name, leaf in learned.items():
        torch.testing.assert_close(result.gradients[name], leaf.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", ["paper", "authors"])
@pytest.mark.parametrize("skip", [False, True])
def test_a_sparse_relu_step_is_the_dense_one(
    skip: bool, loss: Loss, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = random_dictionary("relu", skip).to(dtype=dtype)
    one.b_enc -= 3.0  # some tokens and some features have no active entry
    x, y = (side.to(dtype) for side in batch())
    found = []
    for few in (-1.0, 1.0):
        monkeypatch.setattr(gradients, "_FEW", few)
        found.append(step_result(one, x, y, Recipe(l1_coefficient=0.3, loss=loss)))
    dense, sparse = found
    assert dense.acts.ndim == 2 and sparse.acts.ndim == 1
    assert dense.l0 == sparse.l0 > 0
    assert 0 < int(dense.fired.sum()) < N_FEATURES
    assert torch.equal(dense.fired, sparse.fired)
    apart = {
        "rtol": 1e-6 if dtype == torch.float32 else 1e-13,
        "atol": 1e-6 if dtype == torch.float32 else 1e-13,
    }
    for field in ("loss", "squared_error"):
        torch.testing.assert_close(getattr(sparse, field), getattr(dense, field), **apart)
    for name, gradient in dense.gradients.items():
        torch.testing.assert_close(sparse.gradients[name], gradient, **apart)


def test_a_batch_on_which_nothing_fires_has_a_step_too() -> None:
    one = random_dictionary("relu", False)
    one.b_enc -= 100.0
    result = step_result(one, *batch(), Recipe(l1_coefficient=0.3))
    assert result.l0 == 0 and not result.fired.any()
    assert not result.gradients["W_dec"].any() and result.gradients["b_dec"].any()


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
def test_l0_error_and_fired_are_those_of_the_forward_pass(activation: str) -> None:
    dictionary, (x, y) = random_dictionary(activation, skip=False), batch()
    result = step_result(dictionary, x, y, Recipe(l1_coefficient=0.1))
    output = dictionary(x)
    assert result.l0 == pytest.approx((output.feature_acts > 0).sum(1).double().mean().item())
    assert torch.equal(result.fired, (output.feature_acts > 0).any(0))
    squared = (output.reconstruction - y).pow(2).sum().item()
    assert result.squared_error.item() == pytest.approx(squared, rel=1e-5)


def test_batch_topk_keeps_k_a_token_on_average_and_gives_its_threshold() -> None:
    dictionary, (x, y) = random_dictionary("batch_topk", skip=False), batch()
    result = step_result(dictionary, x, y, Recipe())
    z = dictionary.pre_acts(x).relu()
    largest = z.flatten().sort(descending=True).values[: 4 * N_TOKENS]
    assert result.l0 == 4.0
    assert result.threshold is not None and result.threshold == largest[-1]
    torch.testing.assert_close(result.acts.sort(descending=True).values, largest)
    per_token = (z >= largest[-1]).sum(1)
    assert per_token.min() < 4 < per_token.max()  # not k for every token


def test_auxk_gradients_equal_autograd_and_touch_dead_features_only() -> None:
    dictionary, (x, y) = random_dictionary("relu", skip=False), batch()
    x, y = x.float(), y.float()
    dictionary = dictionary.to(dtype=torch.float32)
    dead = torch.zeros(N_FEATURES, dtype=torch.bool)
    dead[[3, 7, 11]] = True
    with_aux = Recipe(l1_coefficient=0.05, auxk_coefficient=0.5, auxk_k=2)
    plain = step_result(dictionary, x, y, Recipe(l1_coefficient=0.05))
    result = step_result(dictionary, x, y, with_aux, dead)
    leaves = {n: t.detach().clone().requires_grad_() for n, t in dictionary.parameters().items()}
    missed = (y - dictionary(x).reconstruction).detach()
    z_dead = activate((x @ leaves["W_enc"] + leaves["b_enc"])[:, dead], k=2)
    aux = 0.5 * (z_dead @ leaves["W_dec"][dead] - missed).pow(2).sum(1).mean()
    aux.backward()
    assert result.loss.item() == pytest.approx(plain.loss.item() + aux.item(), rel=1e-5)
    for name in ("W_enc", "b_enc", "W_dec"):
        torch.testing.assert_close(
            result.gradients[name] - plain.gradients[name], leaves[name].grad, rtol=1e-4, atol=1e-5
        )
    changed = (result.gradients["b_enc"] != plain.gradients["b_enc"]).nonzero().flatten()
    assert set(changed.tolist()) <= {3, 7, 11} and len(changed) > 0


def test_auxk_without_dead_features_adds_nothing() -> None:
    dictionary, (x, y) = random_dictionary("relu", skip=False), batch()
    none_dead = torch.zeros(N_FEATURES, dtype=torch.bool)
    objective = Recipe(l1_coefficient=0.05, auxk_coefficient=0.5)
    with_aux = step_result(dictionary, x, y, objective, none_dead)
    assert with_aux.loss == step_result(dictionary, x, y, Recipe(l1_coefficient=0.05)).loss


@pytest.mark.parametrize("n_features", [100, 65_536, 70_000])
def test_the_argsort_is_stable_at_every_width(n_features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(0, n_features, (5000,), generator=generator)
    keys[0] = n_features - 1
    assert torch.equal(_stable_argsort(keys, n_features), keys.argsort(stable=True))
