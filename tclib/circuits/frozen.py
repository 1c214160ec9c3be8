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

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from tclib.dictionaries.dictionary import Dictionary
from tclib.models.architectures import AttentionWeights, Norm
from tclib.models.checks import check_attention, check_parts
from tclib.models.language_model import HALF_PRECISION, LanguageModel
from tclib.models.running import ForwardCache, ReadPart, Site, SiteName
from tclib.support.checked import checked
from tclib.support.errors import InputError

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


def node_name(kind: str, layer: int, head: int, feature: int, pos: int) -> str:
    """How tables and figures call a node: L3.17@5, attn2[1]@5, error3@5, embedding@5."""
    if kind == "feature":
        return f"L{layer}.{feature}@{pos}"
    if kind == "head":
        return f"attn{layer}[{head}]@{pos}"
    return f"{kind}{layer if layer >= 0 else ''}@{pos}"


@dataclass(frozen=True)
class ReadSite:
    """Where the stream is read: through the norm of a layer's part, through the last, or as it is (resid_mid)."""

    part: ReadPart
    layer: int

    def norm(self, lm: LanguageModel) -> Norm:
        """The norm that stands there."""
        if self.part == "final":
            return lm.final_norm
        if self.part == "resid_mid":
            return lm.no_norm
        return lm.mlp_norm(self.layer) if self.part == "mlp" else lm.attention_norm(self.layer)

    def scale(self, cache: ForwardCache) -> Float[Tensor, "batch pos"]:
        """σ of that norm in a forward pass."""
        if self.part == "final":
            return cache.final_scale
        if self.part == "resid_mid":
            return torch.ones_like(cache.final_scale)
        scales = cache.mlp_scale if self.part == "mlp" else cache.attention_scale
        return scales[self.layer]


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

    def decode(
        self, dictionary: Dictionary, shape: tuple[int, ...]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Σ z d at every position, touching active rows only."""
        features, place = self.feature.unique(return_inverse=True)
        rows = dictionary.decoder_rows(features)
        sums = embedding_bag(
            place, rows, self.offsets[:-1], per_sample_weights=self.acts, mode="sum"
        )
        return sums.view(shape)

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

    @checked
    def __init__(
        self,
        lm: LanguageModel,
        tokens: Int[Tensor, "batch pos"],
        transcoders: Iterable[Dictionary],
    ) -> None:
        lm = _exact(lm)
        self.lm = lm
        self.transcoders = by_layer(lm, transcoders)
        _check_padding(lm, lm.check_tokens(tokens))
        self.cache: ForwardCache = lm.cache(tokens)
        if not bool(self.cache.logits.isfinite().all()):
            raise InputError(
                f"{lm.name} gives non-finite values on these prompts: check its weights and its dtype"
            )
        check_parts(lm, self.cache)
        check_attention(lm, self.cache)
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
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Output weights of all layers."""
        return torch.stack([weights.W_O for weights in self.attention])

    @cached_property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        """Output biases of all layers."""
        return torch.stack([weights.b_O for weights in self.attention])

    @cached_property
    def value_bias(self) -> Float[Tensor, "layer head d_model"]:
        """b_V W_O of all heads."""
        return torch.stack([weights.value_bias for weights in self.attention])

    @cached_property
    def values(self) -> Float[Tensor, "layer batch head src d_head"]:
        """x̂_pre(s) W_V of all heads, without the value bias."""
        pairs = zip(self.cache.attention_in, self.attention, strict=True)
        return torch.stack([torch.einsum("bsd,hdk->bhsk", x, weights.W_V) for x, weights in pairs])

    @cached_property
    def patterns(self) -> Float[Tensor, "layer batch head dst src"]:
        """Attention patterns of all layers."""
        return torch.stack(self.cache.pattern)

    def _split(self, layer: int, dictionary: Dictionary) -> LayerParts:
        x, y = self.cache.at(dictionary.config.input_site), self.cache.mlp_out[layer]
        active = ActiveFeatures.of(dictionary.encode(x))
        dictionary.keep(active.feature)
        error = y - dictionary.b_dec - active.decode(dictionary, tuple(y.shape))
        if not bool(error.isfinite().all()):
            raise InputError(
                f"the transcoder of layer {layer} gives non-finite values on these prompts: its weights "
                "are damaged; train or load it again"
            )
        skip = None if dictionary.W_skip is None else x @ dictionary.W_skip
        return LayerParts(dictionary, active, skip, error if skip is None else error - skip)

    # -- targets ----------------------------------------------------------------------------

    @checked
    def feature_target(
        self,
        layer: int,
        feature: int,
        pos: int,
        prompt: int = 0,
        dictionary: Dictionary | None = None,
    ) -> Target:
        """The pre-activation of a feature: u = P W_enc[:, i], constant b_enc[i].

        The feature need not be active; its value is then zero or below. It is the transcoder's of that layer,
        or that of another `dictionary` on the same site.
        """
        if layer not in self.transcoders and dictionary is None:
            raise InputError(
                f"no transcoder at layer {layer}: there is one at layers {sorted(self.transcoders)}"
            )
        if dictionary is None:
            dictionary = self.transcoders[layer]
        elif dictionary.config.layer != layer:
            raise InputError(
                f"a dictionary of layer {dictionary.config.layer} for layer {layer}: expected the same"
            )
        else:
            dictionary.check_size(self.lm)
            dictionary.check_basis(self.lm)
        dictionary.check_features(feature)
        pos, prompt = self.check_place(pos, prompt)
        direction = self.lm.final_norm.centre(dictionary.encoder_direction(feature))
        constant = float(dictionary.b_enc[feature])
        site = site_of(dictionary)
        return Target(f"L{layer}.{feature}@{pos}", prompt, pos, site, direction, constant)

    @checked
    def logit_target(
        self, weights: Mapping[int, float], pos: int, prompt: int = 0, name: str = ""
    ) -> Target:
        """Σ weight × logit over tokens: one logit, a difference, a mean over several.

        Logits are relative to their mean over the vocabulary.
        """
        pos, prompt = self.check_place(pos, prompt)
        out_of_range = [i for i in weights if not 0 <= i < self.lm.d_vocab]
        if not weights or out_of_range:
            raise InputError(
                f"logits {list(weights)}: expected token ids from 0 to {self.lm.d_vocab - 1}"
            )
        ids = torch.tensor(list(weights), device=self.lm.device)
        w = torch.tensor(list(weights.values()), dtype=self.lm.dtype, device=self.lm.device)
        label = name or " ".join(f"{weight:+g}·logit[{i}]" for i, weight in weights.items())
        direction = self.lm.unembedding(ids) @ w
        constant = float(self.lm.b_U[ids] @ w)
        site = ReadSite("final", self.lm.n_layers)
        return Target(f"{label}@{pos}", prompt, pos, site, direction, constant)

    @checked
    def value(self, target: Target) -> float:
        """The target's value, directly from the stream that it reads."""
        return float(target_values(self.cache, target)[target.prompt])

    def scale(self, site: ReadSite, prompt: int, pos: int) -> float:
        """1 / σ at a site: the input-dependent factor that all sources of a target share."""
        return 1.0 / float(site.scale(self.cache)[prompt, pos])

    def attention_layers(self, site: ReadSite) -> range:
        """Layers whose attention has written to the stream before `site`."""
        reads_own = site.part in ("mlp", "resid_mid") and not self.lm.is_parallel
        return range(site.layer + 1 if reads_own else site.layer)

    def check_place(self, pos: int, prompt: int) -> tuple[int, int]:
        """The token's index from the front, and the prompt. Errors: `InputError` if there is none."""
        if not -self.n_pos <= pos < self.n_pos:
            raise InputError(
                f"token index {pos} is outside the prompt: expected {-self.n_pos} to {self.n_pos - 1}"
            )
        if not 0 <= prompt < self.n_prompts:
            raise InputError(f"prompt {prompt}: expected 0 to {self.n_prompts - 1}")
        return pos % self.n_pos, prompt


def site_of(dictionary: Dictionary) -> ReadSite:
    """Where a transcoder reads the stream."""
    config = dictionary.config
    return ReadSite("resid_mid" if config.reads_stream else "mlp", config.layer)


def target_values(cache: ForwardCache, target: Target) -> Float[Tensor, "batch"]:
    """The target's value on every prompt of a forward pass, whichever prompt it was made for."""
    layer, pos = target.site.layer, target.pos
    if target.site.part == "final":
        normalised = cache.final_in[:, pos] / cache.final_scale[:, pos, None]
    elif target.site.part == "attention":
        normalised = cache.attention_in[layer][:, pos]
    else:
        name: SiteName = "mlp_in" if target.site.part == "mlp" else "resid_mid"
        normalised = cache.at(Site(name, layer))[:, pos]
    return target.constant + normalised @ target.direction


def read_running(
    lm: LanguageModel, tokens: Int[Tensor, "batch pos"], site: ReadSite, pos: int
) -> Float[Tensor, "batch d_model"]:
    """What the running model reads at a site and token, behind the division by the norm's own scale.

    A target's value there is constant + this · u. Gradients flow unless switched off.
    """
    return site.norm(lm).normalise(lm.stream_into(tokens, site.part, site.layer)[:, pos])


def by_layer(lm: LanguageModel, transcoders: Iterable[Dictionary]) -> dict[int, Dictionary]:
    """Transcoders by layer, where the model is. Errors: `InputError` for other kinds, or two at a layer."""
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


def _exact(lm: LanguageModel) -> LanguageModel:
    """The model, or a copy in float32 of one in half precision, in which sums would not close."""
    if lm.dtype not in HALF_PRECISION:
        return lm
    warnings.warn(
        f"{lm.name} is in {lm.dtype}: attribution runs on a copy of it in float32", stacklevel=3
    )
    exact = LanguageModel(copy.deepcopy(lm.model).float(), lm.tokenizer, lm.name)
    exact.was_rounded = True  # its weights still are
    return exact


def _check_padding(lm: LanguageModel, tokens: Tensor) -> None:
    """Prompts have no mask. Errors: `InputError` for a row that opens with padding, or with BOS twice."""
    pad_id = lm.tokenizer.pad_token_id
    is_pad = tokens[:, 0] == (lm.bos_id if pad_id is None else pad_id)
    if pad_id is None or pad_id == lm.bos_id:
        is_pad &= (tokens[:, :2] == lm.bos_id).all(1)
    padded = is_pad & (tokens != tokens[:, :1]).any(1)  # BOS alone, or after itself, is a prompt
    if bool(padded.any()):
        raise InputError(
            f"prompt {int(padded.nonzero()[0])} opens with padding, or with BOS twice: attribution has no mask; "
            "give prompts of one length, or one at a time"
        )
