"""Notebook 04: blind case studies of features by the automatic investigator, graded on held-out text.

studies.csv               a line a study: hypothesis, scores, grade, and on the demo world the latents
ledger_<feature>.jsonl    every question and answer, chained; can be replayed
dashboards.html           what each feature is, opened after its study
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.blind.grading import active_positions, grade_predicate
from tclib.blind.investigator import Hypothesis, investigate
from tclib.blind.latents import LabelledRows, label_scores, labelled_rows
from tclib.blind.predicates import Score
from tclib.blind.session import BlindSession
from tclib.dictionaries.dictionary import Dictionary
from tclib.features.examples import feature_activations, live_features
from tclib.features.from_weights import LoneTokens
from tclib.features.html import dashboard_html, save_page
from tclib.models.language_model import LanguageModel
from tclib.replication.artifacts import CaseStudies
from tclib.replication.paper import paper_table
from tclib.replication.run import Run
from tclib.replication.verdicts import Line, Measured, decided
from tclib.support.errors import InputError
from tclib.support.progress import progress
from tclib.support.statistics import wilson_interval
from tclib.support.steps import ensure, write_csv

STEP = "04_blind_case_studies"
N_SHOWN = 15  # examples of each dashboard
# Of a feature that never fires.
UNGRADED = Score(math.nan, math.nan, math.nan, math.nan, math.nan, n_active=0, n_predicted=0)


def studied_layer(run: Run) -> int:
    """The layer whose features are studied."""
    layer = run.preset.case_studies.layer
    return run.preset.sweep.layer if layer is None else layer


def make_case_studies(run: Run) -> CaseStudies:
    """The artifacts of step 04, made once. Errors: `InputError` if the layer has no transcoder."""
    step, config = run.step(STEP), asdict(run.preset.case_studies)
    inputs = run.inputs(run.trained)
    parameters = {**config, "layer": studied_layer(run), "seed": run.preset.seed}

    def make() -> Mapping[str, Any]:
        table = _study_all(run, step.folder)
        write_csv(table, step, "studies")
        return {"n_studies": len(table), "n_failures": int((table["grade"] == "failure").sum())}

    ensure(step, parameters, inputs, make)
    return CaseStudies(pd.read_csv(step.folder / "studies.csv"), step.folder)


def session_on(run: Run, feature: int, **shared: Any) -> BlindSession:
    """A session on one feature of the studied layer; `shared` as `BlindSession` takes it."""
    rows = run.corpus.train[: run.preset.case_studies.n_rows]
    return BlindSession(run.lm, run.transcoders, rows, studied_layer(run), feature, **shared)


def _study_all(run: Run, folder: Path) -> pd.DataFrame:
    config, layer, lm = run.preset.case_studies, studied_layer(run), run.lm
    by_layer = {d.config.layer: d for d in run.transcoders.values()}
    if layer not in by_layer:
        raise InputError(f"no transcoder at layer {layer}: there is one at {sorted(by_layer)}")
    rows = run.corpus.train[: config.n_rows]
    features = list(config.features) or _drawn(run, by_layer[layer], rows)
    held_out = _held_out(run)
    acts = feature_activations(lm, by_layer[layer], features, rows)
    held_out_acts = feature_activations(lm, by_layer[layer], features, held_out.rows)
    lone = LoneTokens(lm, run.transcoders.values())
    lines, pages = [], []
    for i, feature in enumerate(progress(features, "blind studies", unit="feature")):
        restricted = i >= config.n_full
        session = session_on(run, feature, restricted=restricted, acts=acts[i], lone=lone)
        hypothesis = investigate(session)
        dashboard = session.unblind(N_SHOWN)
        ledger = folder / f"ledger_{feature}.jsonl"
        ledger.unlink(missing_ok=True)  # that of a run which was killed before the step was made
        session.save_ledger(ledger)
        pages.append(dashboard_html(dashboard))
        save_page(folder / f"dashboard_{feature}.html", pages[-1:], dashboard.title)
        line = {"layer": layer, "feature": feature, "kind": "restricted" if restricted else "full"}
        lines.append({**line, **_graded(lm, hypothesis, session, held_out, held_out_acts[i])})
    save_page(folder / "dashboards.html", pages, f"Blind case studies, layer {layer}")
    return pd.DataFrame(lines)


def _drawn(run: Run, dictionary: Dictionary, rows: Int[Tensor, "row pos"]) -> list[int]:
    """Live features in a random order, by seed."""
    config = run.preset.case_studies
    generator = torch.Generator().manual_seed(run.preset.seed)
    n, least = config.n_full + config.n_restricted, config.min_log10_frequency
    return live_features(run.lm, dictionary, rows, n, generator, least)


def _held_out(run: Run) -> LabelledRows:
    """Text that no study saw; with labels on the demo world."""
    n_rows, corpus = run.preset.case_studies.n_held_out_rows, run.preset.corpus
    if corpus.kind == "demo":
        return labelled_rows(run.lm, n_rows, corpus.n_ctx, corpus.seed, corpus.eval_fraction)
    rows = run.corpus.evaluation[:n_rows]
    return LabelledRows(rows, torch.full_like(rows, -1), ())


def _graded(
    lm: LanguageModel,
    hypothesis: Hypothesis,
    session: BlindSession,
    held_out: LabelledRows,
    acts: Float[Tensor, "row pos"],
) -> dict[str, Any]:
    """Scores and grade of one study; a feature that never fires on the held-out text is a failure."""
    line: dict[str, Any] = {
        "hypothesis": hypothesis.text,
        "predicate": json.dumps(hypothesis.predicate.as_dict()),
        "n_questions": sum(entry.kind == "question" for entry in session.ledger),
    }
    if not bool((acts > 0).any()):
        return {**line, "grade": "failure", **UNGRADED.as_dict()}
    graded = grade_predicate(hypothesis.predicate, held_out.rows, acts, lm.bos_id)
    line |= {"grade": graded.grade, **graded.score.as_dict()}
    if not held_out.names:
        return line
    holds = hypothesis.predicate.holds(held_out.rows, lm.bos_id)
    f1 = label_scores(torch.stack([active_positions(acts), holds]), held_out)
    for name, own in zip(("true", "said"), f1, strict=True):
        line |= {f"{name}_latent": held_out.names[own.argmax()], f"{name}_latent_f1": own.max()}
    return line


def paper_studies() -> pd.DataFrame:
    """The paper's nine studies (Table 4)."""
    return pd.DataFrame(paper_table("case_studies"))


def grade_counts(studies: pd.DataFrame) -> pd.DataFrame:
    """How many studies of each grade, the paper's beside ours."""
    grades = ["success", "mostly", "failure"]
    return pd.DataFrame(
        {
            "paper": paper_studies()["grade"].value_counts().reindex(grades, fill_value=0),
            "ours": studies["grade"].value_counts().reindex(grades, fill_value=0),
        }
    )


def why_failed(run: Run) -> pd.DataFrame:
    """Scores, and on the demo world the latent that each feature stands for and the one that was said."""
    columns = ["feature", "grade", "precision", "recall"]
    columns += ["true_latent", "true_latent_f1", "said_latent", "said_latent_f1"]
    table = run.studies.table
    return table[[name for name in columns if name in table]]


def measured(run: Run) -> dict[str, Measured]:
    """Section 5.1's statistic."""
    table = run.studies.table
    ours = grade_counts(table)["ours"]
    n_good = int(ours["success"] + ours["mostly"])
    return {"case_studies": studied(n_good, len(table), bool((table["n_active"] > 0).all()))}


def claims(run: Run) -> list[Line]:
    """Section 5.1's claim."""
    table = run.studies.table
    ours = grade_counts(table)["ours"]
    line = decided(
        "case_studies",
        "5, 2, 2 of 9 (by hand, GPT-2)",
        f"{ours['success']}, {ours['mostly']}, {ours['failure']} of {len(table)} "
        "(success, mostly, failure; automatic investigator, graded on held-out text)",
        measured(run)["case_studies"],
    )
    return [line]


def studied(n_good: int, n: int, all_fire: bool = True) -> Measured:
    """The share of studies that succeed, mostly or wholly, with Wilson's interval."""
    return Measured(n_good / n, *wilson_interval(n_good, n), all_fire)


def studies_in_words(run: Run) -> str:
    """Ours (Markdown)."""
    table = run.studies.table
    counts = grade_counts(table)["ours"]
    failed = table[table["grade"] == "failure"]
    said_too_much = int((failed["precision"] < failed["recall"]).sum())
    narrow = int((failed["n_active"] < 50).sum())
    n_silent = int((table["n_active"] == 0).sum())
    silent = f" {n_silent} never fire there and could not be graded." if n_silent else ""
    return (
        f"*Ours:* {len(table)} studies of layer {int(table['layer'].iloc[0])} by an automatic investigator: "
        f"{counts['success']} success, {counts['mostly']} mostly, {counts['failure']} failure. Of the failures "
        f"{said_too_much} say too much (precision below recall), and {narrow} are of features with fewer than "
        f"50 active tokens in the held-out text.{silent}"
    )
