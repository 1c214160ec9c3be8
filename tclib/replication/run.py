"""The run of a preset, part by part."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import pandas as pd

from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation.evaluate import Evaluation
from tclib.evaluation.whole_model import WholeModel
from tclib.models.identity import kept_hash
from tclib.models.language_model import LanguageModel
from tclib.models.locate import locate
from tclib.replication.artifacts import (
    CaseStudies,
    Circuits,
    Comparison,
    Explained,
    GreaterThanResults,
    Trained,
)
from tclib.replication.presets import Preset, load_preset
from tclib.support.checked import checked
from tclib.support.declared import Natural
from tclib.support.steps import Step
from tclib.text.corpus import Corpus


@checked
def open_run(
    preset: str = "demo", seed: Natural | None = None, runs_dir: str | Path | None = None
) -> Run:
    """The run of a preset; nothing is made or loaded before it is asked for.

    Args:
        preset: a file of notebooks/presets, without .yaml, or the path of a YAML file of yours.
        seed: another seed than the preset's; such a run has a folder of its own.
        runs_dir: where runs go; by default data/runs of a checkout, ./runs elsewhere.

    Errors: `InputError` for an unknown preset or a value out of range.
    """
    return Run(load_preset(preset, seed, runs_dir))


class Run:
    """A preset's run: every part is made on first use, or loaded if it is there, and then kept.

        run = open_run("demo", seed=7)
        run.lm, run.corpus                     00  the model, its rows of tokens
        run.trained, run.transcoders, run.layers   01  one transcoder a layer, and their losses
        run.whole_model                        01  all of them at once
        run.swept, run.sweep, run.sweeps       02  transcoders and SAEs over sparsities (and the companions')
        run.prompt, run.circuits               03  a prompt and its target; its graph
        run.studies                            04  blind case studies
        run.comparison                         05  transcoder against SAE features, rated blind
        run.components, run.replacements, run.greater_than   06  what the behaviour needs
        run.results, run.published_checks      07  claim, paper, ours, verdict

    A part that lacks an earlier one makes it first, so any part can be asked for by itself.

    Args:
        preset: what it depends on, and where its folders are.
    """

    @checked
    def __init__(self, preset: Preset) -> None:
        self.preset = preset

    def __repr__(self) -> str:
        return f"Run({self.preset.name!r} in {self.preset.folder})"

    def step(self, name: str) -> Step:
        """Where step `name` of this run lives."""
        return self.preset.step(name)

    def inputs(self, *made_from: Trained) -> dict[str, str]:
        """What a step depends on: the model, the corpus, and the files of dictionaries."""
        found = {"model": self.model_hash, "corpus": self.corpus.content_hash}
        for trained in made_from:
            found |= trained.hashes
        return found

    def tells(self, notebook: str) -> bool:
        """Whether the preset runs the notebook of this number, and does not skip it."""
        return notebook not in self.preset.skipped

    @cached_property
    def companions(self) -> list[Run]:
        """Runs whose sweep is drawn beside this one's, with its seed and folder."""
        preset = self.preset
        return [open_run(name, preset.seed, preset.runs_dir) for name in preset.companions]

    # The modules of the notebooks take a `Run`, so they are imported where they are called.

    @cached_property
    def model_hash(self) -> str:
        """The model's identity; its weights are read only where their hash is not known."""
        return kept_hash(locate(self.preset.model)) or self.lm.content_hash

    @property
    def sources(self) -> dict[str, str]:
        """Hashes of what the run copied: its text, and released transcoders."""
        from tclib.replication.model_and_data import text_input
        from tclib.replication.transcoders import released_input

        text, released = text_input(self), released_input(self)
        return {**text, **{f"released {name}": value for name, value in released.items()}}

    @cached_property
    def lm(self) -> LanguageModel:
        """The language model, in float32 on the best device.

        Errors: `InputError` if it lacks a layer, a head or a year that the preset names.
        """
        from tclib.replication.model_and_data import check_model, check_year

        check_model(self.preset)
        lm = LanguageModel.load(self.preset.model)
        if self.tells("03"):
            check_year(self.preset, lm)
        return lm

    @cached_property
    def corpus(self) -> Corpus:
        """Rows of tokens for training and for evaluation."""
        from tclib.replication.model_and_data import make_corpus

        return make_corpus(self)

    @cached_property
    def trained(self) -> Trained:
        """One transcoder a layer, with the training log."""
        from tclib.replication.transcoders import make_transcoders

        return make_transcoders(self)

    @property
    def transcoders(self) -> dict[str, Dictionary]:
        """The transcoders of `trained`, by name."""
        return self.trained.dictionaries

    @cached_property
    def layers(self) -> Evaluation:
        """Losses with each layer's transcoder in its MLP's place."""
        from tclib.replication.transcoders import evaluate_transcoders

        return evaluate_transcoders(self)

    @cached_property
    def whole_model(self) -> WholeModel:
        """Losses with all transcoders in their MLPs' places at once."""
        from tclib.replication.transcoders import evaluate_all_at_once

        return evaluate_all_at_once(self)

    @cached_property
    def swept(self) -> Trained:
        """Transcoders and SAEs of one layer over several sparsities."""
        from tclib.replication.sweep import make_sweep

        return make_sweep(self)

    @cached_property
    def sweep(self) -> Evaluation:
        """The table behind Figure 3."""
        from tclib.replication.sweep import evaluate_sweep

        return evaluate_sweep(self)

    @property
    def sweeps(self) -> dict[str, Evaluation]:
        """This run's sweep and its companions', by a title for each."""
        return {
            f"{run.preset.model}, layer {run.preset.sweep.layer}": run.sweep
            for run in (self, *self.companions)
        }

    @cached_property
    def prompt(self) -> Explained:
        """The prompt that is explained, frozen, and the target on it."""
        from tclib.replication.circuits import explain_prompt

        return explain_prompt(self)

    @cached_property
    def circuits(self) -> Circuits:
        """The prompt's attribution graph, and how far it holds."""
        from tclib.replication.circuits import make_circuits

        return make_circuits(self)

    @cached_property
    def studies(self) -> CaseStudies:
        """Blind case studies."""
        from tclib.replication.case_studies import make_case_studies

        return make_case_studies(self)

    @cached_property
    def comparison(self) -> Comparison:
        """Transcoder and SAE features, shuffled, with the proxy's ratings."""
        from tclib.replication.comparison import make_comparison

        return make_comparison(self)

    @cached_property
    def components(self) -> pd.DataFrame:
        """Every MLP and head ablated."""
        from tclib.replication.greater_than import make_components

        return make_components(self)

    @cached_property
    def replacements(self) -> pd.DataFrame:
        """The greater-than metric with each transcoder in its MLP's place."""
        from tclib.replication.greater_than import make_replacements

        return make_replacements(self)

    @cached_property
    def greater_than(self) -> GreaterThanResults:
        """The greater-than analysis of one MLP."""
        from tclib.replication.greater_than import make_greater_than

        return make_greater_than(self)

    @cached_property
    def results(self) -> pd.DataFrame:
        """Claim, paper, ours, verdict."""
        from tclib.replication.results import make_results

        return make_results(self)

    @cached_property
    def published_checks(self) -> pd.DataFrame:
        """Every published figure that needs no training, with verdicts (released transcoders only)."""
        from tclib.replication.published import make_published_checks

        return make_published_checks(self)
