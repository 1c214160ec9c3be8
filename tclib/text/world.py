"""The bundled world: English-like documents whose every token has a known latent label.

Because a derivation determines its text, the mean derivation surprisal per token is an upper bound on the entropy
of the language (`surprisal_bound`), and no model can be expected to beat the entropy itself: a loss close to the
bound means that the language has been learned. Two small models trained on this world are bundled under data/demo
(`training.world_models`): `gpt2` (sequential blocks, learned positions) and `neox` (parallel blocks, rotary positions).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from tclib.text.grammar import PIECE_PATTERN, Document, write_document

BOS = "<|bos|>"
UNKNOWN = "<|unk|>"
VOCABULARY_SEED = 20_240_617
VOCABULARY_DOCUMENTS = 60_000
HELD_OUT_SEED = 987_654_321
HELD_OUT_DOCUMENTS = 2_000


def documents(seed: int) -> Iterator[Document]:
    """An endless stream of documents; the same seed gives the same stream."""
    rng = random.Random(seed)
    while True:
        yield write_document(rng)


def held_out_pairs(n_ctx: int) -> list[tuple[Document, Document]]:
    """What the models are measured on: pairs of held-out documents that fit the context together."""
    drawn = list(itertools.islice(documents(HELD_OUT_SEED), HELD_OUT_DOCUMENTS))
    pairs = zip(drawn[::2], drawn[1::2], strict=True)
    return [(a, b) for a, b in pairs if len(a.tokens) + len(b.tokens) + 3 <= n_ctx]


def surprisal_bound(measured: Sequence[Document]) -> float:
    """Mean derivation surprisal in nats per predicted token: an upper bound on the entropy rate.

    H(text) = H(derivation) − H(derivation | text) ≤ H(derivation). Each document predicts its own
    tokens and the BOS that ends it, so the sum is divided by tokens + documents.
    """
    nats = sum(sum(document.surprisals) for document in measured)
    return nats / sum(len(document.tokens) + 1 for document in measured)


@cache
def vocabulary() -> dict[str, int]:
    """Token to id: BOS, unknown, the hundred two-digit tokens without and with a space, the words."""
    stream = documents(VOCABULARY_SEED)
    pieces = {p for _ in range(VOCABULARY_DOCUMENTS) for p in next(stream).tokens}
    numbers = [f"{space}{n:02d}" for space in ("", " ") for n in range(100)]
    words = sorted(pieces.difference(numbers))
    return {token: i for i, token in enumerate([BOS, UNKNOWN, *numbers, *words])}


def build_tokenizer() -> Any:
    """The world's word-level tokenizer, as a transformers fast tokenizer.

    A space is put before the text, so that "The war" and " The war" are the same tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE_PATTERN), "removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
