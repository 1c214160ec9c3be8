"""Text that the model writes itself: documents sampled at temperature 1, in blocks that are kept.

Block b is a pure function of (model, context, seed, b): a sampling that was killed loses at most the block it
was in, and goes on with the same tokens; bit for bit, on one machine with one number of threads (others sum in
another order, and then a draw may fall on the other side).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.models.continuation import Continuation
from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError
from tclib.support.files import exclusive, load_tensors, save_tensors

BLOCK_DOCUMENTS = 128
TOKENS = "tokens"


def sampled_documents(
    lm: LanguageModel, n_ctx: int, seed: int, cache_folder: Path | None = None
) -> Iterator[list[int]]:
    """Endless documents of 1 to `n_ctx` − 1 tokens, without BOS and EOS, no two of them the same.

    Blocks are kept below `cache_folder`, if there is one. Errors: `InputError` if the model has nothing new
    to say, or has hooks on it.
    """
    folder = None
    if cache_folder is not None:
        named = f"{lm.content_hash} {n_ctx} {seed} {BLOCK_DOCUMENTS}"
        folder = cache_folder / hashlib.sha256(named.encode()).hexdigest()[:16]
    seen: set[bytes] = set()
    for block_idx in itertools.count():
        n_before = len(seen)
        for row in _kept_block(lm, n_ctx, seed, block_idx, folder):
            document = row[row != lm.bos_id].tolist()
            digest = hashlib.sha256(str(document).encode()).digest()
            if document and digest not in seen:
                seen.add(digest)
                yield document
        if len(seen) == n_before:
            raise InputError(
                f"n_sampled_tokens: {lm.name} wrote {n_before} different documents, and none that is new "
                f"among its next {BLOCK_DOCUMENTS}: ask for fewer"
            )


def sample_block(
    lm: LanguageModel, n_ctx: int, seed: int, block_idx: int
) -> Int[Tensor, "document pos"]:
    """`BLOCK_DOCUMENTS` documents side by side, [document, n_ctx − 1]: what the model writes behind BOS.

    A document ends where the model writes BOS or EOS, or with the row; from its end on it is BOS.
    """
    shape = (BLOCK_DOCUMENTS, n_ctx - 1)
    uniform = torch.rand(shape, generator=_generator(seed, block_idx), dtype=torch.float64)
    tokens = torch.full(shape, lm.bos_id)
    ends = torch.tensor(sorted({lm.bos_id, lm.tokenizer.eos_token_id} - {None}), device=lm.device)
    text, unfinished = Continuation(lm), torch.arange(BLOCK_DOCUMENTS)
    ids = torch.full((BLOCK_DOCUMENTS,), lm.bos_id, device=lm.device)
    for pos in range(n_ctx - 1):
        ids = draw(text.logits(ids), uniform[unfinished, pos].to(lm.device))
        goes_on = ~torch.isin(ids, ends)
        if not bool(goes_on.all()):
            text.keep(goes_on.nonzero()[:, 0])
            ids, unfinished = ids[goes_on], unfinished[goes_on.cpu()]
        if not len(ids):
            break
        tokens[unfinished, pos] = ids.cpu()
    return tokens.int()


def draw(logits: Float[Tensor, "row d_vocab"], uniform: Float[Tensor, "row"]) -> Int[Tensor, "row"]:
    """A token a row by its softmax: the first at which the summed probabilities exceed `uniform`.

    `uniform` is in [0, 1). A number a row, whatever the vocabulary: a draw that falls otherwise moves no other
    row's.
    """
    summed = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)
    wanted = uniform[:, None] * summed[:, -1:]
    found = torch.searchsorted(summed, wanted, right=True)[:, 0]
    return found.clamp_(max=summed.shape[1] - 1)


def _kept_block(
    lm: LanguageModel, n_ctx: int, seed: int, block_idx: int, folder: Path | None
) -> Int[Tensor, "document pos"]:
    """The block from its file, or sampled now and written."""
    if folder is None:
        return sample_block(lm, n_ctx, seed, block_idx)
    path = folder / f"block-{block_idx:05d}.safetensors"
    if not path.is_file():
        # A second run on the same text waits, and finds the block there.
        with exclusive(folder, is_patient=True):
            if not path.is_file():
                tokens = sample_block(lm, n_ctx, seed, block_idx)
                save_tensors(path, {TOKENS: tokens}, {"model": lm.name, "seed": seed})
    return load_tensors(path, f"delete {path} and run again")[0][TOKENS]


def _generator(seed: int, block_idx: int) -> torch.Generator:
    """A generator of its own for every block."""
    digest = hashlib.sha256(f"sampled text {seed} {block_idx}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
