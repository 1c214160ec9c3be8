"""Does a peer library compute with our files what we compute? Written here, read in its own environment.

    python benchmarks/interop.py write interop_run
    <environment with sae-lens, circuit-tracer or eai-sparsify>/bin/python benchmarks/interop.py read interop_run

Prints the largest difference of the outputs on seven random inputs, for plain, skip and JumpReLU
transcoders, and for top-k ones where the peer has those.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

D_MODEL, N_FEATURES, LAYER = 64, 512, 1
KINDS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
TOPK_KINDS = ("topk", "topk_skip")
K = 32


def write(folder: Path) -> None:
    from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig
    from tclib.dictionaries.formats.circuit_tracer import write_circuit_tracer
    from tclib.dictionaries.formats.saelens import write_saelens
    from tclib.dictionaries.formats.sparsify import write_sparsify

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    expected = {"x": normal(7, D_MODEL)}

    def transcoder(kind: str, layer: int) -> Dictionary:
        activation = next((a for a in ("jumprelu", "topk") if kind.startswith(a)), "relu")
        config = DictionaryConfig(
            "transcoder",
            layer,
            D_MODEL,
            D_MODEL,
            N_FEATURES,
            activation,  # type: ignore[arg-type]
            K if activation == "topk" else None,
            "skip" in kind,
            basis="raw" if activation == "topk" else "processed",
        )
        weights = [normal(D_MODEL, N_FEATURES), normal(N_FEATURES)]
        weights += [normal(N_FEATURES, D_MODEL), normal(D_MODEL)]
        skip = normal(D_MODEL, D_MODEL) if config.skip else None
        threshold = normal(N_FEATURES).abs() if activation == "jumprelu" else None
        return Dictionary(config, *weights, skip, threshold)

    for kind in KINDS:
        made = {layer: transcoder(kind, layer) for layer in range(LAYER + 1)}
        write_saelens(made[LAYER], folder / "saelens" / kind)
        write_circuit_tracer(made, folder / "circuit_tracer" / kind)
        expected[kind] = made[LAYER](expected["x"]).reconstruction.contiguous()
    for kind in TOPK_KINDS:
        one = transcoder(kind, LAYER)
        write_sparsify(one, folder / "sparsify" / kind / f"layers.{LAYER}.mlp")
        expected[kind] = one(expected["x"]).reconstruction.contiguous()
    save_file(expected, folder / "expected.safetensors")


def read_with_saelens(folder: Path, kind: str) -> torch.nn.Module:
    from sae_lens.saes import transcoder as peer

    loaders = (
        peer.Transcoder,
        peer.SkipTranscoder,
        peer.JumpReLUTranscoder,
        peer.JumpReLUSkipTranscoder,
    )
    loader = dict(zip(KINDS, loaders, strict=True))[kind]
    return loader.load_from_disk(str(folder / "saelens" / kind), device="cpu")


def read_with_circuit_tracer(folder: Path, kind: str) -> torch.nn.Module:
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    own = folder / "circuit_tracer" / kind
    paths = {layer: str(own / f"layer_{layer}.safetensors") for layer in range(LAYER + 1)}
    hooks = ("ln2.hook_normalized", "hook_mlp_out")
    found = load_transcoder_set(paths, "local", *hooks, lazy_encoder=False, lazy_decoder=False)
    return found[LAYER]


def read_with_sparsify(folder: Path, kind: str) -> object:
    from sparsify import SparseCoder

    place = folder / "sparsify" / kind / f"layers.{LAYER}.mlp"
    coder = SparseCoder.load_from_disk(str(place), device="cpu")

    def reconstruct(x: torch.Tensor) -> torch.Tensor:
        active = coder.encode(x)
        out = coder.decode(active.top_acts, active.top_indices)
        return out if coder.W_skip is None else out + x @ coder.W_skip.mT

    return reconstruct


def read(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    for name, reader, kinds in (
        ("sae_lens", read_with_saelens, KINDS),
        ("circuit_tracer", read_with_circuit_tracer, KINDS),
        ("sparsify", read_with_sparsify, TOPK_KINDS),
    ):
        for kind in kinds:
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
