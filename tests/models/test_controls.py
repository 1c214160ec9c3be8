"""The controls' models are the model but for what they take away."""

from __future__ import annotations

import pytest
import torch
from tiny import GEOMETRIES, random_rows, tiny_lm

from tclib.models.controls import untrained, with_shuffled_mlp
from tclib.support.errors import InputError


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_shuffled_mlp_has_the_same_neurons_writing_each_others_rows(geometry: str) -> None:
    lm, rows = tiny_lm(geometry), random_rows(3).long()
    before = lm.content_hash
    shuffled = with_shuffled_mlp(lm, 1, seed=0)
    assert lm.content_hash == before != shuffled.content_hash
    own, other = lm.neuron_weights(1), shuffled.neuron_weights(1)
    order = torch.randperm(len(own.W_out), generator=torch.Generator().manual_seed(0))
    assert torch.equal(other.W_out, own.W_out[order]) and torch.equal(other.b_out, own.b_out)
    assert torch.equal(lm.neuron_weights(0).W_out, shuffled.neuron_weights(0).W_out)
    below, below_other = lm.run_below(rows, 1), shuffled.run_below(rows, 1)
    assert torch.equal(below.neuron_acts, below_other.neuron_acts)
    expected = below.neuron_acts @ own.W_out[order] + own.b_out
    torch.testing.assert_close(below_other.mlp_out, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(with_shuffled_mlp(lm, 1, seed=0).neuron_weights(1).W_out, other.W_out)
    with pytest.raises(InputError, match="layer 3"):
        with_shuffled_mlp(lm, 3, seed=0)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_an_untrained_model_hangs_on_the_seed_alone(geometry: str) -> None:
    lm = tiny_lm(geometry)
    state = torch.get_rng_state()
    one = untrained(lm, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert untrained(lm, 0).content_hash == one.content_hash
    assert len({one.content_hash, untrained(lm, 1).content_hash, lm.content_hash}) == 3
    assert one.n_layers == lm.n_layers and one.d_model == lm.d_model
