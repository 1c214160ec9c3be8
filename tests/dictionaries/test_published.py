"""The machinery for the released transcoders, on a synthetic checkpoint of exactly their format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hub_rehearsal import add_repository
from huggingface_hub import constants
from tiny import authors_file, tiny_lm

from tclib.dictionaries import published
from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.published import (
    load_frequencies,
    load_published,
    locate_published,
)
from tclib.dictionaries.released_sets import GPT2_FILE, GPT2_FREQUENCIES, SETS
from tclib.evaluation.replace import replace_mlp
from tclib.replication.paper import paper_table
from tclib.replication.published import activation_table, prompt_activation
from tclib.support.errors import InputError


def write_three(folder: Path, config_class: type) -> None:
    folder.mkdir()
    for layer in range(3):
        authors_file(
            folder / GPT2_FILE.format(layer=layer),
            config_class,
            layer=layer,
        )


@pytest.fixture
def transcoders(tmp_path: Path, runner_config: type) -> dict[int, Dictionary]:
    write_three(tmp_path / "hub", runner_config)
    return load_published("gpt2", range(3), tmp_path / "hub")


def test_a_folder_of_published_files_is_loaded_by_layer(
    transcoders: dict[int, Dictionary], tmp_path: Path
) -> None:
    assert [transcoders[layer].config.layer for layer in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="blocks.3.*is missing: download"):
        load_published("gpt2", range(4), tmp_path / "hub")
    wrong = tmp_path / "hub" / GPT2_FILE.format(layer=3)
    (tmp_path / "hub" / GPT2_FILE.format(layer=2)).rename(wrong)
    with pytest.raises(InputError, match="holds layer 2, its name says 3"):
        load_published("gpt2", [3], tmp_path / "hub")


def test_cached_files_are_read_without_the_hub_and_a_missing_one_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runner_config: type
) -> None:
    def write(folder: Path) -> None:
        write_three(folder / "released", runner_config)
        for path in (folder / "released").iterdir():
            path.rename(folder / path.name)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = add_repository(tmp_path, "model", SETS["gpt2"].repository, write)
    assert {path.parent for path in locate_published("hub", range(3)).values()} == {snapshot}
    assert list(load_published("gpt2", range(3))) == [0, 1, 2]
    with pytest.raises(InputError, match=r"blocks\.3\..*is not in the local .* HF_HUB_OFFLINE"):
        locate_published("hub", range(4))


def test_a_download_that_stops_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(*_: object, **_options: object) -> str:
        raise ConnectionError("reset")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(published, "check_hub_reachable", lambda _: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", stop)
    with pytest.raises(InputError, match=r"stopped \(reset\): run the same command again"):
        locate_published("hub", [0])


def test_without_the_hub_one_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="pchlenski/gpt2-transcoders"):
        load_published("gpt2", [0])


def test_frequencies_are_read_where_they_lie_beside(
    transcoders: dict[int, Dictionary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, one = tmp_path / "hub", transcoders[1]
    assert load_frequencies(str(folder), one) is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load_frequencies("hub", one) is None
    path = folder / GPT2_FREQUENCIES.format(layer=1)
    given = torch.linspace(-10, 0, one.config.n_features)
    torch.save(given, path)
    assert torch.equal(load_frequencies(str(folder), one), given)
    torch.save(given[:3], path)
    with pytest.raises(InputError, match=r"holds \(3,\) values: expected one for each of the 40"):
        load_frequencies(str(folder), one)
    torch.save({"freqs": given}, path)
    with pytest.raises(InputError, match="holds a dict: expected one tensor"):
        load_frequencies(str(folder), one)


def test_activations_are_those_of_the_model_with_lower_layers_replaced(
    transcoders: dict[int, Dictionary],
) -> None:
    lm = tiny_lm()
    plain = prompt_activation(lm, transcoders, 2, 7, "w5 w9 w5 w3", "w5")
    tokens = lm.tokenize("w5 w9 w5 w3")
    site = transcoders[2].config.input_site
    acts = transcoders[2].encode(lm.read(tokens, {site})[site])
    assert plain == pytest.approx(float(acts[0, 3, 7]), rel=1e-5)
    with replace_mlp(lm, transcoders[0]), replace_mlp(lm, transcoders[1]):
        acts = transcoders[2].encode(lm.read(tokens[:, 1:], {site})[site])
    replaced = prompt_activation(
        lm, transcoders, 2, 7, "w5 w9 w5 w3", "w5", prepend_bos=False, replaced=range(2)
    )
    assert replaced == pytest.approx(float(acts[0, 2, 7]), rel=1e-5)
    with pytest.raises(InputError, match="has no token 'w8'"):
        prompt_activation(lm, transcoders, 2, 7, "w5", "w8")
    with pytest.raises(InputError, match=r"no transcoders at layers \[5\]"):
        prompt_activation(lm, transcoders, 2, 7, "w5", "w5", replaced=[5])


def test_every_published_activation_gets_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = paper_table("prompt_activations")
    given = iter(float(row["activation"]) for row in rows)
    seen = []

    def first_is_off(*arguments: object) -> float:
        seen.append(arguments)
        value = next(given)
        return value + (1.0 if len(seen) == 1 else 4e-4 * value)  # within a step of float16

    monkeypatch.setattr("tclib.replication.published.prompt_activation", first_is_off)
    table = activation_table(tiny_lm(), {})
    decimals = [row["printed_as"] == "decimals" for row in rows]
    verdicts = ["mismatch" if is_exact else "reproduced" for is_exact in decimals]
    assert table["verdict"].tolist() == ["mismatch", *verdicts[1:]] and sum(decimals) == 5
    assert {tuple(arguments[7]) for arguments in seen} >= {(), tuple(range(8))}
    assert torch.tensor(table["difference"]).max() == pytest.approx(1.0)
