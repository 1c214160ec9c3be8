"""What a direction at a token is made of, exactly (paper Section 3.3; Eqs. 7, 8, 22 to 28).

Attention patterns and norm scales are frozen at their values on the prompt. Everything between
dictionary features is then linear, and a *target* (the pre-activation of a feature, a logit, a
difference of logits) is a finite sum over *sources*:

    target = constant + v · x(t)                     v = u / σ(t)
    x(t)   = embed(t) + pos(t) + Σ_l [ heads(l, t) + attention bias(l, t) ]
                               + Σ_l [ Σ_i z_i d_i + b_dec + skip(t) + error(t) ]

u is the target's input-invariant direction at the stream (norm gain folded in, centred for LayerNorm);
a layer without a transcoder is one opaque source. Heads of the target's own layer belong to x in a
sequential block, not in a parallel one. A head's share of source token s (Eq. 8) is

    A[t, s] · (x̂_pre(s) W_V) · (W_O v),

computed without a [head, dst, src, d_model] tensor. The sources add up to the target to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.dictionary import Dictionary
from tclib.lm import AttentionWeights, ForwardCache, LanguageModel
from tclib.runs import InputError

SourceKind = Literal[
    "feature",
    "head",
    "embedding",
    "position",
    "attention_bias",
    "decoder_bias",
    "skip",
    "error",
    "mlp",
    "constant",
]

KINDS: tuple[SourceKind, ...] = get_args(SourceKind)


@dataclass(frozen=True)
class ReadSite:
    """Where the stream is read through a norm: in front of a layer's part, or at the end."""

    part: Literal["attention", "mlp", "final"]
    layer: int


@dataclass(frozen=True)
class Target:
    """A direction whose value is to be explained.

    Args:
        name: how tables call it.
        prompt: index of the prompt in the batch.
        pos: token position.
        site: where it reads the stream.
        direction: u, the input-invariant direction; the value is constant + u · P x / σ.
        constant: what is added whatever the stream (b_enc of a feature, b_U of a logit).
    """

    name: str
    prompt: int
    pos: int
    site: ReadSite
    direction: Float[Tensor, "d_model"]
    constant: float


@dataclass(frozen=True)
class ActiveFeatures:
    """The active features of one layer on all prompts, in (prompt, pos, feature) order.

    `offsets[prompt × n_pos + pos]` is where a position's features begin.
    """

    prompt: Int[Tensor, "active"]
    pos: Int[Tensor, "active"]
    feature: Int[Tensor, "active"]
    acts: Float[Tensor, "active"]
    offsets: Int[Tensor, "positions_plus_1"]

    @classmethod
    def of(cls, feature_acts: Float[Tensor, "batch pos n_features"]) -> ActiveFeatures:
        """From dense activations, which are not kept."""
        n_prompts, n_pos, _ = feature_acts.shape
        prompt, pos, feature = feature_acts.nonzero(as_tuple=True)
        counts = torch.bincount(prompt * n_pos + pos, minlength=n_prompts * n_pos)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(prompt, pos, feature, feature_acts[prompt, pos, feature], offsets)

    def at(self, prompt: int, pos: int, n_pos: int) -> slice:
        """The slice of one position."""
        place = prompt * n_pos + pos
        return slice(int(self.offsets[place]), int(self.offsets[place + 1]))


@dataclass(frozen=True)
class LayerParts:
    """One layer's MLP output, split: Σ z d + b_dec + skip + error."""

    dictionary: Dictionary
    active: ActiveFeatures
    skip: Float[Tensor, "batch pos d_model"] | None
    error: Float[Tensor, "batch pos d_model"]


class FrozenPrompts:
    """A batch of prompts of one length, run once, with patterns and scales frozen.

    Args:
        lm: the model.
        tokens: prompts with BOS, [batch, pos].
        transcoders: any number, in any order, at most one a layer; layers without one are opaque.

    Errors: `InputError` for an empty or too long prompt, two transcoders at one layer, a dictionary
    that is no transcoder or of another width or model basis, a non-finite forward pass.
    """

    def __init__(
        self,
        lm: LanguageModel,
        tokens: Int[Tensor, "batch pos"],
        transcoders: Iterable[Dictionary],
    ) -> None:
        self.lm = lm
        self.transcoders = _by_layer(lm, transcoders)
        _check_tokens(lm, tokens)
        self.cache: ForwardCache = lm.cache(tokens)
        if not bool(self.cache.logits.isfinite().all()):
            raise InputError(
                f"{lm.name} gives non-finite values on these prompts: check its weights and its dtype"
            )
        self.parts = {layer: self._split(layer, d) for layer, d in self.transcoders.items()}

    @property
    def n_prompts(self) -> int:
        return self.cache.tokens.shape[0]

    @property
    def n_pos(self) -> int:
        return self.cache.tokens.shape[1]

    @cached_property
    def attention(self) -> list[AttentionWeights]:
        """Value and output weights by layer."""
        return [self.lm.attention_weights(layer) for layer in range(self.lm.n_layers)]

    @cached_property
    def values(self) -> list[Float[Tensor, "batch src head d_head"]]:
        """x̂_pre(s) W_V by layer, without the value bias."""
        return [
            torch.einsum("bsd,hdk->bshk", x, weights.W_V)
            for x, weights in zip(self.cache.attention_in, self.attention, strict=True)
        ]

    def _split(self, layer: int, dictionary: Dictionary) -> LayerParts:
        x, y = self.cache.mlp_in[layer], self.cache.mlp_out[layer]
        feature_acts = dictionary.encode(x)
        error = y - dictionary.decode(feature_acts, x)
        skip = None if dictionary.W_skip is None else x @ dictionary.W_skip
        return LayerParts(dictionary, ActiveFeatures.of(feature_acts), skip, error)

    # -- targets ----------------------------------------------------------------------------

    def feature_target(self, layer: int, feature: int, pos: int, prompt: int = 0) -> Target:
        """The pre-activation of a feature: u = P W_enc[:, i], constant b_enc[i].

        The feature need not be active; its value is then zero or below.
        """
        dictionary = self._transcoder_at(layer)
        if not 0 <= feature < dictionary.config.n_features:
            raise InputError(
                f"feature {feature} is out of range: layer {layer} has features 0 to "
                f"{dictionary.config.n_features - 1}"
            )
        pos, prompt = self._check_place(pos, prompt)
        direction = self.lm.final_norm.centre(dictionary.encoder_direction(feature))
        constant = float(dictionary.b_enc[feature])
        site = ReadSite("mlp", layer)
        return Target(f"L{layer}.{feature}@{pos}", prompt, pos, site, direction, constant)

    def logit_target(
        self, weights: Mapping[int, float], pos: int, prompt: int = 0, name: str = ""
    ) -> Target:
        """Σ weight × logit over tokens: one logit, a difference, a mean over several.

        Logits are relative to their mean over the vocabulary.
        """
        pos, prompt = self._check_place(pos, prompt)
        out_of_range = [i for i in weights if not 0 <= i < self.lm.d_vocab]
        if not weights or out_of_range:
            raise InputError(
                f"logits {list(weights)}: expected token ids from 0 to {self.lm.d_vocab - 1}"
            )
        ids = torch.tensor(list(weights), device=self.lm.device)
        w = torch.tensor(list(weights.values()), dtype=self.lm.dtype, device=self.lm.device)
        label = name or " ".join(f"{weight:+g}·logit[{i}]" for i, weight in weights.items())
        direction = self.lm.W_U[:, ids] @ w
        constant = float(self.lm.b_U[ids] @ w)
        site = ReadSite("final", self.lm.n_layers)
        return Target(f"{label}@{pos}", prompt, pos, site, direction, constant)

    def value(self, target: Target) -> float:
        """The target's value, directly from the stream that it reads."""
        cache, layer, place = self.cache, target.site.layer, (target.prompt, target.pos)
        if target.site.part == "final":
            normalised = cache.final_in[place] / cache.final_scale[place]
        else:
            read = cache.mlp_in if target.site.part == "mlp" else cache.attention_in
            normalised = read[layer][place]
        return target.constant + float(normalised @ target.direction)

    def scale(self, site: ReadSite, prompt: int, pos: int) -> float:
        """1 / σ at a site: the input-dependent factor that all sources of a target share."""
        scales = {"attention": self.cache.attention_scale, "mlp": self.cache.mlp_scale}
        if site.part == "final":
            return 1.0 / float(self.cache.final_scale[prompt, pos])
        return 1.0 / float(scales[site.part][site.layer][prompt, pos])

    def attention_layers(self, site: ReadSite) -> range:
        """Layers whose attention has written to the stream before `site`."""
        reads_own = site.part == "mlp" and not self.lm.is_parallel
        return range(site.layer + 1 if reads_own else site.layer)

    def mlp_layers(self, site: ReadSite) -> range:
        """Layers whose MLP has written to the stream before `site`."""
        return range(site.layer)

    def _transcoder_at(self, layer: int) -> Dictionary:
        if layer not in self.transcoders:
            raise InputError(
                f"no transcoder at layer {layer}: there is one at layers {sorted(self.transcoders)}"
            )
        return self.transcoders[layer]

    def _check_place(self, pos: int, prompt: int) -> tuple[int, int]:
        if not -self.n_pos <= pos < self.n_pos:
            raise InputError(
                f"token index {pos} is outside the prompt: expected {-self.n_pos} to {self.n_pos - 1}"
            )
        if not 0 <= prompt < self.n_prompts:
            raise InputError(f"prompt {prompt}: expected 0 to {self.n_prompts - 1}")
        return pos % self.n_pos, prompt


# ---------------------------------------------------------------------------------------------
# Sources


@dataclass(frozen=True)
class Sources:
    """All sources of one target, as columns of equal length.

    contribution = activation × weight: `activation` is input-dependent (z of a feature, the pattern
    entry of a head, 1 for what is always there, all over σ), `weight` is the source's vector dotted
    with the target's input-invariant direction. `kind` indexes `KINDS`; columns that do not apply to
    a kind hold −1.
    """

    target: Target
    value: float
    kind: Int[np.ndarray, "source"]
    layer: Int[np.ndarray, "source"]
    head: Int[np.ndarray, "source"]
    feature: Int[np.ndarray, "source"]
    pos: Int[np.ndarray, "source"]
    activation: Float[np.ndarray, "source"]
    weight: Float[np.ndarray, "source"]

    @cached_property
    def contribution(self) -> Float[np.ndarray, "source"]:
        """activation × weight."""
        return self.activation * self.weight

    @cached_property
    def table(self) -> pd.DataFrame:
        """A line a source, kinds by name."""
        names = ("layer", "head", "feature", "pos", "activation", "weight", "contribution")
        columns = {name: getattr(self, name) for name in names}
        return pd.DataFrame({"kind": np.array(KINDS)[self.kind], **columns})

    @property
    def total(self) -> float:
        """The sum of all contributions; equals `value` to rounding."""
        return float(self.contribution.sum())

    @property
    def residual(self) -> float:
        """(total − value), over the largest magnitude that was summed."""
        size = max(abs(self.value), float(np.abs(self.contribution).max()))
        return (self.total - self.value) / size if size else 0.0


def sources(frozen: FrozenPrompts, targets: Sequence[Target]) -> list[Sources]:
    """The complete list of sources of each target (module equation), for any batch of targets."""
    return [_sources_of(frozen, target) for target in targets]


class _Part(NamedTuple):
    """Sources of one kind; a number stands for a column that repeats it."""

    kind: SourceKind
    weight: Tensor
    activation: Tensor | float = 1.0
    layer: int = -1
    head: Tensor | int = -1
    feature: Tensor | int = -1
    pos: Tensor | int = -1


def _sources_of(frozen: FrozenPrompts, target: Target) -> Sources:
    site, scale = target.site, frozen.scale(target.site, target.prompt, target.pos)
    parts = [
        # The constant is not read from the stream: its weight undoes the scale.
        _Part(
            "constant",
            torch.tensor([target.constant / scale], dtype=torch.float64),
            layer=site.layer,
            pos=target.pos,
        ),
        *_embeddings(frozen, target),
        *(p for layer in frozen.attention_layers(site) for p in _heads(frozen, target, layer)),
        *(p for layer in frozen.mlp_layers(site) for p in _mlp(frozen, target, layer)),
    ]
    kind = np.concatenate([np.full(p.weight.numel(), KINDS.index(p.kind)) for p in parts])
    columns = {name: _column(parts, name) for name in _Part._fields[1:]}
    columns["activation"] = columns["activation"] * scale
    return Sources(target, frozen.value(target), kind, **columns)


def _column(parts: Sequence[_Part], name: str) -> np.ndarray:
    """One column over all parts, as float64 or as integers."""
    dtype = np.float64 if name in ("activation", "weight") else np.int64

    def values(part: _Part) -> np.ndarray:
        value = getattr(part, name)
        if isinstance(value, Tensor):
            return value.expand(part.weight.shape).reshape(-1).cpu().numpy().astype(dtype)
        return np.full(part.weight.numel(), value, dtype=dtype)

    return np.concatenate([values(part) for part in parts])


def _embeddings(frozen: FrozenPrompts, target: Target) -> list[_Part]:
    place = (target.prompt, target.pos)
    token = frozen.cache.token_embedding[place] @ target.direction
    parts = [_Part("embedding", token[None], pos=target.pos)]
    if frozen.cache.position_embedding is not None:
        position = frozen.cache.position_embedding[place] @ target.direction
        parts.append(_Part("position", position[None], pos=target.pos))
    return parts


def _heads(frozen: FrozenPrompts, target: Target, layer: int) -> list[_Part]:
    """Heads by source token, and the layer's bias with the value biases in it (Eq. 8)."""
    weights, n_sources = frozen.attention[layer], target.pos + 1
    pattern = frozen.cache.pattern[layer][target.prompt, :, target.pos, :n_sources]
    written = weights.W_O @ target.direction
    read = frozen.values[layer][target.prompt, :n_sources]
    per_source = torch.einsum("shk,hk->hs", read, written)
    head = torch.arange(len(pattern), device=pattern.device)[:, None]
    source = torch.arange(n_sources, device=pattern.device)[None]
    bias = weights.b_O @ target.direction + pattern.sum(1) @ (weights.value_bias @ target.direction)
    return [
        _Part("head", per_source, pattern, layer, head=head, pos=source),
        _Part("attention_bias", bias[None], layer=layer, pos=target.pos),
    ]


def _mlp(frozen: FrozenPrompts, target: Target, layer: int) -> list[_Part]:
    """Features, decoder bias, skip and error of a layer with a transcoder, else its whole output."""
    place, direction, pos = (target.prompt, target.pos), target.direction, target.pos
    if layer not in frozen.parts:
        whole = frozen.cache.mlp_out[layer][place] @ direction
        return [_Part("mlp", whole[None], layer=layer, pos=pos)]
    split = frozen.parts[layer]
    here = split.active.at(*place, frozen.n_pos)
    feature = split.active.feature[here]
    weight = split.dictionary.W_dec[feature] @ direction
    bias, error = split.dictionary.b_dec @ direction, split.error[place] @ direction
    parts = [
        _Part("feature", weight, split.active.acts[here], layer, feature=feature, pos=pos),
        _Part("decoder_bias", bias[None], layer=layer, pos=pos),
        _Part("error", error[None], layer=layer, pos=pos),
    ]
    if split.skip is not None:
        parts.append(_Part("skip", (split.skip[place] @ direction)[None], layer=layer, pos=pos))
    return parts


# ---------------------------------------------------------------------------------------------
# Checks


def _by_layer(lm: LanguageModel, transcoders: Iterable[Dictionary]) -> dict[int, Dictionary]:
    found: dict[int, Dictionary] = {}
    for dictionary in transcoders:
        config = dictionary.config
        dictionary.check_model(lm)
        if config.kind != "transcoder":
            raise InputError(
                f"a {config.kind} at layer {config.layer}: attribution goes through transcoders, "
                "which map mlp_in to mlp_out"
            )
        if config.layer in found:
            raise InputError(
                f"two transcoders at layer {config.layer}: expected at most one a layer"
            )
        found[config.layer] = dictionary.to(lm.device, lm.dtype)
    return dict(sorted(found.items()))


def _check_tokens(lm: LanguageModel, tokens: Tensor) -> None:
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise InputError(f"tokens of shape {tuple(tokens.shape)}: expected [batch, pos], not empty")
    if tokens.shape[1] > lm.n_ctx:
        raise InputError(
            f"prompt of {tokens.shape[1]} tokens: {lm.name} takes at most {lm.n_ctx}; shorten it"
        )
