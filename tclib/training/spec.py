"""The one declaration of every hyperparameter of a dictionary and of its training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tclib.dictionaries.dictionary import (
    Activation,
    DictionaryConfig,
    Kind,
)
from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError
from tclib.training.gradients import Loss, Objective


@dataclass(frozen=True)
class DictionarySpec:
    """One dictionary to train: what it is and what it is asked to minimise."""

    kind: Kind
    layer: int
    activation: Activation = "relu"
    expansion: int = 32  # n_features over d_model
    l1_coefficient: float = 0.0  # λ, in the units of `loss`
    l0_coefficient: float = 0.0  # λ₀, the price of an active feature, for jumprelu
    bandwidth: float = 1.0  # ε of jumprelu's straight-through gradient, in units of pre-activations
    k: int | None = None  # active features a token, for topk; on average, for batch_topk
    loss: Loss = "paper"
    skip: bool = False
    initial_norm: float = 0.0  # first reconstruction's over the output's; 0: as the paper starts
    auxk_coefficient: float = 0.0  # 0: no auxiliary loss for dead features, as in the paper
    auxk_k: int = 64

    def __post_init__(self) -> None:
        for name in ("l1_coefficient", "l0_coefficient", "initial_norm", "auxk_coefficient"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} {value}: expected a finite number, 0 or more")
        if self.loss not in ("paper", "authors"):
            raise InputError(f"loss {self.loss!r}: expected 'paper' or 'authors'")
        if self.activation == "relu" and self.l1_coefficient == 0:
            raise InputError("l1_coefficient 0: a relu dictionary needs λ > 0 to be sparse")
        if (self.activation == "jumprelu") != (self.l0_coefficient > 0):
            raise InputError(
                f"l0_coefficient {self.l0_coefficient} for {self.activation}: jumprelu needs one above "
                "0 to be sparse, the others take none"
            )
        if not (math.isfinite(self.bandwidth) and self.bandwidth > 0):
            raise InputError(f"bandwidth {self.bandwidth}: expected a finite number above 0")

    @property
    def name(self) -> str:
        """A file name that tells the dictionaries of one run apart."""
        sparsity = {
            "relu": f"l1-{self.l1_coefficient:g}",
            "topk": f"topk-{self.k}",
            "batch_topk": f"batch_topk-{self.k}",
            "jumprelu": f"l0-{self.l0_coefficient:g}",
        }[self.activation]
        skip = "-skip" if self.skip else ""
        return f"{self.kind}-L{self.layer}-x{self.expansion}-{sparsity}{skip}"

    @property
    def sparsity(self) -> float:
        """What makes it sparse: λ of relu, λ₀ of jumprelu, k of the others."""
        given = {"relu": self.l1_coefficient, "jumprelu": self.l0_coefficient}
        return float(given.get(self.activation, self.k or 0))

    @property
    def family(self) -> str:
        """What dictionaries that differ only in sparsity share: one curve of Figure 3."""
        words = [self.kind, "skip" if self.skip else ""]
        words.append(self.activation if self.activation != "relu" else "")
        return " ".join(word for word in words if word)

    def objective(self) -> Objective:
        """What the dictionary minimises."""
        return Objective(
            self.loss,
            self.l1_coefficient,
            self.l0_coefficient,
            self.bandwidth,
            self.auxk_coefficient,
            self.auxk_k,
        )

    def dictionary_config(self, lm: LanguageModel) -> DictionaryConfig:
        """The dictionary's configuration on this model."""
        return DictionaryConfig(
            kind=self.kind,
            layer=lm.check_layer(self.layer),
            d_in=lm.d_model,
            d_out=lm.d_model,
            n_features=self.expansion * lm.d_model,
            activation=self.activation,
            k=self.k,
            skip=self.skip,
            model=lm.name,
        )


@dataclass(frozen=True)
class TrainingConfig:
    """How all dictionaries of a run are trained. Defaults are the paper's (Appendix E)."""

    __pydantic_config__ = {"extra": "forbid"}  # a misspelt key in a preset is an error

    n_tokens: int = 60_000_000
    batch_size: int = 4096  # tokens a step
    learning_rate: float = 2e-5
    warmup_steps: int = 5000  # linear, from 0
    decay_steps: int = 0  # linear, to 0, at the end
    seed: int = 42
    block_rows: int = 4096  # corpus rows whose tokens are shuffled together
    rows_per_forward: int = 32
    checkpoint_every_steps: int = 1000
    log_every_steps: int = 50
    dead_after_tokens: int = 1_000_000  # a feature silent for so long counts as dead
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False  # torch.compile of the training step
    cache_activations: bool = False  # keep them on disk, float16: later passes need no forward
    track: Literal["none", "wandb", "tensorboard"] = "none"

    def __post_init__(self) -> None:
        for name in ("n_tokens", "batch_size", "block_rows", "rows_per_forward"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected at least 1")
        for name in ("checkpoint_every_steps", "log_every_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected at least 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(
                f"learning_rate {self.learning_rate}: expected a finite number above 0"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise InputError(f"precision {self.precision!r}: expected 'float32' or 'bfloat16'")
        if self.n_tokens < self.batch_size:
            raise InputError(
                f"n_tokens {self.n_tokens}: expected at least one batch, {self.batch_size}"
            )

    @property
    def n_steps(self) -> int:
        return self.n_tokens // self.batch_size

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, constant, linear decay."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay = min(1.0, (self.n_steps - step) / max(1, self.decay_steps))
        return self.learning_rate * warmup * decay
