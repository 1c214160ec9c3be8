"""Whatever the documents are, packing loses, moves and doubles nothing."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from tiny import FEW

from tclib.text.packing import pack

BOS = 0
DOCUMENTS = st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=12)


@FEW
@given(DOCUMENTS, st.integers(2, 9), st.none() | st.integers(1, 4))
def test_every_token_is_kept_in_order_and_no_bos_is_doubled(
    documents: list[list[int]], n_ctx: int, n_rows: int | None
) -> None:
    rows = pack(documents, n_ctx, BOS, n_rows)
    assert rows.shape[1] == n_ctx and (rows[:, 0] == BOS).all()
    assert n_rows is None or len(rows) <= n_rows
    for row in rows.tolist():
        assert not any(one == other == BOS for one, other in itertools.pairwise(row))
    tokens = list(itertools.chain(*documents))
    kept = rows[rows != BOS].tolist()
    assert kept == tokens[: len(kept)]
    if n_rows is None or len(rows) < n_rows:
        assert len(tokens) - len(kept) < n_ctx
