"""The greedy search and attribution along paths, beside the authors' own code on the same weights.

Their code runs in an environment of its own, from a clone of their repository:

    git clone https://github.com/jacobdunefsky/transcoder_circuits
    git -C transcoder_circuits checkout 8721ff06b64889e8cc50bb1c5e869c7f72b8303d
    python3.11 -m venv authors_env
    authors_env/bin/pip install -c constraints.txt torch==2.13.0
    authors_env/bin/pip install transformer-lens==3.9.0 einops plotly matplotlib ipython
    AUTHORS_PYTHON=authors_env/bin/python AUTHORS_REPOSITORY=transcoder_circuits \\
        python benchmarks/run.py --only authors
"""

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from random_models import GPT2_SMALL, SMALL, Geometry
from result import NotHere, Result
from safetensors.torch import save_file
from torch import Tensor

from tclib.circuits.frozen import FrozenPrompts, Target
from tclib.circuits.paths import Node, NodeFilter, greedy_paths
from tclib.circuits.paths import Path as FoundPath
from tclib.dictionaries.dictionary import Dictionary
from tclib.models.language_model import LanguageModel
from tclib.replication.authors_paths import Start, feature_start, follow, logit_start

THEIRS = Path(__file__).with_name("authors_greedy.py")
N_PROMPTS, N_ITERATIONS = 3, 3
LOGITS = (40, 41)


def run(small: bool) -> Result:
    """Three prompts of 32 tokens, two roots each; transcoders as in `full_graph`. Target: 1e-4.

    Twice: with encoders as they are, along all the paths that their search finds; and with centred
    encoders (to which the model's norms are blind, their code is not), path by path as each search finds
    them. Their search considers as many entries of an attention layer as it has heads, so that is the width.
    """
    given = [os.environ.get(name) for name in ("AUTHORS_PYTHON", "AUTHORS_REPOSITORY")]
    if not all(given):
        raise NotHere(
            "AUTHORS_PYTHON and AUTHORS_REPOSITORY are not set (see benchmarks/authors.py)"
        )
    python, repository = (str(Path(str(one)).expanduser().absolute()) for one in given)
    shape, n_pos = (SMALL, 8) if small else (GPT2_SMALL, 32)
    lm, rows, transcoders = setup(shape, n_pos)
    roots = [chosen_root(lm, transcoders, row) for row in rows]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, lm, transcoders, rows, roots, shape.n_heads)
        subprocess.run([python, str(THEIRS), str(folder), repository], check=True)
        told = json.loads((folder / "theirs.json").read_text())
    followed = along_their_paths(lm, transcoders, rows, roots, told["as they are"])
    for one in transcoders:
        one.W_enc -= one.W_enc.mean(0)
    n_same, n_paths, apart, seconds = searched(lm, transcoders, rows, roots, told["centred"], shape)
    return Result(
        {"n_pos": n_pos, "n_layers": shape.n_layers, "n_paths": n_paths},
        {
            f"greedy search on {n_pos} tokens, two roots": (seconds / N_PROMPTS, "s"),
            "the authors' search over ours, in time": (told["centred"]["seconds"] / seconds, "×"),
            f"paths of {n_paths} that both searches find": (n_same, ""),
        },
        {
            "attribution along their paths, theirs": (followed, 1e-4),
            "paths of the search, theirs": (apart, 1e-4),
        },
    )


def setup(shape: Geometry, n_pos: int) -> tuple[LanguageModel, Tensor, list[Dictionary]]:
    """A random model whose norms have gains and biases, prompts, and a transcoder a layer."""
    lm = shape.lm(n_pos)
    for weight in lm.model.parameters():
        if weight.ndim == 1:
            weight.data += 0.1 * torch.randn_like(weight)
    rows = shape.rows(N_PROMPTS, n_pos).long()
    return lm, rows, shape.transcoders(lm, rows[:1])


def chosen_root(lm: LanguageModel, transcoders: list[Dictionary], row: Tensor) -> tuple[int, int]:
    """The feature of the last layer but one that is strongest at the last token."""
    one = transcoders[-2]
    site = one.config.input_site
    return one.config.layer, int(one.encode(lm.read(row[None], {site})[site])[0, -1].argmax())


def write(
    folder: Path,
    lm: LanguageModel,
    transcoders: list[Dictionary],
    rows: Tensor,
    roots: list[tuple[int, int]],
    n_branches: int,
) -> None:
    """What authors_greedy.py reads."""
    lm.model.save_pretrained(folder / "model")
    for d in transcoders:
        weights = {name: weight.contiguous() for name, weight in d.parameters().items()}
        save_file(weights, folder / f"layer_{d.config.layer}.safetensors")
    task = {"rows": rows.tolist(), "roots": roots, "logits": LOGITS}
    task |= {"n_iterations": N_ITERATIONS, "n_branches": n_branches}
    (folder / "task.json").write_text(json.dumps(task))


def along_their_paths(
    lm: LanguageModel,
    transcoders: list[Dictionary],
    rows: Tensor,
    roots: list[tuple[int, int]],
    told: dict[str, Any],
) -> float:
    """The largest difference of a contribution, over the largest contribution, as the authors compute them."""
    apart = largest = 0.0
    for row, root, by_root in zip(rows, roots, told["paths"], strict=True):
        frozen = FrozenPrompts(lm, row[None], transcoders)
        starts: list[Start] = [logit_start(frozen, *LOGITS), feature_start(frozen, *root)]
        for start, levels in zip(starts, by_root, strict=True):
            for nodes, theirs in (path for level in levels for path in level):
                ours = follow(frozen, start, [Node(*node) for node in nodes])[-1].contribution
                apart, largest = max(apart, abs(ours - theirs)), max(largest, abs(theirs))
    return apart / largest


def searched(
    lm: LanguageModel,
    transcoders: list[Dictionary],
    rows: Tensor,
    roots: list[tuple[int, int]],
    told: dict[str, Any],
    shape: Geometry,
) -> tuple[int, int, float, float]:
    """(Paths that both found, paths, largest relative difference of one rank, seconds of ours)."""
    kinds, positions = frozenset({"feature", "head"}), frozenset(range(1, rows.shape[1]))
    allowed = NodeFilter(kinds=kinds, positions=positions)
    n_same, n_paths, apart, largest, seconds = 0, 0, 0.0, 0.0, 0.0
    for row, root, by_root in zip(rows, roots, told["paths"], strict=True):
        began = time.perf_counter()
        frozen = FrozenPrompts(lm, row[None], transcoders)
        found = [
            greedy_paths(frozen, target, N_ITERATIONS, shape.n_heads, allowed, "positive")
            for target in targets(frozen, root)
        ]
        seconds += time.perf_counter() - began
        scale = float(frozen.cache.final_scale[0, -1])  # their logits are before the final norm
        for levels, theirs, factor in zip(found, by_root, (scale, 1.0), strict=True):
            for own, other in zip(levels, theirs, strict=True):
                values = [factor * path.contribution for path in own]
                both = zip(values, (value for _, value in other), strict=True)
                apart = max([apart, *(abs(a - b) for a, b in both)])
                largest = max([largest, *values])
                n_same += len(named(own) & {tuple(map(tuple, nodes)) for nodes, _ in other})
                n_paths += len(other)
    return n_same, n_paths, apart / largest, seconds


def targets(frozen: FrozenPrompts, root: tuple[int, int]) -> list[Target]:
    answer, other = LOGITS
    return [frozen.logit_target({answer: 1.0, other: -1.0}, -1), frozen.feature_target(*root, -1)]


def named(paths: list[FoundPath]) -> set[tuple[tuple[object, ...], ...]]:
    return {tuple(tuple(vars(node).values()) for node in path.nodes[1:]) for path in paths}
