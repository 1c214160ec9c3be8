"""A harvest beside a bare transformers forward that is cut off at the same layer."""

from dataclasses import replace

import torch
from random_models import GPT2_SMALL, SMALL
from result import Result, difference, interleaved
from torch import Tensor
from transformers import GPT2Model

from tclib.models.running import Site
from tclib.training.activations import Block, Harvest

N_CTX, N_ROWS, ROWS_PER_FORWARD = 128, 32, 16


def run(small: bool) -> Result:
    """One site pair at half the depth: tokens a second, and activations. Target: 0.9 of the forward's."""
    shape = replace(SMALL if small else GPT2_SMALL, d_vocab=SMALL.d_vocab)
    layer = shape.n_layers // 2
    lm, rows = shape.lm(N_CTX), shape.rows(N_ROWS, N_CTX)
    truncated = GPT2Model(replace(shape, n_layers=layer + 1).config(N_CTX)).eval()
    truncated.load_state_dict(lm.model.transformer.state_dict(), strict=False)
    truncated.ln_f = torch.nn.Identity()
    sites = (Site("mlp_in", layer), Site("mlp_out", layer))
    harvest = Harvest(lm, rows, sites, N_ROWS, ROWS_PER_FORWARD)

    @torch.no_grad()
    def bare() -> None:
        for batch in rows.long().split(ROWS_PER_FORWARD):
            truncated(batch, use_cache=False)

    n_repeats = 3 if small else 15
    seconds, found = interleaved(bare, lambda: harvest.block(0), n_repeats=n_repeats, n_warmups=2)
    expected = bare_activations(truncated, sites, rows)
    apart = difference(sketch(found[1]), sketch(expected))
    return Result(
        {"n_layers": layer + 1, "d_model": shape.d_model, "n_tokens": rows.numel()},
        {"harvest, share of a bare transformers forward's tokens/s": (seconds[0] / seconds[1], "")},
        {"activations, the bare forward's": (apart, 1e-4)},
    )


@torch.no_grad()
def bare_activations(model: GPT2Model, sites: tuple[Site, Site], rows: Tensor) -> Block:
    """What enters and leaves the MLP; a random GPT-2's norms have gain 1 and bias 0."""
    found: Block = {}

    def note(_module: object, inputs: tuple[Tensor], output: Tensor) -> None:
        found[sites[0]] = inputs[0].flatten(0, 1)
        found[sites[1]] = (output - output.mean(-1, keepdim=True)).flatten(0, 1)

    model.h[sites[0].layer].mlp.register_forward_hook(note)
    model(rows.long(), use_cache=False)
    return found


def sketch(block: Block) -> Tensor:
    """The same for any order of tokens: random sums of input and output, each sorted."""
    both = torch.cat([block[site] for site in sorted(block, key=lambda site: site.name)], dim=1)
    generator = torch.Generator().manual_seed(0)
    return (both @ torch.randn(both.shape[1], 64, generator=generator)).sort(0).values
