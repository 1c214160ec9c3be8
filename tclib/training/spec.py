"""The one declaration of every hyperparameter of a dictionary and of its training.

Presets and the command line take theirs from here; nothing here imports torch, so that they can do
so at once. "Published" is the code and the checkpoints that came with the paper (arXiv 2406.11944).
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal

from tclib.dictionaries.kinds import TAKES_K, Activation, Kind
from tclib.support.declared import Count, Natural, NonNegative, Positive, Seed, declared
from tclib.support.errors import InputError

if TYPE_CHECKING:
    from tclib.dictionaries.dictionary import DictionaryConfig
    from tclib.models.language_model import LanguageModel

Loss = Literal["paper", "authors"]


@declared(frozen=True)
class Recipe:
    """A dictionary's width, its sparsity and what it is asked to minimise: all but its place."""

    activation: Activation = "relu"
    """What keeps features sparse: `relu` with λ (the paper's), `topk` and `batch_topk` with k,
    `jumprelu` with λ₀."""
    expansion: Count = 32
    """Features over d_model. Paper: 32."""
    l1_coefficient: NonNegative = 0.0
    """λ, the price of the summed activations of a token, in the units of `loss`. Published: 1e-5 to
    2.5e-4, with the loss `authors`."""
    l0_coefficient: NonNegative = 0.0
    """λ₀, the price of an active feature of a token, for jumprelu alone. Not in the paper."""
    bandwidth: Positive = 1.0
    """ε of jumprelu's straight-through gradient, in units of pre-activations. Not in the paper."""
    k: Count | None = None
    """Active features a token, for topk; on average, for batch_topk. Not in the paper."""
    loss: Loss = "paper"
    """The squared error of a token: `paper` as it is (Eq. 5), `authors` over d_out times the output's
    norm, as the published code has it."""
    skip: bool = False
    """Add a linear path from input to output. Paper: none."""
    initial_norm: NonNegative = 0.0
    """Norm of the first reconstruction over the output's, set by scaling the encoder. 0: as the paper
    starts."""
    auxk_coefficient: NonNegative = 0.0
    """Weight of the auxiliary loss by which dead features learn what the others miss. Paper: 0, no AuxK."""
    auxk_k: Count = 64
    """Dead features a token that the auxiliary loss uses. Not in the paper."""
    learning_rate: Positive | None = None
    """Of this dictionary; null: the training's. Paper: one for both kinds, chosen on transcoders."""

    def at(self, kind: Kind, layer: int, **changes: Any) -> DictionarySpec:
        """This recipe, with `changes`, for one dictionary."""
        own = {field.name: getattr(self, field.name) for field in fields(Recipe)}
        return DictionarySpec(kind, layer, **{**own, **changes})


@declared(frozen=True)
class Place:
    """What a dictionary reads and writes."""

    kind: Kind
    """`transcoder` (MLP input to MLP output), or an SAE on either: `sae_mlp_out`, `sae_mlp_in`."""
    layer: Natural
    """Layer of the MLP, from 0. Paper: 8 of GPT-2, 15 of Pythia; all of GPT-2 for circuits."""


@declared(frozen=True)
class DictionarySpec(Recipe, Place):
    """One dictionary to train: its place, then its recipe."""

    n_tokens: Count | None = None
    """Tokens to train this one on, fewer than the training's; its warm-up and decay are as much shorter.
    Null: the training's."""

    def __post_init__(self) -> None:
        if self.activation == "relu" and self.l1_coefficient == 0:
            raise InputError("l1_coefficient 0: a relu dictionary needs λ > 0 to be sparse")
        if (self.activation == "jumprelu") != (self.l0_coefficient > 0):
            raise InputError(
                f"l0_coefficient {self.l0_coefficient} for {self.activation}: jumprelu needs one above "
                "0 to be sparse, the others take none"
            )
        if (self.activation in TAKES_K) != (self.k is not None):
            raise InputError(
                f"k {self.k} for {self.activation}: {' and '.join(TAKES_K)} need one, the others take none"
            )

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
        rate = f"-lr-{self.learning_rate:g}" if self.learning_rate else ""
        tokens = f"-t-{self.n_tokens}" if self.n_tokens else ""
        return f"{self.kind}-L{self.layer}-x{self.expansion}-{sparsity}{skip}{rate}{tokens}"

    @property
    def sparsity(self) -> float:
        """What makes it sparse: λ of relu, λ₀ of jumprelu, k of the others."""
        given = {"relu": self.l1_coefficient, "jumprelu": self.l0_coefficient}
        return float(given.get(self.activation, self.k or 0))

    @property
    def family(self) -> str:
        """What dictionaries that differ only in sparsity share: one curve of Figure 3."""
        activation = "" if self.activation == "relu" else self.activation
        return " ".join(filter(None, (self.kind, "skip" if self.skip else "", activation)))

    def dictionary_config(self, lm: LanguageModel) -> DictionaryConfig:
        """The dictionary's configuration on this model."""
        from tclib.dictionaries.dictionary import DictionaryConfig

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
            model_hash="" if lm.is_rounded else lm.content_hash,
        )


@declared(frozen=True)
class TrainingConfig:
    """How all dictionaries of a run are trained. Defaults are the paper's (Appendix E), or say what theirs was."""

    n_tokens: Count = 60_000_000
    """Tokens to train on; passes over the corpus are repeated as needed. Paper: 60 million."""
    batch_size: Count = 4096
    """Tokens a step. Paper: 4096."""
    learning_rate: Positive = 2e-5
    """Adam's, after the warm-up. Paper: 2e-5 for the sweep; published code for GPT-2: 4e-4."""
    warmup_steps: Natural = 5000
    """Steps over which the learning rate rises from 0. Published: 5000."""
    decay_steps: Natural = 0
    """Steps at the end over which the learning rate falls to 0. Published: 0."""
    seed: Seed = 42
    """Decides first weights and the order of the data. Paper: 42."""
    block_rows: Count = 4096
    """Corpus rows whose tokens are held in memory and shuffled together."""
    rows_per_forward: Count = 32
    """Corpus rows a forward pass of the language model."""
    checkpoint_every_steps: Count = 1000
    """Steps between checkpoints, from which a run that was stopped goes on."""
    log_every_steps: Count = 50
    """Steps between lines of the training log."""
    dead_after_tokens: Natural = 1_000_000
    """Tokens after which a silent feature counts as dead. Published: 5000 steps, 20.48 million."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Of the products of a step, `tf32` on CUDA alone; weights and Adam's state are float32. Published:
    float32."""
    compile: bool = False
    """Compile the training step with torch.compile."""
    cache_activations: bool = False
    """Keep activations on disk, in float16: later passes need no forward pass."""
    track: Literal["none", "wandb", "tensorboard"] = "none"
    """Where the log goes besides training_log.csv."""

    def __post_init__(self) -> None:
        if self.n_tokens < self.batch_size:
            raise InputError(
                f"n_tokens {self.n_tokens}: expected at least one batch, {self.batch_size}"
            )

    @property
    def n_steps(self) -> int:
        return self.n_tokens // self.batch_size

    def of(self, spec: DictionarySpec) -> TrainingConfig:
        """This training with the dictionary's own learning rate and number of tokens.

        Errors: `InputError` for more tokens than the training has, or fewer than a batch.
        """
        n_tokens = spec.n_tokens or self.n_tokens
        if n_tokens > self.n_tokens:
            raise InputError(
                f"n_tokens {n_tokens} of a dictionary: expected at most the training's {self.n_tokens}"
            )
        share = n_tokens / self.n_tokens
        return replace(
            self,
            n_tokens=n_tokens,
            learning_rate=spec.learning_rate or self.learning_rate,
            warmup_steps=round(self.warmup_steps * share),
            decay_steps=round(self.decay_steps * share),
        )

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, constant, linear decay."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay = min(1.0, (self.n_steps - step) / max(1, self.decay_steps))
        return self.learning_rate * warmup * decay
