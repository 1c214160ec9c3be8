"""What a blind session says of sources and paths: enough to read a circuit by, too little to name a token by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from tclib.circuits.frozen import KINDS
from tclib.circuits.paths import Path
from tclib.circuits.sources import Sources
from tclib.support.statistics import ranked

N_NUMBERED = (
    3  # deeper features whose contributions are given: all of them would give the sum of the rest
)
# What makes up a pre-activation, by where it comes from.
GROUPS = ("the token itself", "earlier tokens", "features above layer 0", "the rest")
TOKEN, EARLIER, DEEPER, REST = range(4)
_TOKENS_OWN = ("embedding", "feature", "error", "mlp", "skip")  # of layer 0 or below


def coarse(value: float) -> float:
    """An activation of a deeper feature, to two significant digits."""
    return float(f"{value:.2g}")


def rough(value: float) -> float:
    """A contribution of a deeper feature, to one: what it leaves of the whole says less of the rest."""
    return float(f"{value:.1g}")


def group_shares(found: Sources, pos: int) -> pd.Series:
    """Each group's part of the pre-activation in quarters, rounded down, from −0.25 to 1.

    To the token itself belong its embedding, all that layer 0's MLP makes of it, and heads that read it.
    BOS and biases are of the rest.
    """
    kind = np.array(KINDS)[found.kind]
    is_head = kind == "head"
    is_own = (is_head & (found.pos == pos)) | (np.isin(kind, _TOKENS_OWN) & (found.layer <= 0))
    is_earlier = is_head & (found.pos > 0) & (found.pos < pos)
    is_deeper = (kind == "feature") & (found.layer > 0)
    group = np.select([is_own, is_earlier, is_deeper], [TOKEN, EARLIER, DEEPER], REST)
    parts = np.bincount(group, found.contribution, len(GROUPS)) / max(found.value, 1e-9)
    return pd.Series((np.floor(parts * 4) / 4).clip(-0.25, 1.0), index=list(GROUPS))


def source_lines(
    found: Sources, shares: pd.Series, n_sources: int, hides_layer_0: bool
) -> pd.DataFrame:
    """The groups, and the strongest sources by rank."""
    is_feature = found.kind == KINDS.index("feature")
    shown = np.flatnonzero(~(is_feature & (found.layer == 0) & hides_layer_0))
    order = shown[ranked(np.abs(found.contribution[shown]))[:n_sources]]
    effect = found.contribution[order]
    is_deep = is_feature[order] & (found.layer[order] > 0)
    is_deep &= is_deep.cumsum() <= N_NUMBERED
    n, none = len(shares), [-1] * len(shares)

    def column(of_groups: Sequence[object], of_sources: Iterable[object]) -> list[object]:
        return [*of_groups, *of_sources]

    places = {
        name: column(none, getattr(found, name)[order].tolist())
        for name in ("layer", "head", "feature", "pos")
    }
    given = [rough(x) if deep else np.nan for x, deep in zip(effect, is_deep, strict=True)]
    columns = {
        "kind": column(list(shares.index), np.array(KINDS)[found.kind[order]].tolist()),
        **places,
        "rank": column([np.nan] * n, range(1, len(order) + 1)),
        "sign": column([np.nan] * n, np.sign(effect).tolist()),
        "contribution": column([np.nan] * n, given),
        "share": column(shares.tolist(), [np.nan] * len(order)),
    }
    return pd.DataFrame(columns)


def path_lines(paths: Sequence[Path], restricted: bool) -> pd.DataFrame:
    """Paths by level, strongest first: path, rank in its level, sign, and contribution where it tells nothing."""
    lines, ranks = [], dict[int, int]()
    for path in paths:
        end = path.nodes[-1]
        if restricted and any(node.kind == "feature" and node.layer == 0 for node in path.nodes):
            continue
        rank = ranks[len(path.nodes)] = ranks.get(len(path.nodes), 0) + 1
        is_deep = end.kind == "feature" and end.layer > 0
        contribution = rough(path.contribution) if is_deep else np.nan
        named = " <- ".join(map(str, path.nodes))
        lines.append((named, rank, int(np.sign(path.contribution)), contribution))
    return pd.DataFrame(lines, columns=["path", "rank", "sign", "contribution"])
