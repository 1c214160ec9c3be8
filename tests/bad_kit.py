"""What the names in `bad_inputs` and `legitimate_inputs` stand for, and a folder of every wrong file."""

from __future__ import annotations

import bz2
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import yaml
from safetensors.torch import save_file
from tiny import random_rows, random_transcoder, tiny_lm
from torch import Tensor

import tclib as tc
from tclib.blind.language import from_dict as said
from tclib.blind.ledger import Entry, next_entry, sealed
from tclib.blind.predicates import Predicate
from tclib.blind.ratings import RatingStore
from tclib.blind.vocabulary import Vocabulary
from tclib.circuits.faithfulness import faithfulness_curves
from tclib.circuits.files import load_json, load_parquet, save_for_viewer, save_json, save_parquet
from tclib.circuits.interventions import ablation_table
from tclib.circuits.paths import NodeFilter as node_filter
from tclib.features.dashboard import build_dashboard
from tclib.features.examples import feature_activations, top_examples
from tclib.figures.circuits import head_heatmap, score_bars
from tclib.figures.graph import layered_graph
from tclib.figures.style import save_whole
from tclib.replication.presets import PRESETS
from tclib.support.files import tensors_hash
from tclib.support.steps import Step, read_manifest
from tclib.text.packing import pack

DEEP = "[" * 20_000
SILENT = 7  # a feature of d1


def transcoder(layer: int, kind: str = "relu") -> tc.Dictionary:
    made = random_transcoder(layer, kind, torch.float32)
    if layer == 1:
        made.b_enc[SILENT] = -1e6
    return made


def narrowed(dictionary: tc.Dictionary) -> tc.Dictionary:
    """The same for a model half as wide."""
    config = replace(dictionary.config, d_in=8, d_out=8)
    d = dictionary
    return tc.Dictionary(config, d.W_enc[:8], d.b_enc, d.W_dec[:, :8], d.b_dec[:8])


def changed(dictionary: tc.Dictionary, **values: Any) -> tc.Dictionary:
    return tc.Dictionary(replace(dictionary.config, **values), **dictionary.parameters())


class Kit:
    """Everything that stays the same from case to case."""

    def __init__(self, files: Path) -> None:
        self.lm = tiny_lm()
        self.rows = random_rows(8)
        self.d = [transcoder(layer) for layer in range(3)]
        prompts = random_rows(2, 7).long()
        frozen = tc.FrozenPrompts(self.lm, prompts, self.d)
        root = frozen.logit_target({3: 1.0, 5: -1.0}, -1)
        graph = tc.prune(tc.attribution_graph(frozen, [root]), 0.8, 0.9)
        infinite = transcoder(0)
        infinite.W_dec.fill_(math.inf)
        skip = transcoder(0, "skip")
        self.names: dict[str, Any] = {
            **vars(math),
            **{name: value for name, value in globals().items() if not name.startswith("_")},
            "nan": math.nan,
            "zeros": torch.zeros,
            "files": files,
            "lm": self.lm,
            "rows": self.rows,
            "vocabulary": Vocabulary.of(self.lm),
            "bos_rows": torch.zeros(4, 16, dtype=torch.int32),
            "prompts": prompts,
            "d0": self.d[0],
            "d1": self.d[1],
            "d2": self.d[2],
            "skipping": skip,
            "sae": changed(self.d[0], kind="sae_mlp_out"),
            "sae_in": changed(self.d[0], kind="sae_mlp_in"),
            "raw": changed(self.d[1], basis="raw"),
            "high": changed(self.d[0], layer=9),
            "halved": self.d[0].to(dtype=torch.float16),
            "narrow": narrowed(self.d[0]),
            "infinite": infinite,
            "frozen": frozen,
            "root": root,
            "paths": tc.greedy_paths(frozen, root, 2, 3),
            "graph": graph,
            "name": "embedding@0",
            "scores": torch.arange(100.0),
            "place": tc.Position(0, 5),
            "silent": SILENT,
            "cached": tc.TrainingConfig(n_tokens=256, batch_size=64, cache_activations=True),
            "config": self.config,
            "jump": self.config(activation="jumprelu"),
            "weights": self.weights,
            "node": self.node,
            "spec": self.spec,
            "session": self.session,
            "drawn": self.drawn,
            "task": self.task(prompts),
            "step": lambda name: Step(
                "demo", name, files / "steps" / name, "tclib run --preset demo"
            ),
        }
        write_files(files, self)

    def names_with(self, out: Path) -> dict[str, Any]:
        """The names, those that read `files` and write `out` among them."""

        def train(**values: Any) -> Any:
            usual = {
                "lm": self.lm,
                "rows": self.rows,
                "specs": [self.spec()],
                "folder": out / "run",
            }
            usual["config"] = tc.TrainingConfig(n_tokens=256, batch_size=64)
            return tc.train(**{**usual, **values})

        def text(
            source: str = "text.txt", kind: str = "text", n_ctx: int = 16, n_tokens: int = 64
        ) -> tc.CorpusConfig:
            path = str(self.names["files"] / source)
            return tc.CorpusConfig(
                kind, path, n_ctx=n_ctx, n_train_tokens=n_tokens, n_eval_tokens=n_tokens
            )  # type: ignore[arg-type]

        def dataset(source: str) -> tc.CorpusConfig:
            return tc.CorpusConfig("huggingface", source, n_ctx=16)

        return {**self.names, "out": out, "train": train, "text": text, "dataset": dataset}

    def config(self, **values: Any) -> tc.DictionaryConfig:
        usual = {"kind": "transcoder", "layer": 0, "d_in": 16, "d_out": 16, "n_features": 40}
        return tc.DictionaryConfig(**{**usual, **values})

    def weights(self, **values: Any) -> list[Any]:
        return list({**self.d[0].parameters(), **values}.values())

    def node(self, **values: Any) -> tc.Node:
        return tc.Node(
            **{"kind": "feature", "layer": 0, "head": -1, "feature": 1, "pos": 6, **values}
        )

    def spec(self, **values: Any) -> tc.DictionarySpec:
        usual = {"kind": "transcoder", "layer": 0, "expansion": 2}
        price = {} if values.get("activation", "relu") != "relu" else {"l1_coefficient": 1e-3}
        return tc.DictionarySpec(**{**usual, **price, **values})

    def task(self, prompts: Tensor) -> tc.GreaterThan:
        numbers, answers = (17, 35, 99), (20, 40, 60)
        is_greater = torch.tensor(answers)[None] > torch.tensor(numbers)[:, None]
        ids = torch.arange(3)
        return tc.GreaterThan(
            "years", prompts[[0, 1, 1]], numbers, (0, 0, 0), 3, ids, answers, is_greater
        )

    def session(self, **values: Any) -> tc.BlindSession:
        transcoders = {f"t{i}": d for i, d in enumerate(self.d)}
        usual = {"lm": self.lm, "transcoders": transcoders, "rows": self.rows, "layer": 1}
        return tc.BlindSession(**{**usual, "feature": 2, "key": "kit", **values})

    def drawn(self, figure: Any) -> None:
        """A figure on disk: only then are its titles laid out."""
        folder = self.names["files"].with_name("drawn")
        save_whole(figure, folder / "figure.png")
        plt.close(figure)


def write_files(folder: Path, kit: Kit) -> None:
    """A file of every kind that could be given where another belongs."""
    (folder / "folder").mkdir(parents=True)
    (folder / "folder.yaml").mkdir()
    (folder / "again").mkdir()
    for name, content in {
        "text.txt": "w3 w4 w5 w6 w7 w8. " * 400,
        "one.md": "\n\n".join(
            f"w{i % 90 + 2} w{i % 80 + 3} w{i % 70 + 4} " * 120 for i in range(60)
        ),
        "empty.txt": "",
        "blank.txt": " \n\n \n",
        "short.txt": "w3 w4",
        "empty.json": "",
        "list.json": "[1, 2]",
        "null.json": "null",
        "deep.json": DEEP,
        "text.safetensors": "no tensors here",
        "empty.safetensors": "",
        "text.pt": "no tensors here",
        "broken.parquet": "no table here",
        "broken.jsonl": '{"text": "a"}\n{"text": ',
        "folder_with/notes.txt": "mine",
        "config_list/config.json": "[]",
        "config_text/config.json": "no config here",
        "parquet_text/nodes.parquet": "no table here",
        "parquet_text/edges.parquet": "no table here",
        "viewer_text/graph-metadata.json": "no graphs here",
        "viewer_list/graph-metadata.json": "[1]",
        "runs/demo/00_model_and_data/table.csv": "a,b\n",
        "steps/empty/manifest.json": "",
        "steps/list/manifest.json": "[]",
        "steps/keyless/manifest.json": "{}",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    latin = "\n\n".join(f"w{i % 90 + 2} für w3 w4 " * 120 for i in range(60))
    (folder / "latin.txt").write_bytes(latin.encode("latin-1"))
    (folder / "latin.json").write_bytes('{"a": "für"}'.encode("latin-1"))
    (folder / "steps" / "latin").mkdir()
    (folder / "steps" / "latin" / "manifest.json").write_bytes("ü".encode("latin-1"))
    (folder / "cut.bz2").write_bytes(bz2.compress(b"<mediawiki>" + b"x" * 9_999)[:-20])
    for name, values in {
        "no_text": [{"a": "b"}],
        "numbers": [{"text": 3}],
        "nulls": [{"text": None}],
    }.items():
        pd.DataFrame(values * 40).to_parquet(folder / f"{name}.parquet")
    write_dictionaries(folder, kit)
    write_graphs(folder, kit)
    write_ledgers(folder, kit)
    write_ratings(folder)
    write_presets(folder)


def write_dictionaries(folder: Path, kit: Kit) -> None:
    good = kit.d[0]
    for name, one in {"good": good, "again/good": good, "high": changed(good, layer=9)}.items():
        one.save(folder / f"{name}.safetensors")
    changed(good, kind="sae_mlp_out").save(folder / "sae.safetensors")
    whole = (folder / "good.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "altered.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    tensors = {name: tensor.contiguous() for name, tensor in good.parameters().items()}
    save_file(tensors, folder / "foreign.safetensors")
    headers = {"no_json": "{", "deep": DEEP, "list": "[]", "null": "null", "no_metadata": {}}
    headers |= {
        "metadata_null": {"metadata": None},
        "sum_is_a_number": {"metadata": {}, "sha256": 7},
    }
    for name, header in headers.items():
        if isinstance(header, dict):
            header = json.dumps({"sha256": tensors_hash(tensors), **header})
        save_file(tensors, folder / f"{name}.safetensors", metadata={"tclib": header})

    def write(name: str, found: Mapping[str, Tensor] = tensors, **metadata: Any) -> None:
        usual = {"format": "tclib-dictionary-1", "config": asdict(good.config)}
        named = {k: v for k, v in {**usual, **metadata}.items() if v is not Ellipsis}
        header = json.dumps({"metadata": named, "sha256": tensors_hash(found)})
        save_file(dict(found), folder / f"{name}.safetensors", metadata={"tclib": header})

    def with_config(**values: Any) -> dict[str, Any]:
        held = {**asdict(good.config), **values}
        return {name: value for name, value in held.items() if value is not Ellipsis}

    write("no_format", format=...)
    write("checkpoint", format=..., config=..., fingerprint="a", step=3)
    write("no_config", config=...)
    write("config_list", config=[1])
    write("unknown_key", config=with_config(colour="red"))
    write("missing_key", config=with_config(kind=...))
    write("layer_word", config=with_config(layer="two"))
    write("layer_float", config=with_config(layer=1.5))
    write("layer_below", config=with_config(layer=-1))
    write("layer_null", config=with_config(layer=None))
    write("width_true", config=with_config(d_in=True))
    write("kind_number", config=with_config(kind=3))
    write("another_width", config=with_config(d_in=15))
    write("extra_tensor", {**tensors, "W_more": torch.zeros(3)})
    write("missing_tensor", {n: t for n, t in tensors.items() if n != "b_dec"})
    write("integers", {n: t.long() for n, t in tensors.items()})
    write("two_types", {**tensors, "b_dec": tensors["b_dec"].half()})


def write_graphs(folder: Path, kit: Kit) -> None:
    graph = kit.names["graph"]
    save_json(graph, folder / "graph.json")
    held = json.loads((folder / "graph.json").read_text())
    source, target, effect = held["edges"][0]
    for name, values in {
        "no_nodes": {"nodes": None},
        "edge_out": {"edges": [[9999, target, effect]]},
        "edge_words": {"edges": [["a", "b", "c"]]},
        "dtype": {"dtype": "flaot32"},
        "targets": {"targets": [9999]},
        "types": {"types": {"name": "int64"}},
    }.items():
        (folder / f"graph_{name}.json").write_text(json.dumps({**held, **values}))
    save_parquet(graph, folder / "parquet_columns")
    other = pd.DataFrame({"a": [1]})
    for name in ("nodes", "edges"):
        (folder / "parquet_other").mkdir(exist_ok=True)
        other.to_parquet(folder / "parquet_other" / f"{name}.parquet")
    other.to_parquet(folder / "parquet_columns" / "edges.parquet")


def write_ledgers(folder: Path, kit: Kit) -> None:
    session = kit.session()
    session.logits(3)
    session.save_ledger(folder / "ledger.jsonl")
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]

    def write(name: str, entries: list[dict[str, Any]]) -> None:
        text = "\n".join(json.dumps(entry) for entry in entries)
        (folder / f"ledger_{name}.jsonl").write_text(text + "\n")

    def forged(**values: Any) -> list[dict[str, Any]]:
        """A whole chain, sealed, whose question is another."""
        chain: list[Entry] = []
        for entry in (lines[0], {**lines[1], **values}):
            body = {name: entry[name] for name in entry if name not in ("index", "digest")}
            chain.append(next_entry(chain, **body))
        return [vars(entry) for entry in (*chain, sealed(chain))]

    write("altered", [{**lines[0], "kind": "question"}, *lines[1:]])
    write("types", [{"index": "a"}])
    write("question", forged(question="save_ledger", arguments={"path": "/tmp/x"}))
    write("arguments", forged(arguments={"k": "many", "colour": 3}))


def write_ratings(folder: Path) -> None:
    good: dict[str, Any] = {"format": "tclib-ratings-1", "rater": "me", "n_items": 3, "answers": {}}
    answer = {"rating": "not", "context_free": False}
    for name, held in {
        "ratings": good,
        "ratings_none": {**good, "answers": None},
        "ratings_list": {**good, "answers": [answer]},
        "ratings_word": {**good, "answers": {"first": answer}},
        "ratings_out": {**good, "answers": {"7": answer}},
        "ratings_good": {**good, "answers": {"0": {"rating": "good", "context_free": False}}},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(held))


def write_presets(folder: Path) -> None:
    values = yaml.safe_load((PRESETS / "demo.yaml").read_text())
    small = {**values, "companions": []}
    for name, found in {
        "list": [1, 2],
        "no_model": {**small, "model": "./nowhere"},
        "high": {**small, "sweep": {**values["sweep"], "layer": 9}},
        "no_text": {**small, "corpus": {**values["corpus"], "kind": "text", "source": "none.txt"}},
        "long": {**small, "corpus": {**values["corpus"], "n_ctx": 9999, "n_train_tokens": 99999}},
        "a b": small,
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(found))
    (folder / "empty.yaml").write_text("")
    (folder / "latin.yaml").write_bytes("description: für\n".encode("latin-1"))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below a folder, with its size and time."""
    paths = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in paths.items()}


__all__ = [
    "Kit",
    "Predicate",
    "RatingStore",
    "ablation_table",
    "build_dashboard",
    "faithfulness_curves",
    "snapshot",
]
__all__ += ["feature_activations", "head_heatmap", "layered_graph", "load_json", "load_parquet"]
__all__ += ["node_filter", "read_manifest"]
__all__ += ["np", "pack", "said", "save_for_viewer", "score_bars", "top_examples"]
