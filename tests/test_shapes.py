"""Shapes are checked while tests run; names in annotations exist."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from tclib.evaluation.metrics import kl_divergence, l0


def test_calls_of_a_wrong_shape_are_found_in_tests() -> None:
    with pytest.raises(TypeCheckError):
        l0(torch.zeros(3))
    with pytest.raises(TypeCheckError):
        l0(torch.zeros(3, 4, dtype=torch.long))
    with pytest.raises(TypeCheckError):
        kl_divergence(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4))
