"""Documents to rows of equal length, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from tclib.support.declared import shown, whole
from tclib.support.errors import InputError


def pack(
    documents: Iterable[list[int]], n_ctx: int, bos_id: int, n_rows: int | None = None
) -> Int[np.ndarray, "row pos"]:
    """Rows of BOS followed by `n_ctx` − 1 tokens of the stream "document BOS document BOS …".

    Every token of every document is kept, in order, but for what is left over after the last whole
    row. A BOS that would fall right behind a row's own is dropped, so none is ever doubled. Stops
    after `n_rows` rows when that is given. Errors: `InputError` for documents that are no lists of whole
    numbers, or rows without room for a token.
    """
    if whole("n_ctx", n_ctx) < 2 or (n_rows is not None and whole("n_rows", n_rows) < 0):
        raise InputError(f"n_ctx {n_ctx}, n_rows {n_rows}: expected at least 2, and at least 0")
    rows: list[np.ndarray] = []
    pending: list[int] = []
    width = n_ctx - 1
    for document in documents:
        if not isinstance(document, list | tuple):
            raise InputError(f"document {shown(document)}: expected a list of token ids")
        if not document:  # it would leave two BOS in a row
            continue
        pending += [*document, bos_id]
        while len(pending) > width:
            if pending[0] == bos_id:
                del pending[0]
                continue
            row = np.array([bos_id, *pending[:width]])
            if row.dtype.kind != "i":
                raise InputError(
                    f"document with {row.dtype}: expected whole numbers, the ids of tokens"
                )
            rows.append(row.astype(np.int32))
            del pending[:width]
        if n_rows is not None and len(rows) >= n_rows:
            break
    if not rows:
        return np.zeros((0, n_ctx), dtype=np.int32)
    return np.stack(rows[:n_rows])
