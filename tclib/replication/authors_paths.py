"""Attribution along published paths, as the authors' code computes it.

With v the direction at the stream, so far multiplied through to the root, one step back is

    feature i of layer l at t:   z (W_dec[i] · v)                v' = (W_dec[i] · v) W_enc[:, i] / σ_mlp(l, t)
    head h of layer l, source s: A[t, s] (x̂_pre(s) W_V) · W_O v  v' = A[t, s] W_V W_O v / σ_attention(l, s)
    embedding at t:              (token + position)(t) · v

`circuits.paths` centres every direction, since the norm that reads it does. The authors do not centre encoder
directions, so that the mean of a decoder row counts too (a released row need not have mean zero). Their greater-than
root is a difference of unembeddings without the final norm's scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tclib.circuits.frozen import FrozenPrompts
from tclib.circuits.paths import Node
from tclib.support.errors import InputError

_NODE = re.compile(r"(mlp|attn|embed)(\d+)(?:tc)?(?:\[(\d+)\])?@(-?\d+)")


@dataclass(frozen=True)
class Start:
    """Where paths begin: the root's direction at the stream, scale included, and its token."""

    direction: Float[Tensor, "d_model"]
    pos: int


@dataclass(frozen=True)
class PathStep:
    """A node of a path: what it contributes to the root along the path, and whether it fires."""

    contribution: float
    is_silent: bool


def feature_start(frozen: FrozenPrompts, layer: int, feature: int) -> Start:
    """A feature at the last token."""
    dictionary, last = frozen.transcoders[layer], frozen.n_pos - 1
    dictionary.check_features(feature)
    scale = frozen.cache.mlp_scale[layer][0, last]
    return Start(dictionary.encoder_direction(feature) / scale, last)


def logit_start(frozen: FrozenPrompts, answer: int, other: int) -> Start:
    """The unembedding of one token minus another's, at the last token, without the final norm's scale."""
    W_U = frozen.lm.W_U
    return Start(W_U[:, answer] - W_U[:, other], frozen.n_pos - 1)


def parse_path(text: str, n_pos: int) -> tuple[list[Node], str]:
    """The nodes behind the root of a published path, and its attribution as printed.

    Errors: `InputError` for a node of no known form.
    """
    steps = text.split(" <- ")
    nodes = []
    for step in steps[1:]:
        found = _NODE.match(step)
        if found is None or (found[1] != "embed" and found[3] is None):
            raise InputError(f"path {text!r}: {step!r} is no feature, head or embedding")
        layer, component, pos = int(found[2]), int(found[3] or -1), int(found[4]) % n_pos
        if found[1] == "mlp":
            nodes.append(Node("feature", layer, -1, component, pos))
        elif found[1] == "attn":
            nodes.append(Node("head", layer, component, -1, pos))
        else:
            nodes.append(Node("embedding", -1, -1, -1, pos))
    return nodes, steps[-1].rsplit(": ", 1)[1]


def node_names(path: str) -> tuple[str, ...]:
    """The nodes of a published path by the authors' names, the root first."""
    return tuple(step.split(": ")[0] for step in path.split(" <- "))


def follow(frozen: FrozenPrompts, start: Start, nodes: Iterable[Node]) -> list[PathStep]:
    """What each node contributes to the root along the path (module equations)."""
    v, pos, steps = start.direction, start.pos, []
    for node in nodes:
        is_silent = False
        if node.kind == "feature":
            dictionary = frozen.transcoders[node.layer]
            dictionary.check_features(node.feature)
            z = activation(frozen, node.layer, node.feature, node.pos)
            weight = dictionary.decoder_direction(node.feature) @ v
            contribution, is_silent = z * float(weight), z == 0
            scale = frozen.cache.mlp_scale[node.layer][0, node.pos]
            v = weight * dictionary.encoder_direction(node.feature) / scale
        elif node.kind == "head":
            weights, layer, head = frozen.attention[node.layer], node.layer, node.head
            pattern = frozen.cache.pattern[layer][0, head, pos, node.pos]
            read = pattern * (weights.W_V[head] @ (weights.W_O[head] @ v))
            contribution = float(frozen.cache.attention_in[layer][0, node.pos] @ read)
            v = read / frozen.cache.attention_scale[layer][0, node.pos]
        else:
            contribution = float(_embedding(frozen, node.pos) @ v)
        pos = node.pos
        steps.append(PathStep(contribution, is_silent))
    return steps


def activation(frozen: FrozenPrompts, layer: int, feature: int, pos: int) -> float:
    """A feature's activation; 0 where it is silent."""
    active = frozen.parts[layer].active
    here = active.at(0, pos, frozen.n_pos)
    return float(active.acts[here][active.feature[here] == feature].sum())


def transcoder_errors(frozen: FrozenPrompts, start: Start, layer: int) -> float:
    """What the errors of all transcoders below `layer` at the start's token contribute to it."""
    errors = [frozen.parts[lower].error[0, start.pos] for lower in range(layer)]
    return float(torch.stack(errors).sum(0) @ start.direction)


def edges(
    paths: Sequence[str], followed: Sequence[Sequence[PathStep]]
) -> dict[tuple[str, str], PathStep]:
    """Contribution to the root by (source, target) name, over the distinct beginnings of paths."""
    seen: set[tuple[str, ...]] = set()
    found: dict[tuple[str, str], PathStep] = {}
    for path, steps in zip(paths, followed, strict=True):
        names = node_names(path)
        for n, step in enumerate(steps, start=1):
            if names[: n + 1] in seen:
                continue
            seen.add(names[: n + 1])
            before = found.get((names[n], names[n - 1]), PathStep(0.0, False))
            total = before.contribution + step.contribution
            found[names[n], names[n - 1]] = PathStep(total, step.is_silent)
    return found


def _embedding(frozen: FrozenPrompts, pos: int) -> Float[Tensor, "d_model"]:
    position = frozen.cache.position_embedding
    token = frozen.cache.token_embedding[0, pos]
    return token if position is None else token + position[0, pos]
