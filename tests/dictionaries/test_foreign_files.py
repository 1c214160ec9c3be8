"""Files that ask for more than they hold: one sentence each, within 5 seconds and 500 MB."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny import authors_file, random_transcoder, runner_config_class

from tclib.dictionaries.formats.circuit_tracer import write_circuit_tracer
from tclib.dictionaries.formats.saelens import write_saelens
from tclib.support.files import HEADER_KEY

SECONDS, MEGABYTES = 5, 500
# In a process of its own, as a user would; its peak of memory is that of everything in it, torch too. (`ru_maxrss`
# would begin with the memory of the process that starts it.)
READ = r"""
import json, re, sys, time
from pathlib import Path
from tclib.dictionaries.formats.any import load_dictionary
from tclib.replication.presets import load_preset
from tclib.support.errors import InputError
for path in sys.argv[1:]:
    started = time.monotonic()
    try:
        (load_preset if path.endswith(".yaml") else load_dictionary)(path)
        said = "accepted"
    except InputError as error:
        said = str(error)
    seconds = time.monotonic() - started
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000
    print(json.dumps([path, said, seconds, peak]), flush=True)
"""
LAUGHS = "a: &a [lol]\n" + "".join(
    f"{later}: &{later} [{', '.join([f'*{earlier}'] * 9)}]\n"
    for earlier, later in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{later}: &{later} {{<<: [*{earlier}, *{earlier}, *{earlier}]}}\n"
    for earlier, later in zip("abcdefghijklmnopqrstuvw", "bcdefghijklmnopqrstuvwx", strict=True)
)


def torch_file(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, held in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3")):
            archive.writestr(f"one/{name}", held)
    return path


def text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words)) + words.encode()


def inflating(folder: Path) -> Path:
    """A tensor of one gigabyte of zeros in four megabytes."""
    n = b"J" + struct.pack("<I", 2**28)
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + n + b"tQ"
    )
    pickled = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage
    pickled += b"K\x00" + n + b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR."
    path = torch_file(folder / "weights.pt", pickled)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("one/data/0", bytes(2**30))
    assert path.stat().st_size < 10e6
    return path


def doubling_lists(folder: Path) -> Path:
    held: list[Any] = []
    for _ in range(40):
        held = [held, held]
    torch.save({"cfg": held, "state_dict": {}}, folder / "lists.pt")
    return folder / "lists.pt"


def doubling_keys(folder: Path) -> Path:
    """A dictionary with a key whose hash takes 2^45 steps."""
    doubled = b"".join(b"q%ch%c\x86" % (i, i) for i in range(45))
    return torch_file(folder / "keys.pt", b"\x80\x02})" + doubled + b"Ns.")


def filled_from_outside(folder: Path) -> Path:
    """Lists that are put into each other while they are empty, and as a hook whose text is endless."""
    made = b"(" + b"".join(b"]q%c" % i for i in range(60)) + b"t"
    filled = b"(" + b"".join(b"h%c(h%ch%ce" % (i, i + 1, i + 1) for i in range(59)) + b"t"
    config = b"csae_training.config\nLanguageModelSAERunnerConfig\n)\x81}("
    config += text("all") + b"(" + made + filled + b"t" + text("is_transcoder") + b"\x88"
    config += text("hook_point") + b"h\x00" + b"ub"
    pickled = b"\x80\x02}(" + text("cfg") + config + text("state_dict") + b"}u."
    return torch_file(folder / "outside.pt", pickled)


def deep_pickle(folder: Path) -> Path:
    return torch_file(folder / "deep.pt", b"\x80\x02" + b")" + b"\x85" * 50_000 + b".")


def lying_sizes(folder: Path) -> Path:
    """A pickle of a quarter of a gigabyte, of which its archive says that it has a thousand bytes."""
    path = folder / "lies.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("one/data.pkl", b"\x80\x02(" + b"N" * 2**28 + b"t.")
    held = path.read_bytes()
    size = held.rindex(b"PK\x01\x02") + 24  # where the directory says it
    path.write_bytes(held[:size] + struct.pack("<I", 1000) + held[size + 4 :])
    return path


def later_protocol(folder: Path) -> Path:
    return torch_file(folder / "protocol.pt", b"\x80\x04" + b"N0" + b".")


def pipe(path: Path) -> Path:
    """Nobody writes into it: a reader would wait for ever."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def long_pickle(folder: Path) -> Path:
    return torch_file(folder / "long.pt", b"\x80\x02(" + b"N" * 2_000_000 + b"t.")


class Allocates:
    def __reduce__(self) -> tuple[type, tuple[int]]:
        return bytearray, (8 * 2**30,)


def allocating(folder: Path) -> Path:
    torch.save({"cfg": Allocates()}, folder / "allocates.pt")
    return folder / "allocates.pt"


def repeated_number(folder: Path) -> Path:
    """Matrices of 10^12 entries, all of them one number that is in the file."""
    n, one = 10**6, torch.ones(1)
    with runner_config_class() as config_class:
        wide = {"d_in": n, "d_out": n, "d_sae": n, "b_dec": one.expand(n), "b_enc": one.expand(n)}
        wide |= {"W_enc": one.expand(n, n), "W_dec": one.expand(n, n), "b_dec_out": one.expand(n)}
        authors_file(folder / "repeats.pt", config_class, **wide)
    return folder / "repeats.pt"


def safetensors_file(path: Path, header: bytes, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)
    return path


def absurd_header(folder: Path) -> Path:
    return safetensors_file(folder / "absurd.safetensors", b"{}", 2**60)


def many_tensors(folder: Path) -> Path:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": empty for i in range(300_000)}).encode()
    return safetensors_file(folder / "many.safetensors", header)


def more_than_it_holds(folder: Path) -> Path:
    declared = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    return safetensors_file(folder / "more.safetensors", json.dumps({"W_enc": declared}).encode())


def deep_metadata(folder: Path) -> Path:
    nested = {HEADER_KEY: "[" * 90_000 + "]" * 90_000}
    save_file({"a": torch.zeros(1)}, folder / "nested.safetensors", metadata=nested)
    return folder / "nested.safetensors"


def tracer(folder: Path, name: str, config: str) -> Path:
    write_circuit_tracer({0: random_transcoder(0, "relu")}, folder / name)
    (folder / name / "config.yaml").write_text(config)
    return folder / name


def lens(folder: Path, name: str, config: str) -> Path:
    write_saelens(random_transcoder(0, "relu"), folder / name)
    (folder / name / "cfg.json").write_text(config)
    return folder / name


def endless(folder: Path) -> Path:
    """Eight gigabytes of nothing."""
    found = tracer(folder, "endless", "")
    os.truncate(found / "config.yaml", 8 * 2**30)
    return found


def preset(folder: Path) -> Path:
    (folder / "laughs.yaml").write_text(LAUGHS)
    return folder / "laughs.yaml"


def piped_lens(folder: Path) -> Path:
    return pipe(lens(folder, "pipe", "") / "cfg.json").parent


def piped_layer(folder: Path) -> Path:
    said = {
        "model_kind": "transcoder_set",
        "model_name": "x",
        "feature_output_hook": "hook_mlp_out",
    }
    said["feature_input_hook"] = "ln2.hook_normalized"
    return pipe(tracer(folder, "layer", yaml.safe_dump(said)) / "layer_0.safetensors").parent


def bare_number(folder: Path) -> Path:
    """A width in sixties, of more digits than Python writes."""
    config = {"model_kind": "transcoder_set", "model_name": "x"}
    number = "\nk: " + ":".join(["1"] * 3000)
    return tracer(folder, "number", yaml.safe_dump(config) + number)


WRITTEN_OUT = "whose references, written out, are more than 1,000,000"
ATTACKS: dict[Callable[[Path], Path], str] = {
    inflating: "would unpack to 1,07",
    doubling_lists: WRITTEN_OUT,
    doubling_keys: WRITTEN_OUT,
    filled_from_outside: "hook_point is a list; expected a text",
    deep_pickle: "values nested more than 50 deep",
    lying_sizes: "or more: torch.save compresses nothing",
    later_protocol: "no torch file (",
    lambda folder: pipe(folder / "pipe.pt"): "pipe.pt is a pipe or a device",
    piped_lens: "cfg.json is a pipe or a device",
    piped_layer: "layer_0.safetensors is a pipe or a device",
    long_pickle: "a pickle of more than 100,000 bytes",
    allocating: "asks for __builtin__.bytearray",
    repeated_number: "holds 4 bytes of it",
    absurd_header: "declares a header of 1,152,921,504,606,846,976 bytes",
    many_tensors: "declares a header of",
    more_than_it_holds: "truncated or corrupted",
    deep_metadata: "is not JSON",
    lambda folder: tracer(folder, "laughs", LAUGHS): WRITTEN_OUT,
    lambda folder: tracer(folder, "merged", MERGED): WRITTEN_OUT,
    lambda folder: tracer(folder, "itself", "a: &a [*a]"): WRITTEN_OUT,
    lambda folder: tracer(folder, "deep", "[" * 90_000): "values nested more than 50 deep",
    lambda folder: lens(folder, "json", "[" * 90_000): "is not JSON",
    lambda folder: lens(folder, "twice", '{"d_in": 1, "d_in": 2}'): "d_in stands there twice",
    lambda folder: lens(folder, "json60", "[" * 60 + "]" * 60): "values nested more than 50 deep",
    bare_number: "a value of 5,999 characters",
    endless: "has more than 100,000 bytes",
    preset: WRITTEN_OUT,
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_each_is_refused_in_one_sentence_in_little_time_and_memory(tmp_path: Path) -> None:
    paths = {str(make(tmp_path)): words for make, words in ATTACKS.items()}
    process = subprocess.run(
        [sys.executable, "-c", READ, *paths], capture_output=True, text=True, timeout=200
    )
    assert process.returncode == 0 and not process.stderr, process.stderr
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert [line[0] for line in lines] == list(paths)
    for path, said, seconds, megabytes in lines:
        print(Path(path).name, f"{seconds:.2f} s, {megabytes:.0f} MB:", said)
        assert paths[path] in said and said.startswith(path) and "\n" not in said, said
        assert len(said) < len(path) + 1000 and "arbitrary code" not in said, said
        assert seconds < SECONDS and megabytes < MEGABYTES, (path, seconds, megabytes)
