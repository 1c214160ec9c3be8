"""Text to rows of tokens: the demo world, text, docstrings, Wikipedia, Hugging Face datasets, a model's own.

Documents are split into training and evaluation by a hash of their text, before they are packed, so
no document (nor any copy of it) is in both. Rows are packed with BOS (`packing.pack`), shuffled by
seed, and named by a content hash. What the model itself writes (`sampling`) stands behind the training
rows of text, and in no evaluation row.
"""

from __future__ import annotations

import hashlib
import itertools
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from tclib.models.language_model import LanguageModel
from tclib.support.checked import checked
from tclib.support.declared import NUMBER, WHOLE, Count, Natural, Seed, declared
from tclib.support.errors import InputError
from tclib.support.paths import expanded
from tclib.support.progress import progress
from tclib.text import world
from tclib.text.documents import (
    bundled_dump,
    docstring_documents,
    python_files,
    text_documents,
    text_files,
    wikipedia_articles,
)
from tclib.text.hub_datasets import dataset_documents, dataset_files
from tclib.text.packing import pack
from tclib.text.sampling import sampled_documents

CorpusKind = Literal["demo", "text", "docstrings", "wikipedia", "huggingface"]
Split = Literal["train", "evaluation"]

TOKENIZER_BATCH = 1_000


@declared(frozen=True)
class CorpusConfig:
    """Which text, how much of it, and how it is split. Sizes are in tokens, BOS included."""

    kind: CorpusKind = "demo"
    """Where text comes from: the bundled world, a file or folder of `text`, Python `docstrings`, a
    `wikipedia` dump or a `huggingface` dataset (paper: OpenWebText)."""
    source: str = ""
    """text: a file or folder; docstrings: a folder; wikipedia: a dump; huggingface: a dataset's id, or
    a folder of parquet, jsonl or text files (a line each). Relative to the preset's file."""
    revision: str = ""
    """huggingface: branch, tag or commit of a dataset on the hub; empty: main. Data sets that are scripts
    have parquet files at `refs/convert/parquet`."""
    data_files: tuple[str, ...] = ()
    """huggingface: names or patterns, relative to the source, of the files to read; empty: all of the
    training split."""
    n_ctx: Annotated[int, Field(ge=2), WHOLE] = 128
    """Tokens a row. Paper: 128."""
    n_train_tokens: Count = 1_000_000
    """Tokens of the training split, at most. Paper: 60 million."""
    n_sampled_tokens: Natural = 0
    """Tokens of further training rows, which the model itself writes: its documents, sampled at temperature 1.
    Paper: none."""
    n_eval_tokens: Count = 100_000
    """Tokens of the evaluation split, at most. Paper: 3.2 million."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1), NUMBER] = 0.1
    """Share of the documents that is kept for evaluation."""
    seed: Seed = 0
    """Decides the order of rows and, where text is drawn, which. A preset's own seed replaces it."""

    def __post_init__(self) -> None:
        if self.kind in ("text", "huggingface") and not self.source:
            raise InputError(f"corpus kind {self.kind!r} needs a source: a path or a dataset id")
        if self.kind != "huggingface" and (self.revision or self.data_files):
            raise InputError(
                f"corpus kind {self.kind!r} takes no revision and no data_files: they are of huggingface's"
            )
        for pattern in self.data_files:
            if not pattern or Path(pattern).is_absolute():
                raise InputError(f"data_files {pattern!r}: expected a name relative to the source")
        for name in ("n_train_tokens", "n_eval_tokens"):
            if getattr(self, name) < self.n_ctx:
                raise InputError(
                    f"{name} {getattr(self, name)}: expected at least one row of n_ctx"
                )
        if 0 < self.n_sampled_tokens < self.n_ctx:
            raise InputError(
                f"n_sampled_tokens {self.n_sampled_tokens}: expected 0, or at least one row of n_ctx"
            )


@checked
@dataclass(frozen=True)
class Corpus:
    """Rows for training and for evaluation, and the hash that names them."""

    train: Int[Tensor, "train_row pos"]
    evaluation: Int[Tensor, "evaluation_row pos"]
    bos_id: int

    @cached_property
    def content_hash(self) -> str:
        """sha256 over both splits."""
        digest = hashlib.sha256()
        for rows in (self.train, self.evaluation):
            digest.update(str(tuple(rows.shape)).encode())
            digest.update(np.ascontiguousarray(rows.numpy()).data)
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "n_train_rows": len(self.train),
            "n_eval_rows": len(self.evaluation),
            "n_ctx": self.train.shape[1],
            "content_hash": self.content_hash,
        }


@checked
def build_corpus(
    config: CorpusConfig, lm: LanguageModel, cache_folder: Path | None = None
) -> Corpus:
    """Tokenise, split, pack and shuffle; have the model write what is asked for.

    What it writes is kept below `cache_folder`, from where a sampling that was stopped goes on.
    Errors: `InputError` for a context longer than the model's, a missing or empty source, or a
    source too short for one row of either split.
    """
    lm.check_context(config.n_ctx)
    splits = _Splits(_documents(config), config.eval_fraction, {"train": [], "evaluation": []})
    wanted = {"train": config.n_train_tokens, "evaluation": config.n_eval_tokens}
    rows = {
        name: _pack_split(splits, name, n_tokens // config.n_ctx, config, lm)
        for name, n_tokens in wanted.items()
    }
    for name, packed in rows.items():
        if len(packed) == 0:
            raise InputError(
                f"corpus {config.kind} {config.source}: not enough text for one row of "
                f"{config.n_ctx} tokens in the {name} split; give it more text"
            )
    if config.n_sampled_tokens:
        rows["train"] = torch.cat([rows["train"], _sampled_rows(config, lm, cache_folder)])
    return Corpus(rows["train"], rows["evaluation"], lm.bos_id)


def check_disjoint(
    train: Int[Tensor, "train_row train_pos"],
    evaluation: Int[Tensor, "evaluation_row evaluation_pos"],
) -> None:
    """Raise `InputError` if any evaluation row is a training row, or the shorter begins the longer."""
    width = min(train.shape[1], evaluation.shape[1])
    seen = {row.tobytes() for row in train[:, :width].numpy()}
    # In one type: bytes of other widths would never be equal.
    n_shared = sum(row.tobytes() in seen for row in evaluation[:, :width].to(train).numpy())
    if n_shared:
        raise InputError(
            f"{n_shared} of {len(evaluation)} evaluation rows are training rows too: "
            "evaluate on the corpus's evaluation split"
        )


@dataclass
class _Splits:
    """Documents drawn from one stream, each waiting for the split that its hash names."""

    stream: Iterator[str]
    eval_fraction: float
    waiting: dict[str, list[str]]

    def documents(self, split: Split) -> Iterator[str]:
        while True:
            while not self.waiting[split]:
                text = next(self.stream, None)
                if text is None:
                    return
                self.waiting[split_of(text, self.eval_fraction)].append(text)
            yield self.waiting[split].pop(0)


def split_of(text: str, eval_fraction: float) -> Split:
    """The split of a document, by a hash of its text: copies always fall on the same side."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return "evaluation" if bucket < eval_fraction else "train"


def _pack_split(
    splits: _Splits, split: Any, n_rows: int, config: CorpusConfig, lm: LanguageModel
) -> Int[Tensor, "row pos"]:
    ids = _token_ids(splits.documents(split), lm)
    encoded = progress(ids, f"{config.kind} {split}", unit="doc", leave=False)
    # An iterator, since checks of types look into what has a length, and would use up a document.
    rows = pack(iter(encoded), config.n_ctx, lm.bos_id, n_rows)
    order = np.random.default_rng(config.seed).permutation(len(rows))
    return torch.from_numpy(rows[order])


def _sampled_rows(
    config: CorpusConfig, lm: LanguageModel, cache_folder: Path | None
) -> Int[Tensor, "row pos"]:
    """Rows of what the model writes, in the order in which it was drawn."""
    documents = sampled_documents(lm, config.n_ctx, config.seed, cache_folder)
    written = progress(documents, f"text by {lm.name}", unit="doc", leave=False)
    n_rows = config.n_sampled_tokens // config.n_ctx
    return torch.from_numpy(pack(iter(written), config.n_ctx, lm.bos_id, n_rows))


def _token_ids(texts: Iterator[str], lm: LanguageModel) -> Iterator[list[int]]:
    while batch := list(itertools.islice(texts, TOKENIZER_BATCH)):
        yield from lm.tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


def _documents(config: CorpusConfig) -> Iterator[str]:
    if config.kind == "demo":
        return (document.text for document in world.documents(config.seed))
    if config.kind == "text":
        return text_documents(expanded(config.source))
    if config.kind == "docstrings":
        return docstring_documents(_docstring_root(config))
    if config.kind == "wikipedia":
        return (article.text for article in wikipedia_articles(_dump(config)))
    return dataset_documents(config.source, config.seed, config.revision, config.data_files)


def source_files(config: CorpusConfig) -> list[Path]:
    """The files that the text is read from; none where they are not here, or text is made."""
    try:
        if config.kind == "text":
            return text_files(expanded(config.source))
        if config.kind == "docstrings":
            return python_files(_docstring_root(config))
        if config.kind == "wikipedia":
            return [dump] if (dump := _dump(config)).is_file() else []
        if config.kind == "huggingface":
            return dataset_files(config.source, config.revision, config.data_files)
    except InputError:
        return []  # a finished run needs them no more; one that does says what is wrong
    return []


def _docstring_root(config: CorpusConfig) -> Path:
    return Path(config.source or sysconfig.get_paths()["purelib"])


def _dump(config: CorpusConfig) -> Path:
    return expanded(config.source) if config.source else bundled_dump()
