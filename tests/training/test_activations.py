"""The harvest: right values, one forward pass, shuffled, stateless, in constant memory."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import random_rows, tiny_lm

from tclib.models.language_model import LanguageModel
from tclib.models.running import Site
from tclib.support.errors import InputError
from tclib.training.activations import ActivationCache, Harvest, _Writer, needed_sites

SITES = (Site("mlp_in", 0), Site("mlp_out", 0), Site("mlp_out", 2))


def harvest(lm: LanguageModel, n_rows: int = 12, **changes: int) -> Harvest:
    settings = {"block_rows": 4, "rows_per_forward": 3, "seed": 0, **changes}
    return Harvest(lm, random_rows(n_rows), SITES, **settings)


def sorted_rows(acts: torch.Tensor) -> torch.Tensor:
    return acts[acts[:, 0].argsort()]


def test_a_pass_holds_every_token_once_at_every_site(lm: LanguageModel) -> None:
    harvested = harvest(lm)
    blocks = [harvested.block(i) for i in range(3)]
    expected = lm.read(random_rows(12).long(), SITES)
    for site in SITES:
        found = torch.cat([block[site] for block in blocks])
        torch.testing.assert_close(
            sorted_rows(found), sorted_rows(expected[site].flatten(0, 1)), rtol=1e-4, atol=1e-5
        )


def test_sites_share_one_permutation(gpt2_lm: LanguageModel) -> None:
    block = harvest(gpt2_lm).block(1)
    mlp_in, mlp_out = block[SITES[0]], block[SITES[1]]
    mlp = gpt2_lm.model.transformer.h[0]
    norm = gpt2_lm.mlp_norm(0)
    with torch.no_grad():
        again = norm.centre(mlp.mlp(mlp_in * norm.gain + norm.bias))
    torch.testing.assert_close(mlp_out, again, rtol=1e-4, atol=1e-5)


def test_blocks_are_shuffled_and_stateless(gpt2_lm: LanguageModel) -> None:
    first, fresh = harvest(gpt2_lm), harvest(gpt2_lm)
    first.block(0)
    assert torch.equal(first.block(2)[SITES[0]], fresh.block(2)[SITES[0]])
    assert not torch.equal(first.block(0)[SITES[0]], first.block(3)[SITES[0]])
    other = harvest(gpt2_lm, seed=1)
    assert not torch.equal(first.block(0)[SITES[0]], other.block(0)[SITES[0]])


def test_a_block_may_span_two_passes(gpt2_lm: LanguageModel) -> None:
    harvested = harvest(gpt2_lm, n_rows=5)
    indices = torch.cat([harvested._row_indices(i) for i in range(5)])
    assert torch.equal(torch.bincount(indices), torch.full((5,), 4))


def test_the_model_runs_once_whatever_the_number_of_sites(gpt2_lm: LanguageModel) -> None:
    n_calls = []
    handle = gpt2_lm._block(0).mlp_reader.register_forward_hook(lambda *_: n_calls.append(1))
    harvest(gpt2_lm).block(0)
    handle.remove()
    assert len(n_calls) == 2  # four rows, three a forward pass


def cached(lm: LanguageModel, folder: Path) -> Harvest:
    """The same harvest, from a cache that has been filled."""
    plain = harvest(lm)
    cache = ActivationCache.of(folder, lm, plain.rows)
    cache.fill(lm, plain.rows, SITES)
    return replace(plain, cache=cache)


def test_cached_activations_are_the_models_in_float16(lm: LanguageModel, tmp_path: Path) -> None:
    plain, from_disk = harvest(lm), cached(lm, tmp_path)
    for block_idx in (0, 2, 4):  # the last of the first pass, and one of the second
        expected, found = plain.block(block_idx), from_disk.block(block_idx)
        for site in SITES:
            assert torch.equal(found[site], expected[site].half().float())


def test_a_filled_cache_needs_no_forward_pass(
    gpt2_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_disk = cached(gpt2_lm, tmp_path)
    monkeypatch.setattr(LanguageModel, "read", None)
    from_disk.block(0)
    assert from_disk.cache is not None
    from_disk.cache.fill(gpt2_lm, from_disk.rows, SITES[:2])
    with pytest.raises(TypeError):  # a site that is not there yet
        from_disk.cache.fill(gpt2_lm, from_disk.rows, [Site("mlp_in", 1)])


def test_other_rows_and_models_have_other_caches(tmp_path: Path) -> None:
    rows = random_rows(4)
    one = ActivationCache.of(tmp_path, tiny_lm("gpt2"), rows)
    assert one != ActivationCache.of(tmp_path, tiny_lm("gpt2"), rows.flip(0))
    assert one != ActivationCache.of(tmp_path, tiny_lm("neox"), rows)


def test_values_beyond_float16_leave_nothing_behind(
    gpt2_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LanguageModel.read

    def huge(self: LanguageModel, tokens: torch.Tensor, sites: object) -> dict:
        return {site: a * 1e6 for site, a in original(self, tokens, sites).items()}  # type: ignore[arg-type]

    monkeypatch.setattr(LanguageModel, "read", huge)
    with pytest.raises(InputError, match="more than float16 holds: set cache_activations to false"):
        cached(gpt2_lm, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def damage(path: Path, how: str) -> None:
    """Spoil one block of a file of the cache, or all of it."""
    held = path.read_bytes()
    offset = np.load(path, mmap_mode="r").offset
    spoilt = {
        "zeroed": held[:offset] + bytes(64) + held[offset + 64 :],
        "flipped": held[:-3] + bytes([held[-3] ^ 1]) + held[-2:],
        "cut": held[: len(held) // 2],
        "empty": b"",
        "misshapen": (buffer := io.BytesIO(), np.save(buffer, np.zeros((3, 2), np.float16)))[0].getvalue(),
    }  # fmt: skip
    path.write_bytes(spoilt[how])


@pytest.mark.parametrize("how", ["zeroed", "flipped", "cut", "empty", "misshapen"])
def test_damaged_blocks_are_named_and_read_again(
    how: str, gpt2_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harvested = harvest(gpt2_lm, n_rows=12)
    whole = replace(ActivationCache.of(tmp_path, gpt2_lm, harvested.rows), rows_per_forward=5)
    whole.fill(gpt2_lm, harvested.rows, SITES)
    path = whole._path(SITES[1])
    before = path.read_bytes()
    damage(path, how)
    asked: list[tuple[int, list[Site]]] = []
    original = LanguageModel.read

    def noted(self: LanguageModel, tokens: torch.Tensor, sites: list[Site]) -> dict:
        asked.append((len(tokens), list(sites)))
        return original(self, tokens, sites)

    monkeypatch.setattr(LanguageModel, "read", noted)
    n_damaged = 1 if how in ("zeroed", "flipped") else 3
    with pytest.warns(UserWarning, match=rf"mlp_out-L0.npy: {n_damaged} of 3 blocks were damaged"):
        whole.fill(gpt2_lm, harvested.rows, SITES)
    assert path.read_bytes() == before
    assert len(asked) == n_damaged and all(sites == [SITES[1]] for _, sites in asked)


def test_a_cache_of_other_weights_of_the_same_name_is_another(tmp_path: Path) -> None:
    rows = random_rows(4)
    one, other = tiny_lm("gpt2"), tiny_lm("gpt2", seed=1)
    assert one.name == other.name
    assert ActivationCache.of(tmp_path, one, rows) != ActivationCache.of(tmp_path, other, rows)


def test_two_runs_on_one_cache_write_it_once(tmp_path: Path) -> None:
    plain = harvest(tiny_lm(), n_rows=40)
    cache = replace(ActivationCache.of(tmp_path, plain.lm, plain.rows), rows_per_forward=1)
    n_reads: list[int] = []
    original = LanguageModel.read

    def slow(self: LanguageModel, tokens: torch.Tensor, sites: list[Site]) -> dict:
        n_reads.append(1)
        time.sleep(0.002)
        return original(self, tokens, sites)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(LanguageModel, "read", slow)
        for done in [pool.submit(cache.fill, tiny_lm(), plain.rows, SITES) for _ in range(4)]:
            done.result()
    assert len(n_reads) == 40
    expected = plain.lm.read(plain.rows.long(), SITES)
    for site, found in cache.read(SITES, torch.arange(40), torch.device("cpu")).items():
        torch.testing.assert_close(found, expected[site].half(), rtol=1e-2, atol=1e-3)


FILL = f"""
import resource, sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from tiny import random_rows, tiny_lm
from tclib.models.running import Site
from tclib.support.errors import InputError
from tclib.training.activations import ActivationCache

folder, n_bytes = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
lm, rows = tiny_lm(), random_rows(640)
read, n_reads = type(lm).read, []
type(lm).read = lambda *given: (n_reads.append(1), time.sleep(0.02), read(*given))[-1]
print("ready", flush=True)
sys.stdin.readline()
try:
    ActivationCache.of(folder, lm, rows).fill(lm, rows, [Site("mlp_in", 0), Site("mlp_out", 2)])
    print(len(n_reads))
except InputError as error:
    print(error)
"""


def filling(folder: Path, n_bytes: int = 2**30) -> subprocess.Popen[str]:
    """A process about to fill a cache, once it is told to; it can write no file above `n_bytes`."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", FILL, str(folder), str(n_bytes)]
    process: subprocess.Popen[str] = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_two_processes_on_one_cache_leave_the_models_activations(tmp_path: Path) -> None:
    both = [filling(tmp_path), filling(tmp_path)]
    for process in both:
        process.stdin.write("go\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    ends = [process.communicate() for process in both]
    assert sorted(ends) == [("0\n", ""), ("20\n", "")]  # batches that each of them read
    lm, rows = tiny_lm(), random_rows(640)
    sites = [Site("mlp_in", 0), Site("mlp_out", 2)]
    cache = ActivationCache.of(tmp_path, lm, rows)
    assert not any(cache._damaged(site) for site in sites)
    found = cache.read(sites, torch.arange(640), torch.device("cpu"))
    expected = lm.read(rows.long(), sites)
    for site in sites:
        torch.testing.assert_close(found[site], expected[site].half(), rtol=1e-2, atol=1e-3)
    assert not list(tmp_path.rglob("*.tclib-tmp"))


@pytest.mark.slow
def test_a_file_that_the_disk_does_not_take_is_one_sentence(tmp_path: Path) -> None:
    said, trace = filling(tmp_path, n_bytes=100_000).communicate("go\n")
    assert "could not be written ([Errno 27] File too large): free some space" in said
    assert said.count("\n") == 1 and trace == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_cache_in_the_place_of_a_file_is_named(gpt2_lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    with pytest.raises(InputError, match="a_file is a file: expected a folder"):
        cached(gpt2_lm, tmp_path / "a_file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_named(
    gpt2_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_self: object, _row: int, values: object) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(values.tobytes())  # type: ignore[attr-defined]

    monkeypatch.setattr(_Writer, "put", full)
    with pytest.raises(InputError, match="No space left on device.*free some space"):
        cached(gpt2_lm, tmp_path)
    assert not list(tmp_path.rglob("*.npy")) and not list(tmp_path.rglob("*.tclib-tmp"))


def test_a_full_disk_is_named_before_anything_is_read(
    gpt2_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    monkeypatch.setattr(LanguageModel, "read", None)
    with pytest.raises(InputError, match="needs 0.0 GB and .* has 0.0 GB"):
        cached(gpt2_lm, tmp_path)


def test_needed_sites_are_distinct_and_in_order() -> None:
    pairs = [(Site("mlp_in", 2), Site("mlp_out", 2)), (Site("mlp_out", 2), Site("mlp_out", 2))]
    assert needed_sites(pairs) == (Site("mlp_in", 2), Site("mlp_out", 2))


def test_bad_input_is_named() -> None:
    lm = tiny_lm()
    with pytest.raises(InputError, match="not empty"):
        Harvest(lm, random_rows(0), SITES)
    with pytest.raises(InputError, match="layer 7 is out of range"):
        Harvest(lm, random_rows(2), (Site("mlp_in", 7),))
    with pytest.raises(InputError, match="rows of 70 tokens"):
        Harvest(lm, random_rows(2, n_ctx=70), SITES)
