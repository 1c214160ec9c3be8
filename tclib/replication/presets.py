"""Presets: everything that a run of the notebooks depends on, in one YAML file each."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, field_validator

from tclib.dictionaries.kinds import Kind
from tclib.greater_than.task import PAPER_TEMPLATE, YEARS, check_templates
from tclib.models.language_model import LanguageModel
from tclib.models.locate import NAMED_MODELS
from tclib.replication.preset_checks import check_preset
from tclib.support.checked import checked
from tclib.support.declared import (
    WHOLE,
    Count,
    Name,
    Natural,
    NonPositive,
    Positive,
    Seed,
    Share,
    declared,
    parse,
    shown,
)
from tclib.support.errors import InputError
from tclib.support.files import check_name
from tclib.support.foreign import read_yaml
from tclib.support.paths import check_folder, expanded
from tclib.support.places import PRESETS, default_runs
from tclib.support.steps import Step
from tclib.text.corpus import CorpusConfig
from tclib.training.spec import DictionarySpec, Loss, Recipe, TrainingConfig

SCHEMA = "schema.json"
NOT_IN_FILES = ("name", "asked")  # keys that a preset's file does not have: load_preset gives them


@declared(frozen=True)
class PresetRecipe(Recipe):
    """A recipe as presets give it."""

    loss: Loss = "authors"
    """The squared error of a token: `authors` divides it by d_out times the output's norm, as the
    published code does, and the published λ are in its units; `paper` is Eq. 5."""


@declared(frozen=True)
class TranscodersConfig(PresetRecipe):
    """Notebook 01: one transcoder a layer."""

    layers: tuple[Natural, ...] | None = None
    """Layers that get a transcoder; null: all. Paper: all of GPT-2, 15 of Pythia."""
    published: str = ""
    """`hub` (or its cache), or a folder with the .pt files: the paper's released transcoders instead of
    training."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How they are trained."""

    def __post_init__(self) -> None:
        if self.layers is not None and len(set(self.layers)) < max(1, len(self.layers)):
            raise InputError(
                f"layers {list(self.layers)}: expected different ones, or null for all"
            )
        if not self.published:
            self.at("transcoder", 0)

    def specs(self, lm: LanguageModel) -> list[DictionarySpec]:
        """The dictionaries to train."""
        return [self.at("transcoder", layer) for layer in self.chosen_layers(lm)]

    def chosen_layers(self, lm: LanguageModel) -> list[int]:
        """Layers with a transcoder."""
        return list(range(lm.n_layers) if self.layers is None else self.layers)

    def names(self, lm: LanguageModel) -> list[str]:
        """What the transcoders are called, trained or released."""
        if self.published:
            return [f"transcoder-L{layer}-published" for layer in self.chosen_layers(lm)]
        return [spec.name for spec in self.specs(lm)]


@declared(frozen=True, kw_only=True)
class DictionaryFamily(PresetRecipe):
    """Dictionaries that differ only in sparsity."""

    kind: Kind
    """`transcoder` (MLP input to MLP output), or an SAE on either: `sae_mlp_out`, `sae_mlp_in`."""
    sparsities: tuple[Positive, ...]
    """λ for relu, λ₀ for jumprelu, k for topk and batch_topk: one dictionary each."""

    def specs(self, layer: int) -> list[DictionarySpec]:
        """One dictionary a sparsity."""
        name = {"relu": "l1_coefficient", "jumprelu": "l0_coefficient"}.get(self.activation, "k")
        whole = name == "k" and all(value.is_integer() for value in self.sparsities)
        values = map(int, self.sparsities) if whole else self.sparsities
        return [self.at(self.kind, layer, **{name: value}) for value in values]


@declared(frozen=True, kw_only=True)
class SweepConfig(PresetRecipe):
    """Notebook 02: dictionaries of one layer at several sparsities (paper Figure 3).

    The first family of transcoders and the first of SAEs are compared with each other; relu ones are
    given by their λ alone, other kinds as `families`, which take from here what they do not say.
    """

    layer: Natural
    """Layer of the MLP, from 0. Paper: 8 of GPT-2, 15 of Pythia."""
    transcoder_l1: tuple[Positive, ...] = ()
    """λ of relu transcoders. Published, for Pythia-410M: 2.5e-5 to 7e-5."""
    sae_mlp_out_l1: tuple[Positive, ...] = ()
    """λ of relu SAEs on the MLP's output, with which Figure 3 compares. Published, for Pythia-410M:
    4e-5 to 1e-4."""
    sae_mlp_in_l1: tuple[Positive, ...] = ()
    """λ of relu SAEs on the MLP's input, with which Table 1 compares. Published, for Pythia-410M: 7e-5."""
    families: tuple[DictionaryFamily, ...] = ()
    """Dictionaries of other kinds."""
    learning_rates: Mapping[Kind, Positive] = field(default_factory=dict)
    """Of dictionaries of a kind, where it is not the training's; `tclib rates` chooses them by a rule."""
    token_budgets: tuple[Count, ...] = ()
    """Fewer training tokens at which the middle sparsity of transcoders and of SAEs on the MLP's output
    is trained too: whether training has ended."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How all of them are trained."""

    @field_validator("families", mode="before")
    @classmethod
    def _shared(cls, families: Any, checked: Any) -> Any:
        own = {f.name: checked.data[f.name] for f in fields(Recipe) if f.name in checked.data}
        if not isinstance(families, Sequence):
            return families
        return [{**own, **one} if isinstance(one, Mapping) else one for one in families]

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.specs()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"{', '.join(twice)}: expected each sparsity of a family once")
        for spec in self.specs():
            self.training.of(spec)  # which checks its tokens

    def specs(self) -> list[DictionarySpec]:
        """The dictionaries to train, transcoders first, then those on fewer tokens."""
        found = self.full_specs()
        middle = [self.middle(found, kind) for kind in ("transcoder", "sae_mlp_out")]
        budgets = [(one, n) for one in middle if one is not None for n in self.token_budgets]
        return found + [replace(one, n_tokens=n_tokens) for one, n_tokens in budgets]

    def full_specs(self) -> list[DictionarySpec]:
        """The dictionaries that are trained on all tokens, transcoders first."""
        relu: tuple[tuple[Kind, tuple[float, ...]], ...] = (
            ("transcoder", self.transcoder_l1),
            ("sae_mlp_out", self.sae_mlp_out_l1),
            ("sae_mlp_in", self.sae_mlp_in_l1),
        )
        found = [
            self.at(kind, self.layer, activation="relu", l1_coefficient=value)
            for kind, values in relu
            for value in values
        ]
        found += [spec for family in self.families for spec in family.specs(self.layer)]
        return [
            replace(spec, learning_rate=spec.learning_rate or self.learning_rates.get(spec.kind))
            for spec in found
        ]

    def middle(self, specs: Sequence[DictionarySpec], kind: Kind) -> DictionarySpec | None:
        """The middle sparsity of the first family of a kind."""
        own = [spec for spec in specs if spec.kind == kind]
        first = [spec for spec in own if spec.family == own[0].family]
        return first[len(first) // 2] if first else None


@declared(frozen=True)
class CircuitsConfig:
    """Notebook 03: which prompt, and how many features the comparisons draw."""

    year: Annotated[int, Field(ge=YEARS[0], le=YEARS[-1]), WHOLE] = 35
    """Of the prompt; the root is the mean later answer minus the mean earlier."""
    n_connection_features: Count = 12
    """Features drawn for each pair of layers."""
    n_connection_rows: Count = 128
    """Corpus rows over which connections are measured."""
    min_log10_frequency: NonPositive = -4.0
    """Of the features drawn; higher where there are few rows. Published: -4."""
    n_prompts: Count = 8
    """Prompts on which circuits are kept alone and taken out: the year's, and others drawn by seed."""
    n_random_circuits: Count = 20
    """Random circuits of each size that a graph's are held against, on each prompt."""
    max_nodes: Count = 120
    """Nodes at most of the pruned graph that is saved and drawn."""
    node_threshold: Share = 0.75
    """Share of the influence that its nodes keep; lowered until they are few enough."""
    edge_threshold: Share = 0.9
    """Share of the influence that its edges keep."""


@declared(frozen=True)
class GreaterThanConfig:
    """Notebook 06: the sentences, what to analyse (found where null), SAEs to compare with."""

    templates: tuple[str, ...] = (PAPER_TEMPLATE,)
    """Sentences in which `{yy:02d}` is the year."""
    layer: Natural | None = None
    """Of the MLP; null: the one above layer 0 that costs most when ablated. Paper: 10."""
    head: tuple[Natural, Natural] | None = None
    """Layer and head; null: the one that brings the year to the MLP's features. Paper: 9, 1."""
    sae_l1: tuple[Positive, ...] = ()
    """λ of relu SAEs on the MLP's output; the one nearest in L0 is shown."""
    sae_k: tuple[Count, ...] = ()
    """k of topk SAEs, likewise."""
    sae_learning_rate: Positive | None = None
    """Of the SAEs; null: the transcoders'. The MLP's output may be far larger than its input."""
    components_every: Count = 1
    """Components are ablated on every how manieth prompt; 1: on all."""

    def __post_init__(self) -> None:
        check_templates(self.templates)

    def sae_specs(self, layer: int, transcoders: TranscodersConfig) -> list[DictionarySpec]:
        """SAEs as wide as the transcoders, with their loss."""
        recipe = PresetRecipe(
            loss=transcoders.loss,
            expansion=transcoders.expansion,
            learning_rate=self.sae_learning_rate,
        )
        topk = replace(recipe, activation="topk", initial_norm=transcoders.initial_norm)
        return [
            *(recipe.at("sae_mlp_out", layer, l1_coefficient=value) for value in self.sae_l1),
            *(topk.at("sae_mlp_out", layer, k=value) for value in self.sae_k),
        ]


@declared(frozen=True)
class CaseStudiesConfig:
    """Notebook 04: which features are studied blind, and on how much text."""

    layer: Natural | None = None
    """Of the transcoder; null: that of the sweep. Paper: 8 of GPT-2."""
    features: tuple[Natural, ...] = ()
    """Features to study; empty: drawn by seed from the live ones."""
    n_full: Natural = 2
    """Studies in which every tool is allowed, of the first features that are studied. Paper: 2."""
    n_restricted: Natural = 7
    """Studies that refuse input-dependent facts about layer 0, one a feature. Paper: 7."""
    n_sae: Natural = 0
    """Restricted studies of features of an SAE on the MLP's input, from the sweep. Paper: none."""
    n_rows: Count = 512
    """Rows of the hidden corpus, from the training split. Paper: 12,800."""
    min_log10_frequency: NonPositive = -4.0
    """Of the features drawn; on little text -4 is a handful of tokens. Published: -4."""
    n_held_out_rows: Count = 256
    """Rows on which the hypotheses are graded."""

    def __post_init__(self) -> None:
        if not (self.features or self.n_full or self.n_restricted):
            raise InputError("n_full 0 and n_restricted 0: expected one study or more")


@declared(frozen=True)
class ComparisonConfig:
    """Notebook 05: how many features of each kind are drawn, from the sweep's dictionaries."""

    n_features: Count = 200
    """Features drawn of each kind for the proxy; all live ones where there are fewer. Paper: 50."""
    n_rated: Count = 50
    """The first of these that have a page, of the transcoder and of one SAE, for raters. Paper: 50."""
    near_l0: Positive | None = None
    """L0 of the transcoder that is compared; null: the paper's in shares of d_model, 0.043."""
    n_rows: Count = 512
    """Rows of the training split, for frequencies and dashboards. Paper: 25,600."""
    n_fit_rows: Count = 256
    """The first of these, from which a predicate is made for every feature."""
    n_held_out_rows: Count = 256
    """Rows on which the predicates are graded."""
    min_log10_frequency: NonPositive = -4.0
    """Of the features drawn. Published: -4."""

    def __post_init__(self) -> None:
        if self.n_rated > self.n_features:
            raise InputError(
                f"n_rated {self.n_rated}: expected at most n_features, {self.n_features}, of which they are"
            )


@declared(frozen=True)
class Preset:
    """A whole run: model, corpus, what the notebooks make, and where it all goes."""

    name: str
    """Of the run and of its folder: that of the preset's file."""
    description: str
    """One line for `tclib presets`."""
    model: Name
    """`demo`, `demo-neox`, `smollm2`, a local folder of Hugging Face's layout, or a hub id."""
    corpus: CorpusConfig
    """The text."""
    transcoders: TranscodersConfig
    """Notebook 01."""
    sweep: SweepConfig = field(default_factory=lambda: SweepConfig(layer=0))
    """Notebook 02."""
    circuits: CircuitsConfig = field(default_factory=CircuitsConfig)
    """Notebook 03."""
    greater_than: GreaterThanConfig = field(default_factory=GreaterThanConfig)
    """Notebook 06."""
    case_studies: CaseStudiesConfig = field(default_factory=CaseStudiesConfig)
    """Notebook 04."""
    comparison: ComparisonConfig = field(default_factory=ComparisonConfig)
    """Notebook 05."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Notebooks that are not run: number, and why."""
    n_evaluation_rows: Count | None = None
    """Held-out rows over which losses are measured; null: all."""
    companions: tuple[str, ...] = ()
    """Presets whose sweep notebook 02 draws beside this one's."""
    seed: Seed = 42
    """Of the corpus and of all training. Paper: 42."""
    runs_dir: Path = field(default_factory=default_runs)
    """Folder of all runs; by default data/runs of a checkout, ./runs elsewhere."""
    asked: Mapping[str, str] = field(default_factory=dict, compare=False)
    """The options of `tclib run` that ask for this run, without those that are default."""

    def __post_init__(self) -> None:
        check_name("name", self.name, "-_.")
        check_preset(self, [name for name in preset_names() if name != self.name])

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.name

    @property
    def command(self) -> str:
        """What makes this run, to be pasted into a shell."""
        return shlex.join(["tclib", "run", *chain.from_iterable(self.asked.items())])

    def step(self, name: str) -> Step:
        """Where step `name` of this run lives."""
        return Step(self.name, name, self.folder / name, self.command)


def preset_names() -> list[str]:
    """The presets that notebooks/presets holds."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


@checked
def load_preset(
    name: str, seed: Natural | None = None, runs_dir: str | Path | None = None
) -> Preset:
    """Read and check a preset; `seed`, where given, acts on the corpus and on all training.

    `name` is a file of notebooks/presets without .yaml, or the path of a YAML file anywhere. A run
    with another seed than the preset's own has a folder of its own, `<name>-seed<seed>`.
    Errors: `InputError` for an unknown preset, an unknown key or a value out of range.
    """
    path = expanded(name if is_path(name) else PRESETS / f"{name}.yaml")
    if not path.is_file():
        known = "no such file" if is_path(name) else f"expected one of {', '.join(preset_names())}"
        raise InputError(f"unknown preset {name!r}: {known}")
    preset = parse(Preset, {"name": path.stem, **_mapping(path)}, f"preset {path.stem!r}")
    asked = {"--preset": name}
    if is_path(name):
        preset = _beside(preset, path.resolve().parent)
        asked = {"--preset": str(path.absolute())}  # notebooks run in another folder
    if seed is not None and seed != preset.seed:
        preset = replace(preset, seed=seed, name=f"{preset.name}-seed{seed}")
        asked["--seed"] = str(seed)
    usual = preset.runs_dir.expanduser().resolve()
    found = expanded(runs_dir or usual).resolve()
    check_folder(found)
    if found != usual:
        asked["--runs-dir"] = str(found)
    return _seeded(replace(preset, runs_dir=found, asked=asked))


def is_path(name: str) -> bool:
    """Whether `name` is a preset's file rather than one of notebooks/presets."""
    return name.endswith((".yaml", ".yml")) or os.sep in name


def preset_schema() -> str:
    """The JSON schema of a preset's file, by which editors complete and explain its keys."""
    schema = TypeAdapter(Preset).json_schema()
    schema["required"].remove("name")
    for key in NOT_IN_FILES:
        del schema["properties"][key]
    for part in schema["$defs"].values():
        part["properties"].pop("seed", None)  # a preset has one, at its top level
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _beside(preset: Preset, folder: Path) -> Preset:
    """The preset with its relative paths taken from its own folder: notebooks run in another one."""

    def path(value: str) -> str:
        return str(folder / expanded(value)) if value else value

    def found(value: str) -> str:
        """A path where it is one, else the name or the hub's id that it must be."""
        is_there = value and Path(path(value)).exists()
        return path(value) if is_there or value.startswith((".", "~")) else value

    corpus, transcoders = preset.corpus, preset.transcoders
    source = (found if corpus.kind == "huggingface" else path)(corpus.source)
    released = transcoders.published
    return replace(
        preset,
        model=preset.model if preset.model in NAMED_MODELS else found(preset.model),
        corpus=replace(corpus, source=source),
        transcoders=replace(
            transcoders, published=released if released == "hub" else path(released)
        ),
        runs_dir=folder / preset.runs_dir.expanduser(),
    )


def _mapping(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    if not isinstance(values, dict):
        found = "nothing" if values is None else shown(values)
        raise InputError(f"{path}: expected names and values, found {found}")
    if set(NOT_IN_FILES) & values.keys():
        raise InputError(
            f"preset {path}: a run is called as the preset's file: leave out the keys "
            f"{' and '.join(NOT_IN_FILES)}"
        )
    sections = {key: part for key, part in values.items() if isinstance(part, dict)}
    trainings = {f"{key}.training": part.get("training") for key, part in sections.items()}
    for place, part in (sections | trainings).items():
        if isinstance(part, dict) and "seed" in part:
            raise InputError(
                f"preset {path.stem!r}, {place}.seed {part['seed']}: seed belongs at the top level of "
                "a preset, and acts on everything that draws"
            )
    return values


def _seeded(preset: Preset) -> Preset:
    """The preset with its one seed handed to everything that draws."""
    transcoders, sweep = preset.transcoders, preset.sweep
    return replace(
        preset,
        corpus=replace(preset.corpus, seed=preset.seed),
        transcoders=replace(transcoders, training=replace(transcoders.training, seed=preset.seed)),
        sweep=replace(sweep, training=replace(sweep.training, seed=preset.seed)),
    )
