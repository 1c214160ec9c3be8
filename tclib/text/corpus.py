"""Text to rows of tokens: the demo world, text, docstrings, Wikipedia, Hugging Face datasets.

Documents are split into training and evaluation by a hash of their text, before they are packed, so
no document (nor any copy of it) is in both. Rows are packed with BOS (`packing.pack`), shuffled by
seed, and named by a content hash.
"""

from __future__ import annotations

import ast
import bz2
import hashlib
import importlib.util
import itertools
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from xml.etree import ElementTree

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tclib.models.language_model import LanguageModel
from tclib.models.locate import check_hub_reachable
from tclib.support.progress import progress
from tclib.support.runs import InputError
from tclib.text import world as demo
from tclib.text.packing import pack

CorpusKind = Literal["demo", "text", "docstrings", "wikipedia", "huggingface"]
Split = Literal["train", "evaluation"]

MIN_DOCSTRING_CHARACTERS = 200
TEXT_DOCUMENT_CHARACTERS = 2_000
TOKENIZER_BATCH = 1_000
STREAM_SHUFFLE_BUFFER = 10_000
BUNDLED_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


@dataclass(frozen=True)
class CorpusConfig:
    """Which text, how much of it, and how it is split. Sizes are in tokens, BOS included."""

    __pydantic_config__ = {"extra": "forbid"}  # a misspelt key in a preset is an error

    kind: CorpusKind = "demo"
    source: str = ""  # text: a file or folder; wikipedia: a dump; huggingface: a dataset id
    n_ctx: int = 128
    n_train_tokens: int = 1_000_000
    n_eval_tokens: int = 100_000
    eval_fraction: float = 0.1  # share of the documents kept for evaluation
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(CorpusKind):
            raise InputError(
                f"corpus kind {self.kind!r}: expected one of {', '.join(get_args(CorpusKind))}"
            )
        if not 0.0 < self.eval_fraction < 1.0:
            raise InputError(f"eval_fraction {self.eval_fraction}: expected between 0 and 1")
        if self.kind in ("text", "huggingface") and not self.source:
            raise InputError(f"corpus kind {self.kind!r} needs a source: a path or a dataset id")
        for name in ("n_train_tokens", "n_eval_tokens"):
            if getattr(self, name) < self.n_ctx:
                raise InputError(
                    f"{name} {getattr(self, name)}: expected at least one row of n_ctx"
                )


@dataclass(frozen=True)
class Corpus:
    """Rows for training and for evaluation, and the hash that names them."""

    train: Int[Tensor, "row pos"]
    evaluation: Int[Tensor, "row pos"]
    bos_id: int

    @property
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


def build_corpus(config: CorpusConfig, lm: LanguageModel) -> Corpus:
    """Tokenise, split, pack and shuffle.

    Errors: `InputError` for a context longer than the model's, a missing or empty source, or a
    source too short for one row of either split.
    """
    lm.check_context(config.n_ctx)
    splits = _split_documents(_documents(config), config)
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
    return Corpus(rows["train"], rows["evaluation"], lm.bos_id)


def check_disjoint(train: Int[Tensor, "row pos"], evaluation: Int[Tensor, "row pos"]) -> None:
    """Raise `InputError` if any evaluation row is also a training row."""
    if train.shape[1] != evaluation.shape[1]:
        return
    seen = {row.tobytes() for row in train.numpy()}
    n_shared = sum(row.tobytes() in seen for row in evaluation.numpy())
    if n_shared:
        raise InputError(
            f"{n_shared} of {len(evaluation)} evaluation rows are training rows too: "
            "evaluate on the corpus's evaluation split"
        )


# ---------------------------------------------------------------------------------------------
# Splitting and packing


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


def _split_documents(documents: Iterable[str], config: CorpusConfig) -> _Splits:
    return _Splits(iter(documents), config.eval_fraction, {"train": [], "evaluation": []})


def _pack_split(
    splits: _Splits, split: Any, n_rows: int, config: CorpusConfig, lm: LanguageModel
) -> Int[Tensor, "row pos"]:
    ids = _token_ids(splits.documents(split), lm)
    encoded = progress(ids, f"{config.kind} {split}", unit="doc", leave=False)
    rows = pack(encoded, config.n_ctx, lm.bos_id, n_rows)
    order = np.random.default_rng(config.seed).permutation(len(rows))
    return torch.from_numpy(rows[order])


def _token_ids(texts: Iterator[str], lm: LanguageModel) -> Iterator[list[int]]:
    while batch := list(itertools.islice(texts, TOKENIZER_BATCH)):
        yield from lm.tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


# ---------------------------------------------------------------------------------------------
# Sources


def _documents(config: CorpusConfig) -> Iterator[str]:
    if config.kind == "demo":
        return (document.text for document in demo.documents(config.seed))
    if config.kind == "text":
        return text_documents(Path(config.source).expanduser())
    if config.kind == "docstrings":
        root = Path(config.source or sysconfig.get_paths()["purelib"])
        return docstring_documents(root)
    if config.kind == "wikipedia":
        dump = Path(config.source).expanduser() if config.source else bundled_dump()
        return (article.text for article in wikipedia_articles(dump))
    return dataset_documents(config.source, config.seed)


def text_documents(path: Path) -> Iterator[str]:
    """Documents of a text file, or of every .txt and .md file below a folder.

    A document is a run of paragraphs of about 2,000 characters.
    """
    if not path.exists():
        raise InputError(f"text {path}: no such file or folder")
    files = [path] if path.is_file() else sorted([*path.rglob("*.txt"), *path.rglob("*.md")])
    if not any(file.stat().st_size for file in files):
        raise InputError(f"text {path}: empty; expected at least one non-empty .txt or .md file")
    return itertools.chain.from_iterable(_paragraph_runs(file) for file in files)


def _paragraph_runs(file: Path) -> Iterator[str]:
    run: list[str] = []
    for paragraph in file.read_text(errors="replace").split("\n\n"):
        if paragraph.strip():
            run.append(paragraph.strip())
        if sum(map(len, run)) >= TEXT_DOCUMENT_CHARACTERS:
            yield "\n\n".join(run)
            run = []
    if run:
        yield "\n\n".join(run)


def docstring_documents(root: Path) -> Iterator[str]:
    """Docstrings of 200 characters or more of every Python file below `root`, in path order."""
    files = sorted(root.rglob("*.py"))
    if not files:
        raise InputError(f"docstrings of {root}: no Python files there")
    return itertools.chain.from_iterable(map(_docstrings, files))


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented):
            text = (ast.get_docstring(node) or "").strip()
            if len(text) >= MIN_DOCSTRING_CHARACTERS:
                yield text


class Article(NamedTuple):
    """A Wikipedia article as plain text."""

    title: str
    text: str


def bundled_dump() -> Path:
    """The 106 articles of the English Wikipedia that the package gensim carries for its own tests.

    Errors: `InputError` where gensim (which need not be importable) or mwparserfromhell is missing.
    """
    _check_parser()
    found = importlib.util.find_spec("gensim")
    if found is None or not found.submodule_search_locations:
        raise InputError(
            "corpus wikipedia reads the articles that the package gensim carries: install it with "
            "`make smollm2`, or name a dump (.xml.bz2) as the corpus's source"
        )
    return Path(found.submodule_search_locations[0]) / "test" / "test_data" / BUNDLED_DUMP


def wikipedia_articles(dump: Path) -> Iterator[Article]:
    """Articles of a MediaWiki dump (.xml.bz2) without redirects, references, pictures and tables.

    Errors: `InputError` for a dump that is missing, cut short or no MediaWiki XML, or without
    mwparserfromhell.
    """
    _check_parser()
    import mwparserfromhell

    if not dump.is_file():
        raise InputError(f"Wikipedia dump {dump}: no such file")
    for title, markup in _article_markup(dump):
        plain = mwparserfromhell.parse(_UNREAD_MARKUP.sub("", markup)).strip_code()
        if plain.strip():
            yield Article(title, plain.strip())


def _check_parser() -> None:
    try:
        import mwparserfromhell  # noqa: F401
    except ImportError as error:
        raise InputError(
            "corpus wikipedia needs the package mwparserfromhell: run `make smollm2`"
        ) from error


# References, comments, and links to pictures and categories: not a sentence's own text.
_UNREAD_MARKUP = re.compile(
    r"<ref[^>/]*/>|<ref[^>]*>.*?</ref>|<!--.*?-->"
    r"|\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]",
    re.DOTALL,
)


def _article_markup(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and markup of every page of the article namespace that is no redirect."""
    try:
        with bz2.open(dump) as file:
            for _, element in ElementTree.iterparse(file):
                if not element.tag.endswith("}page"):
                    continue
                ns = element.tag.removesuffix("page")
                is_article = element.findtext(f"{ns}ns") == "0"
                if is_article and element.find(f"{ns}redirect") is None:
                    markup = element.findtext(f"{ns}revision/{ns}text") or ""
                    yield element.findtext(f"{ns}title") or "", markup
                element.clear()
    except (OSError, EOFError, ElementTree.ParseError) as error:
        raise InputError(
            f"Wikipedia dump {dump}: {error}: expected a whole MediaWiki export, .xml.bz2"
        ) from error


def dataset_documents(dataset_id: str, seed: int) -> Iterator[str]:
    """The `text` column of a Hugging Face dataset's training split, streamed and shuffled."""
    local = Path(dataset_id).expanduser().exists()
    if not local:
        check_hub_reachable(f"dataset {dataset_id!r} is streamed from the Hugging Face hub")
    import datasets

    stream = datasets.load_dataset(dataset_id, split="train", streaming=True)
    if stream.features is not None and "text" not in stream.features:
        raise InputError(
            f"dataset {dataset_id!r} has columns {sorted(stream.features)}: expected one named text"
        )
    shuffled = stream.shuffle(seed=seed, buffer_size=STREAM_SHUFFLE_BUFFER)
    return (example["text"] for example in shuffled)
