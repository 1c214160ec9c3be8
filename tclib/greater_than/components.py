"""Which MLPs and heads matter for a task: each ablated in turn, and each one's direct attribution.

Mean ablation sets a component to its mean over the task's prompts at each position, so that only what
differs between prompts is lost; zero ablation sets it to zero. Direct attribution is what it writes at the
last position, dotted with the root's direction over the frozen final norm.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tclib.circuits.frozen import FrozenPrompts, site_of
from tclib.dictionaries.dictionary import Dictionary
from tclib.features.from_weights import Head
from tclib.greater_than.task import GreaterThan
from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError
from tclib.support.progress import progress
from tclib.support.statistics import ranked

Ablation = Literal["mean", "zero"]


class Component(NamedTuple):
    """An MLP (head −1) or a head."""

    layer: int
    head: int

    @property
    def name(self) -> str:
        return f"MLP {self.layer}" if self.head < 0 else f"head {self.layer}.{self.head}"


def all_components(lm: LanguageModel) -> list[Component]:
    """MLPs first, then heads, by layer."""
    mlps = [Component(layer, -1) for layer in range(lm.n_layers)]
    heads = [Component(layer, head) for layer in range(lm.n_layers) for head in range(lm.n_heads)]
    return mlps + heads


def ablate_component(
    lm: LanguageModel, component: Component, how: Ablation
) -> AbstractContextManager[None]:
    """While active, the component is ablated; the mean is that over the batch, by position.

    Errors: `InputError` for a layer or a head that the model does not have.
    """
    lm.check_layer(component.layer)
    if not -1 <= component.head < lm.n_heads:
        raise InputError(
            f"head {component.head}: {lm.name} has heads 0 to {lm.n_heads - 1}, −1 is the MLP"
        )

    def gone(values: Tensor) -> Tensor:
        kept = values.mean(0, keepdim=True) if how == "mean" else values.new_zeros(1)
        return kept.expand_as(values)

    def in_heads(z: Tensor) -> Tensor:
        changed = z.clone()
        changed[:, :, component.head] = gone(z[:, :, component.head])
        return changed

    if component.head < 0:
        return lm.override_mlp(component.layer, lambda _mlp_in, mlp_out: gone(mlp_out))
    return lm.override_heads(component.layer, in_heads)


@torch.no_grad()
def ablation_effects(lm: LanguageModel, task: GreaterThan) -> pd.DataFrame:
    """The probability difference with each component ablated, over the prompts that count.

    Columns: component, layer, head (−1 for an MLP), original, mean_ablated, zero_ablated, mean_drop,
    zero_drop. Prompts of one template are averaged over by themselves, so means are theirs.
    """
    scored = task.scored()
    groups = [
        scored.subset([i for i, t in enumerate(scored.template_idx) if t == template])
        for template in sorted(set(scored.template_idx))
    ]
    streams = [lm.streams(group.tokens, range(lm.n_layers)) for group in groups]
    original = _mean_difference(lm, groups, streams, 0)
    lines = []
    for component in progress(all_components(lm), "ablating components", unit="component"):
        line = {"component": component.name, **component._asdict(), "original": original}
        for how in get_args(Ablation):
            with ablate_component(lm, component, how):
                line[f"{how}_ablated"] = _mean_difference(lm, groups, streams, component.layer)
            line[f"{how}_drop"] = original - line[f"{how}_ablated"]
        lines.append(line)
    return pd.DataFrame(lines)


def _mean_difference(
    lm: LanguageModel, groups: list[GreaterThan], streams: list[dict[int, Tensor]], layer: int
) -> float:
    """The metric of the model as it is now, of which nothing below `layer` was changed."""
    found = []
    for group, by_layer in zip(groups, streams, strict=True):
        with lm.start_at(layer, by_layer[layer]):
            logits = lm.last_logits(group.tokens)
        found.append(group.differences(group.answer_probabilities(logits)))
    return float(torch.cat(found).mean())


def component_attributions(frozen: FrozenPrompts, task: GreaterThan) -> pd.DataFrame:
    """Direct attribution of each component to the root (mean greater − mean other logit).

    Mean over the prompts of `frozen`, which are those of `task`. Columns: component, layer, head,
    attribution, from_subject (a head's part that reads the number's token, else 0).
    """
    cache, lm = frozen.cache, frozen.lm
    weights = task.is_greater / task.is_greater.sum(1, keepdim=True)
    weights = weights - (~task.is_greater) / (~task.is_greater).sum(1, keepdim=True)
    directions = weights.to(lm.b_U) @ lm.unembedding(task.answer_ids).T
    directions = directions / cache.final_scale[:, -1, None]
    mlps = [float((out[:, -1] * directions).sum(1).mean()) for out in cache.mlp_out]
    by_source = head_contributions(frozen, directions).mean(0)
    heads = by_source.sum(-1).flatten().tolist()
    from_subject = by_source[..., task.subject_pos].flatten().tolist()
    table = pd.DataFrame(all_components(lm))
    return table.assign(
        component=[component.name for component in all_components(lm)],
        attribution=[*mlps, *heads],
        from_subject=[*np.zeros(lm.n_layers), *from_subject],
    )


def head_contributions(
    frozen: FrozenPrompts, directions: Float[Tensor, "prompt d_model"]
) -> Float[Tensor, "prompt layer head src"]:
    """What every head adds at the last position along a direction a prompt, by source token (Eq. 8).

    The value biases are in it, so a head's sum over sources is all that it writes.
    """
    lm = frozen.lm
    found = []
    for layer in range(lm.n_layers):
        weights = frozen.attention[layer]
        written = torch.einsum("pd,hkd->phk", directions, weights.W_O)
        values = frozen.values[layer] + weights.b_V[None, :, None]
        pattern = frozen.cache.pattern[layer][:, :, -1]
        found.append(torch.einsum("phk,phsk,phs->phs", written, values, pattern))
    return torch.stack(found, dim=1)


def feature_contributions(
    frozen: FrozenPrompts, dictionary: Dictionary, feature: int
) -> Float[Tensor, "prompt layer head src"]:
    """What every head adds to the pre-activation of a feature at the last position."""
    scale = site_of(dictionary).scale(frozen.cache)[:, -1, None]
    direction = frozen.lm.final_norm.centre(dictionary.encoder_direction(feature))
    return head_contributions(frozen, direction.expand(frozen.n_prompts, -1) / scale)


def reading_heads(
    frozen: FrozenPrompts, dictionary: Dictionary, features: list[int], subject_pos: int
) -> pd.DataFrame:
    """Which heads carry the number's token into features of one layer, at the last position.

    Columns: layer, head, contribution (mean over prompts and features of the size of what the head
    brings from that token to the pre-activation), spread (its standard deviation over prompts, mean
    over features). Only heads that the layer can read.
    """
    last = dictionary.config.layer + (0 if frozen.lm.is_parallel else 1)
    found = [feature_contributions(frozen, dictionary, feature) for feature in features]
    brought = torch.stack([one[:, :last, :, subject_pos] for one in found]).double()
    layer, head = np.indices(tuple(brought.shape[2:])).reshape(2, -1)
    table = pd.DataFrame(
        {
            "layer": layer,
            "head": head,
            "contribution": brought.abs().mean((0, 1)).flatten().cpu().numpy(),
            "spread": brought.std(1).mean(0).flatten().cpu().numpy(),
        }
    )
    return table.iloc[ranked(table["spread"])].reset_index(drop=True)


def strongest_mlp(effects: pd.DataFrame) -> int:
    """The layer above 0 whose MLP costs most when mean-ablated (MLP 0 serves as a second embedding)."""
    mlps = effects[(effects["head"] < 0) & (effects["layer"] > 0)]
    return int(mlps.iloc[ranked(mlps["mean_drop"])[0]]["layer"])


def strongest_head(heads: pd.DataFrame) -> Head:
    """The head above layer 0 whose contribution from the number's token varies most over prompts.

    Above layer 0, so that layer 0's features stand before it.
    """
    above = heads[heads["layer"] > 0].sort_values(["layer", "head"])
    line = above.iloc[ranked(above["spread"])[0]]
    return Head(int(line["layer"]), int(line["head"]))
