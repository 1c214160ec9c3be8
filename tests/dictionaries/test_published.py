"""The machinery for the released transcoders, on a synthetic checkpoint of exactly their format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import authors_file, tiny_lm

from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.published import FILE_NAME, load_published
from tclib.evaluation.replace import replace_mlp
from tclib.replication.paper import paper_table
from tclib.replication.published import prompt_activation, prompt_activation_table
from tclib.support.errors import InputError


def write_three(folder: Path, config_class: type) -> None:
    folder.mkdir()
    for layer in range(3):
        authors_file(
            folder / FILE_NAME.format(layer=layer),
            config_class,
            hook_point=f"blocks.{layer}.ln2.hook_normalized",
            hook_point_layer=layer,
        )


@pytest.fixture
def transcoders(tmp_path: Path, runner_config: type) -> dict[int, Dictionary]:
    write_three(tmp_path / "hub", runner_config)
    return load_published(range(3), tmp_path / "hub")


def test_a_folder_of_published_files_is_loaded_by_layer(
    transcoders: dict[int, Dictionary], tmp_path: Path
) -> None:
    assert [transcoders[layer].config.layer for layer in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="blocks.3.*is missing: download"):
        load_published(range(4), tmp_path / "hub")
    wrong = tmp_path / "hub" / FILE_NAME.format(layer=3)
    (tmp_path / "hub" / FILE_NAME.format(layer=2)).rename(wrong)
    with pytest.raises(InputError, match="holds layer 2, its name says 3"):
        load_published([3], tmp_path / "hub")


def test_without_the_hub_one_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="pchlenski/gpt2-transcoders"):
        load_published([0])


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
        return next(given) + (1.0 if len(seen) == 1 else 0.004)

    monkeypatch.setattr("tclib.replication.published.prompt_activation", first_is_off)
    table = prompt_activation_table(tiny_lm(), {})
    assert table["verdict"].tolist() == ["mismatch", *["reproduced"] * (len(rows) - 1)]
    assert {tuple(arguments[7]) for arguments in seen} >= {(), tuple(range(8))}
    assert torch.tensor(table["difference"]).max() == pytest.approx(1.0)
