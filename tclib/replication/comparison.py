"""Notebook 05: are transcoder features more interpretable than SAE features? (paper Section 4.1, Table 1)

Live features of a transcoder and of SAEs on the MLP's input (the paper's) and output, at like L0, are drawn by seed.
The first of the transcoder's and of one SAE's are shuffled and shown without their origin: a person rates them
(`ratings`). All of them are rated by an automatic proxy: the simplest predicate that explains a feature's active
positions on one text, scored on another.

    pairs.csv     a line a kind: the dictionary's name, its L0, how many features are live, drawn, rated by hand
    items.csv     a line a feature: number (its place in the shuffled order), the proxy's scores and rating, and on the
                  demo world the known latent that it stands for best
    latents.csv   on the demo world: each known latent's best feature, for every kind
    origin.json   number to kind: kept apart from what a rater sees
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from tclib.blind.predicates import fit_predicate, score
from tclib.blind.ratings import Rating
from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation.metrics import l0, strong_threshold
from tclib.features.dashboard import build_dashboard
from tclib.features.examples import feature_activations, live_in_random_order
from tclib.features.html import dashboard_html, save_page
from tclib.figures.comparison import proxy_figure
from tclib.figures.style import save_figure
from tclib.models.language_model import LanguageModel
from tclib.replication.artifacts import Comparison, Trained
from tclib.replication.comparison_tables import (
    COMPARATORS,
    INTERPRETABLE_F1,
    ON_FEW_TOKENS,
    Hits,
    comparators,
    difference,
    interpretability,
    paper_hits,
    proxy_hits,
    proxy_shares,
    relative_l0,
)
from tclib.replication.known_latents import best_latent, latent_scores, latents_table
from tclib.replication.run import Run
from tclib.replication.verdicts import Line, Measured, claim_line, decided, verdict
from tclib.support.errors import InputError
from tclib.support.files import new_file
from tclib.support.progress import progress
from tclib.support.statistics import fisher_p
from tclib.support.steps import Step, ensure, write_csv

STEP = "05_interpretability_comparison"
N_SHOWN = 20
N_L0_ROWS = 16


def choose_matched(
    lm: LanguageModel,
    dictionaries: Mapping[str, Dictionary],
    rows: Int[Tensor, "row pos"],
    near_l0: float | None = None,
) -> dict[str, Dictionary]:
    """A transcoder and, of each site that has any, the SAE whose L0 is nearest to its own, by name of kind.

    Of all transcoders the one whose L0 is nearest to `near_l0` (by default the paper's share of d_model,
    `relative_l0`) and to its SAEs', in ratios; sums that agree to a ten-thousandth are a tie, which goes by
    name. Errors: `InputError` unless there is one of each.
    """
    l0s = mean_l0s(lm, dictionaries, rows)
    firing = {name: one.config.kind for name, one in dictionaries.items() if l0s[name]}
    kinds = [kind for kind in COMPARATORS if kind in firing.values()]
    found = []
    for name in (name for name, kind in firing.items() if kind == "transcoder"):
        wanted = near_l0 or relative_l0() * dictionaries[name].config.d_out
        nearest = [
            min(
                (l0_distance(l0s[other], l0s[name]), other)
                for other in firing
                if firing[other] == kind
            )
            for kind in kinds
        ]
        far = l0_distance(l0s[name], wanted) + sum(ratio for ratio, _ in nearest)
        found.append((round(far, 4), [name, *(other for _, other in nearest)]))
    if not (found and kinds):
        raise InputError(
            f"dictionaries with features that fire: {', '.join(sorted(set(firing.values()))) or 'none'}; "
            "expected a transcoder and an SAE"
        )
    return {firing[name]: dictionaries[name] for name in min(found)[1]}


def l0_distance(one: float, other: float) -> float:
    """How far apart two L0 are, in logarithms, to a ten-thousandth."""
    return round(abs(float(np.log(one / other))), 4)


@torch.no_grad()
def mean_l0s(
    lm: LanguageModel, dictionaries: Mapping[str, Dictionary], rows: Int[Tensor, "row pos"]
) -> dict[str, float]:
    """L0 of each dictionary over the first rows, BOS left out."""
    rows = rows[:N_L0_ROWS].long()
    sites = {dictionary.config.input_site for dictionary in dictionaries.values()}
    acts = lm.read(rows, sites)
    is_text = (rows != lm.bos_id).to(lm.device)
    return {
        name: l0(d.encode(acts[d.config.input_site][is_text])) for name, d in dictionaries.items()
    }


def make_comparison(run: Run) -> Comparison:
    """The artifacts of step 05, made once."""
    step, config = run.step(STEP), run.preset.comparison
    inputs = run.inputs(_full(run))

    def make() -> Mapping[str, Any]:
        names = {id(one): name for name, one in run.swept.dictionaries.items()}
        matched = comparison_pair(run)
        return _compare(run, matched, {kind: names[id(one)] for kind, one in matched.items()}, step)

    ensure(step, {**asdict(config), "seed": run.preset.seed}, inputs, make)
    return read_comparison(step.folder)


def read_comparison(folder: Path) -> Comparison:
    """The artifacts as they were written."""
    origin = json.loads((folder / "origin.json").read_text())
    tables = {name: pd.read_csv(folder / f"{name}.csv") for name in ("pairs", "items", "latents")}
    return Comparison(**tables, origin={int(i): kind for i, kind in origin.items()}, folder=folder)


def comparison_pair(run: Run) -> dict[str, Dictionary]:
    """The dictionaries whose features step 05 compares, by kind."""
    near_l0 = run.preset.comparison.near_l0
    return choose_matched(run.lm, _full(run).dictionaries, run.corpus.evaluation, near_l0)


def _full(run: Run) -> Trained:
    return run.swept.only({spec.name for spec in run.preset.sweep.full_specs()})


class _Drawn(NamedTuple):
    """Features of one kind, of how many live ones, and where they are active on both texts."""

    features: list[int]
    n_live: int
    acts: Float[Tensor, "feature row pos"]
    held_out_acts: Float[Tensor, "feature row pos"]


class _Place(NamedTuple):
    """One of a kind's drawn features, and whether raters see it."""

    kind: str
    i: int
    has_page: bool


def _compare(
    run: Run, matched: dict[str, Dictionary], names: Mapping[str, str], step: Step
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(run.preset.seed)
    drawn = {kind: _draw(run, one, generator) for kind, one in matched.items()}
    places = _shuffled(drawn, run.preset.comparison.n_rated, generator)
    f1, latent_names = latent_scores(run, matched)
    lines = []
    for number, (kind, i, has_page) in enumerate(progress(places, "features", unit="feature")):
        own, feature = drawn[kind], drawn[kind].features[i]
        if has_page:
            path = step.folder / f"item_{number}.html"
            _save_item(run, matched[kind], feature, own.acts[i], path, number)
        line = {"number": number, "has_page": has_page, "feature": feature}
        line |= _proxy_line(run, own.acts[i], own.held_out_acts[i])
        lines.append({**line, **best_latent(f1.get(kind), feature, latent_names)})
    pairs = _pairs(run, matched, names, drawn)
    write_csv(pairs, step, "pairs")
    write_csv(pd.DataFrame(lines), step, "items")
    write_csv(latents_table(f1, latent_names), step, "latents")
    with new_file(step.folder / "origin.json") as path:
        path.write_text(json.dumps({n: place.kind for n, place in enumerate(places)}))
    l0s = dict(zip(pairs["kind"], pairs["l0"], strict=True))
    return {"n_items": len(lines), "l0": l0s, "layer": run.preset.sweep.layer}


def _draw(run: Run, one: Dictionary, generator: torch.Generator) -> _Drawn:
    """As many live features as asked for, or all. Errors: `InputError` if fewer are live than are rated."""
    config = run.preset.comparison
    rows = run.corpus.train[: config.n_rows]
    held_out = run.corpus.evaluation[: config.n_held_out_rows]
    live = live_in_random_order(run.lm, one, rows, generator, config.min_log10_frequency)
    if len(live) < config.n_rated:
        raise InputError(
            f"comparison.n_rated {config.n_rated}: {one.config.kind} has {len(live)} live features on "
            f"{len(rows)} rows; rate fewer, or give more rows"
        )
    features = live[: config.n_features]
    acts = (feature_activations(run.lm, one, features, text) for text in (rows, held_out))
    return _Drawn(features, len(live), *acts)


def _shuffled(
    drawn: Mapping[str, _Drawn], n_rated: int, generator: torch.Generator
) -> list[_Place]:
    """The features that raters see in a random order, then the rest."""
    rated = [kind for kind in drawn if kind != "transcoder"][:1] + ["transcoder"]
    shown = [_Place(kind, i, True) for kind in drawn if kind in rated for i in range(n_rated)]
    rest = [
        _Place(kind, i, False)
        for kind, own in drawn.items()
        for i in range(n_rated if kind in rated else 0, len(own.features))
    ]
    order = torch.randperm(len(shown), generator=generator).tolist()
    return [*(shown[place] for place in order), *rest]


def _pairs(
    run: Run,
    matched: Mapping[str, Dictionary],
    names: Mapping[str, str],
    drawn: Mapping[str, _Drawn],
) -> pd.DataFrame:
    """What is compared, and of how many features."""
    l0s = mean_l0s(run.lm, matched, run.corpus.evaluation)
    lines = [
        {
            "kind": kind,
            "name": names[kind],
            "l0": l0s[kind],
            "l0_per_d_model": l0s[kind] / one.config.d_out,
            "n_features": one.config.n_features,
            "n_live": drawn[kind].n_live,
            "n_drawn": len(drawn[kind].features),
        }
        for kind, one in matched.items()
    ]
    return pd.DataFrame(lines)


def _save_item(
    run: Run,
    dictionary: Dictionary,
    feature: int,
    acts: Float[Tensor, "row pos"],
    path: Path,
    number: int,
) -> None:
    """One feature's page, which does not tell where it comes from."""
    rows = run.corpus.train[: run.preset.comparison.n_rows]
    board = build_dashboard(run.lm, dictionary, feature, rows, acts=acts, n_examples=N_SHOWN)
    # Both kinds have logits; any other table would tell which this is.
    board = replace(board, tables={"logits": board.tables["logits"]})
    save_page(path, [dashboard_html(board, f"Item {number + 1}")], "item")


# ---------------------------------------------------------------------------------------------
# The proxy


def _proxy_line(
    run: Run, acts: Float[Tensor, "row pos"], held_acts: Float[Tensor, "held_row pos"]
) -> dict[str, Any]:
    config, corpus = run.preset.comparison, run.corpus
    n_rows = min(config.n_fit_rows, len(acts))
    rows, held_out = corpus.train[:n_rows], corpus.evaluation[: config.n_held_out_rows]
    return proxy_rating(rows, acts[:n_rows], held_out, held_acts, run.lm.bos_id)


def proxy_rating(
    rows: Int[Tensor, "row pos"],
    acts: Float[Tensor, "row pos"],
    held_out: Int[Tensor, "held_row pos"],
    held_acts: Float[Tensor, "held_row pos"],
    bos_id: int,
) -> dict[str, Any]:
    """The simplest predicate on one text, scored on the other: predicate, context_free, n_tokens, f1, auroc, rating.

    Active means above a quarter of the maximum on the first text, BOS left out of both. A feature that is
    never active on one of them has no score and counts as `not`. `n_tokens` is how many tokens a
    context-free predicate names; 0 for others.
    """
    acts, held_acts = acts.where(rows != bos_id, 0.0), held_acts.where(held_out != bos_id, 0.0)
    threshold = strong_threshold(acts)
    line: dict[str, Any] = {"predicate": "", "context_free": False, "n_tokens": 0}
    unscored = {"f1": np.nan, "auroc": np.nan, "rating": "not"}
    if not bool((acts > threshold).any()):
        return {**line, **unscored}
    predicate = fit_predicate(rows, acts, bos_id, threshold)
    line = {"predicate": json.dumps(predicate.as_dict()), "context_free": predicate.is_context_free}
    line["n_tokens"] = len(predicate.current or ()) if predicate.is_context_free else 0
    if not bool((held_acts > threshold).any()):
        return {**line, **unscored}
    found = score(predicate.holds(held_out, bos_id), held_acts, held_out != bos_id, threshold)
    return {**line, "f1": found.f1, "auroc": found.auroc, "rating": rating_of(found.f1)}


def rating_of(f1: float, interpretable: float = INTERPRETABLE_F1) -> Rating:
    """`interpretable` from the threshold on, `maybe` from half of it, else `not`."""
    if f1 >= interpretable:
        return "interpretable"
    return "maybe" if f1 >= interpretable / 2 else "not"


# ---------------------------------------------------------------------------------------------
# What it comes to


def proxy_shares_figure(run: Run) -> Figure:
    """Interpretable and context-free shares by the proxy's threshold."""
    shares = proxy_shares(run.comparison)
    return save_figure(proxy_figure(shares), run.step(STEP), "proxy")


def measured(run: Run) -> dict[str, Measured]:
    """Table 1's statistic, by the proxy: against the SAE of the paper's place, and against the other."""
    first, *others = comparators(run.comparison)
    names = {first: "interpretability", **{sae: f"interpretability ({sae})" for sae in others}}
    return {
        name: interpretability(*proxy_hits(run.comparison, "interpretable", sae))
        for sae, name in names.items()
    }


def claims(run: Run) -> list[Line]:
    """Section 4.1's claims, by the proxy and on the demo world by known latents."""
    comparison = run.comparison
    ours = "; ".join(
        _in_words(sae, *proxy_hits(comparison, "interpretable", sae))
        for sae in comparators(comparison)
    )
    lines = [
        decided(
            "interpretability",
            "41 of 50 against 38 of 50 (by hand, Pythia-410M)",
            f"by an automatic proxy, {ours}",
            measured(run)["interpretability"],
        ),
        _context_free_claim(comparison),
    ]
    return lines + ([_latent_claim(comparison)] if len(comparison.latents) else [])


def _in_words(sae: str, own: Hits, other: Hits) -> str:
    return (
        f"{own.n_hits} of {own.n} against {other.n_hits} of {other.n} ({sae}): "
        f"{difference(own, other).in_words}, Fisher's p {fisher_p(*own, *other):.2g}"
    )


def _context_free_claim(comparison: Comparison) -> Line:
    """The paper's second count, against the SAE of its place."""
    sae = comparators(comparison)[0]
    found = difference(*proxy_hits(comparison, "interpretable and context-free", sae))
    few = [f"{hits.n_hits} of {hits.n}" for hits in proxy_hits(comparison, ON_FEW_TOKENS, sae)]
    return claim_line(
        "Table 1: fewer transcoder than SAE features are context-free",
        "6 of 50 against 16 of 50 (by hand, Pythia-410M)",
        f"by an automatic proxy, {_in_words(sae, *proxy_hits(comparison, 'interpretable and context-free', sae))}; "
        f"on one or two tokens {few[0]} against {few[1]}",
        "fewer" if found.high < 0 else "more" if found.low > 0 else "no difference seen",
    )


def _latent_claim(comparison: Comparison) -> Line:
    """Known latents, in the same order of kinds."""
    mean = comparison.latents.groupby("kind")["f1"].mean()
    kinds = ["transcoder", *comparators(comparison)]
    is_ahead = mean["transcoder"] >= mean[kinds[1]]
    return claim_line(
        "Known latents: mean F1 of the best feature",
        "not published",
        f"{', '.join(f'{kind} {mean[kind]:.3f}' for kind in kinds)} over "
        f"{comparison.latents['latent'].nunique()} latents",
        "transcoders ahead" if is_ahead else "SAE ahead",
    )


def pairs_in_words(comparison: Comparison) -> str:
    """Which dictionaries are compared, at which L0, and of how many features (Markdown)."""
    said = [
        f"{one.kind} `{one.name}`: L0 {one.l0:.1f} ({one.l0_per_d_model:.3f} of d_model), "
        f"{one.n_drawn} of {one.n_live} live features drawn"
        for one in comparison.pairs.itertuples()
    ]
    return (
        "; ".join(said)
        + f". The paper's: transcoder L0 44.04 ({relative_l0():.3f} of d_model), SAE on the MLP's input 47.85."
    )


def comparison_in_words(run: Run) -> str:
    """Paper and ours (Markdown)."""
    comparison = run.comparison
    found = measured(run)["interpretability"]
    paper = [paper_hits("interpretable", kind) for kind in ("transcoder", COMPARATORS[0])]
    free = [
        paper_hits("interpretable and context-free", kind)
        for kind in ("transcoder", COMPARATORS[0])
    ]
    ours = "; ".join(
        _in_words(sae, *proxy_hits(comparison, "interpretable", sae))
        for sae in comparators(comparison)
    )
    claim = _context_free_claim(comparison)
    return (
        f"*Paper:* {_in_words(COMPARATORS[0], *paper)}; context-free "
        f"{_in_words(COMPARATORS[0], *free)} (rated by hand, Pythia-410M). *Ours:* {ours}: "
        f"{verdict('interpretability', found)}. Context-free: {claim['ours']}: {claim['verdict']}."
    )
