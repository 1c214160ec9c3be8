"""No verdict, count or chosen name hangs on the last bits of a sum: other threads and kernels say the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import small_preset

from tclib.dictionaries.dictionary import Dictionary
from tclib.replication.artifacts import Trained
from tclib.replication.presets import Preset
from tclib.replication.run import Run

pytestmark = pytest.mark.slow

# The second changes sums that are split over threads, and every product and softmax: torch's own kernels without AVX,
# MKL's and numpy's without fused products.
KERNELS = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "AVX",
    "OPENBLAS_CORETYPE": "Sandybridge",
}
MACHINES = ({"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "2", **KERNELS})
SAY = """
import sys
from pathlib import Path
from replication.test_same_everywhere import say
say(Path(sys.argv[1]))
"""
STUDIED = "feature kind predicate grade n_active n_predicted true_latent said_latent"
CHOSEN = "layer head crossing nearest_approach harmful_feature harmful_rank top_features"


def preset_in(folder: Path) -> Preset:
    """The small preset, narrower and with few ablations."""
    small = small_preset(folder)
    return replace(
        small,
        transcoders=replace(small.transcoders, expansion=1),
        sweep=replace(small.sweep, expansion=1, sae_mlp_in_l1=(1e-3,), token_budgets=()),
        greater_than=replace(small.greater_than, components_every=10),
    )


def twice(trained: Trained) -> Trained:
    """The dictionaries with every feature twice, but for rounding, each writing half: every choice is a tie."""
    return replace(trained, dictionaries={n: _twice(d) for n, d in trained.dictionaries.items()})


def _twice(one: Dictionary) -> Dictionary:
    noise = torch.randn(one.W_enc.shape, generator=torch.Generator().manual_seed(0))
    W_enc = torch.cat([one.W_enc, one.W_enc * (1 + 1e-7 * noise)], 1)
    weights = (W_enc, one.b_enc.repeat(2), one.W_dec.repeat(2, 1) / 2)
    config = replace(one.config, n_features=2 * one.config.n_features)
    return Dictionary(config, *weights, one.b_dec)


def say(folder: Path) -> None:
    """Print what the steps conclude from the dictionaries in `folder`, and a sum in all its bits."""
    from tclib.replication import case_studies, comparison, greater_than, transcoders

    run = Run(preset_in(folder))
    run.trained, run.swept = twice(run.trained), twice(run.swept)
    studies, compared, found = run.studies.table, run.comparison, run.greater_than
    parts = (transcoders, case_studies, comparison, greater_than)
    lines = [line for part in parts for line in part.claims(run)]
    said = {
        "bits": run.lm.logits(run.corpus.evaluation[:4].long()).double().sum().item().hex(),
        "verdicts": {line["claim"]: line["verdict"] for line in lines},
        "studies": studies[STUDIED.split()].to_dict("records"),
        "items": compared.items.drop(columns=["f1", "auroc", "latent_f1"]).to_dict("records"),
        "origin": compared.origin,
        "latents": compared.latents.drop(columns="f1").to_dict("records"),
        "greater_than": {name: found.summary[name] for name in CHOSEN.split()},
        "ahead": found.ahead[["units", "k", "lead"]].to_dict("records"),
        "heads": found.reading_heads[["layer", "head"]].to_numpy().tolist(),
        "lags": greater_than.best_lags(found.feature_curves)[["feature", "lag"]]
        .to_numpy()
        .tolist(),
    }
    print("SAID", json.dumps(said))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its dictionaries, and no step that reads them."""
    folder = tmp_path_factory.mktemp("trained")
    run = Run(preset_in(folder))
    _ = run.trained, run.swept
    return folder


def test_other_threads_and_kernels_reach_the_same_verdicts_counts_and_names(
    trained: Path, tmp_path: Path
) -> None:
    started = []
    for i, machine in enumerate(MACHINES):
        shutil.copytree(trained, tmp_path / str(i))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **machine}
        command = [sys.executable, "-c", SAY, str(tmp_path / str(i))]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        )
    said: list[dict[str, Any]] = []
    for process in started:
        out, _ = process.communicate()
        assert process.returncode == 0
        said.append(json.loads(out.rpartition("SAID")[2]))
    bits = [one.pop("bits") for one in said]
    if bits[0] == bits[1]:
        pytest.skip("torch has no other kernels on this machine")
    assert len(said[0]["verdicts"]) == 12
    for other in said[1:]:
        assert other == said[0]
