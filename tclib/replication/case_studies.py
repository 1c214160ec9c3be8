"""Notebook 04: blind case studies of features by the automatic investigator, graded on held-out text.

studies.csv             a line a study: hypothesis, scores between floor and ceiling, grade, the ledger's seal, and
                        on the demo world the latents
ledger_<study>.jsonl    every question and answer, chained and sealed; can be replayed
leakage.csv             the attack on every number of the ledgers
paper_hypotheses.csv    with the paper's released transcoders: its own hypotheses, graded by the same rule
dashboard_<name>.html   what each feature is, opened after all of its studies
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from tclib.blind.floor import N_RANDOM
from tclib.blind.grading import MOSTLY_F1, active_positions, grade_predicate
from tclib.blind.investigator import Hypothesis, investigate
from tclib.blind.language import Condition
from tclib.blind.latents import LabelledRows, label_scores, labelled_rows
from tclib.blind.leakage import leakage
from tclib.blind.ledger import Entry, example_order, key_of, load_ledger
from tclib.blind.predicates import Score
from tclib.blind.search import SearchedText, best_predicate
from tclib.blind.session import BlindSession
from tclib.blind.vocabulary import Vocabulary
from tclib.circuits.frozen import FrozenPrompts
from tclib.circuits.graph import attribution_graph
from tclib.circuits.prune import prune_to_size
from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation.metrics import strong_threshold
from tclib.features.examples import feature_activations, live_features
from tclib.features.from_weights import LoneTokens
from tclib.features.html import dashboard_html, save_page
from tclib.figures.graph import layered_graph
from tclib.figures.style import save_figure
from tclib.replication.artifacts import CaseStudies, study_name
from tclib.replication.comparison import l0_distance, mean_l0s
from tclib.replication.paper import paper_table
from tclib.replication.paper_hypotheses import PaperHypothesis, paper_hypotheses
from tclib.replication.run import Run
from tclib.replication.verdicts import Line, Measured, decided
from tclib.support.errors import InputError
from tclib.support.progress import progress
from tclib.support.statistics import wilson_interval
from tclib.support.steps import Step, ensure, write_csv

STEP = "04_blind_case_studies"
TRANSCODER, SAE = "transcoder", "sae_mlp_in"
Variant = Literal["full", "restricted"]
SURE_LEAK = 0.001  # of a thousand deals none does as well
N_SHOWN = 15  # examples of each dashboard
N_DRAWN = 30  # nodes of a told study's circuit, besides its tokens
# Of a feature that never fires.
UNGRADED = Score(math.nan, math.nan, math.nan, math.nan, math.nan, n_active=0, n_predicted=0)


def studied_layer(run: Run) -> int:
    """The layer whose features are studied."""
    layer = run.preset.case_studies.layer
    return run.preset.sweep.layer if layer is None else layer


def make_case_studies(run: Run) -> CaseStudies:
    """The artifacts of step 04, made once. Errors: `InputError` if the layer has no transcoder."""
    step, config = run.step(STEP), asdict(run.preset.case_studies)
    inputs = run.inputs(run.trained, *([run.swept] if config["n_sae"] else []))
    parameters = {**config, "layer": studied_layer(run), "seed": run.preset.seed}

    def make() -> Mapping[str, Any]:
        made = _Studies(run).make(step)
        write_csv(made.table, step, "studies")
        write_csv(made.leaks, step, "leakage")
        write_csv(made.papers, step, "paper_hypotheses")
        counts = {
            "n_studies": len(made.table),
            "n_failures": int((made.table["grade"] == "failure").sum()),
        }
        return {**counts, "seals": dict(zip(made.table["study"], made.table["seal"], strict=True))}

    ensure(step, parameters, inputs, make)
    names = ("studies", "leakage", "paper_hypotheses")
    table, leaks, papers = (pd.read_csv(step.folder / f"{name}.csv") for name in names)
    return CaseStudies(table, leaks, papers, step.folder)


def session_on(
    run: Run, feature: int, restricted: bool, kind: str = TRANSCODER, **shared: Any
) -> BlindSession:
    """A session of the automatic investigator on one feature of the studied layer.

    `shared` as `BlindSession` takes it. Examples are numbered by a key that hangs on the run's seed and the
    study, so that a study can be replayed.
    """
    rows = run.corpus.train[: run.preset.case_studies.n_rows]
    named = f"{run.preset.seed} {kind} {feature} {restricted}"
    key = hashlib.sha256(named.encode()).hexdigest()[:32]
    if kind != TRANSCODER and "dictionary" not in shared:
        shared["dictionary"] = studied_sae(run)
    layer = studied_layer(run)
    others = {"key": key, "fresh_eyes": True, **shared}
    return BlindSession(run.lm, run.transcoders, rows, layer, feature, restricted, **others)


def studied_sae(run: Run) -> Dictionary:
    """The SAE on the MLP's input, of the sweep, whose L0 is nearest to the studied transcoder's.

    Errors: `InputError` if the sweep has none on that layer.
    """
    layer = studied_layer(run)
    saes = {
        name: one
        for name, one in run.swept.dictionaries.items()
        if one.config.kind == SAE and one.config.layer == layer
    }
    if not saes:
        raise InputError(
            f"case_studies.n_sae {run.preset.case_studies.n_sae}: the sweep has no {SAE} at layer {layer}; "
            "expected n_sae 0, or one in sweep.families"
        )
    l0s = mean_l0s(run.lm, {**saes, TRANSCODER: _transcoder(run)}, run.corpus.train)
    wanted = l0s[TRANSCODER]
    return saes[min(saes, key=lambda name: l0_distance(l0s[name] + 1e-9, wanted))]


def _transcoder(run: Run) -> Dictionary:
    by_layer = {d.config.layer: d for d in run.transcoders.values()}
    layer = studied_layer(run)
    if layer not in by_layer:
        raise InputError(f"no transcoder at layer {layer}: there is one at {sorted(by_layer)}")
    return by_layer[layer]


@dataclass(frozen=True)
class _Made:
    table: pd.DataFrame
    leaks: pd.DataFrame
    papers: pd.DataFrame


@dataclass(frozen=True)
class _Subject:
    """A feature, and where it is active on the hidden and on the held-out text."""

    kind: str
    feature: int
    acts: Float[Tensor, "row pos"]
    held_out_acts: Float[Tensor, "held_out_row pos"]
    variants: tuple[Variant, ...]


class _Studies:
    """All studies of a run: every one is ended blind before any feature is unblinded."""

    def __init__(self, run: Run) -> None:
        self.run, self.lm, self.config = run, run.lm, run.preset.case_studies
        self.rows = run.corpus.train[: self.config.n_rows]
        self.held_out = _held_out(run)
        self.vocabulary = Vocabulary.of(run.lm)
        self.text = SearchedText(self.rows, self.vocabulary)
        self.dictionaries = {TRANSCODER: _transcoder(run)}
        if self.config.n_sae:
            self.dictionaries[SAE] = studied_sae(run)
        self.subjects = [one for kind in self.dictionaries for one in self._drawn(kind)]

    def make(self, step: Step) -> _Made:
        lone = LoneTokens(self.lm, self.run.transcoders.values())
        todo = [(subject, variant) for subject in self.subjects for variant in subject.variants]
        ended = []
        for subject, variant in progress(todo, "blind studies", unit="study"):
            of = (subject.feature, variant == "restricted", subject.kind)
            one = None if subject.kind == TRANSCODER else self.dictionaries[subject.kind]
            shared = {"acts": subject.acts, "lone": lone, "dictionary": one}
            session = session_on(self.run, *of, **shared)
            ended.append((subject, variant, session, investigate(session, self.vocabulary)))
        ceilings = [
            self._ceiling(one) for one in progress(self.subjects, "ceilings", unit="feature")
        ]
        best = dict(zip(map(id, self.subjects), ceilings, strict=True))
        lines, studies = [], []
        for subject, variant, session, hypothesis in progress(ended, "unblinded", unit="study"):
            self._unblind(step.folder, subject, session)
            name = study_name(subject.feature, variant, subject.kind)
            ledger = step.folder / f"ledger_{name}.jsonl"
            ledger.unlink(
                missing_ok=True
            )  # that of a run which was killed before the step was made
            seal = session.save_ledger(ledger)
            line = {"study": name, "dictionary": subject.kind, "layer": session.layer}
            line |= {"feature": subject.feature, "kind": variant, "seal": seal}
            graded = _graded(self, hypothesis, session, subject, best[id(subject)])
            lines.append({**line, **graded})
            if subject.kind == TRANSCODER:  # the attack computes what a transcoder's features read
                studies.append(load_ledger(ledger, seal))
        leaks = leakage(self.lm, self.run.transcoders, studies, self.rows)
        return _Made(pd.DataFrame(lines), leaks, self._papers(best))

    def _papers(self, best: Mapping[int, Condition]) -> pd.DataFrame:
        """The paper's own hypotheses on its own features, graded by our rule."""
        said: dict[int, PaperHypothesis] = {}
        if self.run.preset.transcoders.published:
            every = paper_hypotheses(self.vocabulary)
            said = {one.feature: one for one in every if one.layer == studied_layer(self.run)}
        lines = [
            {"feature": one.feature, "hypothesis": own.text, "truth": own.truth}
            | {"paper": own.grade, **_grade(self, own.condition, one, best[id(one)])}
            | {"unsaid": own.unsaid}
            for one in self.subjects
            if (own := said.get(one.feature)) is not None
        ]
        columns = ["feature", "hypothesis", "truth", "paper", "grade", "f1", "floor", "ceiling"]
        return pd.DataFrame(lines, columns=[*columns, "correlation", "n_active", "unsaid"])

    def _unblind(self, folder: Path, subject: _Subject, session: BlindSession) -> None:
        """End a study; a feature's page is written once."""
        page = folder / f"dashboard_{study_name(subject.feature, '', subject.kind)}.html"
        dashboard = session.unblind(N_SHOWN)
        save_page(page, [dashboard_html(dashboard)], dashboard.title)

    def _ceiling(self, subject: _Subject) -> Condition:
        threshold = strong_threshold(subject.acts)
        return best_predicate(self.text, subject.acts, self.vocabulary, threshold)

    def _drawn(self, kind: str) -> list[_Subject]:
        """Features in a random order, by seed; the first are studied in full as well."""
        config, one = self.config, self.dictionaries[kind]
        n_full = config.n_full if kind == TRANSCODER else 0
        n_restricted = config.n_restricted if kind == TRANSCODER else config.n_sae
        generator = torch.Generator().manual_seed(self.run.preset.seed)
        least, n = config.min_log10_frequency, max(n_full, n_restricted)
        features = list(config.features) if kind == TRANSCODER else []
        if not features:
            features = live_features(self.lm, one, self.rows, n, generator, least)
        else:
            n_restricted = len(features) if n_restricted else 0
        texts = (self.rows, self.held_out.rows)
        acts, held_out_acts = (feature_activations(self.lm, one, features, text) for text in texts)
        variants = [
            tuple(v for v, count in (("full", n_full), ("restricted", n_restricted)) if i < count)
            for i in range(len(features))
        ]
        pairs = zip(features, acts, held_out_acts, variants, strict=True)
        return [_Subject(kind, *pair) for pair in pairs]  # type: ignore[arg-type]


def _held_out(run: Run) -> LabelledRows:
    """Text that no study saw; with labels on the demo world."""
    n_rows, corpus = run.preset.case_studies.n_held_out_rows, run.preset.corpus
    if corpus.kind == "demo":
        return labelled_rows(run.lm, n_rows, corpus.n_ctx, corpus.seed, corpus.eval_fraction)
    rows = run.corpus.evaluation[:n_rows]
    return LabelledRows(rows, torch.full_like(rows, -1), ())


def _graded(
    studies: _Studies,
    hypothesis: Hypothesis,
    session: BlindSession,
    subject: _Subject,
    best: Condition,
) -> dict[str, Any]:
    """Scores and grade of one study; a feature that never fires on the held-out text is a failure."""
    line: dict[str, Any] = {
        "hypothesis": hypothesis.text,
        "predicate": json.dumps(hypothesis.predicate.as_dict()),
        "best": best.in_words(studies.vocabulary),
        "n_questions": session.n_questions,
    }
    line |= _grade(studies, hypothesis.predicate, subject, best)
    held_out = studies.held_out
    if not held_out.names or not line["n_active"]:
        return line
    holds = hypothesis.predicate.holds(held_out.rows, studies.vocabulary)
    active = active_positions(subject.held_out_acts)
    f1 = label_scores(torch.stack([active, holds]), held_out)
    for name, own in zip(("true", "said"), f1, strict=True):
        line |= {f"{name}_latent": held_out.names[own.argmax()], f"{name}_latent_f1": own.max()}
    return line


def _grade(
    studies: _Studies, said: Condition, subject: _Subject, best: Condition
) -> dict[str, Any]:
    """A hypothesis on the held-out text: grade, scores, ceiling, floor."""
    rows, acts = studies.held_out.rows, subject.held_out_acts
    if not bool((acts > 0).any()):
        missing = {"ceiling": math.nan, "floor": math.nan}
        return {"grade": "failure", **UNGRADED.as_dict(), **missing}
    generator = torch.Generator().manual_seed(subject.feature)
    graded = grade_predicate(
        said,
        rows,
        acts,
        studies.vocabulary,
        best=best,
        n_random=N_RANDOM,
        generator=generator,
    )
    scores = {"grade": graded.grade, **graded.score.as_dict()}
    return {**scores, "ceiling": graded.ceiling, "floor": graded.floor}


def paper_studies() -> pd.DataFrame:
    """The paper's nine studies (Table 4)."""
    return pd.DataFrame(paper_table("case_studies"))


def grade_counts(studies: pd.DataFrame) -> pd.DataFrame:
    """How many studies of each grade, by dictionary and variant, the paper's beside ours."""
    grades = ["success", "mostly", "failure"]
    counts = {"paper": paper_studies()["grade"].value_counts()}
    for (dictionary, kind), own in studies.groupby(["dictionary", "kind"], sort=False):
        counts[f"{dictionary}, {kind}"] = own["grade"].value_counts()
    return pd.DataFrame({name: own.reindex(grades, fill_value=0) for name, own in counts.items()})


def score_summary(studies: pd.DataFrame) -> pd.DataFrame:
    """Medians by dictionary and variant: n, f1, floor, ceiling, correlation, and how many could be said at all."""
    groups = studies.groupby(["dictionary", "kind"], sort=False)
    names = ["f1", "floor", "ceiling", "correlation"]
    return (
        groups[names]
        .median()
        .assign(
            n=groups.size(),
            sayable=groups["ceiling"].agg(lambda own: int((own >= MOSTLY_F1).sum())),
        )
    )


def why_failed(run: Run) -> pd.DataFrame:
    """Scores, and on the demo world the latent that each feature stands for and the one that was said."""
    columns = ["study", "grade", "f1", "floor", "ceiling", "precision", "recall", "correlation"]
    columns += ["true_latent", "true_latent_f1", "said_latent", "said_latent_f1"]
    table = run.studies.table
    return table[[name for name in columns if name in table]]


def told(studies: pd.DataFrame) -> pd.DataFrame:
    """The two studies that are told in full: the first in full that succeeds and the first that fails, or else the first."""
    own = studies[studies["dictionary"] == TRANSCODER]
    firsts = [own[own["grade"] == grade].head(1) for grade in ("success", "failure")]
    found = pd.concat([one if len(one) else own.head(1) for one in firsts])
    return found.drop_duplicates("study")


def first_sources(entries: Sequence[Entry], n: int = 12) -> pd.DataFrame:
    """What a study was told when it first asked for sources."""
    answer = next(entry.answer for entry in entries if entry.question == "sources")
    table = pd.DataFrame(answer).head(n).astype({"rank": "Int64"})
    says_nothing = table.isna() | table.eq(-1).assign(contribution=False, share=False)
    return table.astype(object).mask(says_nothing, "")


def circuit_figure(run: Run, study: str, feature: int) -> Figure:
    """The attribution graph of a studied feature, at the position with the shortest text that the study looked at."""
    entries = load_ledger(run.studies.ledger_path(study))
    places = [entry.arguments for entry in entries if entry.question == "activation"]
    place = min(places, key=lambda one: int(one["pos"]))
    rows = run.corpus.train[: run.preset.case_studies.n_rows]
    row = int(example_order(key_of(entries), len(rows))[place["example"]])
    tokens = rows[[row], : place["pos"] + 1].long()
    frozen = FrozenPrompts(run.lm, tokens, run.transcoders.values())
    root = frozen.feature_target(studied_layer(run), feature, int(place["pos"]))
    graph = attribution_graph(frozen, [root])
    small = prune_to_size(graph, tokens.shape[1] + N_DRAWN)
    title = f"feature {feature} of layer {studied_layer(run)}"
    return save_figure(layered_graph(small, title), run.step(STEP), f"circuit_{study}")


def headline(studies: pd.DataFrame) -> pd.DataFrame:
    """One study a feature, of the transcoder: the restricted ones, as most of the paper's are."""
    own = studies[studies["dictionary"] == TRANSCODER]
    restricted = own[own["kind"] == "restricted"]
    return restricted if len(restricted) else own


def measured(run: Run) -> dict[str, Measured]:
    """Section 5.1's statistic."""
    table = headline(run.studies.table)
    n_good = int((table["grade"] != "failure").sum())
    return {"case_studies": studied(n_good, len(table), bool((table["n_active"] > 0).all()))}


def claims(run: Run) -> list[Line]:
    """Section 5.1's claim."""
    table = headline(run.studies.table)
    ours = table["grade"].value_counts().reindex(["success", "mostly", "failure"], fill_value=0)
    n_sayable = int((table["ceiling"] >= MOSTLY_F1).sum())
    line = decided(
        "case_studies",
        "5, 2, 2 of 9 (by hand, GPT-2)",
        f"{ours['success']}, {ours['mostly']}, {ours['failure']} of {len(table)} "
        "(success, mostly, failure; automatic investigator, graded on held-out text; of "
        f"{n_sayable} the language can say what they are, with the text before one's eyes)",
        measured(run)["case_studies"],
    )
    return [line]


def studied(n_good: int, n: int, all_fire: bool = True) -> Measured:
    """The share of studies that succeed, mostly or wholly, with Wilson's interval."""
    return Measured(n_good / n, *wilson_interval(n_good, n), all_fire)


def studies_in_words(run: Run) -> str:
    """Ours (Markdown)."""
    parts = []
    for (dictionary, kind), own in run.studies.table.groupby(["dictionary", "kind"], sort=False):
        good = own["grade"] != "failure"
        low, high = wilson_interval(int(good.sum()), len(own))
        parts.append(
            f"{int(good.sum())} of {len(own)} {kind} studies of {dictionary} features succeed, mostly or wholly "
            f"({low:.0%} to {high:.0%}); median F1 {own['f1'].median():.2f} between a floor of "
            f"{own['floor'].median():.2f} and a ceiling of {own['ceiling'].median():.2f}"
        )
    n_silent = int((run.studies.table["n_active"] == 0).sum())
    silent = f" {n_silent} never fire there and could not be graded." if n_silent else ""
    layer = int(run.studies.table["layer"].iloc[0])
    return f"*Ours:* {len(run.studies.table)} studies of layer {layer} by an automatic investigator: {'; '.join(parts)}.{silent}"


def leaks(run: Run) -> pd.DataFrame:
    """Answers that name tokens more often than chance, though no rule of the paper allows it."""
    found = run.studies.leaks
    return found[(found["p"] <= SURE_LEAK) & found["rule"].isna()]
