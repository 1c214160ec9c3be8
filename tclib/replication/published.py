"""Every published figure that the released GPT-2 transcoders can be held against, without training.

Each is computed as the authors compute it (`authors_paths`; their overlaps), and compared by the one rule of
`checks`; what depends on text has a tolerance of its own, since theirs is another draw of OpenWebText.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.circuits.frozen import FrozenPrompts
from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.published import NEVER_FIRED, load_frequencies
from tclib.evaluation.evaluate import UNCHANGED, Condition, losses_under
from tclib.evaluation.replace import replace_mlp
from tclib.evaluation.whole_model import ablated_together, replaced_together
from tclib.features.connections import MIN_QUANTILE
from tclib.features.examples import firing_frequency
from tclib.models.language_model import LanguageModel
from tclib.replication.authors_paths import (
    PathStep,
    Start,
    activation,
    edges,
    feature_start,
    follow,
    logit_start,
    parse_path,
    transcoder_errors,
)
from tclib.replication.checks import COLUMNS, check_line, printed_tolerance
from tclib.replication.greater_than import greater_than_table
from tclib.replication.paper import paper_table
from tclib.replication.run import Run
from tclib.support.errors import InputError
from tclib.support.progress import progress
from tclib.support.statistics import top_k_overlap
from tclib.support.steps import ensure, write_csv

CHECKS_STEP = "07_published_checks"
PATHS_PRINTED_AS = ".2"  # Python's two significant digits
ROOT_ANSWERS = ("40", "20")  # the authors' root is W_U of "40" minus W_U of "20"
WALKTHROUGH = "walkthrough"
WALKTHROUGH_FEATURE = (8, 89)
WHOLE_MODEL_TOLERANCE = 0.1  # nats
OVERLAP_TOLERANCE = 2  # features among the k
DEAD_TOLERANCE = 0.15  # of the published count, which was read off a histogram
MIN_LOG10_FREQUENCY = -4.0  # of the authors' live features
ROWS_PER_FORWARD = 32

Lines = list[dict[str, Any]]


def make_published_checks(run: Run) -> pd.DataFrame:
    """Notebook 07 at `gpt2-published`: every figure of data/paper that needs no training, with verdicts.

    Errors: `InputError` at a preset of other transcoders, or of fewer layers than the model has.
    """
    source = run.preset.transcoders.published
    if not source:
        raise InputError(f"preset {run.preset.name} trains its own transcoders: nothing to check")
    layers = run.preset.transcoders.layers or range(run.lm.n_layers)
    missing = sorted(set(range(run.lm.n_layers)) - set(layers))
    if missing:
        raise InputError(
            f"preset {run.preset.name} leaves out layers {missing}: the published figures need all "
            f"{run.lm.n_layers}; leave transcoders.layers empty"
        )
    step, rows = run.step(CHECKS_STEP), run.corpus.evaluation
    inputs = run.inputs(run.trained)
    found = run.greater_than

    def make() -> Mapping[str, Any]:
        compared = greater_than_table(found.summary, found.curves, True)
        by_layer = {d.config.layer: d for d in run.transcoders.values()}
        frequencies = {layer: load_frequencies(source, d) for layer, d in by_layer.items()}
        table = published_table(run.lm, by_layer, rows, compared, frequencies)
        write_csv(table, step, "checks")
        n_reproduced = int((table["verdict"] == "reproduced").sum())
        return {"n_checks": len(table), "n_reproduced": n_reproduced}

    ensure(step, {"n_eval_rows": len(rows)}, inputs, make)
    return pd.read_csv(step.folder / "checks.csv")


def published_table(
    lm: LanguageModel,
    transcoders: Mapping[int, Dictionary],
    rows: Int[Tensor, "row pos"],
    greater_than: pd.DataFrame,
    frequencies: Mapping[int, Float[Tensor, "n_features"] | None],
) -> pd.DataFrame:
    """All checks: source (a file of data/paper), quantity, paper, ours, difference, tolerance, verdict.

    `greater_than` is `greater_than_table`; `rows` are the evaluation text; `frequencies` are the released
    log10 firing frequencies by layer, None where there is no file.
    """
    tables = [
        greater_than[list(COLUMNS)],
        activation_table(lm, transcoders),
        circuit_table(lm, transcoders),
        whole_model_table(lm, transcoders, rows),
        overlap_table(lm, transcoders, rows),
        dead_feature_table(lm, transcoders, rows, frequencies),
        live_feature_table(frequencies),
    ]
    return pd.concat(tables, ignore_index=True)


def counts(table: pd.DataFrame) -> pd.DataFrame:
    """How many figures of each file are reproduced."""
    reproduced = table["verdict"] == "reproduced"
    groups = table.assign(reproduced=reproduced).groupby("source", sort=False)["reproduced"]
    return groups.agg(reproduced="sum", checked="size").reset_index()


def _table(lines: Lines) -> pd.DataFrame:
    return pd.DataFrame(lines, columns=list(COLUMNS))


# ---------------------------------------------------------------------------------------------
# Activations at a prompt


@torch.no_grad()
def prompt_activation(
    lm: LanguageModel,
    transcoders: Mapping[int, Dictionary],
    layer: int,
    feature: int,
    prompt: str,
    at_token: str,
    prepend_bos: bool = True,
    replaced: Iterable[int] = (),
) -> float:
    """A feature's activation at the last occurrence of a token, with some MLPs replaced.

    Errors: `InputError` for a token that does not occur, or a layer without a transcoder.
    """
    missing = sorted({layer, *replaced} - set(transcoders))
    if missing:
        raise InputError(
            f"no transcoders at layers {missing}: there are some at {sorted(transcoders)}"
        )
    tokens = lm.tokenize(prompt)
    tokens = tokens if prepend_bos else tokens[:, 1:]
    places = [i for i, t in enumerate(lm.token_strings(tokens[0].tolist())) if t == at_token]
    if not places:
        raise InputError(f"{prompt!r} has no token {at_token!r}")
    site = transcoders[layer].config.input_site
    with ExitStack() as stack:
        for lower in replaced:
            stack.enter_context(replace_mlp(lm, transcoders[lower]))
        mlp_in = lm.read(tokens, {site})[site]
    return float(transcoders[layer].encode(mlp_in)[0, places[-1], feature])


def activation_table(lm: LanguageModel, transcoders: Mapping[int, Dictionary]) -> pd.DataFrame:
    """Every published activation at a prompt."""
    lines = []
    for row in paper_table("prompt_activations"):
        printed, replaced = row["activation"], row["transcoder_layers_replaced"]
        ours = prompt_activation(
            lm,
            transcoders,
            int(row["layer"]),
            int(row["feature"]),
            row["prompt"],
            row["at_token"],
            row["prepend_bos"] == "true",
            layer_range(replaced),
        )
        quantity = f"L{row['layer']}.{row['feature']} at {row['prompt']}, replaced: {replaced}"
        tolerance = printed_tolerance(printed, row["printed_as"])
        one = ("prompt_activations", quantity, float(printed), ours, tolerance, ours == 0)
        lines.append(check_line(*one))
    return _table(lines)


def layer_range(text: str) -> range:
    """none → no layers, 0-7 → 0 to 7."""
    if text == "none":
        return range(0)
    first, last = text.split("-")
    return range(int(first), int(last) + 1)


# ---------------------------------------------------------------------------------------------
# Paths, edges and closure


def circuit_table(lm: LanguageModel, transcoders: Mapping[int, Dictionary]) -> pd.DataFrame:
    """Every published path, and the walkthrough's edges and closure, along the same nodes."""
    published = pd.DataFrame(paper_table("paths"))
    text = str(published.columns[-1])
    lines: Lines = []
    for (notebook, prompt), own in published.groupby(["notebook", "prompt"], sort=False):
        frozen = FrozenPrompts(lm, lm.tokenize(str(prompt)), transcoders.values())
        start, paths = _start(frozen, str(notebook)), own[text].tolist()
        bar = progress(paths, f"paths of {prompt!r}", unit="path", leave=False)
        followed = [follow(frozen, start, parse_path(path, frozen.n_pos)[0]) for path in bar]
        for path, steps in zip(paths, followed, strict=True):
            lines.append(_path_line(str(prompt), path, steps))
        if notebook == WALKTHROUGH:
            found = edges(paths, followed)
            lines += _edge_lines(found) + _closure_lines(frozen, start, found)
    return _table(lines)


def _start(frozen: FrozenPrompts, notebook: str) -> Start:
    if notebook == WALKTHROUGH:
        return feature_start(frozen, *WALKTHROUGH_FEATURE)
    answer, other = (_token_id(frozen.lm, answer) for answer in ROOT_ANSWERS)
    return logit_start(frozen, answer, other)


def _token_id(lm: LanguageModel, text: str) -> int:
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(f"{text!r} is {len(ids)} tokens of {lm.name}: expected GPT-2's single one")
    return int(ids[0])


def _path_line(prompt: str, path: str, steps: Sequence[PathStep]) -> dict[str, Any]:
    nodes, printed = path.rsplit(": ", 1)
    return check_line(
        "paths",
        f"{prompt}: {nodes}",
        float(printed),
        steps[-1].contribution,
        printed_tolerance(printed, PATHS_PRINTED_AS),
        any(step.is_silent for step in steps),
    )


def _edge_lines(found: Mapping[tuple[str, str], PathStep]) -> Lines:
    """The walkthrough's edges; one that no published path runs through is a mismatch (NaN)."""
    lines = []
    for row in paper_table("edges"):
        source, target, printed = row["source_node"], row["target_node"], row["contribution"]
        ours = found.get((source, target), PathStep(float("nan"), False))
        one = ("edges", f"{source} → {target}", float(printed), ours.contribution)
        lines.append(check_line(*one, printed_tolerance(printed), ours.is_silent))
    return lines


def _closure_lines(
    frozen: FrozenPrompts, start: Start, found: Mapping[tuple[str, str], PathStep]
) -> Lines:
    """The root's value against what the authors set beside it; their prune error is value − edges."""
    layer, feature = WALKTHROUGH_FEATURE
    node = activation(frozen, layer, feature, start.pos)
    root = f"mlp{layer}tc[{feature}]@-1"
    to_root = sum(step.contribution for (_, target), step in found.items() if target == root)
    bias = float(frozen.transcoders[layer].b_enc[feature])
    errors = transcoder_errors(frozen, start, layer)
    ours = {
        "node": node,
        "edges": to_root,
        "transcoder_errors": errors,
        "bias": bias,
        "prune_error": node - to_root,
        "shown_sources": node + errors + bias,
    }
    hang_on_node = {"node", "prune_error", "shown_sources"}
    lines = []
    for row in paper_table("closure"):
        name, printed = row["quantity"], row["value"]
        is_silent = node == 0 and name in hang_on_node
        one = ("closure", name, float(printed), ours[name], printed_tolerance(printed), is_silent)
        lines.append(check_line(*one))
    return lines


# ---------------------------------------------------------------------------------------------
# Text: losses, overlaps, dead and live features


def whole_model_table(
    lm: LanguageModel, transcoders: Mapping[int, Dictionary], rows: Int[Tensor, "row pos"]
) -> pd.DataFrame:
    """Loss with the MLPs of many layers replaced, or zero-ablated, at once.

    KL is over the positions whose next token is known; theirs has each row's last one too.
    """
    published = {
        f"{row['what']}, layers {row['layers']}": row for row in paper_table("whole_model")
    }
    conditions = {
        name: _whole_model(lm, transcoders, row["what"], layer_range(row["layers"].split(" ")[0]))
        for name, row in published.items()
    }
    losses = losses_under(lm, conditions, rows, ROWS_PER_FORWARD)
    lines = []
    for name, row in published.items():
        for what, ours in (("ce", float(losses[name].row_ce.mean())), ("kl", losses[name].kl)):
            if row[what]:
                one = ("whole_model", f"{what.upper()}, {name}", float(row[what]), ours)
                lines.append(check_line(*one, WHOLE_MODEL_TOLERANCE))
    return _table(lines)


def _whole_model(
    lm: LanguageModel, transcoders: Mapping[int, Dictionary], what: str, layers: range
) -> Condition:
    if not layers:
        return UNCHANGED
    if what == "zero-ablated":
        return ablated_together(lm, dict.fromkeys(layers))
    return replaced_together(lm, [transcoders[layer] for layer in layers])


def overlap_table(
    lm: LanguageModel, transcoders: Mapping[int, Dictionary], rows: Int[Tensor, "row pos"]
) -> pd.DataFrame:
    """How many of a pullback's k strongest features are among the mean input-times-gradient's k."""
    published = pd.DataFrame(paper_table("pullback_overlap"))
    lines = []
    for _, own in published.groupby("name", sort=False):
        first, ks = own.iloc[0], own["k"].astype(int).tolist()
        later, earlier = transcoders[int(first["layer"])], transcoders[int(first["earlier_layer"])]
        z = mean_acts_where_active(lm, later, int(first["feature"]), earlier, rows)
        pullback = earlier.W_dec @ later.encoder_direction(int(first["feature"]))
        for k, share in zip(ks, own["overlap"].astype(float), strict=True):
            ours = 0 if z is None else round(k * top_k_overlap(pullback, pullback * z, k))
            quantity = f"{first['name']}: features in common of the {k} strongest"
            one = ("pullback_overlap", quantity, round(k * share), ours, OVERLAP_TOLERANCE)
            lines.append(check_line(*one, z is None))
    return _table(lines)


@torch.no_grad()
def mean_acts_where_active(
    lm: LanguageModel,
    later: Dictionary,
    feature: int,
    earlier: Dictionary,
    rows: Int[Tensor, "row pos"],
) -> Float[Tensor, "n_features"] | None:
    """Mean activations of the earlier features where the later one exceeds its 20th percentile.

    As in the authors' mean input-times-gradient: BOS counts, scores are float16, no norm scale. None for
    a feature that never fires on the rows.
    """
    later.check_features(feature)
    reads, writes = later.config.input_site, earlier.config.input_site
    scores, inputs = [], []
    bar = progress(rows.split(ROWS_PER_FORWARD), "overlaps", unit="batch", leave=False)
    for batch in bar:
        acts = lm.read(batch.long(), {reads, writes})
        # The released transcoders are plain ReLU, so one column is enough.
        pre = acts[reads] @ later.encoder_direction(feature) + later.b_enc[feature]
        scores.append(pre[pre > 0].half().float())
        inputs.append(acts[writes][pre > 0])
    score, x = torch.cat(scores), torch.cat(inputs)
    if not (score > 0).any():
        return None
    minimum = score[score > 0].double().quantile(MIN_QUANTILE)
    strong = x[score > minimum] if (score > minimum).any() else x
    sums = [earlier.encode(part).sum(0) for part in strong.split(1024)]
    return torch.stack(sums).sum(0) / len(strong)


def dead_feature_table(
    lm: LanguageModel,
    transcoders: Mapping[int, Dictionary],
    rows: Int[Tensor, "row pos"],
    frequencies: Mapping[int, Float[Tensor, "n_features"] | None],
) -> pd.DataFrame:
    """GPT-2's features that never fired: from the released frequencies, else on the rows, BOS left out."""
    lines = []
    for row in paper_table("dead_features"):
        if row["model"] != "gpt2":
            continue
        layer, paper = int(row["layer"]), float(row["n_dead"])
        released = frequencies.get(layer)
        if released is None:
            ours = float((firing_frequency(lm, transcoders[layer], rows) == 0).sum())
        else:
            ours = float((released <= NEVER_FIRED).sum())
        by = "on our rows" if released is None else "by the released frequencies"
        quantity = f"dead features of layer {layer}, {by}"
        lines.append(check_line("dead_features", quantity, paper, ours, DEAD_TOLERANCE * paper))
    return _table(lines)


def live_feature_table(
    frequencies: Mapping[int, Float[Tensor, "n_features"] | None],
) -> pd.DataFrame:
    """The published live features, by their place among all live ones; nothing without the frequencies."""
    published = pd.DataFrame(paper_table("live_features"))
    lines = []
    for layer, own in published.groupby("layer", sort=False):
        released = frequencies.get(int(str(layer)))
        if released is None:
            continue
        live = (released > MIN_LOG10_FREQUENCY).nonzero()[:, 0].tolist()
        pairs = zip(own["position"].astype(int), own["feature"].astype(int), strict=True)
        ours = sum(live[position : position + 1] == [feature] for position, feature in pairs)
        quantity = f"live features of layer {layer} in their published places"
        lines.append(check_line("live_features", quantity, len(own), ours, 0.0))
    return _table(lines)
