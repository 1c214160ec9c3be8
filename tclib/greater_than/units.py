"""What an MLP's output is made of on the task's prompts: features, neurons, random directions, and their ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary
from tclib.greater_than.task import GreaterThan
from tclib.models.architectures import Norm
from tclib.models.language_model import LanguageModel
from tclib.models.running import LowerRun
from tclib.support.errors import InputError
from tclib.support.statistics import ranked

AT_MEAN = ", others at their mean"


@dataclass(frozen=True)
class Units:
    """What one MLP's output is made of on the task's prompts: rest + Σ_i acts_i W_dec[i].

    Neurons of an MLP with a norm behind it (Gemma 2 and 3, OLMo 2) add up to what that norm reads, so that one that is
    silenced changes how all others are scaled: mlp_out is then `behind` of the sum.
    """

    name: str
    acts: Float[Tensor, "prompt pos unit"]
    W_dec: Float[Tensor, "unit d_model"]
    rest: Float[Tensor, "prompt pos d_model"]
    behind: Norm | None = None

    @property
    def n_units(self) -> int:
        return self.acts.shape[-1]

    def total(self) -> Float[Tensor, "prompt pos d_model"]:
        """What all units and the rest add up to."""
        return self.rest + self.acts @ self.W_dec

    def output(self) -> Float[Tensor, "prompt pos d_model"]:
        """The MLP's output with every unit kept."""
        return self.mlp_out(self.total())

    def mlp_out(self, total: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What the MLP puts out if the units and the rest add up to `total`."""
        return total if self.behind is None else self.behind.affine(self.behind.normalise(total))

    def without(self, unit: int) -> Units:
        """The units with one of them silent."""
        acts = self.acts.clone()
        acts[..., unit] = 0.0
        return replace(self, acts=acts)


def dictionary_units(dictionary: Dictionary, below: LowerRun, name: str = "") -> Units:
    """Features of a transcoder or of an SAE on mlp_out.

    Errors: `InputError` for another layer than the run's, or an SAE on mlp_in.
    """
    config = dictionary.config
    if config.layer != below.layer:
        raise InputError(
            f"a dictionary of layer {config.layer} for MLP {below.layer}: expected the same"
        )
    if config.kind == "sae_mlp_in":
        raise InputError("an sae_mlp_in does not write the MLP's output: expected another kind")
    x = below.at(config.input_site.name)
    rest = dictionary.b_dec.expand_as(below.mlp_out)
    if dictionary.W_skip is not None:
        rest = rest + x @ dictionary.W_skip
    return Units(name or config.kind, dictionary.encode(x), dictionary.W_dec, rest)


def neuron_units(lm: LanguageModel, below: LowerRun) -> Units:
    """The MLP's own neurons; their output bias stays when they are ablated.

    Errors: `InputError` for an MLP of experts, which has none.
    """
    weights = lm.neuron_weights(below.layer)
    assert below.neuron_acts is not None  # else there were no weights
    rest = weights.b_out.expand_as(below.mlp_out)
    behind = lm.mlp_behind(below.layer)
    return Units("neurons", below.neuron_acts, weights.W_out, rest, behind)


def at_mean(units: Units, task: GreaterThan) -> Units:
    """The same output, from which a unit that is ablated goes to its mean instead of to 0.

        rest' = rest + Σ_i ā_i W_dec[i],   acts' = acts − ā

    ā is a unit's mean over the scored prompts of one sentence, at each position by itself, so that what a unit
    loses is what differs between years (as `ablation_effects` ablates an MLP).
    """
    is_scored = task.is_scored.to(units.acts.device)
    sentence = torch.tensor(task.template_idx, device=units.acts.device)
    mean = torch.zeros_like(units.acts)
    for one in sorted(set(task.template_idx)):
        mean[sentence == one] = units.acts[(sentence == one) & is_scored].mean(0)
    rest = units.rest + mean @ units.W_dec
    return replace(units, name=units.name + AT_MEAN, acts=units.acts - mean, rest=rest)


def random_direction_units(units: Units, generator: torch.Generator) -> Units:
    """The same activations writing random directions of the same norms: a control."""
    random = torch.randn(units.W_dec.shape, generator=generator).to(units.W_dec)
    norms = units.W_dec.norm(dim=1, keepdim=True)
    W_dec = random / random.norm(dim=1, keepdim=True) * norms
    return replace(units, name="random directions", W_dec=W_dec)


def rank_by_variance(
    units: Units, task: GreaterThan, misfits: Sequence[Units] = ()
) -> Int[Tensor, "unit"]:
    """By the variance of the activation at the last position, over all prompts (the paper's ranking).

    Over prompts of the first template, so that sentences do not count as variation; `misfits` are the
    same units on each of the task's prompts of another length.
    """
    first = torch.tensor([t == task.template_idx[0] for t in task.template_idx])
    last = [units.acts[first.to(units.acts.device), -1], *(one.acts[:, -1] for one in misfits)]
    return torch.from_numpy(ranked(torch.cat(last).var(0))).to(units.acts.device)
