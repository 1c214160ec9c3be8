"""What the keys of a preset, each of them good, must be together for its notebooks to run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tclib.support.errors import InputError
from tclib.support.places import NOTEBOOKS

if TYPE_CHECKING:
    from tclib.replication.presets import Preset


def check_preset(preset: Preset, others: list[str]) -> None:
    """Raise `InputError` if a notebook that is not skipped would miss something; `others` are presets."""
    numbers = [path.name[:2] for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))]
    _check_known("skipped", preset.skipped, numbers)
    _check_known("companions", preset.companions, others)
    if len(set(preset.companions)) < len(preset.companions):
        raise InputError(f"companions {list(preset.companions)}: expected each of them once")
    _check_sweep(preset)
    _check_studies(preset)
    _check_layers(preset)


def _check_known(key: str, given: Iterable[str], known: list[str]) -> None:
    for value in given:
        if value not in known:
            raise InputError(f"{key} {value!r}: expected one of {', '.join(known)}")


def _check_sweep(preset: Preset) -> None:
    """Raise `InputError` if notebooks 02 and 05 would miss what they compare."""
    kinds = {spec.kind for spec in preset.sweep.specs()}
    compared = {
        "02": {"transcoder", "sae_mlp_out"} <= kinds,
        "05": "transcoder" in kinds and len(kinds) > 1,
    }
    for number, is_there in compared.items():
        if number not in preset.skipped and not is_there:
            raise InputError(
                "sweep: expected transcoder_l1, sae_mlp_out_l1 or families, transcoders and SAEs "
                f"among them, or skip notebook {number}"
            )


def _check_studies(preset: Preset) -> None:
    """Raise `InputError` if notebook 04 would study layer 0 blindly, or features of an SAE that there is not."""
    studies = preset.case_studies
    layer = preset.sweep.layer if studies.layer is None else studies.layer
    if "04" in preset.skipped:
        return
    if layer == 0 and (studies.n_restricted or studies.n_sae):
        raise InputError(
            "case_studies.layer 0 (null: the sweep's): restricted studies ask nothing of layer 0; expected "
            "another layer, n_restricted 0, or skip notebook 04"
        )
    swept = {spec.kind for spec in preset.sweep.full_specs()} if layer == preset.sweep.layer else ()
    if studies.n_sae and "sae_mlp_in" not in swept:
        raise InputError(
            f"case_studies.n_sae {studies.n_sae}: expected an sae_mlp_in among the sweep's, at layer {layer}, or 0"
        )


def _check_layers(preset: Preset) -> None:
    """Raise `InputError` if notebooks 03, 04 or 06 would miss a transcoder."""
    layers, studied = preset.transcoders.layers, preset.case_studies.layer
    if layers is None:
        return
    needed = {
        "case_studies.layer": ("04", preset.sweep.layer if studied is None else studied),
        "greater_than.layer": ("06", preset.greater_than.layer),
    }
    for key, (number, layer) in needed.items():
        if number not in preset.skipped and layer not in (None, *layers):
            raise InputError(
                f"{key} {layer}: expected one of transcoders.layers, {list(layers)}, or skip "
                f"notebook {number}"
            )
    for number in ("03", "06"):  # which explain a prompt
        if number not in preset.skipped and len(layers) < 2:
            raise InputError(
                f"transcoders.layers {list(layers)}: expected two or more, or skip notebook {number}"
            )
