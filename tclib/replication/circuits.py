"""Notebook 03: one prompt's attribution graph, and how far its connections hold over a corpus and in the model.

closure.csv       value, sum of sources and residual of every node of the graph
connections.csv   pullback against mean pullback, features of every layer against every layer below
ablations.csv     every feature of the graph taken out of the model by itself, beside four predictions
faithfulness.csv  circuits kept alone and taken out, on several prompts, over their size
nodes.parquet, edges.parquet   the full graph; graph.json the pruned one; viewer/ for circuit-tracer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from tclib.circuits.derivatives import FOLLOWS
from tclib.circuits.faithfulness import Metric, faithfulness_curves, faithfulness_summary
from tclib.circuits.files import load_json, load_parquet, save_for_viewer, save_json, save_parquet
from tclib.circuits.frozen import FrozenPrompts, Target
from tclib.circuits.graph import (
    BIAS_KINDS,
    INPUT_KINDS,
    AttributionGraph,
    attribution_graph,
)
from tclib.circuits.interventions import PREDICTIONS, ablation_table, prediction_table
from tclib.circuits.prune import prune_to_size
from tclib.circuits.sources import Sources
from tclib.features.connections import compare_connections
from tclib.features.examples import live_features
from tclib.features.from_weights import (
    Head,
    de_embedding,
    direct_logit_attribution,
    extended_de_embedding,
    feature_table,
    ov_norms,
    pullback,
    token_table,
)
from tclib.figures.circuits import (
    connection_agreement,
    faithfulness_over_size,
    head_heatmap,
    predicted_against_actual,
    score_bars,
)
from tclib.figures.graph import layered_graph
from tclib.figures.style import save_figure
from tclib.greater_than.task import GreaterThan
from tclib.models.language_model import LanguageModel
from tclib.replication.artifacts import Circuits, Explained
from tclib.replication.model_and_data import first_sentence
from tclib.replication.paper import paper_table
from tclib.replication.run import Run
from tclib.replication.verdicts import Line, claim_line
from tclib.support.errors import InputError
from tclib.support.statistics import ranked
from tclib.support.steps import ensure, write_csv

STEP = "03_circuit_tools"
LOGITS, PROBABILITIES = "logit difference", "probability difference"
WITH_BIASES = INPUT_KINDS | BIAS_KINDS  # nodes of the pruned graph, so that none goes unseen


def explain_prompt(run: Run) -> Explained:
    """The preset's greater-than prompt, and the root: mean later logit minus mean earlier one.

    Errors: `InputError` for fewer than two transcoders, between which there is nothing to connect.
    """
    if len(run.transcoders) < 2:
        raise InputError(
            f"{len(run.transcoders)} transcoders at preset {run.preset.name}: circuits need two layers or more"
        )
    return _explain(run, first_sentence(run), run.preset.circuits.year)


def _explain(run: Run, task: GreaterThan, year: int) -> Explained:
    frozen = FrozenPrompts(run.lm, task.tokens[[task.prompt_index(year)]], run.transcoders.values())
    return Explained(
        frozen, frozen.logit_target(task.root_weights(year), -1, name="later − earlier")
    )


def strongest_feature(found: Sources) -> tuple[int, int, int]:
    """Layer, feature and token of the strongest source that stands over another layer's feature.

    Errors: `InputError` if there is none: two features are needed for a connection between them.
    """
    features = found.table.query("kind == 'feature'")
    usable = features[features["layer"] > features["layer"].min()]
    if usable.empty:
        layers = sorted(set(features["layer"])) or "none"
        raise InputError(
            f"features at the prompt's last token: layers {layers}, two are needed; make transcoders less "
            "sparse, choose another circuits.year, or skip notebook 03"
        )
    strongest = usable.iloc[ranked(usable["contribution"])[0]]
    layer, feature, pos = strongest[["layer", "feature", "pos"]]
    return int(layer), int(feature), int(pos)


def make_circuits(run: Run) -> Circuits:
    """The artifacts of step 03, made once; the pruned graph by the preset's one rule."""
    step, config = run.step(STEP), run.preset.circuits
    inputs = run.inputs(run.trained)
    template = run.preset.greater_than.templates[0]
    parameters = {**asdict(config), "template": template, "seed": run.preset.seed}

    def make() -> Mapping[str, Any]:
        frozen, root = run.prompt
        graph, small = _graphs(run, run.prompt)
        write_csv(graph.closure(), step, "closure")
        write_csv(connection_table(run), step, "connections")
        write_csv(ablation_table(frozen, graph, root), step, "ablations")
        write_csv(faithfulness_table(run), step, "faithfulness")
        save_parquet(graph, step.folder)
        save_json(small, step.folder / "graph.json")
        save_for_viewer(small, step.folder / "viewer", "greater-than")
        return {"n_nodes": len(graph.nodes), "n_pruned": len(small.nodes)}

    ensure(step, parameters, inputs, make)
    return Circuits(
        graph=load_parquet(step.folder),
        small=load_json(step.folder / "graph.json"),
        connections=pd.read_csv(step.folder / "connections.csv"),
        ablations=pd.read_csv(step.folder / "ablations.csv"),
        faithfulness=pd.read_csv(step.folder / "faithfulness.csv"),
        step=step,
    )


def _graphs(run: Run, explained: Explained) -> tuple[AttributionGraph, AttributionGraph]:
    """The full graph, and the pruned one."""
    config = run.preset.circuits
    graph = attribution_graph(explained.frozen, [explained.root])
    rule = (config.max_nodes, config.node_threshold, config.edge_threshold)
    return graph, prune_to_size(graph, *rule, counted=WITH_BIASES)


def faithfulness_table(run: Run) -> pd.DataFrame:
    """`faithfulness_curves` of the preset's prompt and of others, drawn by a random order of all."""
    config, seed, task = run.preset.circuits, run.preset.seed, first_sentence(run)
    years = np.random.default_rng(seed).permutation(task.scored().numbers).tolist()
    years = [config.year, *(year for year in years if year != config.year)]
    found = []
    for year in years[: config.n_prompts]:
        explained = run.prompt if year == config.year else _explain(run, task, year)
        metrics = circuit_metrics(run.lm, task.subset([task.prompt_index(year)]), explained.root)
        graphs = _graphs(run, explained)
        n_draws = config.n_random_circuits
        curves = faithfulness_curves(
            explained.frozen, *graphs, explained.root, metrics, n_draws, seed
        )
        found.append(curves.assign(prompt=year))
    return pd.concat(found, ignore_index=True)


def circuit_metrics(lm: LanguageModel, task: GreaterThan, root: Target) -> dict[str, Metric]:
    """The root's value and the probability difference of one prompt, of what the unembedding reads."""
    W_U, b_U = lm.unembedding(task.answer_ids), lm.b_U[task.answer_ids]

    def difference(read: Float[Tensor, "circuit d_model"]) -> Float[Tensor, "circuit"]:
        return task.differences((read @ W_U + b_U).softmax(-1)[:, None])[:, 0]

    return {LOGITS: lambda read: root.constant + read @ root.direction, PROBABILITIES: difference}


def connection_table(run: Run) -> pd.DataFrame:
    """`compare_connections` of every pair of layers, on seeded live features and held-out rows."""
    config, lm = run.preset.circuits, run.lm
    rows = run.corpus.evaluation[: config.n_connection_rows]
    by_layer = sorted(run.transcoders.values(), key=lambda d: d.config.layer)
    generator = torch.Generator().manual_seed(run.preset.seed)
    n, least = config.n_connection_features, config.min_log10_frequency
    drawn = {d.config.layer: live_features(lm, d, rows, n, generator, least) for d in by_layer[1:]}
    tables = [
        compare_connections(
            lm, later, drawn[later.config.layer], by_layer[:n_below], rows, generator
        )
        for n_below, later in enumerate(by_layer)
        if n_below
    ]
    order = ["earlier_layer", "layer"]
    return pd.concat(tables).sort_values(order, kind="stable", ignore_index=True)


# ---------------------------------------------------------------------------------------------
# Figures, each from the artifact that the step saved


def feature_views_figure(run: Run, layer: int, feature: int) -> Figure:
    """What excites one feature, and what it promotes, from weights alone."""
    lm, later = run.lm, run.prompt.frozen.transcoders[layer]
    norms = ov_norms(lm, later, feature)
    head = Head(*divmod(int(ranked(norms.flatten())[0]), norms.shape[1]))
    views = {
        "de-embedding": de_embedding(lm, later, feature),
        "extended de-embedding": extended_de_embedding(lm, later, feature),
        f"through head {head.layer}.{head.head}": de_embedding(lm, later, feature, head),
        "direct logit attribution": direct_logit_attribution(lm, later, feature),
    }
    tables = {name: token_table(lm, scores, k=8) for name, scores in views.items()}
    # Not every layer need have a transcoder.
    below = max(lower for lower in run.prompt.frozen.transcoders if lower < layer)
    strongest = pullback(lm, later, feature, run.prompt.frozen.transcoders[below])
    tables[f"pullback onto layer {below}"] = feature_table(strongest, k=16)
    return save_figure(score_bars(tables), run.circuits.step, "feature_views")


def ov_norm_figure(run: Run, layer: int, feature: int) -> Figure:
    """How strongly each head could feed the feature."""
    norms = ov_norms(run.lm, run.prompt.frozen.transcoders[layer], feature).cpu().numpy()
    figure = head_heatmap(norms, f"OV norms of feature {feature}, layer {layer}")
    return save_figure(figure, run.circuits.step, "ov_norms")


def graph_figure(run: Run) -> Figure:
    """The pruned graph, layers up, tokens across."""
    figure = layered_graph(run.circuits.small, f"{run.prompt.root.name} on the prompt")
    return save_figure(figure, run.circuits.step, "attribution_graph")


def connections_figure(run: Run) -> Figure:
    """Overlaps of input-invariant and input-dependent connections, the paper's beside ours."""
    figure = connection_agreement(run.circuits.connections, paper_overlaps())
    return save_figure(figure, run.circuits.step, "connections")


def prediction_figure(run: Run) -> Figure:
    """Predicted against measured change of the root."""
    panels = {str(follow): column for follow, column in PREDICTIONS.items()}
    unit = f"{run.prompt.root.name}, logits"
    figure = predicted_against_actual(run.circuits.ablations, panels, unit)
    return save_figure(figure, run.circuits.step, "predictions")


def faithfulness_figure(run: Run) -> Figure:
    """Circuits kept alone and taken out, over their size."""
    summary = faithfulness_summary(run.circuits.faithfulness)
    figure = faithfulness_over_size(summary[summary["metric"] == LOGITS])
    return save_figure(figure, run.circuits.step, "faithfulness")


def faithfulness_shown(run: Run) -> pd.DataFrame:
    """Scores of circuits of the pruned graph's size, with their spread: kinds by direction, metric, errors."""
    summary = faithfulness_summary(run.circuits.faithfulness).query("is_pruned_size")
    scores = [_score(line) for line in summary.to_dict("records")]
    columns = ["direction", "metric", "errors"]
    wide = summary.assign(score=scores).pivot(index=columns, columns="kind", values="score")
    return wide[["pruned graph", "graph", "gradient", "random", "neurons"]].fillna("")


def predictions_shown(run: Run) -> pd.DataFrame:
    """How well each prediction does: rows of layers, columns of what follows a change."""
    table = prediction_table(run.circuits.ablations).drop(columns="median_change")
    wide = table.pivot(index=["layer", "n_features"], columns="follows")
    shown = wide[["rank_correlation", "slope", "median_miss"]].reindex(columns=FOLLOWS, level=1)
    return shown.loc[table["layer"].unique()].map(lambda value: f"{value:.2g}")


# ---------------------------------------------------------------------------------------------
# Words and claims


def graph_in_words(run: Run) -> str:
    """Ours, of the layered graph (Markdown)."""
    graph, small = run.circuits.graph, run.circuits.small
    kinds = small.nodes["kind"].value_counts()
    counts = ", ".join(f"{n} {str(kind).replace('_', ' ')}" for kind, n in kinds.items())
    influence = graph.nodes[~graph.is_root]["influence"].sum()
    kept = small.nodes[~small.is_root]["influence"].sum() / influence
    left_out = float(np.abs(small.left_out).sum() / np.abs(graph.edges.double()).sum())
    return (
        f"*Ours:* {counts}, of {len(graph.nodes)} nodes; they carry {kept:.0%} of the influence of features, "
        "errors and tokens. All kinds of source, both signs; what is pruned away is kept as a sum at each "
        f"target (net {left_out:.0%} of all effects)."
    )


def connections_in_words(run: Run) -> str:
    """Paper and ours, of the agreement figure (Markdown)."""
    connections = run.circuits.connections
    claim = connections_claim(connections)
    n_features = connections.groupby("layer")["feature"].nunique().sum()
    return (
        f"*Paper:* {claim['paper']}, of 24,576 features. *Ours:* {claim['ours']}; {n_features} features drawn "
        "by seed, tokens where a feature exceeds the 20th percentile of its positive activations. Among the "
        f"features that are active there (on average {connections['n_candidates'].mean():.0f}) the overlap is "
        f"{_overlaps(connections, 'active_')}, with random decoders {_overlaps(connections, 'random_active_')}."
    )


def _overlaps(connections: pd.DataFrame, prefix: str = "") -> str:
    ks = [name for name in map(str, connections) if name.startswith("overlap_")]
    return "/".join(f"{connections[prefix + name].mean():.0%}" for name in ks)


def faithfulness_in_words(run: Run) -> str:
    """Ours, of the figure of circuits (Markdown)."""
    curves = run.circuits.faithfulness
    ends = curves[(curves["kind"] == "all") & (curves["metric"] == LOGITS)]
    values = ends.assign(end=np.where(ends["k"] > 0, "all", "none"))
    means = values.groupby(["end", "errors"])["value"].mean()
    none, everything = means["none"], means["all"]
    said = {"kept": "features with errors", "dropped": "features alone", "none": "neurons"}
    sizes = ", ".join(
        f"{what} {none[errors]:.2f} to {everything[errors]:.2f}" for errors, what in said.items()
    )
    features = ends[(ends["errors"] == "kept") & (ends["k"] > 0)]["k"]
    return (
        f"*Paper:* not published. *Ours:* {curves['prompt'].nunique()} prompts of {features.min()} to "
        f"{features.max()} active features, random circuits from {curves['draw'].max() + 1} orders each; "
        "bands: 95 % over resampled prompts, of random circuits over their orders. From the empty circuit "
        f"(score 0) to the full one (1) the root goes, in logits: {sizes}."
    )


def predictions_in_words(run: Run) -> str:
    """Ours, of the intervention figure (Markdown)."""
    return f"*Ours:* {prediction_claim(run.circuits.ablations)['ours']}."


def claims(run: Run) -> list[Line]:
    """Sums that close, connections, circuits kept alone and taken out, predictions."""
    return [
        closure_claim(run.circuits.graph.closure()),
        connections_claim(run.circuits.connections),
        *faithfulness_claims(run.circuits.faithfulness),
        prediction_claim(run.circuits.ablations),
    ]


def closure_claim(closure: pd.DataFrame) -> Line:
    """Do attributions add up (data/paper/closure.csv: the reference code's walkthrough root)?"""
    published = {row["quantity"]: float(row["value"]) for row in paper_table("closure")}
    worst = closure["residual"].abs().max()
    return claim_line(
        "Attributions add up: value of a node against the sum of its sources",
        f"node {published['node']:.2f}, sources shown {published['shown_sources']:.2f} (GPT-2)",
        f"largest relative residual {worst:.1e} over {len(closure)} nodes",
        "exact to rounding" if worst < 1e-4 else "does not add up",
    )


def paper_overlaps() -> pd.DataFrame:
    """Published top-k overlaps of pullback and mean input-times-gradient."""
    table = pd.DataFrame(paper_table("pullback_overlap"))
    return table.astype({"k": int, "overlap": float, "layer": int, "earlier_layer": int})


def connections_claim(connections: pd.DataFrame) -> Line:
    """How far input-invariant connections agree with those measured over a corpus."""
    title = "Pullback against mean input-times-gradient: overlap of the top"
    paper = [
        f"{'/'.join(f'{overlap:.0%}' for overlap in lines['overlap'])} ({name})"
        for name, lines in paper_overlaps().groupby("name", sort=False)
    ]
    names = [name for name in map(str, connections) if name.startswith("overlap_")]
    ks = "/".join(name.removeprefix("overlap_") for name in names)
    return claim_line(
        f"{title} {ks}",
        "; ".join(paper),
        f"{_overlaps(connections)} over {len(connections)} pairs of a feature and a layer; "
        f"{_overlaps(connections, 'random_')} with random decoder directions",
        "weights alone find part of the connections",
    )


def faithfulness_claims(curves: pd.DataFrame) -> list[Line]:
    """Are the pruned graph's features enough by themselves, and are they needed?"""
    summary = faithfulness_summary(curves).query("is_pruned_size")
    claims = {"keep": "are enough: kept alone", "remove": "are needed: taken out"}
    return [
        claim_line(
            f"The pruned graph's features {claim}, beside as many random ones and neurons",
            "not published",
            _scores(summary[(summary["direction"] == direction) & (summary["metric"] == LOGITS)]),
            "no counterpart",
        )
        for direction, claim in claims.items()
    ]


def _scores(summary: pd.DataFrame) -> str:
    """Score by kind of circuit, of the same size."""
    said = {
        ("pruned graph", "dropped"): "features alone",
        ("random", "dropped"): "random",
        ("pruned graph", "kept"): "with errors",
        ("random", "kept"): "random",
        ("neurons", "none"): "neurons",
    }
    scores = {(line["kind"], line["errors"]): _score(line) for line in summary.to_dict("records")}
    parts = ", ".join(f"{what} {scores[key]}" for key, what in said.items())
    return f"score at {summary['k'].iloc[0]} on average: {parts}"


def _score(line: Mapping[Any, Any]) -> str:
    return f"{line['score']:.2f} ({line['low']:.2f} to {line['high']:.2f})"


def prediction_claim(ablations: pd.DataFrame) -> Line:
    """How well a graph predicts the model with nothing frozen, and what it lacks."""
    overall = prediction_table(ablations).query("layer == 'all'").set_index("follows")
    parts = ", ".join(
        f"{follow} {line['rank_correlation']:.2f} (slope {line['slope']:.2f})"
        for follow, line in overall.iterrows()
    )
    return claim_line(
        "Taking a feature out of the running model moves the answer as the graph predicts",
        "not published",
        f"rank correlation by what follows a change: {parts}; {len(ablations)} features",
        "no counterpart",
    )
