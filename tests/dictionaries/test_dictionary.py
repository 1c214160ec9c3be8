"""The equations on hand-computable weights, the file, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import D_MODEL, random_transcoder, tiny_lm, unchecked_types

from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig, activate, new_dictionary
from tclib.models.running import Site
from tclib.support.errors import InputError
from tclib.support.files import load_tensors, save_tensors

CONFIG = DictionaryConfig("transcoder", 1, d_in=2, d_out=3, n_features=4)


def by_hand(**changes: object) -> Dictionary:
    #                    warm  cold  both  never
    W_enc = torch.tensor([[1.0, 0.0, 1.0, -1.0], [0.0, 1.0, 1.0, -1.0]])
    b_enc = torch.tensor([0.0, 0.0, -1.0, 0.0])
    W_dec = torch.eye(4)[:, :3]
    b_dec = torch.tensor([10.0, 20.0, 30.0])
    config = replace(CONFIG, **changes)
    skip = torch.ones(2, 3) if config.skip else None
    return Dictionary(config, W_enc, b_enc, W_dec, b_dec, skip)


def test_the_equations_by_hand() -> None:
    x = torch.tensor([[2.0, 3.0]])
    assert by_hand().pre_acts(x).tolist() == [[2.0, 3.0, 4.0, -5.0]]
    assert by_hand().encode(x).tolist() == [[2.0, 3.0, 4.0, 0.0]]
    assert by_hand()(x).reconstruction.tolist() == [[12.0, 23.0, 34.0]]


def test_pre_activations_do_not_depend_on_how_many_tokens_there_are() -> None:
    config = replace(CONFIG, d_in=8, d_out=8, n_features=32)
    dictionary = new_dictionary(config, torch.Generator().manual_seed(0))
    x = torch.randn(3, 100, 8, generator=torch.Generator().manual_seed(1))
    expected = x @ dictionary.W_enc + dictionary.b_enc
    for n_tokens in (1, 20, 100):
        found = dictionary.pre_acts(x[:, :n_tokens])
        torch.testing.assert_close(found, expected[:, :n_tokens], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dictionary.pre_acts(x[0, 0]), expected[0, 0], rtol=1e-5, atol=1e-6)


def test_topk_keeps_the_k_largest_and_never_a_negative() -> None:
    x = torch.tensor([[2.0, 3.0], [-1.0, -2.0]])
    dictionary = by_hand(activation="topk", k=2)
    assert dictionary.encode(x).tolist() == [[0.0, 3.0, 4.0, 0.0], [0.0, 0.0, 0.0, 3.0]]
    assert activate(torch.tensor([[-1.0, -2.0]]), k=1).tolist() == [[0.0, 0.0]]


def test_the_skip_connection_is_added() -> None:
    x = torch.tensor([[2.0, 3.0]])
    skipping = by_hand(skip=True)
    assert skipping(x).reconstruction.tolist() == [[17.0, 28.0, 39.0]]
    with pytest.raises(InputError, match="pass its input x"):
        skipping.decode(skipping.encode(x))


def test_directions_are_the_columns_and_the_rows() -> None:
    dictionary = by_hand()
    assert dictionary.encoder_direction(2).tolist() == [1.0, 1.0]
    assert dictionary.decoder_direction(1).tolist() == [0.0, 1.0, 0.0]
    assert dictionary.W_enc.T.is_contiguous()


@pytest.mark.parametrize(
    ("kind", "sites"),
    [
        ("transcoder", ("mlp_in", "mlp_out")),
        ("sae_mlp_out", ("mlp_out", "mlp_out")),
        ("sae_mlp_in", ("mlp_in", "mlp_in")),
    ],
)
def test_each_kind_reads_and_writes_its_sites(kind: str, sites: tuple[str, str]) -> None:
    config = replace(CONFIG, kind=kind, d_in=3)
    assert (config.input_site, config.output_site) == tuple(Site(s, 1) for s in sites)  # type: ignore[arg-type]


def test_a_new_dictionary_has_unit_decoder_rows_and_removes_the_mean_input() -> None:
    config = replace(CONFIG, n_features=64, skip=True)
    mean_in, mean_out = torch.tensor([5.0, -7.0]), torch.tensor([1.0, 2.0, 3.0])
    new = new_dictionary(config, torch.Generator().manual_seed(0), mean_in, mean_out)
    torch.testing.assert_close(new.W_dec.norm(dim=1), torch.ones(64))
    torch.testing.assert_close(new.pre_acts(mean_in), torch.zeros(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(new(mean_in).reconstruction, mean_out, atol=1e-5, rtol=0)
    again = new_dictionary(config, torch.Generator().manual_seed(0), mean_in, mean_out)
    other = new_dictionary(config, torch.Generator().manual_seed(1), mean_in, mean_out)
    assert torch.equal(new.W_enc, again.W_enc) and not torch.equal(new.W_enc, other.W_enc)


@pytest.mark.parametrize("skip", [False, True])
def test_saving_and_loading_is_exact(tmp_path: Path, skip: bool) -> None:
    original = by_hand(skip=skip, activation="topk", k=2)
    original.save(tmp_path / "d.safetensors")
    loaded = Dictionary.load(tmp_path / "d.safetensors")
    assert loaded.config == original.config
    for name, tensor in original.parameters().items():
        assert torch.equal(loaded.parameters()[name], tensor)


# -- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "crosscoder"}, "kind 'crosscoder'"),
        ({"activation": "gelu"}, "activation 'gelu'"),
        ({"activation": "topk"}, "k None: topk expects 1 to n_features = 4"),
        ({"activation": "topk", "k": 5}, "k 5"),
        ({"k": 2}, "only activations topk and batch_topk take a k"),
        ({"n_features": 0}, "n_features 0"),
        ({"kind": "sae_mlp_out"}, "maps a site to itself"),
    ],
)
def test_configurations_out_of_range_are_refused(changes: dict, message: str) -> None:
    with unchecked_types(), pytest.raises(InputError, match=message):
        replace(CONFIG, **changes)


def test_a_negative_threshold_is_refused() -> None:
    config = replace(CONFIG, activation="jumprelu")
    weights = by_hand().parameters()
    with pytest.raises(InputError, match="threshold -0.5: expected 0 or more"):
        Dictionary(config, **weights, threshold=torch.tensor([0.0, -0.5, 1.0, 0.0]))
    with pytest.raises(InputError, match="the configuration expects .*threshold"):
        Dictionary(config, **weights)


@pytest.mark.parametrize("activation", ["jumprelu", "batch_topk"])
def test_a_feature_is_active_above_its_threshold_with_its_whole_pre_activation(
    activation: str,
) -> None:
    k = 2 if activation == "batch_topk" else None
    config = replace(CONFIG, activation=activation, k=k)
    one = by_hand()
    x = torch.tensor([[1.0, 2.0]])
    pre = one.pre_acts(x)[0]
    threshold = torch.tensor([float(pre[0]) + 1, 0.0, 0.0, max(0.0, float(pre[3]))])
    found = Dictionary(config, **one.parameters(), threshold=threshold).encode(x)[0]
    expected = [float(p) if p > t else 0.0 for p, t in zip(pre, threshold, strict=True)]
    assert found.tolist() == expected and found[0] == 0


def test_a_dictionary_of_another_width_is_named() -> None:
    with pytest.raises(InputError, match="input of width 5, but this transcoder expects 2"):
        by_hand().encode(torch.zeros(1, 5))
    with pytest.raises(InputError, match=f"whose d_model is {D_MODEL}"):
        by_hand().check_model(tiny_lm())
    with pytest.raises(InputError, match="layer 9 is out of range"):
        by_hand(layer=9).check_model(tiny_lm())


def test_weights_of_another_shape_are_refused() -> None:
    with unchecked_types(), pytest.raises(InputError, match="the configuration expects"):
        Dictionary(CONFIG, torch.zeros(2, 5), torch.zeros(4), torch.zeros(4, 3), torch.zeros(3))


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    from tclib.support.files import save_tensors

    save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {"format": "other"})
    with pytest.raises(InputError, match="does not hold a tclib dictionary"):
        Dictionary.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "threshold"])
def test_weights_that_are_not_finite_are_refused_by_name(
    name: str, value: float, tmp_path: Path
) -> None:
    config = replace(CONFIG, skip=True, activation="jumprelu")
    tensors = {n: torch.ones(shape) for n, shape in config.shapes().items()}
    Dictionary(config, **tensors).save(tmp_path / "good.safetensors")
    tensors[name].view(-1)[1] = value
    with pytest.raises(InputError, match=f"^{name} has 1 values that are NaN or infinite"):
        Dictionary(config, **tensors)
    path = tmp_path / "bad.safetensors"
    save_tensors(path, tensors, load_tensors(tmp_path / "good.safetensors", "")[1])
    with pytest.raises(InputError, match=rf"bad\.safetensors: {name} has 1 values"):
        Dictionary.load(path)


def test_weights_that_became_nan_in_place_are_not_saved(tmp_path: Path) -> None:
    dictionary = random_transcoder(0, "relu")
    dictionary.W_dec[0, 0] = torch.nan
    with pytest.raises(InputError, match="^W_dec has 1 values that are NaN"):
        dictionary.save(tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []
