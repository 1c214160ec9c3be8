"""Where documents come from: text, docstrings, Wikipedia dumps."""

from __future__ import annotations

import ast
import bz2
import importlib.util
import itertools
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from tclib.support.errors import InputError

MIN_DOCSTRING_CHARACTERS = 200
TEXT_DOCUMENT_CHARACTERS = 2_000
MAX_PARAGRAPH_CHARACTERS = 1_000_000  # a file without empty lines is not held whole
MAX_PAGE = 10_000_000  # bytes of a page's XML: Wikipedia takes 2 MB of text
XML_CHUNK = 65_536  # bytes
MAX_DEPTH = 50  # elements within elements: a dump has five
BUNDLED_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def text_documents(path: Path) -> Iterator[str]:
    """Documents of a text file, or of every .txt and .md file below a folder.

    A document is a run of paragraphs of about 2,000 characters; a paragraph of more than a million is cut.
    """
    return itertools.chain.from_iterable(_paragraph_runs(file) for file in text_files(path))


def text_files(path: Path) -> list[Path]:
    """The files of `text_documents`. Errors: `InputError` if there is none, or no text in them."""
    if not path.exists():
        raise InputError(f"text {path}: no such file or folder")
    every = [path, *sorted([*path.rglob("*.txt"), *path.rglob("*.md")])]
    files = [file for file in every if file.is_file()]  # a pipe or a device has no end
    if not any(file.stat().st_size for file in files):
        raise InputError(f"text {path}: empty; expected at least one non-empty .txt or .md file")
    return files


def _paragraph_runs(file: Path) -> Iterator[str]:
    run: list[str] = []
    for paragraph in _paragraphs(file):
        run.append(paragraph)
        if sum(map(len, run)) >= TEXT_DOCUMENT_CHARACTERS:
            yield "\n\n".join(run)
            run = []
    if run:
        yield "\n\n".join(run)


def _paragraphs(file: Path) -> Iterator[str]:
    """What stands between empty lines, read as it is asked for."""
    lines: list[str] = []
    n_characters = 0
    with open(file, encoding="utf-8", errors="replace") as text:
        while line := text.readline(MAX_PARAGRAPH_CHARACTERS):
            lines.append(line)
            n_characters += len(line)
            if line == "\n" or n_characters >= MAX_PARAGRAPH_CHARACTERS:
                if paragraph := "".join(lines).strip():
                    yield paragraph
                lines, n_characters = [], 0
    if paragraph := "".join(lines).strip():
        yield paragraph


def docstring_documents(root: Path) -> Iterator[str]:
    """Docstrings of 200 characters or more of every Python file below `root`, in path order."""
    return itertools.chain.from_iterable(map(_docstrings, python_files(root)))


def python_files(root: Path) -> list[Path]:
    """The files of `docstring_documents`. Errors: `InputError` if there is none."""
    if not root.exists():
        raise InputError(f"docstrings of {root}: no such folder")
    files = sorted(file for file in root.rglob("*.py") if file.is_file())
    if not files:
        raise InputError(f"docstrings of {root}: no Python files there")
    return files


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
        for element in _pages(dump):
            ns = element.tag.removesuffix("page")
            is_article = element.findtext(f"{ns}ns") == "0"
            if is_article and element.find(f"{ns}redirect") is None:
                markup = element.findtext(f"{ns}revision/{ns}text") or ""
                yield element.findtext(f"{ns}title") or "", markup
    except (OSError, EOFError, ElementTree.ParseError) as error:
        raise InputError(
            f"Wikipedia dump {dump}: {error}: expected a whole MediaWiki export, .xml.bz2"
        ) from error


def _pages(dump: Path) -> Iterator[ElementTree.Element]:
    """The page elements of a dump, each as it ends.

    A few kilobytes unpack to any size: `ElementTree.ParseError` for elements nested more than 50 deep, or a
    page beyond 10 MB.
    """
    parser: ElementTree.XMLPullParser[Any] = ElementTree.XMLPullParser(["start", "end"])
    depth = n_since_page = 0
    with bz2.open(dump) as file:
        while chunk := file.read(XML_CHUNK):
            parser.feed(chunk)
            n_since_page += len(chunk)
            events: Any = parser.read_events()  # typed as those of comments and namespaces too
            for event, element in events:
                depth += 1 if event == "start" else -1
                if event == "end" and element.tag.endswith("}page"):
                    yield element
                    element.clear()
                    n_since_page = 0
            if depth > MAX_DEPTH or n_since_page > MAX_PAGE:
                raise ElementTree.ParseError(
                    f"a page of more than {MAX_PAGE:,} bytes, or elements nested more than {MAX_DEPTH} deep"
                )
        parser.close()
