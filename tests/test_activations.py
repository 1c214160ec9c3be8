"""The harvest: right values, one forward pass, shuffled, stateless, in constant memory."""

from __future__ import annotations

import pytest
import torch
from conftest import random_rows, tiny_lm

from tclib.activations import Harvest, needed_sites
from tclib.lm import LanguageModel, Site
from tclib.runs import InputError

SITES = (Site("mlp_in", 0), Site("mlp_out", 0), Site("mlp_out", 2))


def harvest(lm: LanguageModel, n_rows: int = 12, **changes: int) -> Harvest:
    settings = {"block_rows": 4, "rows_per_forward": 3, "seed": 0, **changes}
    return Harvest(lm, random_rows(n_rows), SITES, **settings)


def sorted_rows(acts: torch.Tensor) -> torch.Tensor:
    return acts[acts[:, 0].argsort()]


def test_a_pass_holds_every_token_once_at_every_site(lm: LanguageModel) -> None:
    harvested = harvest(lm)
    blocks = [harvested.block(i) for i in range(3)]
    expected = lm.read(random_rows(12).long(), SITES)
    for site in SITES:
        found = torch.cat([block[site] for block in blocks])
        torch.testing.assert_close(
            sorted_rows(found), sorted_rows(expected[site].flatten(0, 1)), rtol=1e-4, atol=1e-5
        )


def test_sites_share_one_permutation(gpt2_lm: LanguageModel) -> None:
    block = harvest(gpt2_lm).block(1)
    mlp_in, mlp_out = block[SITES[0]], block[SITES[1]]
    mlp = gpt2_lm.model.transformer.h[0]
    norm = gpt2_lm.mlp_norm(0)
    with torch.no_grad():
        again = norm.centre(mlp.mlp(mlp_in * norm.gain + norm.bias))
    torch.testing.assert_close(mlp_out, again, rtol=1e-4, atol=1e-5)


def test_blocks_are_shuffled_and_stateless(gpt2_lm: LanguageModel) -> None:
    first, fresh = harvest(gpt2_lm), harvest(gpt2_lm)
    first.block(0)
    assert torch.equal(first.block(2)[SITES[0]], fresh.block(2)[SITES[0]])
    assert not torch.equal(first.block(0)[SITES[0]], first.block(3)[SITES[0]])
    other = harvest(gpt2_lm, seed=1)
    assert not torch.equal(first.block(0)[SITES[0]], other.block(0)[SITES[0]])


def test_a_block_may_span_two_passes(gpt2_lm: LanguageModel) -> None:
    harvested = harvest(gpt2_lm, n_rows=5)
    indices = torch.cat([harvested._row_indices(i) for i in range(5)])
    assert torch.equal(torch.bincount(indices), torch.full((5,), 4))


def test_the_model_runs_once_whatever_the_number_of_sites(gpt2_lm: LanguageModel) -> None:
    n_calls = []
    handle = gpt2_lm._block(0).mlp.register_forward_hook(lambda *_: n_calls.append(1))
    harvest(gpt2_lm).block(0)
    handle.remove()
    assert len(n_calls) == 2  # four rows, three a forward pass


def test_needed_sites_are_distinct_and_in_order() -> None:
    pairs = [(Site("mlp_in", 2), Site("mlp_out", 2)), (Site("mlp_out", 2), Site("mlp_out", 2))]
    assert needed_sites(pairs) == (Site("mlp_in", 2), Site("mlp_out", 2))


def test_bad_input_is_named() -> None:
    lm = tiny_lm()
    with pytest.raises(InputError, match="corpus is empty"):
        Harvest(lm, random_rows(0), SITES)
    with pytest.raises(InputError, match="layer 7 is out of range"):
        Harvest(lm, random_rows(2), (Site("mlp_in", 7),))
    with pytest.raises(InputError, match="context of 70 tokens"):
        Harvest(lm, random_rows(2, n_ctx=70), SITES)
