"""Text that the model goes on with, a token at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.models.checks import check_hooks
from tclib.models.running import Running


class Continuation:
    """Rows that grow by a token each pass; the keys and values of what stands already are kept.

    Args:
        lm: the model. Errors: `InputError` while hooks are on it, which see one token at a time here.
    """

    def __init__(self, lm: Running) -> None:
        from transformers import DynamicCache

        check_hooks(lm.model, lm.name)
        self._model, self._cache = lm.model, DynamicCache(config=lm.model.config)

    @torch.no_grad()
    def logits(self, ids: Int[Tensor, "row"]) -> Float[Tensor, "row d_vocab"]:
        """Next-token logits of every row, once `ids` stand at its end."""
        read = self._model(
            ids[:, None], past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        logits: Tensor = read.logits
        return logits[:, -1]

    def keep(self, rows: Int[Tensor, "kept"]) -> None:
        """Go on with these rows alone."""
        self._cache.batch_select_indices(rows)
