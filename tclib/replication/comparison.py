"""Notebook 05: are transcoder features more interpretable than SAE features? (paper Section 4.1, Table 1)

Live features of both kinds are drawn by seed, shuffled, and shown without their origin. A person rates them
(`ratings`); where there is none, an automatic proxy stands in: the simplest predicate that explains a feature's
active positions on one text, scored on another.

    items.csv     a line a feature: number (its place in the shuffled order), the proxy's scores and rating
    latents.csv   on the demo world: each known latent's best feature, for both kinds
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

from tclib.blind.latents import LabelledRows, label_scores, labelled_rows, recovered_latents
from tclib.blind.predicates import fit_predicate, score
from tclib.blind.ratings import Rating
from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.kinds import Kind
from tclib.evaluation.metrics import ACTIVE_SHARE, l0, strong_threshold
from tclib.features.dashboard import build_dashboard
from tclib.features.examples import feature_activations, live_features
from tclib.features.html import dashboard_html, save_page
from tclib.figures.comparison import proxy_figure
from tclib.figures.style import save_figure
from tclib.models.language_model import LanguageModel
from tclib.replication.artifacts import Comparison
from tclib.replication.paper import paper_table
from tclib.replication.run import Run
from tclib.replication.verdicts import Line, Measured, claim_line, decided, verdict
from tclib.support.errors import InputError
from tclib.support.files import new_file
from tclib.support.progress import progress
from tclib.support.statistics import fisher_p, newcombe_interval, wilson_interval
from tclib.support.steps import Step, ensure, write_csv

STEP = "05_interpretability_comparison"
COMPARATOR: Kind = "sae_mlp_in"
INTERPRETABLE_F1 = 0.6
MIN_INTERPRETABLE = 0.2  # of the features of one kind, for a difference to mean anything
SENSITIVITY = (0.4, 0.5, 0.6, 0.7, 0.8)
N_SHOWN = 20
N_L0_ROWS = 16
ACTS_AT_ONCE = 2**26  # half a gibibyte in float64


def choose_pair(
    lm: LanguageModel,
    dictionaries: Mapping[str, Dictionary],
    rows: Int[Tensor, "row pos"],
    near_l0: float | None = None,
) -> dict[str, Dictionary]:
    """A transcoder and an SAE of one layer whose L0 are nearest to each other, by name of kind.

    The SAE is on the MLP's input, as in the paper's Table 1, where there is one. With `near_l0`, nearest
    to each other and to it; distances that agree to a ten-thousandth are a tie, which goes by name. Errors: `InputError` unless there is one of each.
    """
    l0 = _l0s(lm, dictionaries, rows)
    kinds = {name: dictionary.config.kind for name, dictionary in dictionaries.items()}
    against = COMPARATOR if COMPARATOR in kinds.values() else "sae_mlp_out"
    pairs = [
        (round(abs(np.log(l0[one] / l0[other])) + _distance(l0[one], near_l0), 4), one, other)
        for one in dictionaries
        for other in dictionaries
        if kinds[one] == "transcoder" and kinds[other] == against and l0[one] and l0[other]
    ]
    if not pairs:
        firing = sorted({kinds[name] for name in dictionaries if l0[name]})
        raise InputError(
            f"dictionaries with features that fire: {', '.join(firing) or 'none'}; expected a transcoder and "
            "an SAE"
        )
    _, one, other = min(pairs)
    return {kinds[name]: dictionaries[name] for name in (one, other)}


def _distance(l0: float, wanted: float | None) -> float:
    return 0.0 if wanted is None else abs(float(np.log(l0 / wanted)))


@torch.no_grad()
def _l0s(
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
    swept = run.swept.only({spec.name for spec in run.preset.sweep.full_specs()})
    inputs = run.inputs(swept)

    def make() -> Mapping[str, Any]:
        rows = run.corpus.evaluation
        pair = choose_pair(run.lm, swept.dictionaries, rows, config.near_l0)
        return _compare(run, pair, step)

    ensure(step, {**asdict(config), "seed": run.preset.seed}, inputs, make)
    origin = json.loads((step.folder / "origin.json").read_text())
    return Comparison(
        items=pd.read_csv(step.folder / "items.csv"),
        latents=pd.read_csv(step.folder / "latents.csv"),
        origin={int(number): kind for number, kind in origin.items()},
        folder=step.folder,
    )


class _Drawn(NamedTuple):
    """Features of one kind, and where they are active on both texts."""

    features: list[int]
    acts: Float[Tensor, "feature row pos"]
    held_out_acts: Float[Tensor, "feature row pos"]


def _compare(run: Run, pair: dict[str, Dictionary], step: Step) -> dict[str, Any]:
    config, lm = run.preset.comparison, run.lm
    rows = run.corpus.train[: config.n_rows]
    held_out = run.corpus.evaluation[: config.n_held_out_rows]
    generator = torch.Generator().manual_seed(run.preset.seed)
    drawn = {}
    for kind, one in pair.items():
        least = config.min_log10_frequency
        features = live_features(lm, one, rows, config.n_features, generator, least)
        drawn[kind] = _Drawn(
            features, *(feature_activations(lm, one, features, text) for text in (rows, held_out))
        )
    places = [(kind, i) for kind in pair for i in range(config.n_features)]
    order = torch.randperm(len(places), generator=generator).tolist()
    lines, origin = [], {}
    for number, place in enumerate(progress(order, "features", unit="feature")):
        kind, i = places[place]
        origin[number] = kind
        feature, own = drawn[kind].features[i], drawn[kind].acts[i]
        _save_item(run, pair[kind], feature, own, step.folder / f"item_{number}.html", number)
        proxy = proxy_rating(rows, own, held_out, drawn[kind].held_out_acts[i], lm.bos_id)
        lines.append({"number": number, "feature": feature, **proxy})
    write_csv(pd.DataFrame(lines), step, "items")
    write_csv(_latents(run, pair), step, "latents")
    with new_file(step.folder / "origin.json") as path:
        path.write_text(json.dumps(origin))
    l0s = _l0s(lm, pair, run.corpus.evaluation)
    return {"n_items": len(lines), "l0": l0s, "layer": next(iter(pair.values())).config.layer}


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


def proxy_rating(
    rows: Int[Tensor, "row pos"],
    acts: Float[Tensor, "row pos"],
    held_out: Int[Tensor, "held_row pos"],
    held_acts: Float[Tensor, "held_row pos"],
    bos_id: int,
) -> dict[str, Any]:
    """The simplest predicate on one text, scored on the other: predicate, f1, auroc, rating, context_free.

    Active means above a quarter of the maximum on the first text. A feature that is never active on the
    second has no score and counts as `not`.
    """
    threshold = strong_threshold(acts)
    predicate = fit_predicate(rows, acts, bos_id, threshold)
    line: dict[str, Any] = {"predicate": json.dumps(predicate.as_dict())}
    line["context_free"] = predicate.is_context_free
    if not bool((held_acts > threshold).any()):
        return {**line, "f1": np.nan, "auroc": np.nan, "rating": "not"}
    found = score(predicate.holds(held_out, bos_id), held_acts, held_out != bos_id, threshold)
    return {**line, "f1": found.f1, "auroc": found.auroc, "rating": rating_of(found.f1)}


def rating_of(f1: float, interpretable: float = INTERPRETABLE_F1) -> Rating:
    """`interpretable` from the threshold on, `maybe` from half of it, else `not`."""
    if f1 >= interpretable:
        return "interpretable"
    return "maybe" if f1 >= interpretable / 2 else "not"


def proxy_shares(comparison: Comparison) -> pd.DataFrame:
    """Share interpretable and context-free by kind, with 95 % intervals (Wilson), at several thresholds.

    Columns: kind, threshold, interpretable, low, high, context_free.
    """
    lines = []
    for kind, own in _items_by_kind(comparison):
        f1 = own["f1"].fillna(0.0).to_numpy()
        for threshold in SENSITIVITY:
            passes = f1 >= threshold
            low, high = wilson_interval(int(passes.sum()), len(passes))
            lines.append(
                {
                    "kind": kind,
                    "threshold": threshold,
                    "interpretable": passes.mean(),
                    "low": low,
                    "high": high,
                    "context_free": float((own["context_free"] & passes).mean()),
                }
            )
    return pd.DataFrame(lines)


class Hits(NamedTuple):
    """How many of a kind's features are interpretable, of how many."""

    n_hits: int
    n: int


def interpretable(comparison: Comparison) -> tuple[Hits, Hits]:
    """Interpretable features of the transcoder and of the SAE, by the proxy."""
    found = {
        kind: Hits(int((own["f1"].fillna(0.0) >= INTERPRETABLE_F1).sum()), len(own))
        for kind, own in _items_by_kind(comparison)
    }
    (sae,) = (hits for kind, hits in found.items() if kind != "transcoder")
    return found["transcoder"], sae


def interpretability(one: Hits, other: Hits) -> Measured:
    """The difference of two shares with Newcombe's interval; applicable if any of either is interpretable."""
    low, high = newcombe_interval(*one, *other)
    shares = one.n_hits / one.n, other.n_hits / other.n
    return Measured(shares[0] - shares[1], low, high, max(shares) >= MIN_INTERPRETABLE)


def _items_by_kind(comparison: Comparison) -> Any:
    kinds = comparison.items["number"].map(comparison.origin)
    return comparison.items.assign(kind=kinds).groupby("kind")


# ---------------------------------------------------------------------------------------------
# Known latents


def _latents(run: Run, pair: dict[str, Dictionary]) -> pd.DataFrame:
    """`recovered_latents` of both kinds, over latents with at least fifty positions; empty off the demo world."""
    columns = ["kind", "latent", "best_feature", "f1", "n_features"]
    lm, corpus = run.lm, run.preset.corpus
    if corpus.kind != "demo":
        return pd.DataFrame(columns=columns)
    n_rows = run.preset.comparison.n_held_out_rows
    labelled = labelled_rows(lm, n_rows, corpus.n_ctx, corpus.seed, corpus.eval_fraction)
    counts = torch.bincount(
        labelled.label[labelled.label >= 0].long(), minlength=len(labelled.names)
    )
    common = (counts >= 50).numpy()
    tables = []
    for kind, dictionary in pair.items():
        f1 = _all_feature_scores(lm, dictionary, labelled)[:, common]
        names = tuple(np.array(labelled.names)[common])
        tables.append(recovered_latents(f1, names).assign(kind=kind))
    return pd.concat(tables, ignore_index=True)[columns]


def _all_feature_scores(
    lm: LanguageModel, dictionary: Dictionary, labelled: LabelledRows
) -> Float[np.ndarray, "feature label"]:
    """F1 of every feature with every latent; the model reads the rows once for as many features as fit."""
    found = []
    at_once = max(1, ACTS_AT_ONCE // labelled.rows.numel())
    for start in range(0, dictionary.config.n_features, at_once):
        features = range(start, min(start + at_once, dictionary.config.n_features))
        acts = feature_activations(lm, dictionary, features, labelled.rows)
        largest = acts.amax((1, 2), keepdim=True)
        found.append(label_scores((acts > ACTIVE_SHARE * largest) & (largest > 0), labelled))
    return np.concatenate(found)


def paper_table_1() -> pd.DataFrame:
    """The paper's Table 1."""
    return pd.DataFrame(paper_table("table1"))


def latent_summary(comparison: Comparison) -> pd.DataFrame:
    """How many latents each kind recovers, and how many of its features share one."""
    return comparison.latents.groupby("kind").agg(
        latents=("latent", "size"),
        mean_f1=("f1", "mean"),
        recovered=("f1", lambda f1: int((f1 >= 0.5).sum())),
        features_sharing=("n_features", "mean"),
    )


def latent_differences(comparison: Comparison) -> pd.DataFrame:
    """F1 of each latent's best feature by kind, and transcoder minus SAE."""
    wide = comparison.latents.pivot(index="latent", columns="kind", values="f1")
    other = wide.drop(columns="transcoder").iloc[:, 0]
    return wide.assign(difference=wide["transcoder"] - other).sort_values("difference")


def proxy_shares_figure(run: Run) -> Figure:
    """Interpretable and context-free shares by the proxy's threshold."""
    shares = proxy_shares(run.comparison)
    return save_figure(proxy_figure(shares), run.step(STEP), "proxy")


def measured(run: Run) -> dict[str, Measured]:
    """Table 1's statistic, by the proxy."""
    return {"interpretability": interpretability(*interpretable(run.comparison))}


def claims(run: Run) -> list[Line]:
    """Section 4.1's claim, by the proxy and on the demo world by known latents."""
    comparison = run.comparison
    transcoder, sae = interpretable(comparison)
    measured = interpretability(transcoder, sae)
    lines = [
        decided(
            "interpretability",
            "41 of 50 against 38 of 50 (by hand, Pythia-410M)",
            f"{transcoder.n_hits} of {transcoder.n} against {sae.n_hits} of {sae.n} by an automatic proxy: "
            f"{measured.in_words}; Fisher's p {fisher_p(*transcoder, *sae):.2f}",
            measured,
        )
    ]
    if len(comparison.latents):
        mean = comparison.latents.groupby("kind")["f1"].mean()
        ours = ", ".join(f"{kind} {f1:.3f}" for kind, f1 in mean.items())
        is_ahead = mean["transcoder"] >= mean.drop("transcoder").iloc[0]
        lines.append(
            claim_line(
                "Known latents: mean F1 of the best feature",
                "not published",
                f"{ours} over {comparison.latents['latent'].nunique()} latents",
                "transcoders ahead" if is_ahead else "SAE ahead",
            )
        )
    return lines


def comparison_in_words(run: Run) -> str:
    """Paper and ours (Markdown)."""
    paper = paper_table_1().set_index("kind")
    shares = proxy_shares(run.comparison)
    own = shares[shares["threshold"] == INTERPRETABLE_F1].set_index("kind")
    measured = interpretability(*interpretable(run.comparison))
    ours = "; ".join(
        f"{kind} {line.interpretable:.0%} ({line.low:.0%} to {line.high:.0%}), interpretable and "
        f"context-free {line.context_free:.0%}"
        for kind, line in own.iterrows()
    )
    published = "; ".join(
        f"{kind} {int(line.interpretable)} of 50, context-free {int(line.context_free)}"
        for kind, line in paper.iterrows()
    )
    return (
        f"*Paper:* {published} (rated by hand, Pythia-410M). *Ours:* {ours}; difference "
        f"{measured.in_words}: {verdict('interpretability', measured)}. That fewer of the transcoder's are "
        f"context-free is {'' if _fewer_are_context_free(own) else 'not '}seen."
    )


def _fewer_are_context_free(own: pd.DataFrame) -> bool:
    """Whether the paper's second count, 6 against 16, comes out the same way round."""
    shares = own["context_free"]
    return bool(shares["transcoder"] < shares.drop("transcoder").iloc[0])
