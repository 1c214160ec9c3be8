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
from tclib.replication.presets import Preset
from tclib.support.runs import InputError
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
