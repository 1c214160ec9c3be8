"""Training: it learns, it resumes exactly, its seed acts, and it stops cleanly."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from filelock import FileLock
from tiny import D_MODEL, random_rows, tiny_lm, unchecked_types

from tclib.dictionaries.dictionary import Dictionary, activate, new_dictionary
from tclib.evaluation.metrics import fvu
from tclib.models.language_model import LanguageModel
from tclib.models.running import Site
from tclib.support import files as files_module
from tclib.support.errors import InputError
from tclib.support.files import load_tensors
from tclib.training import train as module
from tclib.training.log import LOG, open_tracker
from tclib.training.spec import DictionarySpec, TrainingConfig
from tclib.training.train import CHECKPOINT, train
from tclib.training.trainer import DictionaryTrainer
from tclib.training.trainer import scaled as scaled_dictionary

SPECS = (
    DictionarySpec("transcoder", 1, expansion=4, l1_coefficient=0.01),
    DictionarySpec("sae_mlp_out", 1, expansion=4, l1_coefficient=0.01, loss="authors"),
    DictionarySpec("sae_mlp_in", 0, "topk", expansion=4, k=3),
    DictionarySpec("transcoder", 2, "topk", expansion=4, k=3, skip=True, auxk_coefficient=0.1),
    DictionarySpec("transcoder", 0, "batch_topk", expansion=4, k=3, initial_norm=1.0),
    DictionarySpec("transcoder", 1, "jumprelu", expansion=4, l0_coefficient=0.1, bandwidth=0.5),
)
CONFIG = TrainingConfig(
    n_tokens=64 * 60,
    batch_size=64,
    learning_rate=3e-3,
    warmup_steps=5,
    decay_steps=10,
    seed=0,
    block_rows=16,
    rows_per_forward=8,
    checkpoint_every_steps=7,
    log_every_steps=5,
    dead_after_tokens=500,
)
ROWS = random_rows(64)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


class Killed(BaseException):
    """Like a signal: nothing catches it."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = module._Run._step

    def step_or_die(self: Any, trainer: Any, block: Any, rows: Any, at: int) -> Any:
        if at == step:
            raise Killed
        return original(self, trainer, block, rows, at)

    monkeypatch.setattr(module._Run, "_step", step_or_die)


def test_a_dictionary_of_its_own_rate_and_tokens_is_as_if_trained_with_them(tmp_path: Path) -> None:
    own = replace(SPECS[0], learning_rate=1e-3, n_tokens=64 * 30)
    together = train(tiny_lm(), ROWS, [SPECS[0], own], CONFIG, tmp_path / "together")
    shorter = replace(CONFIG, n_tokens=64 * 30, learning_rate=1e-3, warmup_steps=2, decay_steps=5)
    (alone,) = train(tiny_lm(), ROWS, [SPECS[0]], shorter, tmp_path / "alone")
    for name, tensor in alone.parameters().items():
        assert torch.equal(tensor, together[1].parameters()[name]), name
    assert not torch.equal(together[0].W_enc, together[1].W_enc)
    log = pd.read_csv(tmp_path / "together" / LOG)
    assert log[log["dictionary"] == own.name]["step"].max() == 30
    assert log[log["dictionary"] == SPECS[0].name]["step"].max() == 60


def test_more_tokens_than_the_training_has_are_refused_before_any_work(tmp_path: Path) -> None:
    for n_tokens, said in ((10**6, "at most the training's 3840"), (10, "at least one batch")):
        with pytest.raises(InputError, match=said):
            train(tiny_lm(), ROWS, [replace(SPECS[0], n_tokens=n_tokens)], CONFIG, tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny_lm(), ROWS, SPECS, CONFIG, folder)
    return folder


@pytest.mark.slow
def test_every_kind_learns(tmp_path: Path, lm: LanguageModel) -> None:
    config = replace(CONFIG, n_tokens=64 * 300)
    log_of = train(lm, ROWS, SPECS, config, tmp_path / "run")
    log = pd.read_csv(tmp_path / "run" / LOG)
    assert len(log_of) == len(SPECS)
    for spec, dictionary in zip(SPECS, log_of, strict=True):
        lines = log[log["dictionary"] == spec.name]
        assert lines["fvu"].iloc[-1] < 0.8 * lines["fvu"].iloc[0]
        config_of = dictionary.config
        acts = lm.read(ROWS.long(), {config_of.input_site, config_of.output_site})
        flat = {site: value.flatten(0, 1) for site, value in acts.items()}
        reconstruction = dictionary(flat[config_of.input_site]).reconstruction
        assert fvu(flat[config_of.output_site], reconstruction) < 0.9
        torch.testing.assert_close(
            dictionary.W_dec.norm(dim=1), torch.ones(4 * D_MODEL), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("step", [0, 3, 7, 13, 30, 59])
def test_a_run_killed_at_any_step_resumes_bit_for_bit(
    step: int, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        killed_at(step, patch)
        with pytest.raises(Killed):
            train(tiny_lm(), ROWS, SPECS, CONFIG, tmp_path / "run")
    train(tiny_lm(), ROWS, SPECS, CONFIG, tmp_path / "run")
    assert files(tmp_path / "run") == files(uninterrupted)
    logs = [
        pd.read_csv(f / LOG).drop(columns="tokens_per_s") for f in (tmp_path / "run", uninterrupted)
    ]
    pd.testing.assert_frame_equal(*logs)


@pytest.mark.slow
def test_the_log_of_a_resumed_run_is_that_of_one_that_was_never_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logged at 5, 7 and 10, killed at 13 with a checkpoint at 7: cut at bytes since."""

    def trained(folder: Path) -> list[list[str]]:
        train(lm, ROWS, SPECS[:2], config, folder)
        lines = (folder / LOG).read_text().splitlines()
        return [line.split(",")[:-1] for line in lines]  # all but the speed

    lm, config = tiny_lm(), replace(CONFIG, n_tokens=64 * 20, checkpoint_every_steps=7)
    expected = trained(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(13, patch)
        trained(tmp_path / "killed")
    held = (tmp_path / "killed" / LOG).read_bytes()
    at_checkpoint = held.index(b"\n10,") + 1
    assert held[at_checkpoint:].count(b"\n") == 2
    for n_bytes in range(at_checkpoint, len(held) + 1, 11):  # each of them in test_log.py
        shutil.copytree(tmp_path / "killed", tmp_path / "cut")
        (tmp_path / "cut" / LOG).write_bytes(held[:n_bytes])
        assert trained(tmp_path / "cut") == expected, n_bytes
        assert files(tmp_path / "cut") == files(tmp_path / "whole")
        shutil.rmtree(tmp_path / "cut")


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    uninterrupted: Path, tmp_path: Path
) -> None:
    train(tiny_lm(), ROWS, SPECS, CONFIG, tmp_path / "same")
    train(tiny_lm(), ROWS, SPECS, replace(CONFIG, seed=1), tmp_path / "other")
    weights = {}
    for name in ("same", "other"):
        path = tmp_path / name / f"{SPECS[0].name}.safetensors"
        weights[name] = Dictionary.load(path).W_enc
    expected = Dictionary.load(uninterrupted / f"{SPECS[0].name}.safetensors").W_enc
    assert torch.equal(weights["same"], expected)
    assert not torch.allclose(weights["other"], expected)


def test_a_dictionary_does_not_depend_on_its_company(uninterrupted: Path, tmp_path: Path) -> None:
    (alone,) = train(tiny_lm(), ROWS, SPECS[:1], CONFIG, tmp_path / "alone")
    together = Dictionary.load(uninterrupted / f"{SPECS[0].name}.safetensors")
    torch.testing.assert_close(alone.W_dec, together.W_dec)


def test_side_by_side_on_two_cores_is_one_after_the_other(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    step = DictionaryTrainer.step

    def noted(self: DictionaryTrainer, *given: Any) -> Any:
        threads.add(threading.current_thread().name)
        return step(self, *given)

    monkeypatch.setattr(DictionaryTrainer, "step", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(tiny_lm(), ROWS, SPECS, CONFIG, tmp_path / "run")
    finally:
        torch.set_num_threads(before)
    assert len(threads) == 2 and "MainThread" not in threads
    assert files(tmp_path / "run") == files(uninterrupted)


def test_a_finished_run_is_loaded_not_repeated(
    uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(0, monkeypatch)
    before = files(uninterrupted)
    loaded = train(tiny_lm(), ROWS, SPECS, CONFIG, uninterrupted)
    assert files(uninterrupted) == before
    assert [d.config.kind for d in loaded] == [spec.kind for spec in SPECS]
    assert not (uninterrupted / CHECKPOINT).exists()


def test_the_log_has_a_line_a_dictionary_and_logged_step(uninterrupted: Path) -> None:
    log = pd.read_csv(uninterrupted / LOG)
    expected = sorted({*range(5, 61, 5), *range(7, 61, 7)})
    assert sorted(log["step"].unique()) == expected
    assert len(log) == len(expected) * len(SPECS)
    assert (log["n_tokens"] == 64 * log["step"]).all()
    topk = log[log["dictionary"].str.contains("topk")]
    assert (topk["l0"] <= 3).all()
    assert log["dead_share"].between(0, 1).all()


@pytest.mark.slow
def test_auxk_revives_dead_features(tmp_path: Path) -> None:
    config = replace(CONFIG, n_tokens=64 * 400, dead_after_tokens=1000, learning_rate=1e-2)
    spec = DictionarySpec("transcoder", 1, "topk", expansion=16, k=4, auxk_k=16)
    shares = []
    for coefficient in (0.0, 1.0):
        folder = tmp_path / f"aux{coefficient}"
        train(tiny_lm(), ROWS, [replace(spec, auxk_coefficient=coefficient)], config, folder)
        shares.append(pd.read_csv(folder / LOG)["dead_share"].iloc[-1])
    assert shares[1] < 0.95 * shares[0]


@pytest.mark.slow
def test_the_trained_thresholds_give_the_l0_that_was_asked_for(tmp_path: Path) -> None:
    lm, config = tiny_lm(), replace(CONFIG, n_tokens=64 * 400)
    batch, cheap, dear = (
        DictionarySpec("transcoder", 1, "batch_topk", expansion=4, k=3),
        DictionarySpec("transcoder", 1, "jumprelu", expansion=4, l0_coefficient=0.02),
        DictionarySpec("transcoder", 1, "jumprelu", expansion=4, l0_coefficient=1.0),
    )
    trained = train(lm, ROWS, (batch, cheap, dear), config, tmp_path / "run")
    x = lm.read(ROWS.long(), [Site("mlp_in", 1)])[Site("mlp_in", 1)].flatten(0, 1)
    l0 = [float((d.encode(x) > 0).sum(1).double().mean()) for d in trained]
    assert l0[0] == pytest.approx(3, rel=0.1)
    assert trained[0].threshold is not None and len(trained[0].threshold.unique()) == 1
    assert l0[2] < 0.7 * l0[1]
    assert trained[2].threshold is not None and trained[2].threshold.min() >= 0


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("activation", ["relu", "topk", "batch_topk"])
def test_the_first_reconstruction_has_the_norm_that_was_asked_for(
    activation: Any, share: float
) -> None:
    k = None if activation == "relu" else 3
    spec = DictionarySpec("transcoder", 1, activation, 4, 0.01, k=k, initial_norm=share)
    lm = tiny_lm()
    config = spec.dictionary_config(lm)
    acts = lm.read(ROWS.long(), [config.input_site, config.output_site])
    block = {site: a.flatten(0, 1) for site, a in acts.items()}
    x, y = block[config.input_site], block[config.output_site]
    first = new_dictionary(config, torch.Generator().manual_seed(0), x.mean(0), y.mean(0))
    scaled = scaled_dictionary(first, spec, block, len(x))
    z = activate(scaled.pre_acts(x), k)
    found = (z @ scaled.W_dec).norm(dim=1).median() / (y - y.mean(0)).norm(dim=1).median()
    assert float(found) == pytest.approx(share, rel=1e-4)


def test_a_run_from_cached_activations_is_nearly_the_same_and_the_cache_serves_the_next(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, cache_activations=True)
    lm = tiny_lm()
    (cached,) = train(lm, ROWS, SPECS[:1], config, tmp_path / "one", tmp_path / "cache")
    plain = Dictionary.load(uninterrupted / f"{SPECS[0].name}.safetensors")
    torch.testing.assert_close(cached.W_dec, plain.W_dec, rtol=0, atol=0.05)
    monkeypatch.setattr(LanguageModel, "read", None)
    (again,) = train(lm, ROWS, SPECS[:1], config, tmp_path / "two", tmp_path / "cache")
    assert torch.equal(again.W_dec, cached.W_dec)


def test_the_learning_rate_warms_up_and_decays() -> None:
    config = replace(CONFIG, learning_rate=1.0)
    rates = [config.learning_rate_at(step) for step in range(config.n_steps)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[10:50] == [1.0] * 40
    assert rates[-1] == pytest.approx(0.1)


COMPILED = """
import sys
from dataclasses import replace
from pathlib import Path
from test_train import CONFIG, ROWS, SPECS
from tiny import tiny_lm
from tclib.training.train import train

config = replace(CONFIG, n_tokens=64 * 20, precision="bfloat16", compile=True)
train(tiny_lm(), ROWS, SPECS[:1], config, Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_bfloat16_and_compile_train_too(tmp_path: Path) -> None:
    """In a process of its own: the compiler cannot look through what the test run puts into functions."""
    here = Path(__file__).parent
    places = [str(place) for place in (here, here.parent, here.parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-c", COMPILED, str(tmp_path / "fast")]
    subprocess.run(command, env=environment, check=True)
    fast = Dictionary.load(tmp_path / "fast" / f"{SPECS[0].name}.safetensors")
    full = replace(CONFIG, n_tokens=64 * 20)
    (exact,) = train(tiny_lm(), ROWS, SPECS[:1], full, tmp_path / "exact")
    assert fast.W_enc.dtype == torch.float32
    torch.testing.assert_close(fast.W_dec, exact.W_dec, atol=0.05, rtol=0)


def test_tensorboard_gets_the_log_only_when_asked(tmp_path: Path) -> None:
    train(tiny_lm(), ROWS, SPECS[:1], replace(CONFIG, n_tokens=640), tmp_path / "plain")
    asked = replace(CONFIG, n_tokens=640, track="tensorboard")
    train(tiny_lm(), ROWS, SPECS[:1], asked, tmp_path / "asked")
    assert not (tmp_path / "plain" / "tensorboard").exists()
    (events,) = (tmp_path / "asked" / "tensorboard").iterdir()
    assert events.stat().st_size > 100


# -- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_negative_or_nan_l1_is_refused(value: float) -> None:
    with pytest.raises(
        InputError, match=f"l1_coefficient {value}: expected (at least 0|a finite number)"
    ):
        DictionarySpec("transcoder", 0, l1_coefficient=value)


def test_specs_and_configs_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="needs λ > 0"):
        DictionarySpec("transcoder", 0)
    with pytest.raises(InputError, match="l0_coefficient 0.0 for jumprelu: jumprelu needs one"):
        DictionarySpec("transcoder", 0, "jumprelu")
    with pytest.raises(InputError, match="l0_coefficient 0.5 for topk"):
        DictionarySpec("transcoder", 0, "topk", k=3, l0_coefficient=0.5)
    with pytest.raises(InputError, match="bandwidth 0.0"):
        DictionarySpec("transcoder", 0, "jumprelu", l0_coefficient=0.5, bandwidth=0.0)
    with pytest.raises(InputError, match="initial_norm -1.0"):
        replace(SPECS[0], initial_norm=-1.0)
    with unchecked_types(), pytest.raises(InputError, match="loss 'mse'"):
        replace(SPECS[0], loss="mse")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="learning_rate nan"):
        replace(CONFIG, learning_rate=math.nan)
    with pytest.raises(InputError, match="batch_size 0"):
        replace(CONFIG, batch_size=0)
    with pytest.raises(InputError, match="log_every_steps 0"):
        replace(CONFIG, log_every_steps=0)
    with pytest.raises(InputError, match="at least one batch"):
        replace(CONFIG, n_tokens=10)
    with unchecked_types(), pytest.raises(InputError, match="precision 'fp8'"):
        replace(CONFIG, precision="fp8")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("specs", "rows", "message"),
    [
        ([replace(SPECS[0], layer=3)], ROWS, "layer 3 is out of range"),
        ([SPECS[0], SPECS[0]], ROWS, "no two the same"),
        ([], ROWS, "at least one"),
        (SPECS, random_rows(4, n_ctx=70), "rows of 70 tokens"),
        (SPECS, random_rows(0), "not empty"),
    ],
)
def test_bad_runs_are_refused_before_anything_is_written(
    specs: Any, rows: torch.Tensor, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train(tiny_lm(), rows, specs, CONFIG, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_another_runs_folder_is_refused_and_kept(uninterrupted: Path) -> None:
    before = files(uninterrupted)
    with pytest.raises(InputError, match="made with other parameters, model or corpus"):
        train(tiny_lm(), ROWS, SPECS, replace(CONFIG, seed=5), uninterrupted)
    assert files(uninterrupted) == before


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".run.lock"),
        pytest.raises(InputError, match="another run is working in"),
    ):
        train(tiny_lm(), ROWS, SPECS, CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module._Run._step

    def explode(self: Any, trainer: Any, block: Any, rows: Any, at: int) -> Any:
        if at == 20:
            trainer.dictionary.W_dec.fill_(math.inf)
        return original(self, trainer, block, rows, at)

    monkeypatch.setattr(module._Run, "_step", explode)
    with pytest.raises(InputError, match=r"loss (nan|inf) at step 21; stopped, the last good"):
        train(tiny_lm(), ROWS, SPECS[:1], CONFIG, tmp_path / "run")
    tensors, metadata = load_tensors(tmp_path / "run" / CHECKPOINT, "")
    assert metadata["step"] == 14
    assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_checkpoint_is_named_with_what_to_do(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        killed_at(10, patch)
        with pytest.raises(Killed):
            train(tiny_lm(), ROWS, SPECS[:1], CONFIG, tmp_path / "run")
    checkpoint = tmp_path / "run" / CHECKPOINT
    content = bytearray(checkpoint.read_bytes())
    if damage == "truncate":
        del content[len(content) // 2 :]
    else:
        content[-10] ^= 1
    checkpoint.write_bytes(content)
    with pytest.raises(InputError, match=r"checkpoint.safetensors is .*corrupted.*: delete .*run"):
        train(tiny_lm(), ROWS, SPECS[:1], CONFIG, tmp_path / "run")


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on_later(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = files_module.save_file
    written: list[Path] = []

    def save_until_full(tensors: Any, path: Path, metadata: Any) -> None:
        written.append(path)
        if len(written) == 3:
            path.write_bytes(b"half of a checkpoint")
            raise OSError(28, "No space left on device")
        original(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(files_module, "save_file", save_until_full)
        with pytest.raises(InputError, match="No space left on device.*free some disk space"):
            train(tiny_lm(), ROWS, SPECS, CONFIG, tmp_path / "run")
    assert load_tensors(tmp_path / "run" / CHECKPOINT, "")[1]["step"] == 14
    assert not list((tmp_path / "run").glob(".*.tclib-tmp"))
    train(tiny_lm(), ROWS, SPECS, CONFIG, tmp_path / "run")
    assert files(tmp_path / "run") == files(uninterrupted)


def test_intervals_of_log_and_checkpoint_are_no_part_of_what_was_trained(tmp_path: Path) -> None:
    train(tiny_lm(), ROWS, SPECS, CONFIG, tmp_path / "run")
    before = files(tmp_path / "run")
    other = replace(CONFIG, log_every_steps=3, checkpoint_every_steps=5)
    train(tiny_lm(), ROWS, SPECS, other, tmp_path / "run")
    assert files(tmp_path / "run") == before


def test_a_run_of_other_weights_of_the_same_name_is_not_taken_for_this_one(tmp_path: Path) -> None:
    train(tiny_lm(), ROWS, SPECS, CONFIG, tmp_path / "run")
    with pytest.raises(InputError, match="made with other parameters, model or corpus"):
        train(tiny_lm(seed=1), ROWS, SPECS, CONFIG, tmp_path / "run")


def test_a_steps_activations_are_gone_before_the_next_dictionary_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    original = module._Run._step
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # one dictionary after the other

    def noted(self: Any, *args: Any) -> Any:
        assert not [one for one in held if one() is not None]
        result = original(self, *args)
        held.append(weakref.ref(result.acts))
        return result

    monkeypatch.setattr(module._Run, "_step", noted)
    train(tiny_lm(), ROWS, SPECS, CONFIG, tmp_path / "run")
    assert len(held) == len(SPECS) * CONFIG.n_steps


def test_tf32_is_asked_for_during_a_step_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    original = module._Run._step

    def noted(self: Any, trainer: Any, *args: Any) -> Any:
        with trainer._precision():
            seen.append(torch.backends.cuda.matmul.allow_tf32)
        return original(self, trainer, *args)

    monkeypatch.setattr(module._Run, "_step", noted)
    config = replace(CONFIG, n_tokens=64 * 2, precision="tf32")
    train(tiny_lm(), ROWS, SPECS[:1], config, tmp_path / "run")
    assert seen == [True, True] and not torch.backends.cuda.matmul.allow_tf32


def test_a_finished_run_holds_no_checkpoint_even_if_a_kill_fell_before_it_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(20, patch)
        train(tiny_lm(), ROWS, SPECS, CONFIG, tmp_path / "run")
    held = (tmp_path / "run" / CHECKPOINT).read_bytes()
    train(tiny_lm(), ROWS, SPECS, CONFIG, tmp_path / "run")
    (tmp_path / "run" / CHECKPOINT).write_bytes(held)
    train(tiny_lm(), ROWS, SPECS, CONFIG, tmp_path / "run")
    assert not (tmp_path / "run" / CHECKPOINT).exists()


def test_trackers_that_are_unknown_or_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InputError, match="track 'mlflow': expected 'none', 'wandb' or 'tensorboard'"
    ):
        TrainingConfig(track="mlflow")  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(InputError, match="pip install wandb"):
        open_tracker("wandb", tmp_path, {})


@pytest.mark.parametrize(("activation", "k"), [("topk", None), ("batch_topk", None), ("relu", 4)])
def test_a_k_that_does_not_fit_the_activation_is_named_before_any_work(
    activation: Any, k: int | None
) -> None:
    with pytest.raises(InputError, match=rf"k {k} for {activation}: topk and batch_topk need one"):
        DictionarySpec("transcoder", 1, activation, 4, 0.01, k=k)


def test_a_run_that_begins_anew_logs_each_step_once_and_keeps_the_lines_of_others(
    tmp_path: Path,
) -> None:
    header = "step,n_tokens,dictionary,loss,l0,fvu,dead_share,tokens_per_s"
    own, other = SPECS[0].name, "another"
    stale = [f"1,64,{name},1.0,1.0,1.0,0.0,1.0" for name in (own, other)]
    (tmp_path / "training_log.csv").write_text("\n".join([header, *stale]) + "\n")
    train(tiny_lm(), ROWS, SPECS[:1], CONFIG, tmp_path)
    lines = (tmp_path / "training_log.csv").read_text().splitlines()[1:]
    steps = [line.split(",")[0] for line in lines if own in line]
    assert len(steps) == len(set(steps)) and sum(other in line for line in lines) == 1


def test_a_finished_dictionary_of_other_parameters_is_not_trained_over(
    gpt2_lm: LanguageModel, tmp_path: Path
) -> None:
    rows = random_rows(64)
    specs = [DictionarySpec("transcoder", 1, expansion=2, l1_coefficient=l1) for l1 in (1e-3, 1e-2)]
    train(gpt2_lm, rows, specs[:1], TrainingConfig(n_tokens=512, batch_size=64), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="was made with other parameters"):
        train(gpt2_lm, rows, specs, TrainingConfig(n_tokens=1024, batch_size=64), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_runs_checkpoint_in_the_folder_of_a_finished_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, folder = tiny_lm(), tmp_path / "run"
    other = [replace(SPECS[0], l1_coefficient=0.02)]
    train(lm, ROWS, SPECS[:1], CONFIG, folder)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(30, patch)
        train(lm, ROWS, other, CONFIG, folder)
    before = (folder / CHECKPOINT).read_bytes()
    train(lm, ROWS, SPECS[:1], CONFIG, folder)
    assert (folder / CHECKPOINT).read_bytes() == before


def test_a_dictionary_names_the_weights_as_they_were_when_it_was_trained(
    gpt2_lm: LanguageModel, tmp_path: Path
) -> None:
    spec, config = SPECS[0], TrainingConfig(n_tokens=512, batch_size=64)
    (one,) = train(gpt2_lm, random_rows(64), [spec], config, tmp_path / "one")
    for parameter in gpt2_lm.model.parameters():
        parameter.data += torch.randn_like(parameter)
    (other,) = train(gpt2_lm, random_rows(64), [spec], config, tmp_path / "other")
    assert one.config.model_hash != other.config.model_hash == gpt2_lm.content_hash
