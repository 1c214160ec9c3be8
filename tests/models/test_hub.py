"""The cache of the hub comes first: whole models are found in it, and nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hub_rehearsal import add_repository
from huggingface_hub import constants
from tiny import tiny_hf_model, tiny_tokenizer

from tclib.models import hub, locate
from tclib.models.hub import cached_model, cached_snapshot
from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that must not be asked."""

    def fail(context: str) -> None:
        raise InputError(f"asked the hub: {context}")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(locate, "check_hub_reachable", fail)
    return tmp_path


def write_tiny(folder: Path, shard: str = "5GB") -> None:
    tiny_hf_model("gpt2").save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)


def test_a_model_of_which_only_what_is_needed_was_fetched_is_found(cache: Path) -> None:
    snapshot = add_repository(cache, "model", "tiny/gpt2", write_tiny)
    # The list of the hub's files names one that is not here, after which snapshot_download would refuse it.
    assert "flax_model" in next(cache.glob("*/trees/*.json")).read_text()
    assert cached_model("tiny/gpt2") == snapshot
    assert LanguageModel.load("tiny/gpt2", device="cpu").n_layers == 3


def test_branches_with_slashes_and_commits_are_revisions(cache: Path) -> None:
    snapshot = add_repository(
        cache, "dataset", "a/b", lambda f: (f / "x").touch(), revision="refs/convert/parquet"
    )
    for revision in ("refs/convert/parquet", snapshot.name):
        assert cached_snapshot("a/b", "dataset", revision) == snapshot
    assert cached_snapshot("a/b", "dataset") is None
    assert cached_snapshot("a/b") is None


def remove_shard(folder: Path) -> None:
    next(folder.glob("*-00002-of-*.safetensors")).unlink()


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def remove_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


@pytest.mark.parametrize("remove", [remove_shard, remove_tokenizer, remove_weights])
def test_a_cached_model_that_lacks_a_part_is_asked_of_the_hub(
    cache: Path, remove: Callable[[Path], None]
) -> None:
    snapshot = add_repository(cache, "model", "tiny/gpt2", write_tiny, "20KB")
    assert len(list(snapshot.glob("model-*"))) > 1 and cached_model("tiny/gpt2") == snapshot
    remove(snapshot)
    assert cached_model("tiny/gpt2") is None
    with pytest.raises(InputError, match="asked the hub: model 'tiny/gpt2' is not in the local"):
        locate.locate("tiny/gpt2")


def test_what_is_no_path_and_no_id_is_named(cache: Path) -> None:
    for name, message in (("./none", "no such folder"), ("a/b/c", "nor a valid hub id")):
        with pytest.raises(InputError, match=message):
            locate.locate(name)


def test_an_unreachable_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="x, and http://127.0.0.1:9 cannot be reached: connect"):
        hub.check_hub_reachable("x")
