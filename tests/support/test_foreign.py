"""What other people's files may say, and what is refused before it is made."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from tclib.support.errors import InputError, listed
from tclib.support.foreign import pickled_names, read_json, read_yaml


def test_plain_values_and_harmless_aliases_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "sizes: &s [1, 2.5, null]\nagain: *s\nmore: {<<: {x: 1}, y: yes}\n"
    )
    sizes = [1, 2.5, None]
    expected = {"sizes": sizes, "again": sizes, "more": {"x": 1, "y": True}}
    assert read_yaml(tmp_path / "a.yaml") == expected
    (tmp_path / "a.json").write_text('{"a": [1, {"b": "λ"}]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, {"b": "λ"}]}


@pytest.mark.parametrize(
    "text",
    [
        b"a: [",
        b"a: !!int ''",
        b"a: !!bool x",
        b"a: !!timestamp x",
        b"a: 2001-99-99",
        b"a: !!python/object/apply:os.system [ls]",
        b"a: *b",
        b"? [x]\n: 1",
        b"a: 1\n---\nb: 2",
        b"\xff\xfe",
        b"\x00",
    ],
)
def test_what_is_not_yaml_is_one_sentence(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.yaml").write_bytes(text)
    with pytest.raises(InputError, match="a.yaml is not YAML: ") as found:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[1,]", b"1" * 5000])
def test_what_is_not_json_is_one_sentence(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(InputError, match="a.json is not JSON: "):
        read_json(tmp_path / "a.json")
    with pytest.raises(InputError, match="none.json does not exist: give a file in JSON"):
        read_json(tmp_path / "none.json")


def test_the_names_that_a_torch_file_asks_for_are_seen_without_reading_it(tmp_path: Path) -> None:
    shared = torch.zeros(3)
    torch.save({"a": shared, "b": shared, "c": [shared] * 50}, tmp_path / "one.pt")
    assert pickled_names(tmp_path / "one.pt") == {
        "collections.OrderedDict",
        "torch.FloatStorage",
        "torch._utils._rebuild_tensor_v2",
    }


def test_a_torch_file_that_was_compressed_afterwards_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(10_000), tmp_path / "one.pt")
    with (
        zipfile.ZipFile(tmp_path / "one.pt") as one,
        zipfile.ZipFile(tmp_path / "two.pt", "w", zipfile.ZIP_DEFLATED) as two,
    ):
        for name in one.namelist():
            two.writestr(name, one.read(name))
    with pytest.raises(InputError, match=r"two.pt has .* bytes, and would unpack to 4\d,"):
        pickled_names(tmp_path / "two.pt")


def test_a_sentence_lists_a_few_names() -> None:
    assert listed("cab") == "a, b, c" and listed([]) == ""
    assert listed(range(9)) == "0, 1, 2 and 6 more"
