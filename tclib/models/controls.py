"""A model like another one, but for what a control takes away."""

from __future__ import annotations

import copy

import torch

from tclib.models.language_model import LanguageModel


@torch.no_grad()
def with_shuffled_mlp(lm: LanguageModel, layer: int, seed: int) -> LanguageModel:
    """A copy whose neurons of one MLP write each other's output weights.

    Row i of W_out becomes row π(i), π a permutation drawn by the seed. The neurons read, fire and write as much
    as before, and what the MLP writes spans the same directions; what it computes is another function. A
    transcoder of it is as hard to train as one of the MLP, and explains nothing of what the model does. (Targets
    of other tokens would be no such control: nothing can be learned from them but their mean, and that
    transcoder is the mean-ablated MLP once more.)

    Errors: `InputError` for a layer that the model does not have.
    """
    lm.check_layer(layer)
    name = f"{lm.name} with MLP {layer} shuffled"
    other = LanguageModel(copy.deepcopy(lm.model), lm.tokenizer, name)
    other.was_rounded = lm.is_rounded
    rows = other.stored_W_out(layer)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    rows.copy_(rows[order.to(rows.device)])
    return other


def untrained(lm: LanguageModel, seed: int) -> LanguageModel:
    """The same architecture with the weights that training would start from, drawn by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = type(lm.model)(lm.model.config)
    model = model.to(device=lm.device, dtype=lm.dtype).eval()
    return LanguageModel(model, lm.tokenizer, f"{lm.name} untrained")
