"""Train any number of dictionaries side by side from one harvest.

`train` is a loop over batches of shuffled activations; each dictionary takes one Adam step a batch.
A run is a pure function of (model, rows, specs, config): a run that was killed resumes from its
checkpoint and ends in the same file as one that was never killed: bit for bit, on one CPU with one number
of threads (others sum in another order).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary, new_dictionary
from tclib.models.language_model import LanguageModel
from tclib.support.checked import checked
from tclib.support.errors import InputError
from tclib.support.files import exclusive, load_tensors, save_tensors
from tclib.support.paths import check_folder
from tclib.support.progress import progress
from tclib.training.activations import ActivationCache, Block, Harvest, needed_sites
from tclib.training.gradients import StepResult
from tclib.training.log import LOG, Meter, Tracker, append_log, open_tracker, truncate_log
from tclib.training.spec import DictionarySpec, TrainingConfig
from tclib.training.trainer import DictionaryTrainer, Measurement, init_generator, scaled

CHECKPOINT = "checkpoint.safetensors"
CACHE = "activations"
STRETCH = 2**23  # entries of a batch's activations, for as many steps at a time
UNCOUNTED = ("track", "log_every_steps", "checkpoint_every_steps")  # no weight depends on them


@checked
def train(
    lm: LanguageModel,
    rows: Int[Tensor, "row pos"],
    specs: Sequence[DictionarySpec],
    config: TrainingConfig,
    folder: str | Path,
    cache_folder: str | Path | None = None,
) -> list[Dictionary]:
    """Train every spec on the activations of `rows`; write to `folder` and return them.

    Writes one `<spec.name>.safetensors` a dictionary and `training_log.csv`. A folder that holds an
    unfinished run of the same parameters resumes; one that holds the finished run just loads it.
    Cached activations lie in `cache_folder`, by default in `folder`, and stay there for other runs.

    Errors: `InputError` for a layer out of range, a context longer than the model's, two equal
    specs, a folder in use or made with other parameters, a non-finite loss.
    """
    folder = Path(folder)
    cache_folder = Path(cache_folder or folder / CACHE)
    for place in (folder, cache_folder):
        check_folder(place)
    run = _Run(lm, rows, tuple(specs), config, folder, cache_folder)
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
    _side_by_side: Callable[..., Iterator[Any]] = map

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.specs]
        if not names or len(set(names)) < len(names):
            raise InputError(f"dictionaries {names}: expected at least one, and no two the same")
        for spec in self.specs:
            self.config.of(spec)  # which checks it, before any work
        self._configs = [spec.dictionary_config(self.lm) for spec in self.specs]
        sites = needed_sites((c.input_site, c.output_site) for c in self._configs)
        # No block larger than the run needs, and none smaller than a batch.
        n_ctx, config = max(1, self.rows.shape[1]), self.config
        smallest, needed = (math.ceil(n / n_ctx) for n in (config.batch_size, config.n_tokens))
        block_rows = max(smallest, min(config.block_rows, needed))
        cache = None
        if config.cache_activations:
            cache = ActivationCache.of(self.cache_folder, self.lm, self.rows)
        self.harvest = Harvest(
            self.lm, self.rows, sites, block_rows, config.rows_per_forward, config.seed, cache
        )
        self.steps_per_block = self.harvest.block_tokens // config.batch_size

    @cached_property
    def fingerprint(self) -> str:
        """Names everything that the result depends on."""
        what = {
            "model": self.lm.content_hash,
            "rows": hashlib.sha256(self.rows.numpy().tobytes()).hexdigest(),
            "specs": [asdict(spec) for spec in self.specs],
            "config": {k: v for k, v in asdict(self.config).items() if k not in UNCOUNTED},
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
        there = [spec for spec in self.specs if self.path(spec).exists()]
        for spec in there:
            _, metadata = load_tensors(self.path(spec), self.remedy)
            self._check_fingerprint(self.path(spec), metadata.get("training", {}))
        if len(there) < len(self.specs):
            return None
        self._remove_own_checkpoint()
        return [
            Dictionary.load(self.path(spec), self.remedy).to(self.lm.device) for spec in self.specs
        ]

    def _remove_own_checkpoint(self) -> None:
        """Remove what is left where a kill fell after the last dictionary; another run's stays."""
        checkpoint = self.folder / CHECKPOINT
        with suppress(InputError):  # damaged, or of another run
            if checkpoint.exists():
                self._check_fingerprint(checkpoint, load_tensors(checkpoint, self.remedy)[1])
                checkpoint.unlink()

    @torch.no_grad()
    def carry_out(self) -> list[Dictionary]:
        """Train from the start or from the checkpoint, save everything, return the dictionaries."""
        checkpoint = self.folder / CHECKPOINT
        resumed = load_tensors(checkpoint, self.remedy) if checkpoint.exists() else None
        if resumed is not None:
            self._check_fingerprint(checkpoint, resumed[1])
        start = 0 if resumed is None else int(resumed[1]["step"])
        truncate_log(self.folder / LOG, start, [spec.name for spec in self.specs])
        tracker = open_tracker(self.config.track, self.folder, asdict(self.config))
        if self.harvest.cache is not None:
            self.harvest.cache.fill(self.lm, self.rows, self.harvest.sites)
        try:
            first_block = self.harvest.block(0) if resumed is None else None
            self._make_trainers(first_block)
            if resumed is not None:
                self._restore(resumed[0])
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
            dictionary = new_dictionary(config, init_generator(self.config.seed, config), *means)
            if first_block is not None and spec.initial_norm > 0:
                dictionary = scaled(dictionary, spec, first_block, self.config.batch_size)
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
        meter, n_steps = Meter(), self.config.n_steps
        what = f"training {len(self.specs)} on {self.lm.name}"
        bar = progress(None, what, initial=start, total=n_steps, unit="step")
        step = start
        try:
            with self._workers():
                while step < n_steps:
                    stop = self._next_stop(step)
                    self._take(range(step, stop), blocks, meter, tracker, bar)
                    bar.update(stop - step)
                    step = stop
        except KeyboardInterrupt as stopped:
            every = self.config.checkpoint_every_steps
            kept = max(start, step // every * every)
            then = f"goes on from step {kept}, its last checkpoint" if kept else "begins anew"
            raise KeyboardInterrupt(
                f"stopped at step {step + 1} of {n_steps}: run again, it {then}"
            ) from stopped
        finally:
            bar.close()

    def _next_stop(self, step: int) -> int:
        """Up to where dictionaries step without waiting for each other: a log line, a checkpoint, a block."""
        config = self.config
        every = (config.log_every_steps, config.checkpoint_every_steps, self.steps_per_block)
        widest = max(own.n_features for own in self._configs)
        stretch = max(1, STRETCH // (config.batch_size * widest))
        dues = [(step // n + 1) * n for n in every]
        return min(*dues, step + stretch, config.n_steps)

    @contextmanager
    def _workers(self) -> Iterator[None]:
        """While active, dictionaries take their steps side by side, one core each: fewer threads wait.

        On one core, or a GPU, one after the other. A step by itself does the same either way.
        """
        n_workers = min(torch.get_num_threads(), len(self.trainers))
        if n_workers < 2 or self.lm.device.type != "cpu":
            yield
            return
        with ThreadPoolExecutor(n_workers, initializer=_take_one_core) as pool:
            self._side_by_side = pool.map
            try:
                yield
            finally:
                self._side_by_side = map

    def _take(
        self, steps: range, blocks: _BlockHolder, meter: Meter, tracker: Tracker, bar: Any
    ) -> None:
        """Some steps of every dictionary; a line of the log and a checkpoint where they are due."""
        block, n = blocks.get(steps[0] // self.steps_per_block), self.config.batch_size
        checkpoint_due = steps.stop % self.config.checkpoint_every_steps == 0
        is_last = steps.stop == self.config.n_steps
        log_due = checkpoint_due or is_last or steps.stop % self.config.log_every_steps == 0

        def step_through(trainer: DictionaryTrainer) -> Measurement | None:
            for step in range(steps.start, min(steps.stop, trainer.config.n_steps)):
                first = step % self.steps_per_block * n
                rows = slice(first, first + n)
                result = self._step(trainer, block, rows, step)
                if log_due and step == steps[-1]:
                    return trainer.measure(result, block, rows)
                del result  # it holds a batch's activations, of which one set is in memory
            return None

        lines = list(self._side_by_side(step_through, self.trainers))
        if log_due:
            names = [spec.name for spec in self.specs]
            measured = {name: line for name, line in zip(names, lines, strict=True) if line}
            self._report(steps[-1], measured, meter, tracker, bar)
        if checkpoint_due and not is_last:
            self._checkpoint(steps.stop)

    def _step(self, trainer: DictionaryTrainer, block: Block, rows: slice, step: int) -> StepResult:
        return trainer.step(block, rows, step)

    def _report(
        self,
        step: int,
        measured: dict[str, Measurement],
        meter: Meter,
        tracker: Tracker,
        bar: Any,
    ) -> None:
        """Stop if a loss is not finite; tell the log, the tracker and the bar."""
        for name, line in measured.items():
            if not math.isfinite(line.loss):
                raise InputError(
                    f"{name}: loss {line.loss} at step {step + 1}; stopped, the last good checkpoint "
                    f"in {self.folder} is kept: lower learning_rate or λ"
                )
        n_tokens = (step + 1) * self.config.batch_size
        speed = meter.tokens_per_s(n_tokens)
        append_log(self.folder / LOG, step + 1, n_tokens, measured, speed)
        tracker.log(step + 1, {name: asdict(line) for name, line in measured.items()})
        loss, l0, fvu, dead = map(fmean, zip(*map(astuple, measured.values()), strict=True))
        shown = {"loss": f"{loss:.3g}", "L0": f"{l0:.1f}", "FVU": f"{fvu:.3f}"}
        bar.set_postfix(**shown, dead=f"{dead:.0%}", tok_s=f"{speed:,.0f}", refresh=False)

    def _checkpoint(self, step: int) -> None:
        tensors = {
            f"{trainer.spec.name}/{key}": value
            for trainer in self.trainers
            for key, value in trainer.state().items()
        }
        metadata = {"fingerprint": self.fingerprint, "step": step}
        save_tensors(self.folder / CHECKPOINT, tensors, metadata)

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        """Load a checkpoint into the trainers."""
        for trainer in self.trainers:
            prefix = f"{trainer.spec.name}/"
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            trainer.load_state(own)


def _take_one_core() -> None:
    """In a thread of its own: products are not spread over further threads, nor are gradients kept."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


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
