"""Presets: everything that a run of the notebooks depends on, in one YAML file each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from tclib.dictionaries.dictionary import TAKES_K, Activation, Kind
from tclib.greater_than.task import PAPER_TEMPLATE
from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError
from tclib.support.files import PRESETS, default_runs
from tclib.support.steps import Step
from tclib.text.corpus import CorpusConfig
from tclib.training.gradients import Loss
from tclib.training.spec import DictionarySpec, TrainingConfig

_STRICT = ConfigDict(extra="forbid")  # a misspelt key is an error


@dataclass(frozen=True)
class TranscodersConfig:
    """Notebook 01: one transcoder a layer."""

    __pydantic_config__ = _STRICT

    layers: tuple[int, ...] | None = None  # None: all
    published: str = ""  # hub, or a folder: the paper's released transcoders instead of training
    activation: Activation = "relu"
    expansion: int = 32
    l1_coefficient: float = 0.0
    l0_coefficient: float = 0.0
    k: int | None = None
    skip: bool = False
    initial_norm: float = 0.0
    loss: Loss = "authors"
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def specs(self, lm: LanguageModel) -> list[DictionarySpec]:
        """The dictionaries to train. Errors: `InputError` for a layer out of range."""
        layers = range(lm.n_layers) if self.layers is None else self.layers
        return [
            DictionarySpec(
                kind="transcoder",
                layer=lm.check_layer(layer),
                activation=self.activation,
                expansion=self.expansion,
                l1_coefficient=self.l1_coefficient,
                l0_coefficient=self.l0_coefficient,
                k=self.k,
                skip=self.skip,
                initial_norm=self.initial_norm,
                loss=self.loss,
            )
            for layer in layers
        ]


@dataclass(frozen=True)
class DictionaryFamily:
    """Dictionaries that differ only in sparsity: λ for relu, λ₀ for jumprelu, k for the others."""

    __pydantic_config__ = _STRICT

    kind: Kind
    sparsities: tuple[float, ...]
    activation: Activation = "relu"
    skip: bool = False
    bandwidth: float = 1.0  # of jumprelu
    initial_norm: float = 0.0

    def specs(self, layer: int, expansion: int, loss: Loss) -> list[DictionarySpec]:
        """One dictionary a sparsity."""
        return [
            DictionarySpec(
                kind=self.kind,
                layer=layer,
                activation=self.activation,
                expansion=expansion,
                l1_coefficient=value if self.activation == "relu" else 0.0,
                l0_coefficient=value if self.activation == "jumprelu" else 0.0,
                bandwidth=self.bandwidth,
                k=int(value) if self.activation in TAKES_K else None,
                loss=loss,
                skip=self.skip,
                initial_norm=self.initial_norm,
            )
            for value in self.sparsities
        ]


@dataclass(frozen=True)
class SweepConfig:
    """Notebook 02: dictionaries of one layer at several sparsities (paper Figure 3).

    The first family of transcoders and the first of SAEs are compared with each other; relu ones are
    given by their λ alone, other kinds as `families`.
    """

    __pydantic_config__ = _STRICT

    layer: int
    transcoder_l1: tuple[float, ...] = ()
    sae_mlp_out_l1: tuple[float, ...] = ()
    families: tuple[DictionaryFamily, ...] = ()
    expansion: int = 32
    loss: Loss = "authors"
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def specs(self) -> list[DictionarySpec]:
        """The dictionaries to train, transcoders first."""
        relu = (
            DictionaryFamily("transcoder", self.transcoder_l1),
            DictionaryFamily("sae_mlp_out", self.sae_mlp_out_l1),
        )
        found: list[DictionarySpec] = []
        for family in (*relu, *self.families):
            found += family.specs(self.layer, self.expansion, self.loss)
        return found


@dataclass(frozen=True)
class CircuitsConfig:
    """Notebook 03: which prompt, and how many features the comparisons draw."""

    __pydantic_config__ = _STRICT

    year: int = 35  # in the prompt; the root is the mean later answer minus the mean earlier
    n_connection_features: int = 12  # a pair of layers
    n_connection_rows: int = 128
    min_log10_frequency: float = -4.0  # of the features drawn; higher where there are few rows
    n_ablations: int = 200


@dataclass(frozen=True)
class GreaterThanConfig:
    """Notebook 06: the sentences, what to analyse (found where null), SAEs to compare with."""

    __pydantic_config__ = _STRICT

    templates: tuple[str, ...] = (PAPER_TEMPLATE,)
    layer: int | None = None  # of the MLP; null: the one above layer 0 that costs most when ablated
    head: tuple[int, int] | None = None  # null: the one that brings the year to its features
    sae_l1: tuple[float, ...] = ()  # SAEs on mlp_out; the one nearest in L0 is shown
    sae_k: tuple[int, ...] = ()  # as many topk ones
    sae_learning_rate: float | None = None  # null: the transcoders'; mlp_out may be far larger
    components_every: int = 1  # ablate components on every how manieth prompt; 1: on all

    def sae_specs(self, layer: int, transcoders: TranscodersConfig) -> list[DictionarySpec]:
        """SAEs as wide as the transcoders."""
        families = (
            DictionaryFamily("sae_mlp_out", self.sae_l1),
            DictionaryFamily(
                "sae_mlp_out", self.sae_k, "topk", initial_norm=transcoders.initial_norm
            ),
        )
        found: list[DictionarySpec] = []
        for family in families:
            found += family.specs(layer, transcoders.expansion, transcoders.loss)
        return found


@dataclass(frozen=True)
class CaseStudiesConfig:
    """Notebook 04: which features are studied blind, and on how much text."""

    __pydantic_config__ = _STRICT

    layer: int | None = None  # null: that of the sweep
    features: tuple[int, ...] = ()  # empty: drawn by seed from the live ones
    n_full: int = 2
    n_restricted: int = 7
    n_rows: int = 512  # of the hidden corpus, from the training split
    min_log10_frequency: float = -4.0  # of what is drawn; on little text a handful of tokens
    n_held_out_rows: int = 256


@dataclass(frozen=True)
class ComparisonConfig:
    """Notebook 05: how many features of each kind are drawn, from the sweep's dictionaries."""

    __pydantic_config__ = _STRICT

    n_features: int = 50
    near_l0: float | None = None  # of the pair that is compared; null: the pair nearest in L0
    n_rows: int = 512  # of the training split: dashboards and predicates
    n_held_out_rows: int = 256
    min_log10_frequency: float = -4.0


@dataclass(frozen=True)
class Preset:
    """A whole run: model, corpus, what the notebooks make, and where it all goes."""

    __pydantic_config__ = _STRICT

    name: str
    description: str
    model: str
    corpus: CorpusConfig
    transcoders: TranscodersConfig
    sweep: SweepConfig = field(default_factory=lambda: SweepConfig(layer=0))
    circuits: CircuitsConfig = field(default_factory=CircuitsConfig)
    greater_than: GreaterThanConfig = field(default_factory=GreaterThanConfig)
    case_studies: CaseStudiesConfig = field(default_factory=CaseStudiesConfig)
    comparison: ComparisonConfig = field(default_factory=ComparisonConfig)
    skipped: Mapping[str, str] = field(default_factory=dict)  # notebook number: why
    n_evaluation_rows: int | None = None  # over which losses are measured; null: all held-out rows
    companions: tuple[str, ...] = ()  # presets whose sweep notebook 02 draws beside this one's
    seed: int = 42
    runs_dir: Path = field(default_factory=default_runs)

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.name

    def step(self, name: str) -> Step:
        """Where step `name` of this run lives."""
        return Step(self.name, name, self.folder / name)


def preset_names() -> list[str]:
    """The presets that notebooks/presets holds."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(name: str, seed: int | None = None, runs_dir: str | Path | None = None) -> Preset:
    """Read and check a preset; `seed`, where given, acts on the corpus and on all training.

    A run with another seed than the preset's own has a folder of its own, `<name>-seed<seed>`.
    Errors: `InputError` for an unknown preset, an unknown key or a value out of range.
    """
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        raise InputError(f"unknown preset {name!r}: expected one of {', '.join(preset_names())}")
    preset = _parse(yaml.safe_load(path.read_text()), name)
    if seed is not None and seed != preset.seed:
        preset = replace(preset, seed=seed, name=f"{name}-seed{seed}")
    if runs_dir:
        preset = replace(preset, runs_dir=Path(runs_dir).expanduser().resolve())
    return _seeded(preset)


def _parse(values: dict[str, Any], name: str) -> Preset:
    try:
        return TypeAdapter(Preset).validate_python({"name": name, **values})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"preset {name!r}, {where}: {first['msg']}") from error


def _seeded(preset: Preset) -> Preset:
    """The preset with its one seed handed to everything that draws."""
    transcoders, sweep = preset.transcoders, preset.sweep
    return replace(
        preset,
        corpus=replace(preset.corpus, seed=preset.seed),
        transcoders=replace(transcoders, training=replace(transcoders.training, seed=preset.seed)),
        sweep=replace(sweep, training=replace(sweep.training, seed=preset.seed)),
    )
