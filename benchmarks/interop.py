"""Does whoever reads our files compute what we compute? We ourselves, and the libraries that are here.

    python benchmarks/interop.py FOLDER
    <environment with sae-lens, circuit-tracer or eai-sparsify>/bin/python benchmarks/interop.py FOLDER

The first writes the files, unless they are there; tclib need not be where they are read.
"""

import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from result import Result
from safetensors.torch import load_file, save_file
from torch import Tensor

D_MODEL, N_FEATURES, LAYER, K = 64, 512, 1, 32
SAELENS_CLASSES = {
    "transcoder": "Transcoder",
    "skip_transcoder": "SkipTranscoder",
    "jumprelu_transcoder": "JumpReLUTranscoder",
    "jumprelu_skip_transcoder": "JumpReLUSkipTranscoder",
}
PLACES = [f"{of}/{kind}" for of in ("saelens", "circuit-tracer") for kind in SAELENS_CLASSES]
PLACES += [f"sparsify/{kind}/layers.{LAYER}.mlp" for kind in ("topk", "topk_skip")]
Compute = Callable[[Tensor], Tensor]


def run(small: bool) -> Result:
    """Outputs on seven random inputs: plain, skip and JumpReLU transcoders, top-k ones for sparsify.

    Target: 1e-6. The same at both sizes.
    """
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return Result({"d_model": D_MODEL, "n_features": N_FEATURES}, {}, read(Path(folder)))


def write(folder: Path) -> None:
    from tclib.dictionaries.formats.any import write_any

    expected = {"x": 0.1 * torch.randn(7, D_MODEL, generator=torch.Generator().manual_seed(0))}
    for place in PLACES:
        library, kind = place.split("/")[:2]
        layers = range(LAYER + 1) if library == "circuit-tracer" else (LAYER,)
        made = {layer: transcoder(kind, layer) for layer in layers}
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        write_any(made, folder / place, library)
        expected[kind] = made[LAYER](expected["x"]).reconstruction.contiguous()
    save_file(expected, folder / "expected.safetensors")


def transcoder(kind: str, layer: int) -> Any:
    from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig

    generator = torch.Generator().manual_seed(layer)
    activation = next((a for a in ("jumprelu", "topk") if kind.startswith(a)), "relu")
    k, basis = (K, "raw") if activation == "topk" else (None, "processed")
    sizes = (D_MODEL, D_MODEL, N_FEATURES)
    config = DictionaryConfig("transcoder", layer, *sizes, activation, k, "skip" in kind, "", basis)
    shapes = config.shapes().items()
    weights = {name: 0.1 * torch.randn(*shape, generator=generator) for name, shape in shapes}
    if "threshold" in weights:
        weights["threshold"].abs_()
    return Dictionary(config, **weights)


def read(folder: Path) -> dict[str, tuple[float, float]]:
    """The largest difference of an output from ours, by file and library."""
    expected = load_file(folder / "expected.safetensors")
    found = {}
    for place in PLACES:
        library, kind = place.split("/")[:2]
        for module, reader in (("tclib", with_tclib), PEERS[library]):
            if find_spec(module) is not None:
                with torch.no_grad():
                    output = reader(folder / place, kind)(expected["x"])
                apart = float((output - expected[kind]).abs().max())
                found[f"{place} read by {module}"] = (apart, 1e-6)
    return found


def with_tclib(place: Path, _kind: str) -> Compute:
    from tclib.dictionaries.formats.any import load_dictionary

    dictionary = load_dictionary(place, LAYER)
    return lambda x: dictionary(x).reconstruction


def with_saelens(place: Path, kind: str) -> Compute:
    from sae_lens.saes import transcoder as peer

    return getattr(peer, SAELENS_CLASSES[kind]).load_from_disk(str(place), device="cpu")


def with_circuit_tracer(place: Path, _kind: str) -> Compute:
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    paths = {layer: str(place / f"layer_{layer}.safetensors") for layer in range(LAYER + 1)}
    hooks = ("ln2.hook_normalized", "hook_mlp_out")
    found = load_transcoder_set(paths, "local", *hooks, lazy_encoder=False, lazy_decoder=False)
    return found[LAYER]


def with_sparsify(place: Path, _kind: str) -> Compute:
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(str(place), device="cpu")

    def reconstruct(x: Tensor) -> Tensor:
        active = coder.encode(x)
        out = coder.decode(active.top_acts, active.top_indices)
        return out if coder.W_skip is None else out + x @ coder.W_skip.mT

    return reconstruct


PEERS: dict[str, tuple[str, Callable[[Path, str], Compute]]] = {
    "saelens": ("sae_lens", with_saelens),
    "circuit-tracer": ("circuit_tracer", with_circuit_tracer),
    "sparsify": ("sparsify", with_sparsify),
}

if __name__ == "__main__":
    own = Path(sys.argv[1])
    if not own.exists():
        write(own)
    for what, (apart, _) in read(own).items():
        print(f"{what}: largest difference {apart:.1e}")
