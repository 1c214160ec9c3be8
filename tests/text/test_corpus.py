"""Packing, splitting, sources, and what is refused."""

from __future__ import annotations

import bz2
import itertools
import json
import os
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import random_rows, unchecked_types

from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError
from tclib.text import corpus as module
from tclib.text.corpus import CorpusConfig, build_corpus, check_disjoint, split_of
from tclib.text.documents import text_documents
from tclib.text.hub_datasets import dataset_documents
from tclib.text.packing import pack

SMALL = CorpusConfig(n_ctx=16, n_train_tokens=1600, n_eval_tokens=320)


@pytest.fixture(scope="module")
def demo_lm() -> LanguageModel:
    return LanguageModel.load("demo", device="cpu")


def test_pack_keeps_every_token_in_order_and_never_doubles_bos() -> None:
    rows = pack([[1, 2, 3], [4, 5], [6, 7, 8, 9]], n_ctx=4, bos_id=0)
    # The BOS behind 3 would fall right behind the second row's own, and is dropped.
    assert rows.tolist() == [[0, 1, 2, 3], [0, 4, 5, 0], [0, 6, 7, 8]]


def test_pack_of_long_documents_loses_nothing() -> None:
    documents = [list(range(1, 60)), list(range(60, 100))]
    rows = pack(documents, n_ctx=10, bos_id=0)
    kept = [t for t in rows.flatten().tolist() if t != 0]
    assert kept == list(range(1, len(kept) + 1)) and len(kept) > 90
    assert not any(a == b == 0 for a, b in itertools.pairwise(rows.flatten().tolist()))


def test_the_demo_corpus_is_split_by_document(demo_lm: LanguageModel) -> None:
    built = build_corpus(SMALL, demo_lm)
    assert built.train.shape == (100, 16) and built.evaluation.shape == (20, 16)
    assert (built.train[:, 0] == demo_lm.bos_id).all()
    check_disjoint(built.train, built.evaluation)


def test_copies_of_a_document_fall_on_the_same_side() -> None:
    sides = {text: split_of(text, 0.3) for text in map(str, range(2000))}
    assert all(split_of(text, 0.3) == side for text, side in sides.items())
    share = np.mean([side == "evaluation" for side in sides.values()])
    assert 0.25 < share < 0.35


@pytest.mark.slow
def test_the_seed_acts_and_repeats(demo_lm: LanguageModel) -> None:
    first, again, other = (
        build_corpus(replace(SMALL, seed=seed), demo_lm).content_hash for seed in (0, 0, 1)
    )
    assert first == again != other


def test_text_files_and_folders_are_read(tmp_path: Path, demo_lm: LanguageModel) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(["The war lasted."] * 400))
    (tmp_path / "b.md").write_text("The dog sleeps.")
    documents = list(text_documents(tmp_path))
    assert len(documents) == 4 and documents[-1] == "The dog sleeps."
    assert "".join(documents).count("war") == 400


def test_paragraphs_are_what_stands_between_empty_lines(tmp_path: Path) -> None:
    """As by splitting the whole text, which a file of gigabytes does not allow; a paragraph without end is cut."""
    long = "\n".join(["word " * 100] * 5)
    text = f"\n\n{long}\n\n\n{long}\r\n\r\n \n{long}\n \n{long}\n\n\n\nend"
    (tmp_path / "a.txt").write_bytes(text.encode())
    split = [part.strip() for part in text.replace("\r\n", "\n").split("\n\n")]
    assert list(text_documents(tmp_path / "a.txt")) == [part for part in split if part]
    (tmp_path / "b.txt").write_text("a" * (1_000_005))
    assert [len(text) for text in text_documents(tmp_path / "b.txt")] == [1_000_000, 5]


def test_docstrings_are_found_and_the_broken_files_passed_over(tmp_path: Path) -> None:
    long = "What it does. " * 20
    (tmp_path / "good.py").write_text(f'"""{long}"""\n\ndef f():\n    """short"""\n')
    (tmp_path / "broken.py").write_text("def f(:\n")
    assert list(module.docstring_documents(tmp_path)) == [long.strip()]


@pytest.mark.slow
def test_installed_docstrings_are_plenty() -> None:
    import torch as package

    root = Path(package.__file__).parent / "nn"
    assert sum(map(len, module.docstring_documents(root))) > 300_000


PAGES = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">
  <page><title>War</title><ns>0</ns><revision><text>The '''war''' lasted
from [[1732]] to [[1745|45]].&lt;ref&gt;A source.&lt;/ref&gt; [[File:a.png|thumb|The [[war]] in colour]]
{{Infobox|x=1}}It was long.</text></revision></page>
  <page><title>Wars</title><ns>0</ns><redirect title="War"/><revision><text>#REDIRECT [[War]]</text></revision></page>
  <page><title>Talk:War</title><ns>1</ns><revision><text>Was it?</text></revision></page>
  <page><title>Dog</title><ns>0</ns><revision><text>The dog sleeps.&lt;!-- or not --&gt;</text></revision></page>
</mediawiki>"""


def write_dump(path: Path, pages: str = PAGES) -> Path:
    path.write_bytes(bz2.compress(pages.encode()))
    return path


def test_wikipedia_articles_are_plain_text_without_redirects_and_talk(tmp_path: Path) -> None:
    pytest.importorskip("mwparserfromhell", reason="comes with `make smollm2`")
    articles = list(module.wikipedia_articles(write_dump(tmp_path / "dump.xml.bz2")))
    assert [article.title for article in articles] == ["War", "Dog"]
    words = " ".join(articles[0].text.split())
    assert words == "The war lasted from 1732 to 45. It was long."
    assert articles[1].text == "The dog sleeps."


def test_a_dump_that_is_missing_cut_short_or_no_xml_is_named(tmp_path: Path) -> None:
    pytest.importorskip("mwparserfromhell", reason="comes with `make smollm2`")
    with pytest.raises(InputError, match="none.bz2: no such file"):
        list(module.wikipedia_articles(tmp_path / "none.bz2"))
    whole = write_dump(tmp_path / "whole.bz2").read_bytes()
    (tmp_path / "cut.bz2").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut.bz2: .*expected a whole MediaWiki export"):
        list(module.wikipedia_articles(tmp_path / "cut.bz2"))
    with pytest.raises(InputError, match="text.bz2: .*expected a whole MediaWiki export"):
        list(module.wikipedia_articles(write_dump(tmp_path / "text.bz2", "no XML")))
    (tmp_path / "plain.bz2").write_text(PAGES)
    with pytest.raises(InputError, match="plain.bz2: .*expected a whole MediaWiki export"):
        list(module.wikipedia_articles(tmp_path / "plain.bz2"))


@pytest.mark.parametrize("pages", ["<a>" * 4_000_000, f"<page>{' ' * 50_000_000}</page>"])
def test_a_dump_that_unpacks_to_anything_is_refused_early(tmp_path: Path, pages: str) -> None:
    pytest.importorskip("mwparserfromhell", reason="comes with `make smollm2`")
    dump = write_dump(tmp_path / "bomb.bz2", f"<mediawiki xmlns='m'>{pages}")
    assert dump.stat().st_size < 10_000
    tracemalloc.start()
    with pytest.raises(InputError, match="bomb.bz2: a page of more than 10,000,000 bytes, or elem"):
        list(module.wikipedia_articles(dump))
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_without_its_packages_the_wikipedia_corpus_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match="install it with `make smollm2`"):
        module.bundled_dump()
    monkeypatch.setitem(sys.modules, "mwparserfromhell", None)
    with pytest.raises(InputError, match="needs the package mwparserfromhell"):
        list(module.wikipedia_articles(tmp_path / "dump.xml.bz2"))


def test_a_local_dataset_is_streamed(tmp_path: Path, demo_lm: LanguageModel) -> None:
    lines = [json.dumps({"text": f"The war lasted from the year 17{i:02d}."}) for i in range(100)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines * 8))
    config = replace(SMALL, kind="huggingface", source=str(tmp_path), eval_fraction=0.3)
    built = build_corpus(config, demo_lm)
    assert len(built.train) == 100
    assert "war" in demo_lm.tokenizer.decode(built.evaluation[0])


def test_an_empty_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(InputError, match="train.parquet is empty: fetch it again"):
        next(dataset_documents(str(tmp_path), 0))


# -- bad input ------------------------------------------------------------------------------


def test_evaluation_rows_that_were_trained_on_are_counted() -> None:
    rows = random_rows(8)
    with pytest.raises(InputError, match="3 of 5 evaluation rows are training rows"):
        check_disjoint(rows[:6], torch.cat([rows[:3], rows[6:]]))
    for train, evaluation in ((rows[:6], rows[3:, :8]), (rows[:6, :8], rows[3:])):
        with pytest.raises(InputError, match="^3 of "):  # cut shorter on either side
            check_disjoint(train, evaluation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "web"}, "kind 'web': expected 'demo'"),
        ({"eval_fraction": 1.0}, "eval_fraction 1.0"),
        ({"kind": "text"}, "needs a source"),
        ({"n_train_tokens": 3}, "n_train_tokens 3"),
        ({"revision": "main"}, "kind 'demo' takes no revision and no data_files"),
        ({"data_files": ("a.txt",)}, "kind 'demo' takes no revision and no data_files"),
        (
            {"kind": "huggingface", "source": "a/b", "data_files": ("/a.txt",)},
            "data_files '/a.txt': expected a name relative to the source",
        ),
    ],
)
def test_configurations_out_of_range_are_refused(changes: dict, message: str) -> None:
    with unchecked_types(), pytest.raises(InputError, match=message):
        replace(SMALL, **changes)


def test_missing_empty_and_short_sources_are_named(tmp_path: Path, demo_lm: LanguageModel) -> None:
    text = replace(SMALL, kind="text", source=str(tmp_path / "none.txt"))
    with pytest.raises(InputError, match="none.txt: no such file"):
        build_corpus(text, demo_lm)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="empty.txt: empty"):
        build_corpus(replace(text, source=str(tmp_path / "empty.txt")), demo_lm)
    (tmp_path / "short.txt").write_text("The war lasted.")
    with pytest.raises(InputError, match="not enough text for one row"):
        build_corpus(replace(text, source=str(tmp_path / "short.txt")), demo_lm)
    for name in ("pipe.txt", "pipe.py"):  # nobody writes into them
        os.mkfifo(tmp_path / name)
    assert len(list(module.text_documents(tmp_path))) == 1
    with pytest.raises(InputError, match="no Python files"):
        list(module.docstring_documents(tmp_path))


def test_a_context_longer_than_the_models_is_refused(demo_lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="context of 129 tokens: demo takes 2 to 128"):
        build_corpus(replace(SMALL, n_ctx=129), demo_lm)


def test_an_unreachable_dataset_is_one_sentence(
    demo_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = replace(SMALL, kind="huggingface", source="nobody/nothing")
    with pytest.raises(InputError, match="nobody/nothing' is not in the local Hugging Face cache"):
        build_corpus(config, demo_lm)
