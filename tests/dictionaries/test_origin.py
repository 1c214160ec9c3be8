"""A dictionary and the model that it was trained on: by the weights where they are known, else by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_rows, random_transcoder, tiny_hf_model, tiny_lm, tiny_tokenizer

from tclib.circuits.frozen import FrozenPrompts
from tclib.dictionaries.bases import to_processed, to_raw
from tclib.dictionaries.dictionary import FILE_FORMAT, Dictionary
from tclib.dictionaries.formats.any import Format, load_dictionary, write_any
from tclib.evaluation.evaluate import evaluate
from tclib.evaluation.replace import replace_mlp
from tclib.features.examples import firing_frequency
from tclib.features.from_weights import (
    LoneTokens,
    de_embedding,
    direct_logit_attribution,
    pullback,
)
from tclib.models.identity import names_differ
from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError
from tclib.support.files import load_tensors, save_tensors
from tclib.training.spec import DictionarySpec

OTHER = (
    "was trained on tiny-gpt2, whose weights .* are not those of tiny-gpt2 .*dictionary.for_model"
)


@cache
def model(seed: int) -> LanguageModel:
    return tiny_lm("gpt2", seed)


def of(
    lm: LanguageModel, layer: int = 1, kind: str = "relu", basis: str = "processed"
) -> Dictionary:
    one = random_transcoder(layer, kind, torch.float32)
    one.config = replace(one.config, basis=basis)  # type: ignore[arg-type]
    return one.for_model(lm)


def test_what_is_trained_knows_the_weights_of_its_model() -> None:
    spec = DictionarySpec("transcoder", 1, l1_coefficient=1e-3)
    assert spec.dictionary_config(model(0)).model_hash == model(0).content_hash


MEETINGS: dict[str, Callable[[LanguageModel, Dictionary], Any]] = {
    "evaluate": lambda lm, one: evaluate(lm, {"one": one}, random_rows(2)),
    "replace_mlp": replace_mlp,
    "FrozenPrompts": lambda lm, one: FrozenPrompts(lm, random_rows(1).long(), [one]),
    "firing_frequency": lambda lm, one: firing_frequency(lm, one, random_rows(2)),
    "de_embedding": lambda lm, one: de_embedding(lm, one, 0),
    "direct_logit_attribution": lambda lm, one: direct_logit_attribution(lm, one, 0),
    "pullback": lambda lm, one: pullback(lm, of(lm, 2), 0, one),
    "LoneTokens": lambda lm, one: LoneTokens(lm, [one]).scores(one, 0),
    "to_raw": lambda lm, one: to_raw(one, lm),
}


@pytest.mark.parametrize("meeting", MEETINGS)
def test_a_model_with_other_weights_is_refused_wherever_it_is_met_unless_it_is_meant(
    meeting: str,
) -> None:
    meet = MEETINGS[meeting]
    meet(model(0), of(model(0)))
    with pytest.raises(InputError, match=OTHER):
        meet(model(1), of(model(0)))
    meet(model(1), of(model(0)).for_model(model(1)))


@pytest.mark.parametrize("meeting", sorted(MEETINGS.keys() - {"to_raw"}))
def test_a_dictionary_of_the_raw_basis_is_refused_wherever_it_meets_a_model(meeting: str) -> None:
    with pytest.raises(InputError, match="take tclib.to_processed"):
        MEETINGS[meeting](model(0), of(model(0), basis="raw"))


def test_the_same_weights_are_the_same_model_whatever_it_is_called() -> None:
    renamed = LanguageModel(model(0).model, tiny_tokenizer(), "other")
    of(model(0)).check_model(renamed)


@pytest.mark.parametrize("form", ["tclib", "saelens", "circuit-tracer", "sparsify"])
def test_every_format_keeps_the_hash_and_so_does_a_change_of_basis(
    form: Format, tmp_path: Path
) -> None:
    lm = model(0)
    kind, basis = ("topk", "raw") if form == "sparsify" else ("relu", "processed")
    one = of(lm, 0, kind, basis)
    out = tmp_path / ("layers.0.mlp" + (".safetensors" if form == "tclib" else ""))
    write_any({0: one}, out, form)
    found = load_dictionary(out)
    assert found.config.model_hash == lm.content_hash
    changed = to_processed(to_raw(found, lm), lm)
    assert changed.config.model_hash == lm.content_hash
    with pytest.raises(InputError, match="whose weights .* are not those of"):
        to_processed(to_raw(found, lm), model(1)).check_model(model(1))


def test_a_set_is_of_one_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layers 0 and 1 were trained on different models"):
        write_any({0: of(model(0), 0), 1: of(model(1), 1)}, tmp_path / "set", "circuit-tracer")


def test_files_of_before_are_read_and_their_model_is_not_known(tmp_path: Path) -> None:
    one, path = of(model(0)), tmp_path / "one.safetensors"
    config = asdict(one.config)
    del config["model_hash"]
    save_tensors(path, one.parameters(), {"format": FILE_FORMAT, "config": config})
    found = Dictionary.load(path)
    assert found.config.model_hash == ""
    found.check_model(model(1))
    one.save(path)
    assert load_tensors(path, "")[1]["config"]["model_hash"] == model(0).content_hash


# ---------------------------------------------------------------------------------------------
# By name


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        ("gpt2-small", "openai-community/gpt2", False),
        ("gpt2", "GPT2-small", False),
        ("EleutherAI/pythia-410m", "pythia-410m", False),
        ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", False),
        ("pythia-410m", "gpt2-medium", True),
        ("demo", "demo-neox", True),
        ("gpt2-small", "", False),
        ("", "gpt2", False),
        ("/models/mine", "openai-community/gpt2", False),
        ("~/models/mine", "gpt2", False),
        ("./mine", "gpt2", False),
    ],
)
def test_names_differ_where_both_say_something(one: str, other: str, differ: bool) -> None:
    assert names_differ(one, other) is differ and names_differ(other, one) is differ


def test_another_name_is_a_warning_where_nothing_better_is_known() -> None:
    demo = LanguageModel.load("demo", device="cpu")
    d, n = demo.d_model, 8
    config = replace(random_transcoder(1, "relu").config, d_in=d, d_out=d, n_features=n)
    weights = (torch.zeros(d, n), torch.zeros(n), torch.zeros(n, d), torch.zeros(d))
    named = Dictionary(replace(config, model="pythia-410m"), *weights)
    with pytest.warns(UserWarning, match="trained on pythia-410m, and this is demo: .*for_model"):
        named.check_model(demo)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named.for_model(demo).check_model(demo)
        Dictionary(replace(config, model="demo"), *weights).check_model(demo)


def test_a_folder_and_a_model_given_by_hand_have_no_name_of_their_own(tmp_path: Path) -> None:
    tiny_hf_model("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    one = random_transcoder(1, "relu")
    one.config = replace(one.config, model="gpt2-small")
    for lm in (LanguageModel.load(str(tmp_path), device="cpu"), model(0)):
        assert lm.known_as == ""
        one.check_model(lm)


def test_half_precision_is_no_other_model() -> None:
    rounded = LanguageModel(tiny_hf_model("gpt2").bfloat16(), tiny_tokenizer(), "tiny-gpt2")
    assert rounded.content_hash != model(0).content_hash
    with pytest.warns(UserWarning, match="a copy of it in float32"):
        frozen = FrozenPrompts(rounded, random_rows(1).long(), [of(model(0))])
    de_embedding(frozen.lm, of(model(0)), 0)
    assert of(rounded).config.model_hash == ""
