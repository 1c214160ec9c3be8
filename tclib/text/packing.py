"""Documents to rows of equal length, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int


def pack(
    documents: Iterable[list[int]], n_ctx: int, bos_id: int, n_rows: int | None = None
) -> Int[np.ndarray, "row pos"]:
    """Rows of BOS followed by `n_ctx` − 1 tokens of the stream "document BOS document BOS …".

    Every token of every document is kept, in order, but for what is left over after the last whole
    row. A BOS that would fall right behind a row's own is dropped, so none is ever doubled. Stops
    after `n_rows` rows when that is given.
    """
    rows: list[np.ndarray] = []
    pending: list[int] = []
    width = n_ctx - 1
    for document in documents:
        if not document:  # it would leave two BOS in a row
            continue
        pending += [*document, bos_id]
        while len(pending) > width:
            if pending[0] == bos_id:
                del pending[0]
                continue
            rows.append(np.array([bos_id, *pending[:width]], dtype=np.int32))
            del pending[:width]
        if n_rows is not None and len(rows) >= n_rows:
            break
    if not rows:
        return np.zeros((0, n_ctx), dtype=np.int32)
    return np.stack(rows[:n_rows])
