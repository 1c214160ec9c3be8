"""Every published figure that the released GPT-2 transcoders can be held against, without training."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from tclib.circuits.frozen import FrozenPrompts, Target
from tclib.circuits.paths import Node, step_back
from tclib.circuits.sources import sources
from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation import metrics
from tclib.evaluation.replace import replace_mlp, set_mlp_out
from tclib.features.connections import compare_connections
from tclib.features.examples import firing_frequency
from tclib.models.language_model import LanguageModel
from tclib.replication.greater_than import PUBLISHED_TOLERANCE, greater_than_table
from tclib.replication.paper import paper_table
from tclib.replication.run import Run
from tclib.support.errors import InputError
from tclib.support.progress import progress
from tclib.support.steps import (
    ensure,
    write_csv,
)

CHECKS_STEP = "07_published_checks"
COLUMNS = ("source", "quantity", "paper", "ours", "difference", "tolerance", "verdict")
ROOT_ANSWERS = ("40", "20")  # the authors' root is W_U of "40" minus W_U of "20"
CLOSURE_PROMPT = "Oh, that rifle model is a 6M"
CLOSURE_FEATURE = (8, 89)
WHOLE_MODEL_TOLERANCE = 0.1  # nats: other text of the same kind
OVERLAP_TOLERANCE = 0.1
DEAD_TOLERANCE = 0.15  # of the published count, which was read off a histogram
ROWS_PER_FORWARD = 32
_NODE = re.compile(r"(mlp|attn|embed)(\d+)(?:tc)?(?:\[(\d+)\])?@(-?\d+)")


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


def prompt_activation_table(
    lm: LanguageModel, transcoders: Mapping[int, Dictionary]
) -> pd.DataFrame:
    """Every published activation beside ours: paper, ours, difference, verdict (within 0.005)."""
    lines = []
    for row in paper_table("prompt_activations"):
        ours = prompt_activation(
            lm,
            transcoders,
            int(row["layer"]),
            int(row["feature"]),
            row["prompt"],
            row["at_token"],
            row["prepend_bos"] == "true",
            layer_range(row["transcoder_layers_replaced"]),
        )
        difference = ours - float(row["activation"])
        verdict = "reproduced" if abs(difference) <= PUBLISHED_TOLERANCE else "mismatch"
        shown = {
            name: row[name] for name in ("layer", "feature", "prompt", "transcoder_layers_replaced")
        }
        shown |= {"paper": float(row["activation"]), "ours": ours}  # type: ignore[dict-item]
        lines.append({**shown, "difference": difference, "verdict": verdict})
    return pd.DataFrame(lines)


def layer_range(text: str) -> range:
    """none → no layers, 0-7 → 0 to 7."""
    if text == "none":
        return range(0)
    first, last = text.split("-")
    return range(int(first), int(last) + 1)


def make_published_checks(run: Run) -> pd.DataFrame:
    """Notebook 07 at `gpt2-published`: every figure of data/paper that needs no training, with verdicts.

    Errors: `InputError` at a preset of other transcoders.
    """
    if not run.preset.transcoders.published:
        raise InputError(f"preset {run.preset.name} trains its own transcoders: nothing to check")
    step, rows = run.step(CHECKS_STEP), run.corpus.evaluation
    inputs = run.inputs(run.trained)
    found = run.greater_than

    def make() -> Mapping[str, Any]:
        compared = greater_than_table(found.summary, found.curves, True)
        by_layer = {d.config.layer: d for d in run.transcoders.values()}
        table = published_table(run.lm, by_layer, rows, compared)
        write_csv(table, step, "checks")
        n_reproduced = int((table["verdict"] == "reproduced").sum())
        return {"n_checks": len(table), "n_reproduced": n_reproduced}

    ensure(step, {"n_eval_rows": len(rows)}, inputs, make)
    return pd.read_csv(step.folder / "checks.csv")


def check_line(
    source: str, quantity: str, paper: float, ours: float, tolerance: float
) -> dict[str, Any]:
    """One line of the table; `reproduced` where the difference is within the tolerance."""
    difference = ours - paper
    verdict = "reproduced" if abs(difference) <= tolerance else "mismatch"
    return dict(
        zip(COLUMNS, (source, quantity, paper, ours, difference, tolerance, verdict), strict=True)
    )


def published_table(
    lm: LanguageModel,
    transcoders: Mapping[int, Dictionary],
    rows: Int[Tensor, "row pos"],
    greater_than: pd.DataFrame,
) -> pd.DataFrame:
    """All checks: source (a file of data/paper), quantity, paper, ours, difference, tolerance, verdict.

    `greater_than` is `greater_than_report.greater_than_table`; `rows` are the evaluation text.
    """
    activations = prompt_activation_table(lm, transcoders)
    tables = [
        _as_checks(greater_than, "greater_than", "quantity"),
        _as_checks(activations, "prompt_activations", "prompt"),
        path_table(lm, transcoders),
        closure_table(lm, transcoders),
        whole_model_table(lm, transcoders, rows),
        overlap_table(lm, transcoders, rows),
        dead_feature_table(lm, transcoders, rows),
    ]
    return pd.concat(tables, ignore_index=True)


def counts(table: pd.DataFrame) -> pd.DataFrame:
    """How many figures of each file are reproduced."""
    reproduced = table["verdict"] == "reproduced"
    groups = table.assign(reproduced=reproduced).groupby("source", sort=False)["reproduced"]
    return groups.agg(reproduced="sum", checked="size").reset_index()


def _as_checks(table: pd.DataFrame, source: str, name: str) -> pd.DataFrame:
    """A table of published figures with its own verdicts, in this module's columns."""
    shown = table.assign(source=source, quantity=table[name], tolerance=PUBLISHED_TOLERANCE)
    if source == "prompt_activations":
        where = table["transcoder_layers_replaced"]
        place = "L" + table["layer"].astype(str) + "." + table["feature"].astype(str)
        shown["quantity"] = place + " at " + table["prompt"] + ", replaced: " + where
    return shown[list(COLUMNS)]


def parse_path(text: str, n_pos: int) -> tuple[list[Node], str]:
    """The nodes behind the root of a published path, and its attribution as printed.

    Errors: `InputError` for a node of no known form.
    """
    steps = text.split(" <- ")
    nodes = []
    for step in steps[1:]:
        found = _NODE.match(step)
        if found is None or (found[1] != "embed" and found[3] is None):
            raise InputError(f"path {text!r}: {step!r} is no feature, head or embedding")
        layer, component, pos = int(found[2]), int(found[3] or -1), int(found[4]) % n_pos
        if found[1] == "mlp":
            nodes.append(Node("feature", layer, -1, component, pos))
        elif found[1] == "attn":
            nodes.append(Node("head", layer, component, -1, pos))
        else:
            nodes.append(Node("embedding", -1, -1, -1, pos))
    return nodes, steps[-1].rsplit(": ", 1)[1]


def path_contribution(frozen: FrozenPrompts, root: Target, nodes: Iterable[Node]) -> float:
    """What the last node contributes to the root along the path (Eqs. 7, 8, 24 and 28).

    An embedding node is the token's and the position's together. Zero for a node that is silent.
    """
    target, contribution = root, math.nan
    for node in nodes:
        (found,) = sources(frozen, [target])
        table = found.table
        is_node = (table["layer"] == node.layer) & (table["pos"] == node.pos)
        if node.kind == "embedding":
            is_node = table["kind"].isin(["embedding", "position"])
            is_node &= table["pos"] == node.pos
        else:
            own = "head" if node.kind == "head" else "feature"
            is_node &= (table["kind"] == node.kind) & (table[own] == getattr(node, own))
        contribution = float(table.loc[is_node, "contribution"].sum())
        if node.kind != "embedding":
            target = step_back(frozen, target, node)
    return contribution


def printed_tolerance(printed: str) -> float:
    """Half a unit of the last digit that was printed, and a little for float32."""
    mantissa, _, exponent = printed.partition("e")
    n_decimals = len(mantissa.partition(".")[2])
    return 0.505 * 10.0 ** (int(exponent or 0) - n_decimals)


def path_table(lm: LanguageModel, transcoders: Mapping[int, Dictionary]) -> pd.DataFrame:
    """Every published path beside our attribution along the same nodes.

    Greater-than roots are the authors': a difference of unembeddings with no final norm, so ours are
    multiplied by its scale.
    """
    published = pd.DataFrame(paper_table("paths"))
    text = str(published.columns[-1])
    lines = []
    for (notebook, prompt), own in published.groupby(["notebook", "prompt"], sort=False):
        frozen = FrozenPrompts(lm, lm.tokenize(str(prompt)), transcoders.values())
        root, factor = _path_root(frozen, str(notebook))
        for path in progress(own[text], f"paths of {prompt!r}", unit="path", leave=False):
            nodes, printed = parse_path(path, frozen.n_pos)
            ours = factor * path_contribution(frozen, root, nodes)
            quantity = f"{prompt}: {path.rsplit(': ', 1)[0]}"
            tolerance = printed_tolerance(printed)
            lines.append(check_line("paths", quantity, float(printed), ours, tolerance))
    return pd.DataFrame(lines, columns=list(COLUMNS))


def _path_root(frozen: FrozenPrompts, notebook: str) -> tuple[Target, float]:
    """The root of a notebook's paths, and what turns our contributions into the authors' units."""
    last = frozen.n_pos - 1
    if notebook == "walkthrough":
        return frozen.feature_target(*CLOSURE_FEATURE, last), 1.0
    ids = [_token_id(frozen.lm, answer) for answer in ROOT_ANSWERS]
    root = frozen.logit_target({ids[0]: 1.0, ids[1]: -1.0}, last)
    return root, float(frozen.cache.final_scale[0, last])


def _token_id(lm: LanguageModel, text: str) -> int:
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(f"{text!r} is {len(ids)} tokens of {lm.name}: expected GPT-2's single one")
    return int(ids[0])


def closure_table(lm: LanguageModel, transcoders: Mapping[int, Dictionary]) -> pd.DataFrame:
    """The published value, bias and error share of one feature; the rest of that table is a graph's."""
    published = {row["quantity"]: float(row["value"]) for row in paper_table("closure")}
    frozen = FrozenPrompts(lm, lm.tokenize(CLOSURE_PROMPT), transcoders.values())
    layer, feature = CLOSURE_FEATURE
    last = frozen.n_pos - 1
    (found,) = sources(frozen, [frozen.feature_target(layer, feature, last)])
    is_error = (found.table["kind"] == "error") & (found.table["pos"] == last)
    ours = {
        "node": found.value,
        "bias": float(transcoders[layer].b_enc[feature]),
        "transcoder_errors": float(found.table.loc[is_error, "contribution"].sum()),
    }
    lines = [
        check_line("closure", name, published[name], value, 0.005) for name, value in ours.items()
    ]
    return pd.DataFrame(lines, columns=list(COLUMNS))


@torch.no_grad()
def whole_model_table(
    lm: LanguageModel, transcoders: Mapping[int, Dictionary], rows: Int[Tensor, "row pos"]
) -> pd.DataFrame:
    """Loss with the MLPs of many layers replaced, or zero-ablated, at once."""
    lines = []
    for row in paper_table("whole_model"):
        layers = layer_range(row["layers"].split(" ")[0])
        ce, kl = _loss_with(lm, transcoders, layers, row["what"], rows)
        name = f"{row['what']}, layers {row['layers']}"
        tolerance = WHOLE_MODEL_TOLERANCE
        lines.append(check_line("whole_model", f"CE, {name}", float(row["ce"]), ce, tolerance))
        if row["kl"]:
            lines.append(check_line("whole_model", f"KL, {name}", float(row["kl"]), kl, tolerance))
    return pd.DataFrame(lines, columns=list(COLUMNS))


def _loss_with(
    lm: LanguageModel,
    transcoders: Mapping[int, Dictionary],
    layers: Iterable[int],
    what: str,
    rows: Int[Tensor, "row pos"],
) -> tuple[float, float]:
    """CE and KL from the original, nats a token."""
    ce = kl = 0.0
    batches = rows.split(ROWS_PER_FORWARD)
    for batch in progress(batches, f"{what}, whole model", unit="batch", leave=False):
        tokens = batch.long().to(lm.device)
        original = lm.logits(tokens)
        with ExitStack() as stack:
            for layer in layers:
                is_ablated = what == "zero-ablated"
                stack.enter_context(
                    set_mlp_out(lm, layer) if is_ablated else replace_mlp(lm, transcoders[layer])
                )
            logits = lm.logits(tokens)
        weight = len(batch) / len(rows)
        ce += weight * float(metrics.next_token_losses(logits, tokens).mean())
        kl += weight * float(metrics.kl_divergence(original[:, :-1], logits[:, :-1]).mean())
    return ce, kl


def overlap_table(
    lm: LanguageModel, transcoders: Mapping[int, Dictionary], rows: Int[Tensor, "row pos"]
) -> pd.DataFrame:
    """Shares of a pullback's k strongest features that are among the mean pullback's k."""
    published = pd.DataFrame(paper_table("pullback_overlap"))
    lines = []
    for _, own in published.groupby("name", sort=False):
        first = own.iloc[0]
        later, earlier = transcoders[int(first["layer"])], transcoders[int(first["earlier_layer"])]
        ours = compare_connections(lm, later, [int(first["feature"])], earlier, rows).iloc[0]
        for row in own.itertuples():
            found, quantity = ours.get(f"overlap_{row.k}"), f"{row.name}, k = {row.k}"
            if found is not None:
                one = check_line(
                    "pullback_overlap",
                    quantity,
                    float(row.overlap),  # type: ignore[arg-type]
                    found,
                    OVERLAP_TOLERANCE,
                )
                lines.append(one)
    return pd.DataFrame(lines, columns=list(COLUMNS))


def dead_feature_table(
    lm: LanguageModel, transcoders: Mapping[int, Dictionary], rows: Int[Tensor, "row pos"]
) -> pd.DataFrame:
    """GPT-2's features that never fire on the rows, BOS left out."""
    lines = []
    for row in paper_table("dead_features"):
        if row["model"] != "gpt2":
            continue
        dictionary, paper = transcoders[int(row["layer"])], float(row["n_dead"])
        ours = float((firing_frequency(lm, dictionary, rows) == 0).sum())
        quantity = f"dead features of layer {row['layer']}"
        lines.append(check_line("dead_features", quantity, paper, ours, DEAD_TOLERANCE * paper))
    return pd.DataFrame(lines, columns=list(COLUMNS))
