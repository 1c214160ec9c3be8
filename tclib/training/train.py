"""Train any number of dictionaries side by side from one harvest.

`train` is a loop over batches of shuffled activations; each dictionary takes one Adam step a batch.
A run is a pure function of (model, rows, specs, config): a run that was killed resumes from its
checkpoint and ends in the same file, bit for bit on the CPU, as one that was never killed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from tclib.dictionaries.dictionary import (
    TAKES_K,
    Activation,
    Dictionary,
    DictionaryConfig,
    Kind,
    activate,
    new_dictionary,
)
from tclib.models.language_model import LanguageModel
from tclib.support.progress import progress
from tclib.support.runs import InputError, exclusive, load_tensors, new_file, save_tensors
from tclib.training.activations import ActivationCache, Block, Harvest, needed_sites
from tclib.training.gradients import Loss, Objective, StepResult, step_result
from tclib.training.log import Tracker, open_tracker

CHECKPOINT = "checkpoint.safetensors"
LOG = "training_log.csv"
CACHE = "activations"
THRESHOLD_RATE = 0.01  # a batch's share in batch_topk's running threshold
LOG_COLUMNS = (
    "step",
    "n_tokens",
    "dictionary",
    "loss",
    "l0",
    "fvu",
    "dead_share",
    "tokens_per_s",
)


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


@dataclass(frozen=True)
class Measurement:
    """One line of the training log, for one dictionary."""

    loss: float
    l0: float
    fvu: float
    dead_share: float


class DictionaryTrainer:
    """One dictionary, its Adam state, and how long each feature has been silent."""

    def __init__(
        self, spec: DictionarySpec, dictionary: Dictionary, config: TrainingConfig
    ) -> None:
        self.spec = spec
        self.dictionary = dictionary
        self._config = config
        self._objective = spec.objective()
        # Adam walks the memory of W_enc.T, which is the contiguous one.
        self._stored = {name: _contiguous(t) for name, t in dictionary.parameters().items()}
        self._adam = torch.optim.Adam(self._stored.values(), config.learning_rate, fused=True)
        self.tokens_since_fired = torch.zeros(
            dictionary.config.n_features, dtype=torch.int64, device=dictionary.b_enc.device
        )
        self._step_result = torch.compile(step_result) if config.compile else step_result

    def step(self, block: Block, rows: slice, learning_rate: float) -> StepResult:
        """One Adam step on a slice of the block, then unit-norm decoder rows."""
        x = block[self.dictionary.config.input_site][rows]
        y = block[self.dictionary.config.output_site][rows]
        dead = self.dead if self._objective.auxk_coefficient else None
        with self._autocast():
            result = self._step_result(self.dictionary, x, y, self._objective, dead)
        self._remove_parallel_component(result.gradients)
        for name, gradient in result.gradients.items():
            parameter = self._stored[name]
            parameter.grad = _contiguous(gradient).to(parameter.dtype)
        self._adam.param_groups[0]["lr"] = learning_rate
        self._adam.step()
        self._normalise_decoder()
        self._keep_threshold(result)
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[result.fired] = 0
        return result

    @property
    def dead(self) -> Tensor:
        """Features that have been silent for `dead_after_tokens` or longer."""
        return self.tokens_since_fired >= self._config.dead_after_tokens

    def measure(self, result: StepResult, block: Block, rows: slice) -> Measurement:
        """The log line of a step: its loss, L0 and FVU on its own batch, and the dead share."""
        y = block[self.dictionary.config.output_site][rows]
        total = (y - y.mean(0)).pow(2).sum()
        return Measurement(
            loss=float(result.loss),
            l0=result.l0,
            fvu=float(result.squared_error / total),
            dead_share=float(self.dead.float().mean()),
        )

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        tensors = {f"parameter.{name}": t for name, t in self._stored.items()}
        for name, parameter in self._stored.items():
            for key, value in self._adam.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = value
        return {**tensors, "tokens_since_fired": self.tokens_since_fired}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` returned, in place."""
        self.tokens_since_fired.copy_(tensors["tokens_since_fired"])
        for name, parameter in self._stored.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            prefix = f"adam.{name}."
            self._adam.state[parameter] = {
                key.removeprefix(prefix): value.to(
                    value.device if value.ndim == 0 else parameter.device
                )
                for key, value in tensors.items()
                if key.startswith(prefix)
            }

    def _autocast(self) -> Any:
        if self._config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.dictionary.b_enc.device.type, torch.bfloat16)

    def _remove_parallel_component(self, gradients: dict[str, Tensor]) -> None:
        """Take out of each decoder row's gradient what would only change the row's norm."""
        gradient, W_dec = gradients["W_dec"], self._stored["W_dec"]
        along = torch.linalg.vecdot(gradient, W_dec.to(gradient.dtype)).unsqueeze(1)
        gradient.addcmul_(W_dec.to(gradient.dtype), along, value=-1.0)

    def _keep_threshold(self, result: StepResult) -> None:
        """jumprelu's thresholds stay at 0 or above; batch_topk's is a running mean of the batches'."""
        threshold = self.dictionary.threshold
        if result.threshold is not None and threshold is not None:
            is_first = not bool(threshold.any())
            threshold.lerp_(result.threshold, 1.0 if is_first else THRESHOLD_RATE)
        elif threshold is not None:
            threshold.clamp_(min=0.0)

    def _normalise_decoder(self) -> None:
        W_dec = self._stored["W_dec"]
        W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min_(1e-12))


def _contiguous(tensor: Tensor) -> Tensor:
    """`tensor`, or its transpose where that is the contiguous one."""
    return tensor if tensor.is_contiguous() else tensor.T


# ---------------------------------------------------------------------------------------------
# The run


def train(
    lm: LanguageModel,
    rows: Int[Tensor, "row pos"],
    specs: Sequence[DictionarySpec],
    config: TrainingConfig,
    folder: Path,
    cache_folder: Path | None = None,
) -> list[Dictionary]:
    """Train every spec on the activations of `rows`; write to `folder` and return them.

    Writes one `<spec.name>.safetensors` a dictionary and `training_log.csv`. A folder that holds an
    unfinished run of the same parameters resumes; one that holds the finished run just loads it.
    Cached activations lie in `cache_folder`, by default in `folder`, and stay there for other runs.

    Errors: `InputError` for a layer out of range, a context longer than the model's, two equal
    specs, a folder in use or made with other parameters, a non-finite loss.
    """
    run = _Run(lm, rows, tuple(specs), config, folder, cache_folder or folder / CACHE)
    with exclusive(folder):
        finished = run.load_finished()
        return finished if finished is not None else run.carry_out()


@dataclass
class _Run:
    lm: LanguageModel
    rows: Int[Tensor, "row pos"]
    specs: tuple[DictionarySpec, ...]
    config: TrainingConfig
    folder: Path
    cache_folder: Path
    trainers: list[DictionaryTrainer] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.specs]
        if not names or len(set(names)) < len(names):
            raise InputError(f"dictionaries {names}: expected at least one, and no two the same")
        self._configs = [spec.dictionary_config(self.lm) for spec in self.specs]
        sites = needed_sites((c.input_site, c.output_site) for c in self._configs)
        # No block larger than the run needs, and none smaller than a batch.
        n_ctx = max(1, self.rows.shape[1])
        smallest = math.ceil(self.config.batch_size / n_ctx)
        needed = math.ceil(self.config.n_tokens / n_ctx)
        self.harvest = Harvest(
            self.lm,
            self.rows,
            sites,
            max(smallest, min(self.config.block_rows, needed)),
            self.config.rows_per_forward,
            self.config.seed,
            self._cache(),
        )
        self.steps_per_block = self.harvest.block_tokens // self.config.batch_size

    def _cache(self) -> ActivationCache | None:
        if not self.config.cache_activations:
            return None
        return ActivationCache.of(self.cache_folder, self.lm, self.rows)

    @property
    def fingerprint(self) -> str:
        """Names everything that the result depends on."""
        what = {
            "model": self.lm.name,
            "rows": hashlib.sha256(self.rows.numpy().tobytes()).hexdigest(),
            "specs": [asdict(spec) for spec in self.specs],
            "config": {k: v for k, v in asdict(self.config).items() if k != "track"},
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    @property
    def remedy(self) -> str:
        return f"delete {self.folder} and train again"

    def path(self, spec: DictionarySpec) -> Path:
        return self.folder / f"{spec.name}.safetensors"

    # -- before and after -------------------------------------------------------------------

    def load_finished(self) -> list[Dictionary] | None:
        """The dictionaries of a finished run of these parameters, if the folder holds them."""
        if not all(self.path(spec).exists() for spec in self.specs):
            return None
        for spec in self.specs:
            _, metadata = load_tensors(self.path(spec), self.remedy)
            self._check_fingerprint(self.path(spec), metadata.get("training", {}))
        return [
            Dictionary.load(self.path(spec), self.remedy).to(self.lm.device) for spec in self.specs
        ]

    @torch.no_grad()
    def carry_out(self) -> list[Dictionary]:
        """Train from the start or from the checkpoint, save everything, return the dictionaries."""
        checkpoint = self.folder / CHECKPOINT
        resumed = load_tensors(checkpoint, self.remedy) if checkpoint.exists() else None
        if resumed is not None:
            self._check_fingerprint(checkpoint, resumed[1])
        tracker = open_tracker(self.config.track, self.folder, asdict(self.config))
        if self.harvest.cache is not None:
            self.harvest.cache.fill(self.lm, self.rows, self.harvest.sites)
        try:
            first_block = self.harvest.block(0) if resumed is None else None
            self._make_trainers(first_block)
            start = 0 if resumed is None else self._restore(*resumed)
            del resumed
            blocks = _BlockHolder(self.harvest, first_block)
            del first_block  # the holder frees it
            self._loop(start, tracker, blocks)
        finally:
            tracker.close()
        return self._save_finished(checkpoint)

    def _check_fingerprint(self, path: Path, metadata: dict[str, Any]) -> None:
        if metadata.get("fingerprint") != self.fingerprint:
            raise InputError(
                f"{path} was made with other parameters, model or corpus: "
                f"choose another folder, or {self.remedy}"
            )

    def _make_trainers(self, first_block: Block | None) -> None:
        for spec, config in zip(self.specs, self._configs, strict=True):
            means: list[Tensor | None] = [None, None]
            if first_block is not None:
                means = [first_block[s].mean(0) for s in (config.input_site, config.output_site)]
            dictionary = new_dictionary(config, _init_generator(self.config.seed, config), *means)
            if first_block is not None and spec.initial_norm > 0:
                dictionary = _scaled(dictionary, spec, first_block, self.config.batch_size)
            self.trainers.append(
                DictionaryTrainer(spec, dictionary.to(self.lm.device), self.config)
            )

    def _save_finished(self, checkpoint: Path) -> list[Dictionary]:
        for trainer in self.trainers:
            training = {
                "fingerprint": self.fingerprint,
                "spec": asdict(trainer.spec),
                "config": asdict(self.config),
            }
            trainer.dictionary.save(self.path(trainer.spec), training)
        checkpoint.unlink(missing_ok=True)
        return [trainer.dictionary for trainer in self.trainers]

    # -- the loop ---------------------------------------------------------------------------

    def _loop(self, start: int, tracker: Tracker, blocks: _BlockHolder) -> None:
        meter = _Meter()
        bar = progress(
            range(start, self.config.n_steps),
            f"training {len(self.specs)} on {self.lm.name}",
            initial=start,
            total=self.config.n_steps,
            unit="step",
        )
        for step in bar:
            block, rows = blocks.get(step // self.steps_per_block), self._batch(step)
            results = [self._step(trainer, block, rows, step) for trainer in self.trainers]
            checkpoint_due = (step + 1) % self.config.checkpoint_every_steps == 0
            last = step + 1 == self.config.n_steps
            if checkpoint_due or last or (step + 1) % self.config.log_every_steps == 0:
                self._report(step, results, block, rows, meter, tracker, bar)
            if checkpoint_due and not last:
                self._checkpoint(step + 1)
            del block  # or the next block would be made while this one is still held

    def _batch(self, step: int) -> slice:
        start = (step % self.steps_per_block) * self.config.batch_size
        return slice(start, start + self.config.batch_size)

    def _step(self, trainer: DictionaryTrainer, block: Block, rows: slice, step: int) -> StepResult:
        return trainer.step(block, rows, self.config.learning_rate_at(step))

    def _report(
        self,
        step: int,
        results: list[StepResult],
        block: Block,
        rows: slice,
        meter: _Meter,
        tracker: Tracker,
        bar: Any,
    ) -> None:
        """Measure, stop if the loss is not finite, and tell the log, the tracker and the bar."""
        measured = {
            trainer.spec.name: trainer.measure(result, block, rows)
            for trainer, result in zip(self.trainers, results, strict=True)
        }
        for name, line in measured.items():
            if not math.isfinite(line.loss):
                raise InputError(
                    f"{name}: loss {line.loss} at step {step + 1}; stopped, the last good checkpoint "
                    f"in {self.folder} is kept: lower learning_rate or λ"
                )
        n_tokens = (step + 1) * self.config.batch_size
        speed = meter.tokens_per_s(n_tokens)
        _append_log(self.folder / LOG, step + 1, n_tokens, measured, speed)
        tracker.log(step + 1, {name: asdict(line) for name, line in measured.items()})
        lines = list(measured.values())
        bar.set_postfix(
            loss=f"{_mean(line.loss for line in lines):.3g}",
            L0=f"{_mean(line.l0 for line in lines):.1f}",
            FVU=f"{_mean(line.fvu for line in lines):.3f}",
            dead=f"{_mean(line.dead_share for line in lines):.0%}",
            tok_s=f"{speed:,.0f}",
            refresh=False,
        )

    def _checkpoint(self, step: int) -> None:
        tensors = {
            f"{trainer.spec.name}/{key}": value
            for trainer in self.trainers
            for key, value in trainer.state().items()
        }
        save_tensors(
            self.folder / CHECKPOINT, tensors, {"fingerprint": self.fingerprint, "step": step}
        )

    def _restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> int:
        """Load a checkpoint into the trainers, cut the log back to it, return its step."""
        for trainer in self.trainers:
            prefix = f"{trainer.spec.name}/"
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            trainer.load_state(own)
        _truncate_log(self.folder / LOG, metadata["step"])
        return int(metadata["step"])


class _BlockHolder:
    """The one block that is in memory: an old one is freed before the next is made."""

    def __init__(self, harvest: Harvest, first_block: Block | None) -> None:
        self._harvest = harvest
        self._block = first_block
        self._block_idx = 0 if first_block is not None else -1

    def get(self, block_idx: int) -> Block:
        if block_idx != self._block_idx or self._block is None:
            self._block = None
            self._block = self._harvest.block(block_idx)
            self._block_idx = block_idx
        return self._block


class _Meter:
    """Tokens a second since the run (or its resumption) began."""

    def __init__(self) -> None:
        self._began: float = time.perf_counter()
        self._first_tokens: int | None = None

    def tokens_per_s(self, n_tokens: int) -> float:
        now = time.perf_counter()
        if self._first_tokens is None:
            self._first_tokens, self._began = n_tokens, now
            return math.nan
        return (n_tokens - self._first_tokens) / max(now - self._began, 1e-9)


def _scaled(
    dictionary: Dictionary, spec: DictionarySpec, block: Block, n_tokens: int
) -> Dictionary:
    """The encoder times what gives the first reconstruction `initial_norm` times the output's norm.

    With outputs of norm 100 and the paper's start, features that are late to grow never win a place
    among the k largest: over half of them die.
    """
    config = dictionary.config
    x = block[config.input_site][:n_tokens].cpu()
    y = block[config.output_site][:n_tokens].cpu() - dictionary.b_dec
    pre = dictionary.pre_acts(x)
    z = activate(pre, config.k if config.activation in TAKES_K else None)
    wanted = spec.initial_norm * y.norm(dim=1).median()
    scale = float(wanted / (z @ dictionary.W_dec).norm(dim=1).median().clamp_min(1e-12))
    tensors = dictionary.parameters()
    scaled = {name: tensors[name] * scale for name in ("W_enc", "b_enc")}
    return Dictionary(config, **{**tensors, **scaled})


def _init_generator(seed: int, config: DictionaryConfig) -> torch.Generator:
    """The initial weights depend on the seed, the kind and the layer, not on the company."""
    digest = hashlib.sha256(f"{seed} {config.kind} {config.layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


# ---------------------------------------------------------------------------------------------
# The log


def _append_log(
    path: Path, step: int, n_tokens: int, measured: dict[str, Measurement], speed: float
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(LOG_COLUMNS)
        for name, line in measured.items():
            writer.writerow([step, n_tokens, name, *asdict(line).values(), round(speed, 1)])


def _truncate_log(path: Path, step: int) -> None:
    """Keep the lines up to `step`: what was logged after the checkpoint will be logged again."""
    if not path.exists():
        return
    with open(path, newline="") as file:
        kept = [row for row in csv.reader(file) if row[:1] == ["step"] or int(row[0]) <= step]
    with new_file(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows(kept)
