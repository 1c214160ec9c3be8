"""Notebook 02: sparsity against faithfulness (paper Figure 3)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float

from tclib.evaluation.evaluate import BOOTSTRAP_SEED, Evaluation
from tclib.models.language_model import LanguageModel
from tclib.replication.model_and_data import load_model, prepare_corpus
from tclib.replication.paper import paper_table
from tclib.replication.presets import Preset, load_preset
from tclib.replication.transcoders import Trained, _evaluated, _trained
from tclib.replication.verdicts import Line, claim_line
from tclib.support.statistics import bootstrap_means, interval
from tclib.text.corpus import Corpus

N_GAP_POINTS = 5


_CLAUSES = {"transcoder": "transcoders better", "SAE": "SAEs better", "tie": "no difference"}


def paper_sweep() -> pd.DataFrame:
    """The published points of Figure 3, Pythia-410M layer 15 (data/paper/fig3_pythia410m.csv)."""
    table = pd.DataFrame(paper_table("fig3_pythia410m"))
    table = table.rename(columns={"l1_coefficient": "sparsity"})
    return table.astype({"sparsity": float, "l0": float, "ce": float})


def compared_families(table: pd.DataFrame) -> pd.DataFrame:
    """The lines of a sweep's first family of transcoders and its first of SAEs."""
    if "family" not in table:
        return table
    first = table.groupby("kind", sort=False)["family"].first()
    return table[table["family"].isin(first)].reset_index(drop=True)


def shared_l0(table: pd.DataFrame, n_points: int = N_GAP_POINTS) -> Float[np.ndarray, "point"]:
    """L0 values, evenly spaced in log, over the range that both kinds of a sweep cover.

    Empty where the ranges do not overlap.
    """
    ranges = table.groupby("kind")["l0"].agg(["min", "max"])
    low, high = ranges["min"].max(), ranges["max"].min()
    return np.geomspace(low, high, n_points) if low < high else np.array([])


def ce_gap(table: pd.DataFrame, at_l0: Float[np.ndarray, "point"]) -> Float[np.ndarray, "point"]:
    """CE of the SAEs minus CE of the transcoders at equal L0, interpolated linearly in log L0.

    Positive where transcoders are better.
    """

    def curve(kind: str) -> np.ndarray:
        points = table[table["kind"] == kind].sort_values("l0")
        return np.asarray(np.interp(np.log(at_l0), np.log(points["l0"]), points["ce"]))

    return np.asarray(curve("sae_mlp_out") - curve("transcoder"))


def ce_gap_table(evaluation: Evaluation) -> pd.DataFrame:
    """`ce_gap` of a sweep with a 95 % interval, paired by row of the corpus.

    Columns: l0, ce_gap, low, high, winner (`transcoder`, `SAE`, or `tie` where 0 is inside).
    """
    table = compared_families(evaluation.table)
    at_l0 = shared_l0(table)
    if len(at_l0) == 0:
        return pd.DataFrame(columns=["l0", "ce_gap", "low", "high", "winner"])
    # The gap is linear in the dictionaries' CE, so one gap a row of the corpus can be resampled.
    weights = np.stack(
        [ce_gap(table.assign(ce=np.eye(len(table))[i]), at_l0) for i in range(len(table))]
    )
    row_gaps = evaluation.row_ce[table["name"]].to_numpy() @ weights
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    low, high = interval(bootstrap_means(row_gaps, generator))
    winner = np.where(low > 0, "transcoder", np.where(high < 0, "SAE", "tie"))
    return pd.DataFrame(
        {"l0": at_l0, "ce_gap": row_gaps.mean(0), "low": low, "high": high, "winner": winner}
    )


def family_table(table: pd.DataFrame) -> pd.DataFrame:
    """The dictionaries of a sweep's other families beside its transcoders at equal L0.

    Columns: family, sparsity, l0, ce, transcoder_ce (of the compared transcoders, interpolated in log
    L0; NaN outside their range), difference (negative: better than they). Empty without others.
    """
    base = compared_families(table)
    own = base[base["kind"] == "transcoder"].sort_values("l0")
    others = table[~table["name"].isin(base["name"])] if "family" in table else table.iloc[:0]
    at = np.interp(
        np.log(others["l0"].to_numpy(float)),
        np.log(own["l0"].to_numpy(float)),
        own["ce"].to_numpy(float),
        left=np.nan,
        right=np.nan,
    )
    found = others[["family", "sparsity", "l0", "ce"]] if len(others) else pd.DataFrame()
    return found.assign(transcoder_ce=at, difference=others["ce"].to_numpy() - at)


def who_wins(gaps: pd.DataFrame) -> str:
    """One clause on a `ce_gap_table`: who is better where."""
    if gaps.empty:
        return "the two kinds share no range of L0"
    winners = list(gaps["winner"])
    if len(set(winners)) == 1:
        names = {"transcoder": "transcoders better", "SAE": "SAEs better", "tie": "no difference"}
        return (
            f"{names[winners[0]]} at every L0 from {gaps['l0'].min():.1f} to {gaps['l0'].max():.1f}"
        )
    parts = []
    for winner, group in gaps.groupby("winner", sort=False):
        values = ", ".join(f"{l0:.3g}" for l0 in group["l0"])
        parts.append(f"{_CLAUSES[str(winner)]} at L0 {values}")
    return "; ".join(parts)


def sweep_caption(sweeps: dict[str, Evaluation]) -> str:
    """Figure 3's caption: paper, ours, and why they differ (Markdown)."""
    paper = paper_sweep()
    published = ce_gap(paper, shared_l0(paper))
    ours = "; ".join(f"**{title}**: {who_wins(ce_gap_table(e))}" for title, e in sweeps.items())
    table = next(iter(sweeps.values())).table
    has_lambda = any((~e.table["activation"].str.contains("topk")).any() for e in sweeps.values())
    labels = "labels are λ (a power of ten is in the axis label), " if has_lambda else ""
    worth = " and ".join(
        f"{(e.table['ce_mean_ablated'] - e.table['ce_original']).iloc[0]:.3f}"
        for e in sweeps.values()
    )
    return (
        f"**Figure 3.** Cross-entropy with one MLP replaced, against L0; {labels}bars 95 % intervals "
        "paired by row of the corpus. "
        "*Paper:* transcoders equal or better everywhere; at equal L0 the published Pythia-410M "
        f"points give SAE − transcoder {published.min():+.4f} to {published.max():+.4f} nats. "
        f"*Ours:* {ours}. "
        "The gap is to be read against what the MLP is worth "
        f"({worth} nats of mean ablation). "
        f"*Differs, probably, because* these dictionaries have {int(table['n_features'].iloc[0]):,} "
        "features, trained on fewer tokens, on a smaller model than Pythia-410M, and the paper itself "
        "finds the gap growing with size; an SAE sees the very vector that it must reproduce, a transcoder has "
        f"to compute it. L0 is over {int(table['n_tokens'].iloc[0]):,} tokens, BOS left out; one seed. "
        "In the paper's panel one published SAE point (L0 505, CE 3.337) lies outside the axes, as in "
        "the paper, and the gap above L0 110 is interpolated towards it."
    )


def sweep_claim(model: str, evaluation: Evaluation) -> Line:
    """Figure 3's claim: at equal L0, transcoders are as faithful as SAEs or more."""
    gaps = ce_gap_table(evaluation)
    paper = paper_sweep()
    published = ce_gap(paper, shared_l0(paper))
    share = (gaps["winner"] != "SAE").mean() if len(gaps) else float("nan")
    verdict = {1.0: "reproduced", 0.0: "not reproduced"}.get(share, "mixed")
    return claim_line(
        f"Fig. 3: transcoders no less faithful than SAEs at equal L0 ({model})",
        f"SAE − transcoder CE {published.min():+.4f} to {published.max():+.4f} nats "
        "(Pythia-410M L15)",
        f"{gaps['ce_gap'].min():+.4f} to {gaps['ce_gap'].max():+.4f} nats: {who_wins(gaps)}",
        verdict if len(gaps) else "no shared range",
    )


SWEEP_STEP = "02_sparsity_vs_faithfulness"


def train_sweep(preset: Preset, lm: LanguageModel, corpus: Corpus) -> Trained:
    """Notebook 02: transcoders and SAEs of one layer over several λ, from one harvest."""
    lm.check_layer(preset.sweep.layer)
    return _trained(preset, SWEEP_STEP, lm, corpus, preset.sweep.specs(), preset.sweep.training)


def evaluate_sweep(
    preset: Preset, lm: LanguageModel, corpus: Corpus, trained: Trained
) -> Evaluation:
    """The table behind Figure 3, with each dictionary's family and sparsity (λ, λ₀ or k)."""
    evaluation = _evaluated(preset, f"{SWEEP_STEP}_evaluation", lm, corpus, trained)
    specs = {spec.name: spec for spec in preset.sweep.specs()}
    own = [specs[name] for name in evaluation.table["name"]]
    table = evaluation.table.assign(
        family=[spec.family for spec in own], sparsity=[spec.sparsity for spec in own]
    )
    return Evaluation(table, evaluation.row_ce)


def run_sweeps(preset: Preset) -> dict[str, Evaluation]:
    """Everything that Figure 3 needs, made or loaded: this preset's sweep and its companions'."""
    presets = [preset, *(companion(preset, name) for name in preset.companions)]
    return {f"{p.model}, layer {p.sweep.layer}": _run_sweep(p) for p in presets}


def companion(preset: Preset, name: str) -> Preset:
    """Preset `name` with this preset's seed and folder of runs."""
    own_seed = load_preset(name).seed
    seed = None if preset.seed == own_seed else preset.seed
    return load_preset(name, seed, preset.runs_dir)


def _run_sweep(preset: Preset) -> Evaluation:
    lm = load_model(preset)
    corpus = prepare_corpus(preset, lm)
    return evaluate_sweep(preset, lm, corpus, train_sweep(preset, lm, corpus))
