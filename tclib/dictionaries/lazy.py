"""Dictionaries whose encoder and decoder stay in their file: rows are read where features are active.

The file is mapped into memory, in the type that it has: of a set of 160 GB a prompt touches the encoders, a piece at
a time, and the decoder rows of its active features. Numbers are those of the same dictionary read whole.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig
from tclib.models.architectures import Norm
from tclib.support.checked import checked
from tclib.support.errors import InputError
from tclib.support.torch_types import Device, FloatType

FEATURES_AT_ONCE = 8192  # of an encoder in float32: 64 MB at d_model 2,048


class MappedRows:
    """A row a feature, in float32 as they are asked for, of a matrix that stays in its file.

    Args:
        where: its file, for messages.
        held: the mapped matrix, [feature, d], or [d, feature] `by_column`.
        by_column: how it lies in the file.
        scale: what every row is multiplied by.
    """

    def __init__(
        self,
        where: Path,
        held: Tensor,
        by_column: bool = False,
        scale: Float[Tensor, "d"] | None = None,
    ) -> None:
        self.where, self.held, self.by_column, self.scale = where, held, by_column, scale
        self._kept: tuple[Int[Tensor, "kept"], Float[Tensor, "kept d"]] | None = None

    def rows(self, features: Tensor | slice | int) -> Float[Tensor, "*feature d"]:
        """The rows of features; those that are kept are not read again."""
        if self._kept is not None and isinstance(features, Tensor):
            known, rows = self._kept
            place = torch.searchsorted(known, features).clamp_max(len(known) - 1)
            if bool((known[place] == features).all()):
                return rows[place]
        return self._read(features)

    def _read(self, features: Tensor | slice | int) -> Tensor:
        found = self.held[:, features].T if self.by_column else self.held[features]
        found = found.float().contiguous()
        if not bool(found.isfinite().all()):
            raise InputError(
                f"{self.where}: rows that are NaN or infinite: expected finite weights; download it again"
            )
        return found if self.scale is None else found * self.scale

    def keep(self, features: Int[Tensor, "feature"]) -> None:
        """Read the rows of these features, and keep them."""
        known = features.unique()
        self._kept = (known, self._read(known)) if len(known) else None

    def scaled(self, scale: Float[Tensor, "d"]) -> MappedRows:
        """The same rows times `scale`, as it is now."""
        own = scale.detach().to("cpu", torch.float32, copy=True)
        both = own if self.scale is None else own * self.scale
        return MappedRows(self.where, self.held, self.by_column, both)


class LazyDictionary(Dictionary):
    """A dictionary of which only biases, thresholds and the skip are in memory.

    W_enc and W_dec are read whole whenever they are asked for by name; `encode`, `decode` and the rows of features
    read what they need. It computes in float32 on the CPU; anywhere else `to` reads it whole.
    """

    def __init__(
        self,
        config: DictionaryConfig,
        encoder: MappedRows,
        b_enc: Float[Tensor, "n_features"],
        decoder: MappedRows,
        b_dec: Float[Tensor, "d_out"],
        W_skip: Float[Tensor, "d_in d_out"] | None = None,
        threshold: Float[Tensor, "n_features"] | None = None,
    ) -> None:
        self.config = config
        self._encoder, self._decoder = encoder, decoder
        self.b_enc, self.b_dec, self.W_skip, self.threshold = b_enc, b_dec, W_skip, threshold
        self.check_finite()
        self._check_threshold()

    @property
    def W_enc(self) -> Float[Tensor, "d_in n_features"]:  # type: ignore[override]
        """The whole encoder, read now."""
        return self._encoder.rows(slice(None)).T

    @property
    def W_dec(self) -> Float[Tensor, "n_features d_out"]:  # type: ignore[override]
        """The whole decoder, read now."""
        return self._decoder.rows(slice(None))

    def encoder_rows(self, features: Tensor | int) -> Float[Tensor, "*feature d_in"]:
        """Encoder directions, a row a feature."""
        return self._encoder.rows(features)

    def decoder_rows(self, features: Tensor | int) -> Float[Tensor, "*feature d_out"]:
        """Decoder directions, a row a feature."""
        return self._decoder.rows(features)

    def keep(self, features: Int[Tensor, "feature"]) -> None:
        """Read both directions of these features, and keep them in place of those kept before."""
        self._encoder.keep(features)
        self._decoder.keep(features)

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch n_features"]:
        """Pre = x W_enc + b_enc, some thousand features at a time. Errors: as `Dictionary`'s, and for rows not finite."""
        self._check_given("input", x, self.config.d_in)
        flat, n_features = x.reshape(-1, x.shape[-1]), self.config.n_features
        pieces = [
            slice(start, start + FEATURES_AT_ONCE)
            for start in range(0, n_features, FEATURES_AT_ONCE)
        ]
        if torch.is_grad_enabled() and x.requires_grad:
            pre = torch.cat([flat @ self._encoder.rows(some).T for some in pieces], 1) + self.b_enc
        else:
            pre = self.b_enc.expand(len(flat), -1).clone()
            for some in pieces:
                pre[:, some] += flat @ self._encoder.rows(some).T
        return pre.view(*x.shape[:-1], n_features)

    def _decoded(
        self, feature_acts: Float[Tensor, "*batch n_features"]
    ) -> Float[Tensor, "*batch d_out"]:
        is_active = (feature_acts != 0).reshape(-1, self.config.n_features)
        active = is_active.any(0).nonzero()[:, 0]
        return feature_acts[..., active] @ self._decoder.rows(active)

    @checked
    def to(self, device: Device | None = None, dtype: FloatType | None = None) -> Dictionary:
        """Itself in float32 on the CPU; anywhere else it is read whole."""
        is_here = device is None or torch.device(device).type == "cpu"
        if is_here and dtype in (None, torch.float32):
            return self
        return self.whole().to(device, dtype)

    def whole(self) -> Dictionary:
        """The same in memory."""
        return Dictionary(self.config, **self.parameters())

    def check_finite(self) -> None:
        """Raise `InputError` for biases, thresholds or a skip that are NaN or infinite; the rest as it is read."""
        held = {"b_enc": self.b_enc, "b_dec": self.b_dec}
        optional = {"W_skip": self.W_skip, "threshold": self.threshold}
        self._check_all_finite(held | {n: t for n, t in optional.items() if t is not None})

    def held(self) -> list[Tensor]:
        """What is in memory, and what is mapped."""
        small = (self.b_enc, self.b_dec, self.W_skip, self.threshold)
        return [self._encoder.held, self._decoder.held, *(t for t in small if t is not None)]

    def renamed(self, config: DictionaryConfig) -> LazyDictionary:
        made = copy.copy(self)
        made.config = config
        return made

    def with_gain(self, norm: Norm) -> LazyDictionary:
        """A raw-basis dictionary in the processed basis, of a norm that does not centre and has no bias."""
        made = self.renamed(replace(self.config, basis="processed"))
        made._encoder = self._encoder.scaled(norm.gain)
        gain = norm.gain.detach().to(self.b_dec)
        made.W_skip = None if self.W_skip is None else gain[:, None] * self.W_skip
        return made
