"""Models of real sizes, random: loaded, one prompt, its graph through transcoders that stay on disk.

python benchmarks/large_models.py NAME FOLDER     one of them at its full size, files kept in FOLDER
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from result import Result, in_own_process
from safetensors.torch import save_file

N_POS, N_NODES, L0 = 32, 2_000, 50


@dataclass(frozen=True)
class Size:
    """A family's configuration, and the width of its transcoders."""

    model_type: str
    config: dict[str, Any]
    n_features: int


QWEN3 = Size(
    "qwen3",
    {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    65_536,
)
GEMMA2 = Size(
    "gemma2",
    {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256_000,
    },
    16_384,
)
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SIZES = {"Qwen3 0.6B": QWEN3, "Gemma 2 2B": GEMMA2}


def run(small: bool) -> Result:
    """Two models in bfloat16 on disk, traced in float32: 32 tokens, 2,000 feature nodes. Target: 12 GB.

    Memory is the process's own (pages of files that are mapped are the system's to take back). Gemma 2 2B's weights
    alone are 10.5 GB in float32: its size takes 13 GB while it is traced, and 15 while transformers loads it.
    """
    measures, agreements = {}, {}
    for name, size in SIZES.items():
        if small:
            size = Size(size.model_type, {**size.config, **TINY, "vocab_size": 893}, 256)
        with tempfile.TemporaryDirectory() as folder:
            found = in_own_process(made_and_measured, size, folder)
        loading, tracing, memory, residual = found
        measures[f"{name}'s size: loaded from bfloat16"] = (loading, "s")
        measures[f"{name}'s size: graph of {N_POS} tokens, transcoders on disk"] = (tracing, "s")
        measures[f"{name}'s size: memory of its own at its peak"] = (memory, "GB")
        agreements[f"{name}'s size: value of a node, the sum of its edges"] = (residual, 1e-4)
    return Result({"n_pos": N_POS, "n_feature_nodes": N_NODES}, measures, agreements)


def made_and_measured(size: Size, folder: str) -> tuple[float, float, float, float]:
    in_own_process(write, size, folder)  # what it takes to make them is not counted
    return measured(folder)


def write(size: Size, folder: str) -> None:
    """The model and its transcoders, in bfloat16, as a hub would have them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tclib.text.world import build_tokenizer

    place = Path(folder)
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = AutoConfig.for_model(size.model_type, **size.config, **special)
    torch.set_default_dtype(torch.bfloat16)
    AutoModelForCausalLM.from_config(config).save_pretrained(place / "model")
    build_tokenizer().save_pretrained(place / "model")
    write_transcoders(place / "transcoders", config, size.n_features)


def write_transcoders(place: Path, config: Any, n_features: int) -> None:
    """As circuit-tracer keeps a set; biases leave about `L0` features of random directions active."""
    place.mkdir()
    d = config.hidden_size
    threshold = float(torch.special.ndtri(torch.tensor(1 - L0 / n_features, dtype=torch.float64)))
    for layer in range(config.num_hidden_layers):
        weights = {
            "W_enc": torch.randn(n_features, d) / d**0.5,
            "b_enc": torch.full((n_features,), -threshold),
            "W_dec": torch.randn(n_features, d) / d**0.5,
            "b_dec": torch.zeros(d),
        }
        save_file(
            {n: w.bfloat16() for n, w in weights.items()}, place / f"layer_{layer}.safetensors"
        )
    said = {
        "model_kind": "transcoder_set",
        "feature_input_hook": "ln2.hook_normalized",
        "feature_output_hook": "hook_mlp_out",
    }
    (place / "config.yaml").write_text(yaml.safe_dump(said))


def measured(folder: str) -> tuple[float, float, float, float]:
    """(Seconds of loading, of tracing, GB at the peak, largest residual of a node)."""
    from tclib.circuits.frozen import FrozenPrompts
    from tclib.circuits.graph import attribution_graph
    from tclib.dictionaries.formats.circuit_tracer import read_circuit_tracer
    from tclib.models.language_model import LanguageModel

    with own_memory() as peak:
        began = time.perf_counter()
        lm = LanguageModel.load(Path(folder) / "model")
        loaded = time.perf_counter()
        tokens = torch.randint(2, 893, (1, N_POS))
        tokens[:, 0] = 0
        several = read_circuit_tracer(Path(folder) / "transcoders", lazy=True)
        graph = attribution_graph(
            FrozenPrompts(lm, tokens, several.values()), max_feature_nodes=N_NODES, keep_bos=False
        )
        traced = time.perf_counter()
    residual = float(graph.closure()["residual"].abs().max())
    return loaded - began, traced - loaded, max(peak), residual


@contextmanager
def own_memory() -> Iterator[list[float]]:
    """GB of this process that are no file's, noted every 20 ms while active."""
    found, is_over = [0.0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            found.append(kilobytes * 1024 / 1e9)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        is_over.set()
        watcher.join()


if __name__ == "__main__":
    chosen, kept = SIZES[sys.argv[1]], Path(sys.argv[2])
    if not (kept / "transcoders").is_dir():
        kept.mkdir(parents=True, exist_ok=True)
        in_own_process(write, chosen, str(kept))
    names = ("loading_s", "tracing_s", "GB", "residual")
    print(json.dumps(dict(zip(names, in_own_process(measured, str(kept)), strict=True))))
