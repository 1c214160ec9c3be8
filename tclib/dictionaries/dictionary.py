"""Sparse dictionaries: transcoders and sparse autoencoders (paper Section 3.1, Eqs. 3 to 5).

    pre = x W_enc + b_enc               W_enc [d_in, n_features]   b_enc [n_features]
    z   = act(pre)                      relu; topk: the k largest of relu(pre) at each token;
                                        jumprelu: pre where pre > θ [n_features], else 0;
                                        batch_topk: as jumprelu once trained, one θ for all features
    ŷ   = z W_dec + b_dec (+ x W_skip)  W_dec [n_features, d_out]  b_dec [d_out]   W_skip [d_in, d_out]

A transcoder maps mlp_in to mlp_out; a sparse autoencoder (SAE) maps mlp_out, or mlp_in, to itself.
Both sites are in the processed basis of `models.weights`. The encoder direction of feature i is column i of
W_enc, its decoder direction row i of W_dec.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.dictionaries.kinds import TAKES_K, TAKES_THRESHOLD, Activation, Kind
from tclib.models.identity import names_differ
from tclib.models.language_model import LanguageModel
from tclib.models.running import Site
from tclib.support.checked import checked
from tclib.support.declared import Count, Natural, declared, parse, shown, whole
from tclib.support.errors import InputError
from tclib.support.files import load_tensors, save_tensors
from tclib.support.torch_types import Device, FloatType

Basis = Literal["processed", "raw", "stream"]
Hook = Callable[..., Tensor | None]  # of TransformerLens: activations and the point itself
FILE_FORMAT = "tclib-dictionary-1"
FEW_TOKENS = 64


@declared(frozen=True)
class DictionaryConfig:
    """What a dictionary is: where it sits, how wide it is, how it is kept sparse."""

    kind: Kind
    layer: Natural
    d_in: Count
    d_out: Count
    n_features: Count
    activation: Activation = "relu"
    k: Count | None = None  # active features a token: topk; on average: batch_topk
    skip: bool = False  # linear path from input to output
    model: str = ""  # the language model that it was trained on
    basis: Basis = "processed"  # of mlp_in and mlp_out; raw: norm gain left in, output not centred; stream: resid_mid
    model_hash: str = ""  # the model's `known_hash`; empty where there is none

    def __post_init__(self) -> None:
        takes_k = self.activation in TAKES_K
        if takes_k and not 1 <= (self.k or 0) <= self.n_features:
            raise InputError(
                f"k {self.k}: {self.activation} expects 1 to n_features = {self.n_features}"
            )
        if not takes_k and self.k is not None:
            raise InputError(f"k {self.k}: only activations {' and '.join(TAKES_K)} take a k")
        if self.kind != "transcoder" and self.d_in != self.d_out:
            raise InputError(
                f"an SAE maps a site to itself, but d_in {self.d_in} ≠ d_out {self.d_out}"
            )
        if self.reads_stream and self.kind != "transcoder":
            raise InputError(f"basis stream: only a transcoder reads resid_mid, not an {self.kind}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight, by name."""
        expected: dict[str, tuple[int, ...]] = {
            "W_enc": (self.d_in, self.n_features),
            "b_enc": (self.n_features,),
            "W_dec": (self.n_features, self.d_out),
            "b_dec": (self.d_out,),
        }
        if self.skip:
            expected["W_skip"] = (self.d_in, self.d_out)
        if self.activation in TAKES_THRESHOLD:
            expected["threshold"] = (self.n_features,)
        return expected

    @property
    def reads_stream(self) -> bool:
        """Whether it reads the stream in front of the MLP's norm, resid_mid."""
        return self.basis == "stream"

    @property
    def input_site(self) -> Site:
        if self.reads_stream:
            return Site("resid_mid", self.layer)
        return Site("mlp_out" if self.kind == "sae_mlp_out" else "mlp_in", self.layer)

    @property
    def output_site(self) -> Site:
        return Site("mlp_in" if self.kind == "sae_mlp_in" else "mlp_out", self.layer)


class DictionaryOutput(NamedTuple):
    """ŷ and z of one forward pass."""

    reconstruction: Float[Tensor, "*batch d_out"]
    feature_acts: Float[Tensor, "*batch n_features"]


class Dictionary:
    """A transcoder or an SAE: its configuration and its weights.

    W_enc is kept so that W_enc.T is contiguous: features are gathered by row far more often than
    columns are.
    """

    @checked
    def __init__(
        self,
        config: DictionaryConfig,
        W_enc: Float[Tensor, "d_in n_features"],
        b_enc: Float[Tensor, "n_features"],
        W_dec: Float[Tensor, "n_features d_out"],
        b_dec: Float[Tensor, "d_out"],
        W_skip: Float[Tensor, "d_in d_out"] | None = None,
        threshold: Float[Tensor, "n_features"] | None = None,
    ) -> None:
        self.config = config
        self.W_enc = W_enc.T.contiguous().T
        self.b_enc = b_enc
        self.W_dec = W_dec.contiguous()
        self.b_dec = b_dec
        self.W_skip = W_skip
        self.threshold = threshold
        found = {name: tuple(tensor.shape) for name, tensor in self.parameters().items()}
        if found != config.shapes():
            raise InputError(
                f"weights of shapes {found}, but the configuration expects {config.shapes()}"
            )
        types = sorted({str(tensor.dtype) for tensor in self.parameters().values()})
        if len(types) > 1:
            raise InputError(
                f"weights of {' and '.join(types)}: expected all of one floating-point type"
            )
        self.check_finite()
        self._check_threshold()

    def _check_threshold(self) -> None:
        if self.threshold is not None and not bool((self.threshold >= 0).all()):
            raise InputError(
                f"threshold {float(self.threshold.min()):.3g}: expected 0 or more, so that activations "
                "are never negative"
            )

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch n_features"]:
        """Pre = x W_enc + b_enc. Errors: `InputError` for another width than d_in, or another type."""
        self._check_given("input", x, self.config.d_in)
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) <= FEW_TOKENS:
            # For one prompt the wide factor goes first: the product is half again as fast on a CPU.
            pre = torch.addmm(self.b_enc[:, None], self.W_enc.T, flat.T).T.contiguous()
        else:
            pre = torch.addmm(self.b_enc, flat, self.W_enc)
        return pre.reshape(*x.shape[:-1], self.config.n_features)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch n_features"]:
        """Z = act(pre), paper Eq. 3."""
        k = self.config.k if self.config.activation == "topk" else None
        return activate(self.pre_acts(x), k, self.threshold)

    def decode(
        self,
        feature_acts: Float[Tensor, "*batch n_features"],
        x: Float[Tensor, "*batch d_in"] | None = None,
    ) -> Float[Tensor, "*batch d_out"]:
        """ŷ = z W_dec + b_dec (+ x W_skip), paper Eq. 4. A skip dictionary needs `x`."""
        self._check_given("features", feature_acts, self.config.n_features)
        reconstruction = self._decoded(feature_acts) + self.b_dec
        if self.W_skip is None:
            return reconstruction
        if x is None:
            raise InputError(
                "a dictionary with a skip connection decodes z and x: pass its input x"
            )
        self._check_given("input", x, self.config.d_in)
        return reconstruction + x @ self.W_skip

    def _decoded(
        self, feature_acts: Float[Tensor, "*batch n_features"]
    ) -> Float[Tensor, "*batch d_out"]:
        return feature_acts @ self.W_dec

    def _check_given(self, what: str, given: Tensor, width: int) -> None:
        dtype = self.b_dec.dtype
        if not isinstance(given, Tensor) or given.dtype != dtype:
            raise InputError(
                f"{what} {shown(given)}: expected a {str(dtype).removeprefix('torch.')} tensor, as the "
                "weights are"
            )
        if given.shape[-1:] != (width,):
            raise InputError(
                f"{what} of width {given.shape[-1] if given.ndim else 'none'}, but this "
                f"{self.config.kind} expects {width}: wrong layer or model?"
            )

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> DictionaryOutput:
        feature_acts = self.encode(x)
        return DictionaryOutput(self.decode(feature_acts, x), feature_acts)

    def hooks(self) -> list[tuple[str, Hook]]:
        """What puts this dictionary into a model of TransformerLens, as `fwd_hooks` of `run_with_hooks`.

        A transcoder stands in for the MLP, an SAE gives its reconstruction of the site. For a bridge in compatibility
        mode, whose sites are the processed ones, of a model with a norm of the MLP's own (ln2): Phi, GPT-J, Command R
        and Falcon 7B have one for both parts, OLMo 2 none. Errors: `InputError` for a dictionary in the raw basis.
        """
        read, write = self._hook_names()
        if read == write:
            # An edited norm's output is not what its MLP then reads there: what enters the MLP is.
            place = f"blocks.{self.config.layer}.mlp.hook_in"
            put_at = place if self.config.kind == "sae_mlp_in" else write
            return [(put_at, lambda x, hook: self(x).reconstruction)]
        held: list[Tensor] = []

        def note(x: Tensor, hook: object) -> None:
            held[:] = [x]

        def put(_mlp_out: Tensor, hook: object) -> Tensor:
            return self(held.pop()).reconstruction

        return [(read, note), (write, put)]

    def as_features(self, found: list[Tensor]) -> list[tuple[str, Hook]]:
        """The `fwd_hooks` that change nothing, and append this dictionary's features of each pass to `found`.

        Errors: `InputError` for a dictionary in the raw basis.
        """
        read, _ = self._hook_names()
        return [(read, lambda x, hook: found.append(self.encode(x)))]

    def _hook_names(self) -> tuple[str, str]:
        if self.config.basis == "raw":
            raise InputError(
                f"the {self.config.kind} of layer {self.config.layer} is in the raw basis, which TransformerLens has "
                "at no hook: take tclib.to_processed(dictionary, lm) first"
            )
        return self.config.input_site.hook_name, self.config.output_site.hook_name

    def encoder_direction(self, feature_idx: int) -> Float[Tensor, "d_in"]:
        """Column `feature_idx` of W_enc. Errors: `InputError` for a feature that does not exist."""
        self.check_features(feature_idx)
        return self.encoder_rows(feature_idx)

    def decoder_direction(self, feature_idx: int) -> Float[Tensor, "d_out"]:
        """Row `feature_idx` of W_dec. Errors: `InputError` for a feature that does not exist."""
        self.check_features(feature_idx)
        return self.decoder_rows(feature_idx)

    def encoder_rows(self, features: Tensor | int) -> Float[Tensor, "*feature d_in"]:
        """Encoder directions, a row a feature."""
        return self.W_enc.T[features]

    def decoder_rows(self, features: Tensor | int) -> Float[Tensor, "*feature d_out"]:
        """Decoder directions, a row a feature."""
        return self.W_dec[features]

    def keep(self, features: Int[Tensor, "feature"]) -> None:
        """Have both directions of these features at hand, where they are not."""

    def parameters(self) -> dict[str, Tensor]:
        """The weights by name."""
        named = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        optional = {"W_skip": self.W_skip, "threshold": self.threshold}
        return named | {name: tensor for name, tensor in optional.items() if tensor is not None}

    @checked
    def to(self, device: Device | None = None, dtype: FloatType | None = None) -> Dictionary:
        """A copy on another device or of another type; itself where it is that already."""
        moved = {name: t.to(device=device, dtype=dtype) for name, t in self.parameters().items()}
        if all(moved[name] is tensor for name, tensor in self.parameters().items()):
            return self  # it is there already: nothing to be checked again
        return Dictionary(self.config, **moved)

    def held(self) -> list[Tensor]:
        """The tensors that it is made of."""
        return list(self.parameters().values())

    def check_model(self, lm: LanguageModel) -> None:
        """Raise `InputError` unless this dictionary is finite, of the model, and in its processed basis.

        Of the model is what `check_origin` takes.
        """
        self.check_origin(lm)
        self.check_finite()
        self.check_basis(lm)

    def check_basis(self, lm: LanguageModel) -> None:
        """Raise `InputError` unless what it reads is a site of the model."""
        if self.config.basis == "raw":
            raise InputError(
                f"the {self.config.kind} of layer {self.config.layer} was trained on unprocessed weights "
                "(norm gain left in, output not centred): take tclib.to_processed(dictionary, lm) first, or `tclib "
                "convert … --basis processed`"
            )
        if self.config.reads_stream and (lm.is_parallel or lm.final_norm.kind == "layer"):
            raise InputError(
                f"the transcoder of layer {self.config.layer} reads the stream between attention and MLP, and {lm.name} "
                + (
                    "runs the two side by side"
                    if lm.is_parallel
                    else "has LayerNorms, of which the processed basis holds no mean"
                )
                + ": expected a model with RMSNorms, one part after the other"
            )

    def check_finite(self) -> None:
        """Raise `InputError` for weights that are NaN or infinite."""
        self._check_all_finite(self.parameters())

    def _check_all_finite(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                n_bad = int((~tensor.isfinite()).sum())
                raise InputError(
                    f"{name} has {n_bad} values that are NaN or infinite: expected finite weights; restore "
                    "the file, or train again with a lower learning rate"
                )

    def check_size(self, lm: LanguageModel) -> None:
        """Raise `InputError` unless the model has this dictionary's layer and width."""
        lm.check_layer(self.config.layer)
        if self.config.d_out != lm.d_model or self.config.d_in != lm.d_model:
            raise InputError(
                f"dictionary of width {self.config.d_in} → {self.config.d_out} for {lm.name}, "
                f"whose d_model is {lm.d_model}: it was trained on {self.config.model or 'another model'}"
            )

    def check_origin(self, lm: LanguageModel) -> None:
        """Raise `InputError` unless this dictionary fits the model's layers, width and weights.

        Where it does not know the hash of its model, names are compared. They are no proof, one model has
        many, so that another one is a warning. So it is for a model in half precision, whose rounded weights
        have a hash of their own.
        """
        self.check_size(lm)
        own, trained_on = self.config.model_hash, self.config.model or "a model without a name"
        what = f"the {self.config.kind} of layer {self.config.layer} was trained on {trained_on}"
        meant = "if that is meant (a fine-tuned copy, say), take dictionary.for_model(lm)"
        known = lm.known_hash if own else ""
        if own and known:
            if own != known:
                raise InputError(
                    f"{what}, whose weights (hash {own[:8]}) are not those of {lm.name} "
                    f"({known[:8]}): load the model that it was trained on; {meant}"
                )
        elif names_differ(self.config.model, lm.known_as):
            warnings.warn(f"{what}, and this is {lm.name}: {meant}", stacklevel=3)

    @checked
    def for_model(self, lm: LanguageModel) -> Dictionary:
        """The same weights as those of a dictionary of `lm`, whatever model they were trained on."""
        return self.renamed(replace(self.config, model=lm.name, model_hash=lm.known_hash))

    def renamed(self, config: DictionaryConfig) -> Dictionary:
        return Dictionary(config, **self.parameters())

    def check_features(self, *features: int) -> None:
        """Raise `InputError` for a feature that this dictionary does not have, or for none at all."""
        last = self.config.n_features - 1
        unknown = [one for one in features if not 0 <= whole("feature", one) <= last]
        if unknown or not features:
            raise InputError(
                f"feature {', '.join(map(str, unknown)) or 'none'} is out of range: "
                f"layer {self.config.layer} has features 0 to {last}"
            )

    @checked
    def save(self, path: Path, training: dict[str, Any] | None = None) -> None:
        """Write one safetensors file; `training` is kept in its header."""
        self.check_finite()
        metadata = {
            "format": FILE_FORMAT,
            "config": asdict(self.config),
            "training": training or {},
        }
        save_tensors(path, self.parameters(), metadata)

    @classmethod
    @checked
    def load(
        cls,
        path: Path,
        remedy: str = "restore it, or train it again; load_dictionary reads other libraries' formats",
        is_checked: bool = False,
    ) -> Dictionary:
        """Read what `save` wrote; `is_checked` as in `load_tensors`.

        Errors: `InputError` if missing, corrupted or of another format.
        """
        tensors, metadata = load_tensors(path, remedy, is_checked)
        if metadata.get("format") != FILE_FORMAT:
            raise InputError(f"{path} does not hold a tclib dictionary: {remedy}")
        config = parse(DictionaryConfig, metadata.get("config"), f"{path}: config")
        wanted = set(config.shapes())
        missing, extra = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
        if missing or extra:
            raise InputError(f"{path}: tensors missing {missing}, not expected {extra}: {remedy}")
        try:
            return cls(config, **tensors)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def activate(
    pre_acts: Float[Tensor, "*batch n_features"],
    k: int | None = None,
    threshold: Float[Tensor, "n_features"] | None = None,
) -> Float[Tensor, "*batch n_features"]:
    """relu(pre), keeping the k largest entries of each token, or those above the threshold, if given."""
    if threshold is not None:
        return torch.where(pre_acts > threshold, pre_acts, 0.0)
    z = pre_acts.relu()
    if k is None:
        return z
    top = topk_features(pre_acts, k)
    return torch.zeros_like(z).scatter_(-1, top.indices, top.acts)


class TopFeatures(NamedTuple):
    """The k strongest features of each token; entries that relu silences stay, with value 0."""

    acts: Float[Tensor, "*batch k"]
    indices: Int[Tensor, "*batch k"]


def topk_features(pre_acts: Float[Tensor, "*batch n_features"], k: int) -> TopFeatures:
    """The k largest of relu(pre) of each token."""
    values, indices = pre_acts.topk(k, dim=-1, sorted=False)
    return TopFeatures(values.relu(), indices)


def new_dictionary(
    config: DictionaryConfig,
    generator: torch.Generator,
    mean_in: Float[Tensor, "d_in"] | None = None,
    mean_out: Float[Tensor, "d_out"] | None = None,
) -> Dictionary:
    """A fresh dictionary, initialised as in the paper's code (paper Appendix E).

    W_enc and W_dec are Kaiming-uniform with fan n_features, decoder rows then get unit norm;
    b_dec is the mean output and b_enc = −mean_in W_enc, the folded form of subtracting the mean
    input; W_skip and the thresholds are zero.
    """
    bound = math.sqrt(6.0 / config.n_features)

    def uniform(n_rows: int, n_columns: int) -> Tensor:
        return (torch.rand(n_rows, n_columns, generator=generator) * 2 - 1) * bound

    W_enc = uniform(config.d_in, config.n_features)
    W_dec = uniform(config.n_features, config.d_out)
    mean_in = torch.zeros(config.d_in) if mean_in is None else mean_in.float().cpu()
    mean_out = torch.zeros(config.d_out) if mean_out is None else mean_out.float().cpu()
    return Dictionary(
        config,
        W_enc,
        -mean_in @ W_enc,
        W_dec / W_dec.norm(dim=1, keepdim=True),
        mean_out.clone(),
        torch.zeros(config.d_in, config.d_out) if config.skip else None,
        torch.zeros(config.n_features) if config.activation in TAKES_THRESHOLD else None,
    )
