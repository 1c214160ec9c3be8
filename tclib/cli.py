"""The command line: `tclib run` does what `make demo` does; the rest are its parts."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import fields, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer
from typer.core import TyperGroup

from tclib.support.declared import descriptions
from tclib.support.errors import InputError
from tclib.support.paths import check_folder, expanded
from tclib.support.places import NOTEBOOKS
from tclib.training.spec import DictionarySpec, Recipe, TrainingConfig

if TYPE_CHECKING:
    from tclib.dictionaries.formats.any import Format
    from tclib.replication.presets import Preset

# What is slow to import (torch, pandas, transformers) is imported by the commands that need it.


class Commands(TyperGroup):
    """Every command, stopped by Ctrl-C, says so in one sentence, and where to go on if it knows."""

    def invoke(self, ctx: Any) -> Any:
        """Status 130 for Ctrl-C, as shells have it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            said = (
                str(stop) or "stopped: what is made stays, and the same command goes on from there"
            )
            typer.secho(f"\ntclib: {said}", err=True, fg="red")
            raise typer.Exit(130) from None


UsageError: Any = typer.BadParameter.__base__  # click's, or typer's own copy of it

# Plain help: it shows long options whole, and rich takes a while to import.
app = typer.Typer(
    cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)
preset_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="What a preset's file may hold."
)
app.add_typer(preset_app, name="preset")
ratings_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Features rated by hand in notebook 05."
)
app.add_typer(ratings_app, name="ratings")


def main() -> None:
    """Run the command line; bad input ends in one sentence and status 2."""
    try:
        raise SystemExit(app(standalone_mode=False))
    except InputError as error:
        said = f"tclib: {error}"
    except UsageError as error:  # of which one is the help, where no command is given
        said = error.format_message()
        said = said if said.startswith("Usage:") else f"tclib: {' '.join(said.split())}"
    typer.secho(said, err=True, fg="red" if said.startswith("tclib:") else None)
    raise SystemExit(2) from None


def _print_version(asked: bool | None) -> None:
    if asked:
        typer.echo(f"tclib {importlib.metadata.version('tclib')}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool | None,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = None,
) -> None:
    """Train transcoders, attribute circuits through them, and replicate the paper."""


PresetOption = Annotated[
    str, typer.Option(help="A file of notebooks/presets, without .yaml, or a YAML file of yours.")
]
SeedOption = Annotated[int | None, typer.Option(help="Another seed than the preset's.")]
RunsOption = Annotated[
    Path | None,
    typer.Option(parser=expanded, help="Where runs go; data/runs of a checkout, else ./runs."),
]


@app.command()
def run(
    preset: PresetOption = "demo",
    from_: Annotated[str | None, typer.Option("--from", help="First notebook, by number.")] = None,
    only: Annotated[str | None, typer.Option(help="This notebook alone, by number.")] = None,
    seed: SeedOption = None,
    runs_dir: RunsOption = None,
    fresh: Annotated[bool, typer.Option(help="Delete this preset's earlier run first.")] = False,
    fresh_companions: Annotated[
        bool, typer.Option(help="Delete its companions' earlier runs first.")
    ] = False,
    seeds: Annotated[
        int | None,
        typer.Option(
            help="Then make as many runs with this and the next seeds, and their headline table."
        ),
    ] = None,
) -> None:
    """Run the notebooks in order at a preset.

    After a failure, the same command goes on from the notebook that failed. What a notebook finds
    already made from the same parameters, it loads; one whose executed copy is current is not run again
    (but by --from and --only).
    """
    from tclib.replication import sequence
    from tclib.replication.presets import load_preset
    from tclib.replication.seeds import make_seeds, runs_of
    from tclib.support.files import exclusive

    chosen = load_preset(preset, seed, runs_dir)
    asked = _selected(from_, only)  # a mistake must not cost the earlier run
    if seeds is not None:
        runs_of(chosen, seeds)
    sequence.check_all_ready(chosen, asked)
    deleted = sequence.earlier_runs(chosen, fresh, fresh_companions)
    with ExitStack() as locks:
        for folder in {chosen.folder, *deleted}:
            locks.enter_context(exclusive(folder))
        sequence.delete(deleted)
        first = None if from_ or only else sequence.stopped_at(chosen)
        if first:
            typer.echo(f"The last run stopped in notebook {first}: going on from there.")
        # The seed is always passed: an executed copy tells it.
        parameters = {
            "preset": chosen.asked["--preset"],
            "seed": chosen.seed,
            "runs_dir": str(chosen.runs_dir),
        }
        notebooks = _selected(first, None) if first else asked
        sequence.execute_all(chosen, notebooks, parameters, anew=bool(from_ or only))
        if seeds is not None:
            table = make_seeds(chosen, seeds)["seeds"]
            typer.echo(f"\nOver {seeds} seeds:\n\n{table.round(4).to_string(index=False)}")
    _print_results(chosen)


def _selected(first: str | None, only: str | None) -> list[Path]:
    """The notebooks to run. Errors: `InputError` for a number that no notebook has."""
    if first is not None and only is not None:
        raise InputError(f"--from {first}, --only {only}: expected one of the two")
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    numbers = [path.name[:2] for path in every]
    for option, value in (("--from", first), ("--only", only)):
        if value is not None and value not in numbers:
            raise InputError(f"{option} {value}: expected one of {', '.join(numbers)}")
    if only is not None:
        return [every[numbers.index(only)]]
    return every[numbers.index(first) if first else 0 :]


def _print_results(preset: Preset) -> bool:
    """Print what the run has of figures and results; False if it has neither."""
    figures = sorted(preset.folder.rglob("*.png"))
    if figures:
        typer.echo("\nFigures:")
        for figure in figures:
            typer.echo(f"  {figure}")
    results = preset.folder / "07_results" / "results.md"
    if results.is_file():
        typer.echo(f"\nResults ({results.with_suffix('.csv')}):\n\n{results.read_text()}")
    return bool(figures) or results.is_file()


@app.command()
def presets() -> None:
    """List the presets."""
    from tclib.replication.presets import load_preset, preset_names

    for name in preset_names():
        try:
            said = load_preset(name).description
        except InputError as error:  # of one file: the others can be used
            said = f"cannot be used: {error}"
        typer.echo(f"{name:16} {said}")


@app.command()
def models() -> None:
    """List the families of models that can be traced, and what each was checked on."""
    from tclib.models.families import families

    typer.echo(families().to_string(index=False))


@preset_app.command("schema")
def schema() -> None:
    """Print the JSON schema: every key, its meaning, its range."""
    from tclib.replication.presets import preset_schema

    typer.echo(preset_schema(), nl=False)


@app.command()
def rates(preset: PresetOption = "demo", runs_dir: RunsOption = None) -> None:
    """Choose each kind's learning rate for a preset's sweep, by a rule, on a seed of its own.

    The preset takes what is chosen as sweep.learning_rates.
    """
    from tclib.replication.learning_rates import rate_table

    typer.echo(rate_table(preset, runs_dir).round(6).to_string(index=False))


@app.command()
def report(
    preset: PresetOption = "demo", seed: SeedOption = None, runs_dir: RunsOption = None
) -> None:
    """Print where a run's figures are, and its results table."""
    from tclib.replication.presets import load_preset

    chosen = load_preset(preset, seed, runs_dir)
    if not _print_results(chosen):
        raise InputError(
            f"{chosen.folder} has neither figures nor results: run `{chosen.command}` first"
        )


@app.command()
def collect(
    out: Annotated[
        Path, typer.Argument(parser=expanded, help="Folder to write; what is there is replaced.")
    ],
    preset: PresetOption = "demo",
    seed: SeedOption = None,
    runs_dir: RunsOption = None,
    step: Annotated[
        list[str] | None, typer.Option(help="Only what begins with this: a folder of the run.")
    ] = None,
) -> None:
    """Copy a run's figures, tables and notebooks, without weights."""
    from tclib.replication.collect import collect as collect_run
    from tclib.replication.presets import load_preset

    kept = collect_run(load_preset(preset, seed, runs_dir), out, step or ())
    size = sum(path.stat().st_size for path in kept)
    typer.echo(f"{out}: {len(kept)} files, {size / 1e6:.1f} MB")


@ratings_app.command("export")
def export(
    out: Annotated[Path, typer.Argument(parser=expanded, help="CSV file to write.")],
    rater: Annotated[
        list[str] | None, typer.Option(help="Whose ratings; all raters' by default.")
    ] = None,
    with_origin: Annotated[
        bool, typer.Option(help="Tell where each feature comes from, once all are rated.")
    ] = False,
    preset: PresetOption = "demo",
    seed: SeedOption = None,
    runs_dir: RunsOption = None,
) -> None:
    """Write ratings as a CSV for spreadsheets: number (of the page), rating, context_free, note, rater."""
    from tclib.replication.export_ratings import export_ratings
    from tclib.replication.presets import load_preset

    _check_free(out)
    table = export_ratings(load_preset(preset, seed, runs_dir), rater or (), with_origin, out)
    typer.echo(f"{out}: {len(table)} ratings by {', '.join(sorted(set(table['rater'])))}")


# What a preset's transcoders do not say.
TRAIN_DEFAULTS: dict[str, Any] = {"kind": "transcoder", "layer": 0}
ALIASES = {"l1_coefficient": ("--l1",), "l0_coefficient": ("--l0",)}


def _with_training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` an option a hyperparameter, in the place of its `**given`."""
    declared = signature(command, eval_str=True)
    own = [p for p in declared.parameters.values() if p.kind is not p.VAR_KEYWORD]
    of_training = descriptions(TrainingConfig)  # which say enough of one dictionary
    options = [*_options(DictionarySpec, of_training), *_options(TrainingConfig)]
    command.__signature__ = declared.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return command


def _options(cls: type, besides: Collection[str] = ()) -> Iterator[Parameter]:
    """An option for each field of a declared class but the seed; None stands for "not given"."""
    types = get_type_hints(cls)
    for name, text in descriptions(cls).items():
        if name == "seed" or name in besides:
            continue  # the preset's, which the command has
        long = name.replace("_", "-")
        switch = f"--{long}/--no-{long}" if types[name] is bool else f"--{long}"
        default = TRAIN_DEFAULTS.get(name, "the preset's")
        option = typer.Option(
            switch,
            *ALIASES.get(name, ()),
            help=f"{' '.join(text.split())} [default: {default}]",
        )
        annotation: Any = Annotated[types[name] | None, option]
        yield Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _spec(recipe: Recipe, asked: dict[str, Any]) -> DictionarySpec:
    """The recipe with what was asked for; its sparsity is not that of another activation."""
    if asked.get("activation", recipe.activation) != recipe.activation:
        asked = {"l1_coefficient": 0.0, "l0_coefficient": 0.0, "k": None, **asked}
    return recipe.at(**{**TRAIN_DEFAULTS, **asked})


@app.command()
@_with_training_options
def train(
    out: Annotated[Path, typer.Argument(parser=expanded, help="Folder for dictionaries and log.")],
    preset: PresetOption = "demo",
    seed: SeedOption = None,
    runs_dir: RunsOption = None,
    **given: Any,
) -> None:
    """Train one dictionary on a preset's corpus, and evaluate it.

    What is not given is as the preset's transcoders have it; another activation than theirs needs its own
    sparsity (--l1, --k or --l0).
    """
    import pandas as pd

    from tclib.evaluation.evaluate import evaluate
    from tclib.figures.style import save_whole
    from tclib.figures.training import training_curves
    from tclib.replication.model_and_data import check_ready
    from tclib.replication.presets import load_preset
    from tclib.replication.run import Run
    from tclib.training.log import LOG
    from tclib.training.train import train as train_dictionaries

    asked = {name: value for name, value in given.items() if value is not None}
    check_folder(out)
    chosen = load_preset(preset, seed, runs_dir)
    of_training = asked.keys() & {field.name for field in fields(TrainingConfig)}
    recipe = chosen.transcoders
    asked_of_training = {name: asked.pop(name) for name in of_training}
    # One dictionary has one rate: what was asked, else the recipe's own, else the training's.
    rate = recipe.learning_rate or recipe.training.learning_rate
    training = replace(recipe.training, **{"learning_rate": rate, **asked_of_training})
    spec = _spec(replace(recipe, learning_rate=None), asked)
    check_ready(chosen)
    run = Run(chosen)
    spec.dictionary_config(run.lm)  # which checks it, before the corpus is built
    lm, corpus = run.lm, run.corpus
    (dictionary,) = train_dictionaries(lm, corpus.train, [spec], training, out)
    save_whole(training_curves(pd.read_csv(out / LOG)), out / "training_curves.png")
    table = evaluate(lm, {spec.name: dictionary}, corpus.evaluation, corpus.train).table
    typer.echo(table.T.to_string(header=False))


@app.command()
def evaluate(
    files: Annotated[
        list[Path], typer.Argument(parser=expanded, help="Dictionaries of any known format.")
    ],
    preset: PresetOption = "demo",
    seed: SeedOption = None,
    runs_dir: RunsOption = None,
) -> None:
    """Evaluate dictionaries on a preset's held-out tokens, as CSV."""
    from tclib.dictionaries.formats.any import load_dictionary
    from tclib.evaluation.evaluate import evaluate as evaluate_dictionaries
    from tclib.replication.model_and_data import check_ready
    from tclib.replication.presets import load_preset
    from tclib.replication.run import Run

    chosen = load_preset(preset, seed, runs_dir)
    names = [file.stem for file in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"{', '.join(twice)}: more than one file of this name, by which the table calls it; rename "
            "one, or evaluate them one at a time"
        )
    dictionaries = {file.stem: load_dictionary(file) for file in files}
    check_ready(chosen)
    opened = Run(chosen)
    lm = opened.lm
    moved = {name: d.to(lm.device) for name, d in dictionaries.items()}
    for dictionary in moved.values():
        dictionary.check_model(lm)  # before the corpus is built
    corpus = opened.corpus
    table = evaluate_dictionaries(lm, moved, corpus.evaluation, corpus.train).table
    typer.echo(table.to_csv(index=False))


@app.command()
def judge(
    out: Annotated[
        Path, typer.Argument(parser=expanded, help="Folder for tables, and for every answer.")
    ],
    preset: PresetOption = "demo",
    seed: SeedOption = None,
    runs_dir: RunsOption = None,
    n_features: Annotated[
        int, typer.Option(help="Then judge so many features of the preset's notebook 05.", min=0)
    ] = 0,
    n_latents: Annotated[int, typer.Option(help="Known latents of the demo world.")] = 6,
    n_items: Annotated[int, typer.Option(help="Texts for detection, and for fuzzing.")] = 10,
    n_trials: Annotated[int, typer.Option(help="Intruder questions.")] = 5,
    n_shown: Annotated[int, typer.Option(help="Texts in one prompt.")] = 5,
    model: Annotated[str | None, typer.Option(help="By default TCLIB_JUDGE_MODEL.")] = None,
    base_url: Annotated[str | None, typer.Option(help="By default OPENAI_BASE_URL.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds until a request counts as lost.")] = 120.0,
    price_in: Annotated[float | None, typer.Option(help="Of a million tokens of prompts.")] = None,
    price_out: Annotated[float | None, typer.Option(help="Of a million tokens of answers.")] = None,
    show: Annotated[bool, typer.Option(help="Print every prompt and answer.")] = False,
) -> None:
    """Have a language model judge features, after holding it to the demo world's known latents.

    It is asked over any OpenAI-compatible endpoint, with the key of OPENAI_API_KEY. The same command asks
    nothing twice.
    """
    from tclib.blind.endpoint import Asker, endpoint_from_environment
    from tclib.blind.judge import Judge
    from tclib.replication import judging
    from tclib.replication.presets import load_preset
    from tclib.replication.run import Run

    asked = judging.Asked(n_items, n_trials)
    check_folder(out)
    chosen = load_preset(preset, seed, runs_dir)
    prices = {"price_in": price_in, "price_out": price_out}
    endpoint = endpoint_from_environment(model, base_url, timeout=timeout, **prices)
    asker = Asker(endpoint, out / judging.ANSWERS, show=typer.echo if show else None)
    opened, judge = Run(chosen), Judge(asker, n_shown)
    if n_features:
        judging.check_compared(opened)
    try:
        found = judging.validate(judge, out, n_latents, asked, chosen.seed)
        typer.echo(found.table.round(3).to_string(index=False))
        typer.echo("\n".join(map(str, found.distinctions)))
        if n_features:
            judging.judge_run(opened, judge, out, n_features, asked)
            typer.echo(f"{out / 'judged.csv'}: {n_features} features")
    finally:
        typer.echo(asker.usage.in_words(endpoint))


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(parser=expanded, help="A dictionary of any known format.")
    ],
) -> None:
    """Say what a dictionary holds: format, layer, width, basis."""
    from tclib.dictionaries.formats.any import read_any

    found = read_any(path, lazy=True)
    typer.echo(f"format {found.format}, {len(found.dictionaries)} dictionaries")
    for layer, dictionary in found.dictionaries.items():
        c = dictionary.config
        details = f"{c.activation}{'' if c.k is None else f' k={c.k}'}{', skip' if c.skip else ''}"
        typer.echo(
            f"layer {layer}: {c.kind}, {c.d_in} → {c.n_features} → {c.d_out}, {details}, {c.basis} basis"
            f"{f', model {c.model}' if c.model else ''}"
        )


@app.command()
def published(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Sets to check; all by default.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Load a layer and the model of each, and compare.")
    ] = False,
) -> None:
    """List the released sets of transcoders that can be loaded by name, or check what they give."""
    from tclib.dictionaries.published import published_table
    from tclib.dictionaries.released_sets import SETS, released_set
    from tclib.evaluation.released import check_released

    for name in names or []:
        released_set(name)
    if not check:
        table = published_table()
        chosen = table[table["name"].isin(names)] if names else table
        typer.echo(chosen.to_string(index=False))
        return
    n_wrong = 0
    for name in names or SETS:
        try:
            found = check_released(name)
        except InputError as error:
            typer.echo(f"{name}: not checked: {error}")
            continue
        n_wrong += found.verdict != "as released"
        said = "" if found.released_l0 is None else f" ({found.released_l0} released)"
        typer.echo(
            f"{name}: layer {found.layer}, L0 {found.l0:.1f}{said}, FVU {found.fvu:.3f}: {found.verdict}"
        )
    if n_wrong:
        raise typer.Exit(1)


@app.command()
def upload(
    folder: Annotated[
        Path,
        typer.Argument(parser=expanded, help="A folder of dictionaries, as notebook 01 writes it."),
    ],
    repo: Annotated[str, typer.Option(help="Where on the hub: owner/name.")],
    licence: Annotated[str, typer.Option(help="Of the weights, as the hub names it.")] = "mit",
    to: Annotated[str, typer.Option(help="tclib, saelens, circuit-tracer or sparsify.")] = "tclib",
    private: Annotated[bool, typer.Option("--private", help="Only for its owner.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(parser=expanded, help="Write what would be uploaded here, and stop."),
    ] = None,
) -> None:
    """Upload trained dictionaries to the Hugging Face hub, with a model card of the run's figures."""
    from tempfile import TemporaryDirectory

    from tclib.replication.upload import check_repository, push, stage

    form = _known_format(to)
    check_repository(repo)
    if out is not None:
        _check_free(out)
        stage(folder, out, repo, licence, form)
        typer.echo(f"{out}: as it would be uploaded to {repo}")
        return
    with TemporaryDirectory() as temporary:
        staged = Path(temporary) / "upload"
        found = stage(folder, staged, repo, licence, form)
        typer.echo(f"{push(staged, repo, private)}: {len(found)} dictionaries")


@app.command()
def convert(
    path: Annotated[
        Path, typer.Argument(parser=expanded, help="A dictionary of any known format.")
    ],
    out: Annotated[Path, typer.Argument(parser=expanded, help="File (tclib) or folder to write.")],
    to: Annotated[str, typer.Option(help="tclib, saelens, circuit-tracer or sparsify.")] = "tclib",
    model: Annotated[
        str | None, typer.Option(help="The language model, where the basis has to change.")
    ] = None,
    basis: Annotated[
        Literal["processed", "raw"] | None, typer.Option(help="As it is by default.")
    ] = None,
) -> None:
    """Convert a dictionary to another format or basis."""
    from tclib.dictionaries.bases import to_processed, to_raw
    from tclib.dictionaries.formats.any import read_any, write_any
    from tclib.models.language_model import LanguageModel

    form = _known_format(to)
    _check_free(out)
    dictionaries = read_any(path).dictionaries
    changed = {layer: d for layer, d in dictionaries.items() if basis not in (None, d.config.basis)}
    streams = [layer for layer, d in changed.items() if d.config.reads_stream]
    if streams:
        raise InputError(
            f"layers {streams} read the stream, which is in no other basis: leave out --basis {basis}"
        )
    if changed and model is None:
        raise InputError("a change of basis needs the model's norms: give --model")
    if changed:
        lm = LanguageModel.load(str(model))
        function = to_processed if basis == "processed" else to_raw
        dictionaries |= {layer: function(d, lm) for layer, d in changed.items()}
    write_any(dictionaries, out, form)
    typer.echo(f"{out}: {to}, layers {sorted(dictionaries)}")


def _known_format(to: str) -> Format:
    """The format of that name. Errors: `InputError` for one that is not known."""
    from tclib.dictionaries.formats.any import FORMATS

    if to not in FORMATS:
        raise InputError(f"format {to!r}: expected one of {', '.join(FORMATS)}")
    return to


def _check_free(out: Path) -> None:
    """Raise `InputError` unless something new can be written there."""
    check_folder(out.parent)
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} is there already: choose another place, or remove it")


@app.command("demo-model")
def demo_model(
    architecture: Annotated[Literal["gpt2", "neox"], typer.Argument(help="Which of them.")],
    out: Annotated[Path, typer.Argument(parser=expanded, help="Folder for the model.")],
) -> None:
    """Train a bundled model again, bit for bit on the same CPU and torch: half an hour."""
    import torch

    from tclib.training.world_models import ModelTraining, train_model

    check_folder(out)
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is there already: choose another place, or remove it")
    torch.set_num_threads(1)  # sums in another order would give other bits
    out.mkdir(parents=True, exist_ok=True)
    typer.echo(json.dumps(train_model(ModelTraining(architecture), out), indent=2))


@app.command()
def smollm2() -> None:
    """Load SmolLM2-135M and show that it compares years."""
    _show_years("smollm2")


@app.command()
def gemma3() -> None:
    """Show Gemma's terms, load Gemma 3 270M once they are accepted, and show that it compares years."""
    from tclib.models.pypi import MODELS, ask_for_terms

    ask_for_terms(MODELS["gemma3-270m"], typer.confirm, typer.echo)
    _show_years("gemma3-270m")


def _show_years(name: str) -> None:
    from tclib.greater_than.task import next_digit_mass
    from tclib.models.language_model import LanguageModel

    lm = LanguageModel.load(name)
    typer.echo("Next-digit probability after 'The war lasted from the year 17d0 to the year 17':")
    for digit in range(1, 10):
        above, below = next_digit_mass(lm, digit)
        typer.echo(f"  d = {digit}   at or above d: {above:.3f}   below d: {below:.3f}")


@app.command()
def notebooks(
    destination: Annotated[
        Path,
        typer.Argument(
            parser=expanded, metavar="[DEST]", help="Folder to write; ./notebooks by default."
        ),
    ] = Path("notebooks"),
) -> None:
    """Copy the notebooks and presets where they can be opened; no changed file is overwritten."""
    from tclib.support.files import copy_folder

    written, kept = copy_folder(NOTEBOOKS, destination)
    typer.echo(f"{destination}: {len(written)} files written, {len(kept)} already there")


if __name__ == "__main__":
    main()
