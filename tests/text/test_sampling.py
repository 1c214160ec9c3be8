"""What the model writes itself: its distribution, its seed, its resume, and what it leaves alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import D_VOCAB, random_rows, tiny_lm, unchecked_types

from tclib.models.continuation import Continuation
from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError
from tclib.text import sampling
from tclib.text.corpus import CorpusConfig, build_corpus
from tclib.text.sampling import BLOCK_DOCUMENTS, draw, sample_block, sampled_documents

N_CTX = 12
SMALL = CorpusConfig(n_ctx=N_CTX, n_train_tokens=20 * N_CTX, n_eval_tokens=5 * N_CTX)


def first(lm: LanguageModel, n: int, folder: Path | None = None, seed: int = 3) -> list[list[int]]:
    return list(itertools.islice(sampled_documents(lm, N_CTX, seed, folder), n))


def test_a_row_that_grows_has_the_logits_of_the_whole_row(lm: LanguageModel) -> None:
    rows = random_rows(5, 9).long()
    whole = lm.logits(rows)
    text, kept = Continuation(lm), torch.arange(5)
    for pos in range(9):
        if pos == 4:
            kept = torch.tensor([3, 0])
            text.keep(kept)
        torch.testing.assert_close(
            text.logits(rows[kept, pos]), whole[kept, pos], rtol=1e-3, atol=1e-3
        )


def test_a_draw_takes_each_token_as_often_as_its_probability_says() -> None:
    probability = torch.tensor([0.0, 0.25, 0.5, 0.0, 0.25])
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(probability.log().expand(6, -1), uniform).tolist() == [1, 1, 2, 2, 4, 4]
    n = 4_000  # every n-th part of the unit interval once: counts are n p, to the borders
    logits = torch.randn(D_VOCAB, generator=torch.Generator().manual_seed(0))
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = draw(logits.expand(n, -1), grid).bincount(minlength=D_VOCAB)
    assert (counts - n * logits.softmax(-1)).abs().max() <= 1.01


def test_documents_follow_the_models_own_distribution() -> None:
    """First tokens by the softmax behind BOS, second ones by that behind the first (χ², 5 σ)."""
    lm = tiny_lm()
    tokens = torch.cat([sample_block(lm, 3, 0, b) for b in range(40)]).long()
    most = int(tokens[tokens[:, 0] != 0, 0].mode().values)
    prompts = {(): tokens[:, 0], (most,): tokens[tokens[:, 0] == most, 1]}
    for prompt, drawn in prompts.items():
        expected = lm.logits(torch.tensor([[0, *prompt]]))[0, -1].double().softmax(-1) * len(drawn)
        often = expected >= 5
        observed = drawn.bincount(minlength=D_VOCAB).double()
        parts = [torch.cat([x[often], x[~often].sum()[None]]) for x in (observed, expected)]
        chi2, n = float(((parts[0] - parts[1]) ** 2 / parts[1]).sum()), int(often.sum())
        assert n >= 5 and chi2 < n + 5 * (2 * n) ** 0.5


def test_a_document_ends_at_bos_or_with_its_row(lm: LanguageModel) -> None:
    tokens = sample_block(lm, 40, 0, 0)
    assert tokens.shape == (BLOCK_DOCUMENTS, 39)
    ends = tokens == lm.bos_id
    assert ends.any() and bool((ends.int().diff(dim=1) >= 0).all())  # once it is over, it is over


def test_the_seed_and_the_block_act_and_repeat() -> None:
    lm = tiny_lm()
    one, again = sample_block(lm, N_CTX, 1, 0), sample_block(lm, N_CTX, 1, 0)
    assert one.equal(again)
    for other in ((2, 0), (1, 1)):
        assert (sample_block(lm, N_CTX, *other) != one).any(1).float().mean() > 0.9


def test_a_sampling_that_was_killed_goes_on_with_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, n = tiny_lm(), 3 * BLOCK_DOCUMENTS // 2
    wanted = first(lm, n)
    sampled: list[int] = []

    def killed_in_the_second(lm: LanguageModel, n_ctx: int, seed: int, block: int) -> torch.Tensor:
        sampled.append(block)
        if sampled == [0, 1]:
            raise KeyboardInterrupt
        return sample_block(lm, n_ctx, seed, block)

    monkeypatch.setattr(sampling, "sample_block", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        first(lm, n, tmp_path)
    assert first(lm, n, tmp_path) == wanted
    assert first(lm, n, tmp_path) == wanted and sampled == [0, 1, 1]
    first(lm, 1, tmp_path, seed=4)
    first(tiny_lm(seed=1), 1, tmp_path)
    assert sampled == [0, 1, 1, 0, 0]  # another seed, another model: text of their own


def test_a_damaged_block_is_named_and_not_used(tmp_path: Path) -> None:
    lm = tiny_lm()
    first(lm, 1, tmp_path)
    (path,) = tmp_path.rglob("block-00000.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="block-00000.safetensors is corrupted.*delete"):
        first(lm, 1, tmp_path)


def test_no_document_comes_twice_and_a_model_with_nothing_new_to_say_is_named() -> None:
    lm = tiny_lm()
    documents = first(lm, 300)
    assert len({tuple(document) for document in documents}) == 300
    assert all(document and lm.bos_id not in document for document in documents)
    lm.model.lm_head.weight.data.mul_(1e4)  # it writes the most likely document alone
    with pytest.raises(InputError, match="[01] different documents, and none that is new"):
        first(lm, 2)


def test_text_that_the_model_writes_stands_behind_the_training_rows_alone(tmp_path: Path) -> None:
    lm = LanguageModel.load("demo", device="cpu")
    plain = build_corpus(SMALL, lm)
    longer = build_corpus(replace(SMALL, n_sampled_tokens=10 * N_CTX + 1), lm, tmp_path)
    assert longer.evaluation.equal(plain.evaluation) and longer.train[:20].equal(plain.train)
    sampled = longer.train[20:]
    assert sampled.shape == (10, N_CTX) and bool((sampled[:, 0] == lm.bos_id).all())
    written = [token for document in first(lm, 30, seed=SMALL.seed) for token in document]
    own = sampled[sampled != lm.bos_id].tolist()
    assert own == written[: len(own)]
    assert np.unique(sampled.numpy(), axis=0).shape == sampled.shape


def test_bad_input_is_named() -> None:
    with unchecked_types():
        with pytest.raises(
            InputError, match="n_sampled_tokens 11: expected 0, or at least one row"
        ):
            replace(SMALL, n_sampled_tokens=N_CTX - 1)
        with pytest.raises(InputError, match="n_sampled_tokens -1: expected at least 0"):
            replace(SMALL, n_sampled_tokens=-1)
    lm = tiny_lm()
    lm.model.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="attached to the model"):
        sample_block(lm, N_CTX, 0, 0)
