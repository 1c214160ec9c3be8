"""Does a peer library compute with our files what we compute? Written here, read in its own environment.

    python benchmarks/interop.py write interop_run
    <environment with sae-lens or circuit-tracer>/bin/python benchmarks/interop.py read interop_run

Prints the largest difference of the outputs on seven random inputs, for a plain and a skip transcoder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

D_MODEL, N_FEATURES, LAYER = 64, 512, 1
KINDS = ("transcoder", "skip_transcoder")


def write(folder: Path) -> None:
    from tclib.dictionary import Dictionary, DictionaryConfig
    from tclib.formats import write_circuit_tracer, write_saelens

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    expected = {"x": normal(7, D_MODEL)}
    for kind in KINDS:
        skip = kind == "skip_transcoder"
        made = {}
        for layer in range(LAYER + 1):
            config = DictionaryConfig("transcoder", layer, D_MODEL, D_MODEL, N_FEATURES, skip=skip)
            weights = [normal(D_MODEL, N_FEATURES), normal(N_FEATURES)]
            weights += [normal(N_FEATURES, D_MODEL), normal(D_MODEL)]
            made[layer] = Dictionary(config, *weights, normal(D_MODEL, D_MODEL) if skip else None)
        write_saelens(made[LAYER], folder / "saelens" / kind)
        write_circuit_tracer(made, folder / "circuit_tracer" / kind)
        expected[kind] = made[LAYER](expected["x"]).reconstruction.contiguous()
    save_file(expected, folder / "expected.safetensors")


def read_with_saelens(folder: Path, kind: str) -> torch.nn.Module:
    from sae_lens.saes.transcoder import SkipTranscoder, Transcoder

    loader = SkipTranscoder if kind == "skip_transcoder" else Transcoder
    return loader.load_from_disk(str(folder / "saelens" / kind), device="cpu")


def read_with_circuit_tracer(folder: Path, kind: str) -> torch.nn.Module:
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    own = folder / "circuit_tracer" / kind
    paths = {layer: str(own / f"layer_{layer}.safetensors") for layer in range(LAYER + 1)}
    hooks = ("ln2.hook_normalized", "hook_mlp_out")
    found = load_transcoder_set(paths, "local", *hooks, lazy_encoder=False, lazy_decoder=False)
    return found[LAYER]


def read(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    for name, reader in (
        ("sae_lens", read_with_saelens),
        ("circuit_tracer", read_with_circuit_tracer),
    ):
        for kind in KINDS:
            try:
                module = reader(folder, kind)
            except ImportError as error:
                print(f"{name}: not installed here ({error})")
                break
            with torch.no_grad():
                difference = float((module(expected["x"]) - expected[kind]).abs().max())
            print(f"{name}, {kind}: largest difference {difference:.1e}")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
