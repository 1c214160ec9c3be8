"""What a blind session says of sources and paths: enough to read a circuit by, too little to name a token by.

Not only numbers name tokens: the sign of a head's line is the sign of a product that hangs on one token, and five such
questions name it. So nothing is said of single sources but which features above layer 0 there are, which features of
layer 0 raise the target (in full studies), and which heads raise it most from earlier tokens, each by rank among its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from tclib.circuits.frozen import KINDS
from tclib.circuits.paths import Path
from tclib.circuits.sources import Sources
from tclib.support.statistics import ranked

# Deeper features whose contributions are given: all of them would give the sum of the rest.
N_NUMBERED = 3
N_HEADS = 5  # lines of heads that are listed
MAX_LISTED = 50  # features
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
    found: Sources, shares: pd.Series, n_sources: int, hides_layer_0: bool, pos: int
) -> pd.DataFrame:
    """The groups, and what is listed, each kind by rank: deeper features, features of layer 0, heads."""
    kind, effect = np.array(KINDS)[found.kind], found.contribution
    is_feature, n = kind == "feature", min(n_sources, MAX_LISTED)
    is_earlier = (kind == "head") & (found.pos > 0) & (found.pos < pos)
    listed = [
        (is_feature & (found.layer > 0), n),
        (is_feature & (found.layer == 0) & (effect > 0), 0 if hides_layer_0 else n),
        (is_earlier & (effect > 0), N_HEADS),
    ]
    lines: list[dict[str, object]] = [
        {"kind": name, "layer": -1, "head": -1, "feature": -1, "pos": -1, "share": share}
        for name, share in shares.items()
    ]
    for place, (mask, n_kept) in enumerate(listed):
        which = np.flatnonzero(mask)
        for rank, i in enumerate(which[ranked(np.abs(effect[which]))[:n_kept]], 1):
            where = {name: int(getattr(found, name)[i]) for name in _PLACE}
            given = rough(float(effect[i])) if place == 0 and rank <= N_NUMBERED else np.nan
            lines.append({"kind": kind[i], **where, "rank": rank, "contribution": given})
    columns = ["kind", *_PLACE, "rank", "contribution", "share"]
    return pd.DataFrame(lines, columns=columns)


_PLACE = ("layer", "head", "feature", "pos")


def path_lines(paths: Sequence[Path], restricted: bool) -> pd.DataFrame:
    """Paths that end in deeper features, strongest first, the first of each length with their contributions.

    Then those that raise the root from a feature of layer 0 or a head, by name. All others end at the token
    itself or in a bias. Restricted: without paths through a feature of layer 0.
    """
    deep, others, n_numbered = [], [], Counter[int]()
    for path in paths:
        end, named = path.nodes[-1], " <- ".join(map(str, path.nodes))
        if restricted and any(node.kind == "feature" and node.layer == 0 for node in path.nodes):
            continue
        if end.kind == "feature" and end.layer > 0:
            n_numbered[len(path.nodes)] += 1
            is_given = n_numbered[len(path.nodes)] <= N_NUMBERED
            deep.append((named, rough(path.contribution) if is_given else np.nan))
        elif end.kind in ("feature", "head") and path.contribution > 0:
            others.append((named, np.nan))
    return pd.DataFrame([*deep, *sorted(others)], columns=["path", "contribution"])
