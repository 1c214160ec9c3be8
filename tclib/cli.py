"""The command line: `tclib run` does what `make demo` does; the rest are its parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from tclib.replication.collect import collect as collect_run
from tclib.replication.model_and_data import check_ready, load_model, prepare_corpus
from tclib.replication.presets import Preset, load_preset, preset_names
from tclib.support.errors import InputError
from tclib.support.files import NOTEBOOKS, exclusive, new_file
from tclib.support.progress import progress

EXECUTED = "notebooks"
PROGRESS = "progress.json"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command line; bad input ends in one sentence and status 2."""
    try:
        app()
    except InputError as error:
        typer.secho(f"tclib: {error}", err=True, fg="red")
        raise SystemExit(2) from None


PresetOption = Annotated[str, typer.Option(help="A file of notebooks/presets, without .yaml.")]
SeedOption = Annotated[int | None, typer.Option(help="Another seed than the preset's.")]
RunsOption = Annotated[
    Path | None, typer.Option(help="Where runs go; data/runs of a checkout, else ./runs.")
]


@app.command()
def run(
    preset: PresetOption = "demo",
    from_: Annotated[str | None, typer.Option("--from", help="First notebook, by number.")] = None,
    only: Annotated[str | None, typer.Option(help="This notebook alone, by number.")] = None,
    seed: SeedOption = None,
    runs_dir: RunsOption = None,
    fresh: Annotated[bool, typer.Option(help="Delete the preset's earlier run first.")] = False,
) -> None:
    """Run the notebooks in order at a preset.

    After a failure, the same command goes on from the notebook that failed. What a notebook finds
    already made from the same parameters, it loads.
    """
    from tclib.replication.model_and_data import check_ready

    chosen = load_preset(preset, seed, runs_dir)
    check_ready(chosen)
    with exclusive(chosen.folder):
        if fresh:
            _delete_runs(chosen)
        first = from_ if from_ or only else _failed_at(chosen)
        notebooks = _selected(first, only)
        # The seed is always passed: the notebooks' own default need not be the preset's.
        parameters = {"preset": preset, "seed": chosen.seed, "runs_dir": str(chosen.runs_dir)}
        _execute_all(chosen, notebooks, parameters)
    _print_results(chosen)


def _delete_runs(preset: Preset) -> None:
    from tclib.replication.sweep import companion

    for one in (preset, *(companion(preset, name) for name in preset.companions)):
        shutil.rmtree(one.folder, ignore_errors=True)


def _selected(first: str | None, only: str | None) -> list[Path]:
    """The notebooks to run. Errors: `InputError` for a number that no notebook has."""
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    numbers = [path.name[:2] for path in every]
    for option, value in (("--from", first), ("--only", only)):
        if value is not None and value not in numbers:
            raise InputError(f"{option} {value}: expected one of {', '.join(numbers)}")
    if only is not None:
        return [every[numbers.index(only)]]
    return every[numbers.index(first) if first else 0 :]


def _failed_at(preset: Preset) -> str | None:
    """The number of the notebook at which the last run stopped, if it failed."""
    path = preset.folder / PROGRESS
    if not path.is_file():
        return None
    failed = str(json.loads(path.read_text())["failed"])
    typer.echo(f"The last run failed in notebook {failed}: going on from there.")
    return failed


def _execute_all(preset: Preset, notebooks: list[Path], parameters: dict[str, Any]) -> None:
    bar = progress(notebooks, f"preset {preset.name}", unit="notebook")
    for notebook in bar:
        bar.set_postfix_str(notebook.stem)
        if notebook.name[:2] in preset.skipped:
            bar.write(f"{notebook.stem} is skipped: {preset.skipped[notebook.name[:2]]}")
            continue
        try:
            _execute(notebook, preset.folder / EXECUTED / notebook.name, parameters)
        except Exception:
            with new_file(preset.folder / PROGRESS) as path:
                path.write_text(json.dumps({"failed": notebook.name[:2]}))
            raise
    (preset.folder / PROGRESS).unlink(missing_ok=True)


def _execute(notebook: Path, output: Path, parameters: dict[str, Any]) -> None:
    """Run one notebook through papermill. Errors: `InputError` with the failing cell's message."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(notebook), str(output), parameters, cwd=str(output.parent), kernel_name="python3"
        )
    except PapermillExecutionError as error:
        raise InputError(
            f"{notebook.name} stopped: {error.ename}: {error.evalue} (see {output}); "
            "run the same command again to go on from there"
        ) from error


def _print_results(preset: Preset) -> None:
    figures = sorted(preset.folder.rglob("*.png"))
    if figures:
        typer.echo("\nFigures:")
        for figure in figures:
            typer.echo(f"  {figure}")
    results = preset.folder / "07_results" / "results.md"
    if results.is_file():
        typer.echo(f"\nResults ({results.with_suffix('.csv')}):\n\n{results.read_text()}")


@app.command()
def presets() -> None:
    """List the presets."""
    for name in preset_names():
        typer.echo(f"{name:16} {load_preset(name).description}")


@app.command()
def report(
    preset: PresetOption = "demo", seed: SeedOption = None, runs_dir: RunsOption = None
) -> None:
    """Print where a run's figures are, and its results table."""
    chosen = load_preset(preset, seed, runs_dir)
    if not chosen.folder.is_dir():
        raise InputError(f"{chosen.folder} does not exist: run `tclib run --preset {preset}` first")
    _print_results(chosen)


@app.command()
def collect(
    out: Annotated[Path, typer.Argument(help="Folder to write; what is there is replaced.")],
    preset: PresetOption = "demo",
    seed: SeedOption = None,
    runs_dir: RunsOption = None,
) -> None:
    """Copy a run's figures, tables, manifests and executed notebooks, without weights."""

    kept = collect_run(load_preset(preset, seed, runs_dir), out)
    size = sum(path.stat().st_size for path in kept)
    typer.echo(f"{out}: {len(kept)} files, {size / 1e6:.1f} MB")


@app.command()
def train(
    out: Annotated[Path, typer.Argument(help="Folder for dictionaries and log.")],
    preset: PresetOption = "demo",
    layer: Annotated[int, typer.Option(help="Layer of the MLP.")] = 0,
    kind: Annotated[
        str, typer.Option(help="transcoder, sae_mlp_out or sae_mlp_in.")
    ] = "transcoder",
    activation: Annotated[str, typer.Option(help="relu, topk, batch_topk or jumprelu.")] = "relu",
    l1: Annotated[float, typer.Option(help="λ, in units of the loss.")] = 0.0,
    l0: Annotated[float, typer.Option(help="λ₀, the price of an active feature: jumprelu.")] = 0.0,
    bandwidth: Annotated[float, typer.Option(help="ε of jumprelu's gradient.")] = 1.0,
    k: Annotated[
        int | None, typer.Option(help="Active features a token: topk; on average: batch_topk.")
    ] = None,
    expansion: Annotated[int, typer.Option(help="n_features over d_model.")] = 8,
    loss: Annotated[str, typer.Option(help="paper or authors.")] = "authors",
    skip: Annotated[bool, typer.Option(help="Add a linear path from input to output.")] = False,
    seed: SeedOption = None,
    runs_dir: RunsOption = None,
) -> None:
    """Train one dictionary on a preset's model and corpus, and print its evaluation."""
    import pandas as pd

    from tclib.evaluation.evaluate import evaluate
    from tclib.figures.style import SAVED_DPI
    from tclib.figures.training import training_curves
    from tclib.training.log import LOG
    from tclib.training.spec import DictionarySpec
    from tclib.training.train import train as train_dictionaries

    chosen = load_preset(preset, seed, runs_dir)
    spec = DictionarySpec(
        kind=kind,  # type: ignore[arg-type]
        layer=layer,
        activation=activation,  # type: ignore[arg-type]
        expansion=expansion,
        l1_coefficient=l1,
        l0_coefficient=l0,
        bandwidth=bandwidth,
        k=k,
        loss=loss,  # type: ignore[arg-type]
        skip=skip,
    )
    check_ready(chosen)
    lm = load_model(chosen)
    lm.check_layer(layer)
    corpus = prepare_corpus(chosen, lm)
    (dictionary,) = train_dictionaries(lm, corpus.train, [spec], chosen.transcoders.training, out)
    training_curves(pd.read_csv(out / LOG)).savefig(out / "training_curves.png", dpi=SAVED_DPI)
    table = evaluate(lm, {spec.name: dictionary}, corpus.evaluation, corpus.train).table
    typer.echo(table.T.to_string(header=False))


@app.command()
def evaluate(
    files: Annotated[list[Path], typer.Argument(help="Dictionaries (.safetensors).")],
    preset: PresetOption = "demo",
    seed: SeedOption = None,
    runs_dir: RunsOption = None,
) -> None:
    """Evaluate saved dictionaries on a preset's held-out tokens, as CSV."""
    from tclib.dictionaries.dictionary import Dictionary
    from tclib.evaluation.evaluate import evaluate as evaluate_dictionaries

    chosen = load_preset(preset, seed, runs_dir)
    dictionaries = {file.stem: Dictionary.load(file) for file in files}
    check_ready(chosen)
    lm = load_model(chosen)
    corpus = prepare_corpus(chosen, lm)
    moved = {name: d.to(lm.device) for name, d in dictionaries.items()}
    table = evaluate_dictionaries(lm, moved, corpus.evaluation, corpus.train).table
    typer.echo(table.to_csv(index=False))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A dictionary of any known format.")],
) -> None:
    """Say what a dictionary file or folder holds: format, layer, width, activation, basis."""
    from tclib.dictionaries.formats.any import read_any

    found = read_any(path)
    typer.echo(f"format {found.format}, {len(found.dictionaries)} dictionaries")
    for layer, dictionary in found.dictionaries.items():
        c = dictionary.config
        details = f"{c.activation}{'' if c.k is None else f' k={c.k}'}{', skip' if c.skip else ''}"
        typer.echo(
            f"layer {layer}: {c.kind}, {c.d_in} → {c.n_features} → {c.d_out}, {details}, {c.basis} basis"
            f"{f', model {c.model}' if c.model else ''}"
        )


@app.command()
def convert(
    path: Annotated[Path, typer.Argument(help="A dictionary of any known format.")],
    out: Annotated[Path, typer.Argument(help="File (tclib) or folder to write.")],
    to: Annotated[str, typer.Option(help="tclib, saelens, circuit-tracer or sparsify.")] = "tclib",
    model: Annotated[
        str | None, typer.Option(help="The language model, where the basis has to change.")
    ] = None,
    basis: Annotated[
        str | None, typer.Option(help="processed or raw; as it is by default.")
    ] = None,
) -> None:
    """Convert a dictionary between formats, and between bases where a model is given."""
    from tclib.dictionaries.bases import to_processed, to_raw
    from tclib.dictionaries.formats.any import FORMATS, read_any, write_any
    from tclib.models.language_model import LanguageModel

    if to not in FORMATS:
        raise InputError(f"format {to!r}: expected one of {', '.join(FORMATS)}")
    if basis not in (None, "processed", "raw"):
        raise InputError(f"basis {basis!r}: expected processed or raw")
    if out.exists():
        raise InputError(f"{out} is there already: choose another place, or remove it")
    dictionaries = read_any(path).dictionaries
    changed = {layer: d for layer, d in dictionaries.items() if basis not in (None, d.config.basis)}
    if changed and model is None:
        raise InputError("a change of basis needs the model's norms: give --model")
    if changed:
        lm = LanguageModel.load(str(model))
        function = to_processed if basis == "processed" else to_raw
        dictionaries |= {layer: function(d, lm) for layer, d in changed.items()}
    write_any(dictionaries, out, to)
    typer.echo(f"{out}: {to}, layers {sorted(dictionaries)}")


@app.command("demo-model")
def demo_model(
    architecture: Annotated[str, typer.Argument(help="gpt2 or neox.")],
    out: Annotated[Path, typer.Argument(help="Folder for the model.")],
) -> None:
    """Train a bundled model again: half an hour on one core, and the committed bits come out."""
    import torch

    from tclib.text.world_models import ModelTraining, train_model

    torch.set_num_threads(1)  # sums in another order would give other bits
    out.mkdir(parents=True, exist_ok=True)
    typer.echo(json.dumps(train_model(ModelTraining(architecture), out), indent=2))


@app.command()
def smollm2() -> None:
    """Load SmolLM2-135M and show that it compares years, one digit at a time."""
    from tclib.greater_than.task import next_digit_mass
    from tclib.models.language_model import LanguageModel

    lm = LanguageModel.load("smollm2")
    typer.echo("Next-digit probability after 'The war lasted from the year 17d0 to the year 17':")
    for digit in range(1, 10):
        above, below = next_digit_mass(lm, digit)
        typer.echo(f"  d = {digit}   at or above d: {above:.3f}   below d: {below:.3f}")


@app.command()
def notebooks(
    destination: Annotated[
        Path, typer.Argument(metavar="[DEST]", help="Folder to write; ./notebooks by default.")
    ] = Path("notebooks"),
) -> None:
    """Copy the notebooks and presets where they can be opened; no changed file is overwritten."""
    from tclib.support.files import copy_folder

    written, kept = copy_folder(NOTEBOOKS, destination)
    typer.echo(f"{destination}: {len(written)} files written, {len(kept)} already there")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"tclib {version('tclib')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print it.")
    ] = False,
) -> None:
    """Transcoders: training, circuits, and the replication of the paper."""


if __name__ == "__main__":
    main()
