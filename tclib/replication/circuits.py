"""Step 03: one prompt's attribution graph, and how far its connections hold over a corpus and in the model.

closure.csv       value, sum of sources and residual of every node of the graph
connections.csv   pullback against mean pullback, features of every layer against every layer below
ablations.csv     features taken out of the model with nothing frozen, beside the graph's predictions
nodes.parquet, edges.parquet   the full graph; graph.json the pruned one; viewer/ for circuit-tracer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from tclib.circuits.files import load_parquet, save_for_viewer, save_json, save_parquet
from tclib.circuits.frozen import FrozenPrompts, Target
from tclib.circuits.graph import BIAS_KINDS, INPUT_KINDS, AttributionGraph, attribution_graph
from tclib.circuits.interventions import ablation_table
from tclib.circuits.prune import prune
from tclib.dictionaries.dictionary import Dictionary
from tclib.features.connections import compare_connections
from tclib.features.examples import live_features
from tclib.greater_than.task import GreaterThan
from tclib.models.language_model import LanguageModel
from tclib.replication.paper import paper_table
from tclib.replication.presets import Preset
from tclib.replication.verdicts import Line, claim_line
from tclib.support.errors import InputError
from tclib.support.steps import ensure, weight_hashes, write_csv
from tclib.text.corpus import Corpus

STEP = "03_circuit_tools"
WITH_BIASES = INPUT_KINDS | BIAS_KINDS


class Explained(NamedTuple):
    """A frozen prompt and the target that its graph explains."""

    frozen: FrozenPrompts
    root: Target


@dataclass(frozen=True)
class Circuits:
    """What step 03 holds."""

    graph: AttributionGraph
    connections: pd.DataFrame
    ablations: pd.DataFrame


def explain_prompt(
    preset: Preset, lm: LanguageModel, transcoders: Mapping[str, Dictionary]
) -> Explained:
    """The preset's greater-than prompt, and the root: mean later logit minus mean earlier one.

    Errors: `InputError` for fewer than two transcoders, between which there is nothing to connect.
    """
    if len(transcoders) < 2:
        raise InputError(
            f"{len(transcoders)} transcoders at preset {preset.name}: circuits need two layers or more"
        )
    task = GreaterThan.of(lm, preset.greater_than.templates[0])
    prompt = task.prompt_index(preset.circuits.year)
    frozen = FrozenPrompts(lm, task.tokens[[prompt]], transcoders.values())
    weights = task.root_weights(preset.circuits.year)
    return Explained(frozen, frozen.logit_target(weights, -1, name="later − earlier"))


def make_circuits(
    preset: Preset, lm: LanguageModel, corpus: Corpus, transcoders: Mapping[str, Dictionary]
) -> Circuits:
    """The artifacts of step 03, made once."""
    step = preset.step(STEP)
    inputs = {"model": preset.model, "corpus": corpus.content_hash}
    inputs |= weight_hashes(transcoders)
    template = preset.greater_than.templates[0]
    parameters = {**asdict(preset.circuits), "template": template, "seed": preset.seed}

    def make() -> Mapping[str, Any]:
        frozen, root = explain_prompt(preset, lm, transcoders)
        graph = attribution_graph(frozen, [root])
        small = prune(graph, counted=WITH_BIASES)
        ablations = ablation_table(frozen, graph, root, preset.circuits.n_ablations, preset.seed)
        write_csv(graph.closure(), step, "closure")
        write_csv(connection_table(preset, lm, corpus, transcoders), step, "connections")
        write_csv(ablations, step, "ablations")
        save_parquet(graph, step.folder)
        save_json(small, step.folder / "graph.json")
        save_for_viewer(small, step.folder / "viewer", "greater-than")
        return {"n_nodes": len(graph.nodes), "n_pruned": len(small.nodes)}

    ensure(step, parameters, inputs, make)
    tables = {
        name: pd.read_csv(step.folder / f"{name}.csv") for name in ("connections", "ablations")
    }
    return Circuits(load_parquet(step.folder), **tables)


def connection_table(
    preset: Preset, lm: LanguageModel, corpus: Corpus, transcoders: Mapping[str, Dictionary]
) -> pd.DataFrame:
    """`compare_connections` of every pair of layers, on seeded live features and held-out rows."""
    config = preset.circuits
    rows = corpus.evaluation[: config.n_connection_rows]
    by_layer = sorted(transcoders.values(), key=lambda d: d.config.layer)
    generator = torch.Generator().manual_seed(preset.seed)
    n, least = config.n_connection_features, config.min_log10_frequency
    drawn = {d.config.layer: live_features(lm, d, rows, n, generator, least) for d in by_layer[1:]}
    tables = [
        compare_connections(lm, later, drawn[later.config.layer], earlier, rows)
        for earlier, later in combinations(by_layer, 2)
    ]
    return pd.concat(tables, ignore_index=True)


def graph_caption(graph: AttributionGraph, small: AttributionGraph) -> str:
    """The caption of the layered graph (Markdown)."""
    kinds = small.nodes["kind"].value_counts()
    counts = ", ".join(f"{n} {str(kind).replace('_', ' ')}" for kind, n in kinds.items())
    influence = graph.nodes[~graph.is_root]["influence"].sum()
    kept = small.nodes[~small.is_root]["influence"].sum() / influence
    left_out = float(np.abs(small.left_out).sum() / np.abs(graph.edges.double()).sum())
    return (
        f"**The pruned graph**: {counts}, of {len(graph.nodes)} nodes; they carry {kept:.0%} of the "
        "influence of features, errors and tokens. Numbers under circles are feature indices; width and "
        "opacity follow the size of the direct effect. *Paper:* graphs of greedy paths, positive edges "
        "only, errors and biases apart (Figure 6). *Ours:* all kinds of source, both signs; what is pruned "
        f"away is kept as a sum at each target (net {left_out:.0%} of all effects). *Differs because* the "
        "reference code draws the paths of a beam, this the whole linear model of the prompt."
    )


def connections_caption(connections: pd.DataFrame) -> str:
    """The caption of the agreement figure (Markdown)."""
    claim = connections_claim(connections)
    n_features = connections.groupby("layer")["feature"].nunique().sum()
    active = [name for name in map(str, connections) if name.startswith("active_overlap_")]
    return (
        f"**Agreement of input-invariant and input-dependent connections.** *Paper:* {claim['paper']}, "
        f"of 24,576 features. *Ours:* {claim['ours']}; {n_features} features drawn by seed, tokens where "
        "a feature exceeds the 20th percentile of its positive activations; rank correlation over "
        "earlier features that are active there. Among those alone the overlap is "
        f"{'/'.join(f'{connections[name].mean():.0%}' for name in active)}. *Differs, probably, because* "
        "directions of features that never fire together interfere more in a stream of this width: on "
        f"average {connections['n_candidates'].mean():.0f} earlier features are active at all."
    )


def prediction_caption(ablations: pd.DataFrame) -> str:
    """The caption of the intervention figure (Markdown)."""
    claim = prediction_claim(ablations)
    sizes = {
        "measured change": ablations["actual"],
        "miss of the prediction": ablations["actual"] - ablations["predicted_total"],
        "miss with norm scales frozen": ablations["actual_norms_frozen"]
        - ablations["predicted_total"],
    }
    means = ", ".join(f"{name} {values.abs().mean():.3f}" for name, values in sizes.items())
    return (
        "**Predicted and measured change of the root when a feature is taken out of the running model.** "
        f"*Paper:* {claim['paper']}. *Ours:* {claim['ours']}. Means in logits: {means}. *Differs from "
        "exact because* taking a feature out also moves every norm scale after it, which rescales the whole "
        "answer (right: without that), attention patterns move, and later MLPs are not their transcoders."
    )


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
    ours = "/".join(f"{connections[name].mean():.0%}" for name in names)
    ks = "/".join(name.removeprefix("overlap_") for name in names)
    return claim_line(
        f"{title} {ks}",
        "; ".join(paper),
        f"{ours} over {len(connections)} pairs of a feature and a layer; "
        f"Spearman {connections['spearman'].mean():.2f}",
        "weights alone find part of the connections",
    )


def prediction_claim(ablations: pd.DataFrame) -> Line:
    """How well a graph predicts the model with nothing frozen."""
    r, r_direct, r_frozen = (
        float(np.corrcoef(ablations[measured], ablations[predicted])[0, 1])
        for measured, predicted in (
            ("actual", "predicted_total"),
            ("actual", "predicted_direct"),
            ("actual_norms_frozen", "predicted_total"),
        )
    )
    columns = ["actual_norms_frozen", "predicted_total"]
    ranks = float(ablations[columns].corr("spearman").to_numpy()[0, 1])
    return claim_line(
        "Taking a feature out of the running model moves the answer as the graph predicts",
        "not published",
        f"r = {r:.3f} over all paths ({r_direct:.3f} by direct edges); {r_frozen:.3f} (ranks "
        f"{ranks:.3f}) if norm scales stay; {len(ablations)} features",
        "norm scales decide" if r_frozen - abs(r) > 0.2 else "no counterpart",
    )
