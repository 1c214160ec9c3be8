"""Hugging Face data sets: folders first, then the caches, then the hub; all that is bad is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_rehearsal import DATASET_ID, PARQUET_REVISION, add_repository
from huggingface_hub import constants

from tclib.replication.model_and_data import check_ready
from tclib.replication.presets import load_preset
from tclib.support.errors import InputError
from tclib.text import hub_datasets
from tclib.text.hub_datasets import dataset_documents, locate_dataset

TEXTS = [f"The war lasted from 17{i:02}." for i in range(20)]
PATTERN = ("plain_text/*train/*.parquet",)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, and a hub that must not be asked."""

    def fail(context: str) -> None:
        raise InputError(f"asked the hub: {context}")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)
    monkeypatch.setattr(hub_datasets, "check_hub_reachable", fail)
    return tmp_path


def write_parquet(path: Path, texts: list[str] = TEXTS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), path)


def write_lines(path: Path) -> None:
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))


def write_text(path: Path) -> None:
    path.write_text("\n".join(TEXTS))


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.parquet", write_parquet), ("a.jsonl", write_lines), ("a.txt", write_text)],
)
def test_a_folder_and_a_file_of_each_kind_are_read(
    cache: Path, name: str, write: Callable[[Path], None]
) -> None:
    folder = cache / "mine"
    folder.mkdir()
    (folder / "README.md").write_text("# About it")
    write(folder / name)
    for source in (folder, folder / name):
        assert sorted(dataset_documents(str(source), 0)) == TEXTS
    first, again, other = (list(dataset_documents(str(folder), seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_data_files_choose_what_is_read(cache: Path) -> None:
    for name, texts in (("a[1].parquet", TEXTS[:5]), ("b.parquet", TEXTS[5:])):
        write_parquet(cache / "mine" / name, texts)
    assert sorted(dataset_documents(str(cache / "mine"), 0, "", ["a*.parquet"])) == TEXTS[:5]
    assert sorted(dataset_documents(str(cache / "mine"), 0)) == TEXTS


@pytest.mark.parametrize("place", ["train", "partial-train"])
def test_the_cached_parquet_branch_is_read_without_the_hub(cache: Path, place: str) -> None:
    def write(folder: Path) -> None:
        write_parquet(folder / "plain_text" / place / "0000.parquet", TEXTS[:10])
        write_parquet(folder / "plain_text" / place / "0001.parquet", TEXTS[10:])
        write_parquet(folder / "plain_text" / "test" / "0000.parquet", ["held out"])

    add_repository(cache / "hub", "dataset", DATASET_ID, write, revision=PARQUET_REVISION)
    assert sorted(dataset_documents(DATASET_ID, 0, PARQUET_REVISION, PATTERN)) == TEXTS
    with pytest.raises(InputError, match="asked the hub"):
        locate_dataset(DATASET_ID)


def test_what_datasets_has_prepared_is_read_without_the_hub(cache: Path) -> None:
    write_parquet(cache / "openwebtext" / "train.parquet")
    datasets.load_dataset(str(cache / "openwebtext"), cache_dir=str(cache / "datasets"))
    os.rename(cache / "datasets" / "openwebtext", cache / "datasets" / "Skylion007___openwebtext")
    assert sorted(dataset_documents(DATASET_ID, 0, PARQUET_REVISION, PATTERN)) == TEXTS


def test_a_snapshot_without_data_is_asked_of_the_hub_with_its_revision(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_repository(
        cache / "hub",
        "dataset",
        DATASET_ID,
        lambda folder: (folder / "README.md").touch(),  # what streaming leaves there
        revision=PARQUET_REVISION,
    )
    with pytest.raises(InputError, match="openwebtext' at revision refs/convert/parquet is not in"):
        locate_dataset(DATASET_ID, PARQUET_REVISION, PATTERN)
    monkeypatch.setattr(hub_datasets, "check_hub_reachable", lambda _: None)
    assert locate_dataset(DATASET_ID, PARQUET_REVISION, PATTERN) == {
        "path": DATASET_ID,
        "revision": PARQUET_REVISION,
        "data_files": {"train": list(PATTERN)},
    }


def test_a_preset_is_ready_where_its_text_is_cached_and_not_where_it_is_not(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tclib.replication.model_and_data.check_model", lambda _: None)
    preset = load_preset("pythia-410m", runs_dir=cache / "runs")
    with pytest.raises(InputError, match="asked the hub: dataset 'Skylion007/openwebtext' at"):
        check_ready(preset)

    def write(folder: Path) -> None:
        write_parquet(folder / "plain_text" / "train" / "0000.parquet")

    add_repository(cache / "hub", "dataset", DATASET_ID, write, revision=PARQUET_REVISION)
    check_ready(preset)


# -- bad input ------------------------------------------------------------------------------


def test_folders_without_data_and_columns_without_text_are_named(cache: Path) -> None:
    (cache / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no parquet, jsonl or text files there"):
        locate_dataset(str(cache / "empty"))
    write_parquet(cache / "mine" / "a.parquet")
    with pytest.raises(InputError, match=r"mine: no train/\*.parquet there"):
        locate_dataset(str(cache / "mine"), "", ["train/*.parquet"])
    (cache / "mine" / "a.parquet").unlink()
    (cache / "mine" / "b.jsonl").write_text('{"words": "a"}\n')
    with pytest.raises(InputError, match=r"columns \['words'\]: expected one named text"):
        dataset_documents(str(cache / "mine"), 0)
    with pytest.raises(InputError, match="dataset folder ./none: no such folder"):
        locate_dataset("./none")


def test_a_data_set_that_is_a_script_says_where_its_parquet_is(cache: Path) -> None:
    write_parquet(cache / "old" / "a.parquet")
    (cache / "old" / "old.py").touch()
    with pytest.raises(InputError, match="scripts are no longer .* refs/convert/parquet"):
        dataset_documents(str(cache / "old"), 0)
    (cache / "cut").mkdir()
    (cache / "cut" / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cut' could not be read"):
        list(dataset_documents(str(cache / "cut"), 0))
