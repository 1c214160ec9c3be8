"""A folder as Hugging Face's libraries fill it, small enough to rehearse a day with a hub.

    python tests/hub_rehearsal.py FOLDER                    # every preset of the paper, small
    python tests/hub_rehearsal.py FOLDER gpt2-published --full-size

FOLDER/home is an HF_HOME that holds the models, the released transcoders and the text of the paper's
presets under their own ids and in the hub's layouts: random weights, made-up text, GPT-2's own tokenizer.
FOLDER/presets are the paper's presets with smaller sizes, and nothing else changed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from gpt2_tokenizer import END_OF_TEXT, byte_level, write_gpt2_tokenizer
from safetensors.torch import save_file
from tiny import authors_file, runner_config_class
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from tclib import cli
from tclib.dictionaries.released_sets import GPT2_FILE, GPT2_FREQUENCIES, SETS
from tclib.greater_than.task import PAPER_TEMPLATE
from tclib.replication.paper import paper_table
from tclib.support.files import new_folder
from tclib.support.places import PRESETS
from tclib.text import world

DATASET_ID, PARQUET_REVISION = "Skylion007/openwebtext", "refs/convert/parquet"
PAPERS_PRESETS = ("gpt2", "gpt2-published", "pythia-410m", "pythia-1.4b")
NO_HUB = "http://127.0.0.1:9"  # where nothing answers
N_RELEASED_FEATURES = 24_576  # of tiny ones too: published figures name features up to 21,996


@dataclass(frozen=True)
class Size:
    """Of the stand-ins; GPT-2 keeps its layers, heads and vocabulary, Pythia its layers and heads."""

    gpt2_width: int
    pythia_width: int
    n_positions: int
    n_documents: int


TINY, FULL = Size(12, 16, 128, 1_000), Size(768, 1024, 1_024, 20_000)

GPT2: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_head": 12,
    "n_layer": 12,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
PYTHIA: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-05,
    "model_type": "gpt_neox",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_parallel_residual": True,
}


def build_home(home: Path, size: Size = TINY) -> None:
    """Everything that the paper's presets load, as the hub's libraries keep it in `home`."""
    texts = [document.text for document in itertools.islice(world.documents(0), size.n_documents)]
    with new_folder(home) as temporary:
        hub = temporary / "hub"
        add_repository(hub, "model", "openai-community/gpt2", write_gpt2, size)
        add_repository(hub, "model", SETS["gpt2"].repository, write_released, size.gpt2_width)
        for name in ("EleutherAI/pythia-410m", "EleutherAI/pythia-1.4b"):
            add_repository(hub, "model", name, write_pythia, size, texts)
        add_repository(hub, "dataset", DATASET_ID, write_parquet, texts, revision=PARQUET_REVISION)


# -- the cache of huggingface_hub -----------------------------------------------------------


def add_repository(
    hub: Path,
    kind: str,
    repository_id: str,
    write: Callable[..., None],
    *arguments: Any,
    revision: str = "main",
) -> Path:
    """What `write` makes in a folder, kept as huggingface_hub keeps a repository; the snapshot's folder.

    Contents are blobs (named by sha256 where the hub has large files, else by git's hash), a snapshot is
    links to them, refs/<revision> names its commit, and trees/<commit>.json lists what the hub has: more
    than is here, as after `hf download --include`.
    """
    repository = hub / "--".join([f"{kind}s", *repository_id.split("/")])
    commit = hashlib.sha1(repository_id.encode()).hexdigest()
    snapshot = repository / "snapshots" / commit
    hub.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=hub) as folder:
        write(Path(folder), *arguments)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                _keep(path, repository / "blobs", snapshot / path.relative_to(folder))
    for name, text in ((f"refs/{revision}", commit), (f"trees/{commit}.json", _tree(snapshot))):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(text)
    return snapshot


def _keep(path: Path, blobs: Path, link: Path) -> None:
    content = path.read_bytes()
    is_large = path.suffix in (".safetensors", ".pt", ".parquet")
    of_git = hashlib.sha1(f"blob {len(content)}\0".encode() + content)
    blob = blobs / (hashlib.sha256(content) if is_large else of_git).hexdigest()
    blobs.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    path.replace(blob)
    link.symlink_to(os.path.relpath(blob, link.parent))


def _tree(snapshot: Path) -> str:
    here = {str(p.relative_to(snapshot)): p.resolve() for p in snapshot.rglob("*") if p.is_file()}
    files = {name: {"size": p.stat().st_size, "blob_id": p.name[:40]} for name, p in here.items()}
    files["flax_model.msgpack"] = {"size": 1, "blob_id": "0" * 40}
    return json.dumps({"format_version": 1, "files": files})


# -- what the repositories hold -------------------------------------------------------------


def write_gpt2(folder: Path, size: Size) -> None:
    """Random GPT-2; the hub's tensors lack the prefix `transformer.` and hold the causal masks."""
    n_ctx = size.n_positions
    values = {**GPT2, "n_embd": size.gpt2_width, "n_ctx": n_ctx, "n_positions": n_ctx}
    (folder / "config.json").write_text(json.dumps(values))
    torch.manual_seed(0)
    tensors = spread(GPT2LMHeadModel(GPT2Config(**values)).transformer.state_dict())
    mask = torch.ones(1, 1, n_ctx, n_ctx).tril()
    tensors |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(12)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_gpt2_tokenizer(folder)


def write_pythia(folder: Path, size: Size, texts: Sequence[str]) -> None:
    """Random Pythia in float16 with its former buffers; a tokenizer of its kind, smaller than the model's."""
    tokenizer = byte_level(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[END_OF_TEXT, "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[:200], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "unk")}
    own = {**special, "add_prefix_space": False, "tokenizer_class": "GPTNeoXTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    width, n_ctx = size.pythia_width, size.n_positions
    values = {**PYTHIA, "hidden_size": width, "intermediate_size": 4 * width, "vocab_size": 512}
    values["max_position_embeddings"] = n_ctx
    (folder / "config.json").write_text(json.dumps(values))
    torch.manual_seed(1)
    tensors = spread(GPTNeoXForCausalLM(GPTNeoXConfig(**values)).state_dict())
    for layer in range(24):
        attention = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{attention}.bias"] = torch.ones(1, 1, n_ctx, n_ctx, dtype=torch.bool).tril()
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)
    half = {n: t if t.dtype == torch.bool else t.half() for n, t in tensors.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})


def spread(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that are large enough for layers to read more than the stream's constant part."""
    return {n: t * (5 if t.dim() > 1 else 1) for n, t in state.items()}


def write_released(folder: Path, width: int) -> None:
    """Twelve .pt files of the released layout and their frequencies; in them about ten features are active at a token.

    Features that published figures name are active more often, so that every figure has something to
    measure.
    """
    with runner_config_class() as config_class:
        for layer in range(12):
            generator = torch.Generator().manual_seed(layer)

            def normal(scale: float, *shape: int, g: torch.Generator = generator) -> Tensor:
                return scale * torch.randn(*shape, generator=g)

            frequencies = normal(1.0, N_RELEASED_FEATURES).sub(3).clamp(min=-10)
            torch.save(frequencies, folder / GPT2_FREQUENCIES.format(layer=layer))
            b_enc = torch.full((N_RELEASED_FEATURES,), -3.6)
            b_enc[named_features(layer)] = -1.0
            authors_file(
                folder / GPT2_FILE.format(layer=layer),
                config_class,
                layer=layer,
                d_in=width,
                d_out=width,
                d_sae=N_RELEASED_FEATURES,
                W_enc=normal(width**-0.5, width, N_RELEASED_FEATURES),
                b_enc=b_enc,
                W_dec=normal(0.1, N_RELEASED_FEATURES, width),
                b_dec=normal(0.05, width),
                b_dec_out=normal(0.05, width),
            )


def named_features(layer: int) -> list[int]:
    """Features of a layer that the case studies, activations and connections of the paper name."""
    tables = ("case_studies", "prompt_activations", "pullback_overlap")
    rows = [row for name in tables for row in paper_table(name)]
    return sorted({int(row["feature"]) for row in rows if int(row["layer"]) == layer})


def write_parquet(folder: Path, texts: Sequence[str]) -> None:
    """The text in four files, as the hub's own conversion of a data set lies on its branch."""
    place = folder / "plain_text" / "train"
    place.mkdir(parents=True)
    for i in range(4):
        pq.write_table(pa.table({"text": texts[i::4]}), place / f"{i:04}.parquet")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs diff=lfs merge=lfs -text\n")


# -- the presets in other sizes, and running them -------------------------------------------

_TRAINING = {
    "n_tokens": 1_024,
    "batch_size": 256,
    "warmup_steps": 2,
    "block_rows": 16,
    "rows_per_forward": 8,
    "dead_after_tokens": 500,
}
_ROWS = {"n_rows": 64, "n_held_out_rows": 8, "min_log10_frequency": -3.0}
SIZES: dict[str, Any] = {
    "n_evaluation_rows": 2,  # what is over all of GPT-2's tokens takes the most time
    "corpus": {"n_ctx": 32, "n_train_tokens": 2_048, "n_eval_tokens": 256},
    "transcoders": {"expansion": 1, "training": _TRAINING},
    "sweep": {"expansion": 1, "training": _TRAINING},
    "circuits": {
        "n_connection_features": 2,
        "n_connection_rows": 2,
        "n_prompts": 1,
        "n_random_circuits": 2,
    },
    "greater_than": {"components_every": 30, "templates": [PAPER_TEMPLATE]},
    "case_studies": {**_ROWS, "n_full": 1, "n_restricted": 0},
    "comparison": {**_ROWS, "n_features": 4, "n_rated": 4},
}
# Of the preset that trains nothing, with a restricted study where the other has one with every tool.
PUBLISHED_SIZES = {
    **{part: sizes for part, sizes in SIZES.items() if part not in ("transcoders", "sweep")},
    "case_studies": {**_ROWS, "n_full": 0, "n_restricted": 1, "features": [355]},
}


def write_presets(folder: Path) -> None:
    """The paper's presets in other sizes; what is not a size stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PAPERS_PRESETS:
        values = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
        sizes = PUBLISHED_SIZES if "published" in values["transcoders"] else SIZES
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(with_sizes(values, sizes)))


def with_sizes(values: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of `sizes` in their place, at every depth."""
    inner = {
        key: with_sizes(values[key], size)
        for key, size in sizes.items()
        if key in values and isinstance(size, dict)
    }
    return {**values, **sizes, **inner}


def execute_here(
    notebook: Path, output: Path, parameters: Mapping[str, Any], made_from: str
) -> None:
    """A notebook's cells in this process, in the place of papermill, which starts a kernel for each."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell = InteractiveShell.instance()
    shell.reset()
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            with capture_output():
                result = shell.run_cell("".join(cell["source"]))
            result.raise_error()
            if "parameters" in cell["metadata"].get("tags", []):
                shell.push(dict(parameters))


def run_here(preset: Path, runs: Path) -> None:
    """`tclib run` with the preset's file, every notebook in this process."""
    at_once = mock.patch("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)
    with at_once, mock.patch("tclib.replication.executed.execute", execute_here):
        cli.run(str(preset), runs_dir=runs)


def main() -> None:
    """Build the folder, and run presets on it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("presets", nargs="*", default=PAPERS_PRESETS)
    parser.add_argument(
        "--full-size", action="store_true", help="GPT-2 small's and Pythia-410M's widths"
    )
    given = parser.parse_args()
    home, presets = given.folder / "home", given.folder / "presets"
    if not home.is_dir():
        build_home(home, FULL if given.full_size else TINY)
    write_presets(presets)
    environment = {**os.environ, "HF_HOME": str(home.resolve()), "HF_ENDPOINT": NO_HUB}
    for name in given.presets:
        began = time.perf_counter()
        command = ["tclib.cli", "run", "--preset", str(presets / f"{name}.yaml")]
        command += ["--runs-dir", str(given.folder / "runs")]
        subprocess.run([sys.executable, "-m", *command], env=environment, check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(
            f"{name}: {time.perf_counter() - began:.0f} s; peak so far {peak:.1f} GiB", flush=True
        )


if __name__ == "__main__":
    main()
