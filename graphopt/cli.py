"""The `graphopt` command. At module level it imports nothing heavy: `--help` has to be quick."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt import options as o
from graphopt import shell
from graphopt.errors import RefusedError

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.exported import Options
    from graphopt.record import Record
    from graphopt.report import BenchRecord, Report

app = typer.Typer(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # drawing boxes around --help would double its time
)


def main() -> None:
    """Entry point of the console script."""
    shell.prepare()
    app(prog_name="graphopt")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(f"graphopt {metadata.version('graphopt')}")
        raise typer.Exit


@app.callback()
def graphopt(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print it and exit."
        ),
    ] = False,
) -> None:
    """Make ONNX models smaller and faster, and prove that they still compute the same.

    Exit codes: 0 written and proved; 1 refused; 2 wrong usage or input.
    """


@app.command(short_help="Optimise IN, prove the result, write it to OUT.")
@shell.boundary
def optimize(
    source: o.Source,
    output: o.Output,
    level: o.Level = 2,
    passes: o.Passes = None,
    target: o.Target = "portable",
    shape: o.FixedShapes = None,
    opset: o.Opset = None,
    data: o.Data = None,
    validate: o.Validate = True,
    unproven: o.Unproven = False,
    keep_overridable: o.KeepOverridable = False,
    external_data: o.ExternalData = "auto",
    custom_ops: o.CustomOps = None,
    seed: o.Seed = 0,
    sparsity: o.Sparsity = None,
    nm: o.Nm = None,
    block: o.Block = None,
    threshold: o.Threshold = None,
    channels: o.Channels = None,
    importance: o.Importance = None,
    recover: o.Recover = None,
    low_rank: o.LowRank = None,
    low_rank_method: o.LowRankMethod = None,
    codebook: o.Codebook = None,
    int8: o.Int8 = None,
    max_drop: o.MaxDrop = 0.01,
    metric: o.Metric = None,
    min_sqnr: o.MinSqnr = None,
    decisions: o.Decisions = None,
    replay: o.Replay = None,
    force: o.Force = False,
    threads: o.ModelThreads = 0,
    json: o.Json = False,
    report: o.ReportFile = None,
    bench: o.Bench = False,
    verify_each: o.VerifyEach = False,
    verbose: o.LogPasses = False,
) -> None:
    """Optimise the model IN, prove the result and write it to OUT."""
    from graphopt.exported import Options
    from graphopt.render.results import show_report

    shapes, libraries = o.shapes(shape, keep=True), custom_ops or []
    what = Options(level=level, passes=passes, target=target, shapes=shapes, opset=opset)
    what |= Options(keep_overridable=keep_overridable, external=external_data)
    what |= Options(validate=validate, unproven=unproven, data=data, custom_ops=libraries)
    what |= Options(seed=seed, verify_each=verify_each or None)  # None: as the environment says
    what |= Options(sparsity=sparsity, nm=nm, block=block, threshold=threshold)
    what |= Options(channels=channels, importance=importance, recover=recover)
    what |= Options(low_rank=low_rank, low_rank_method=low_rank_method, codebook=codebook)
    what |= Options(int8=int8, max_drop=max_drop, metric=metric, min_sqnr=min_sqnr)
    what |= Options(decisions=decisions, replay=replay, force=force, threads=threads)
    with shell.report_writer(report, source, output) as save:
        record = _optimized(source, output, what, save, quiet=json)
        if bench:
            found = _bench([source, output], data, seed, libraries, shapes, threads)
            record = record.model_copy(update={"bench": found})
            save(record)
    _tell(record, json, lambda console: show_report(record, console, every_pass=verbose))


def _optimized(
    source: Path,
    output: Path,
    options: Options,
    save: Callable[[Record], Any],
    *,
    quiet: bool,
) -> Report:
    """The report of the run, saved; also that of a refusal, which is shown unless `quiet`."""
    from graphopt import api
    from graphopt.exported import Options
    from graphopt.render.progress import progress
    from graphopt.render.results import show_refusal

    try:
        with progress() as tell:
            options = options | Options(progress=tell)
            report = api.optimize(source, output, **options).report
    except RefusedError as refusal:
        if (refused := refusal.report) is not None:
            save(refused)
            if not quiet:
                shell.show(lambda console: show_refusal(refused, console))
        raise
    save(report)
    return report


def _bench(
    models: list[Path],
    data: str | None,
    seed: int,
    custom_ops: list[Path],
    shapes: Mapping[str, Sequence[int]],
    threads: int = 0,
    seconds: float = 20.0,
) -> BenchRecord:
    """Time the models against the first of them, on a feed that the first one accepts."""
    from graphopt import bench as measure
    from graphopt.proposals import first_feed
    from graphopt.render.progress import progress

    with progress() as tell:
        tell("looking for a feed", None)
        feed = first_feed(models[0], data=data, shapes=shapes, seed=seed, custom_ops=custom_ops)
        return measure.bench(
            models,
            feed,
            threads=threads,
            seconds=seconds,
            seed=seed,
            custom_ops=custom_ops,
            progress=tell,
        )


@app.command(short_help="Compare model B with its original A.")
@shell.boundary
def validate(
    original: o.Original,
    candidate: o.Compared,
    shape: o.Shapes = None,
    data: o.Data = None,
    custom_ops: o.CustomOps = None,
    seed: o.Seed = 0,
    json: o.Json = False,
    report: o.ReportFile = None,
    verbose: o.Verbose = False,
) -> None:
    """Compare model B with its original A. Exit code 0 if it is proved to compute the same."""
    from graphopt.render.progress import progress
    from graphopt.render.results import show_validation
    from graphopt.validate import validate_files

    with shell.report_writer(report, original, candidate) as save:
        with progress() as tell:
            proof = validate_files(
                original,
                candidate,
                data=data,
                custom_ops=custom_ops or [],
                seed=seed,
                shapes=o.shapes(shape),
                progress=tell,
            )
        save(proof)
    _tell(proof, json, lambda console: show_validation(proof, console))
    raise typer.Exit(0 if proof.verdict == "proved" else 1)


@app.command(short_help="Make sparse weights dense, for tools that read no others.")
@shell.boundary
def densify(
    source: o.Source,
    output: o.Output,
    data: o.Data = None,
    validate: o.Validate = True,
    external_data: o.ExternalData = "auto",
    custom_ops: o.CustomOps = None,
    seed: o.Seed = 0,
    json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Write IN to OUT with its sparse weights dense, every bit the same, and prove it."""
    from graphopt.exported import Options
    from graphopt.render.listings import show_densified

    what = Options(passes="densify", validate=validate, external=external_data, data=data)
    # Exact without a proof: a model that cannot be run here is written all the same.
    what |= Options(unproven=True, custom_ops=custom_ops or [], seed=seed)
    record = _optimized(source, output, what, lambda record: None, quiet=json)
    _tell(record, json, lambda console: show_densified(record, console))


@app.command(short_help="Show what a model is made of, and its MACs.")
@shell.boundary
def inspect(
    model: o.ModelFile,
    shape: o.Shapes = None,
    json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Show what a model is made of, its MACs, and what about it cannot be proved."""
    from graphopt import inspection
    from graphopt.render.listings import show_inspection

    found = inspection.inspect(model, o.shapes(shape))
    _tell(found, json, lambda console: show_inspection(found, console))


@app.command(short_help="Time models against the first of them.")
@shell.boundary
def bench(
    models: o.TimedModels,
    shape: o.Shapes = None,
    data: o.Data = None,
    threads: o.Threads = 0,
    seconds: o.Seconds = 20.0,
    custom_ops: o.CustomOps = None,
    seed: o.Seed = 0,
    json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Time models against the first of them, interleaved, with load time and memory."""
    from graphopt.ir import Model
    from graphopt.render.listings import show_bench

    for path in models:
        Model.load(path)  # a file that is no model is said so before anything is timed
    found = _bench(models, data, seed, custom_ops or [], o.shapes(shape), threads, seconds)
    _tell(found, json, lambda console: show_bench(found, console))


@app.command(short_help="Say what int8 would cost a model, region by region.")
@shell.boundary
def sensitivity(
    model: o.ModelFile,
    data: o.Data = None,
    threads: o.ModelThreads = 0,
    shape: o.FixedShapes = None,
    custom_ops: o.CustomOps = None,
    seed: o.Seed = 0,
    json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Say what static int8 does to MODEL, region by region: noise that comes in, time that goes."""
    from graphopt.render.int8 import show_sensitivity
    from graphopt.render.progress import progress
    from graphopt.sensitivity import sensitivity as measure

    with progress() as tell:
        found = measure(
            model,
            data=data,
            shapes=o.shapes(shape, keep=True),
            custom_ops=custom_ops or [],
            seed=seed,
            threads=threads,
            progress=tell,
        )
    _tell(found, json, lambda console: show_sensitivity(found, console))


@app.command(short_help="Say what ranks would do to a model, layer by layer.")
@shell.boundary
def ranks(
    model: o.ModelFile,
    data: o.Data = None,
    method: o.RankMethod = "auto",
    threads: o.ModelThreads = 0,
    shape: o.FixedShapes = None,
    custom_ops: o.CustomOps = None,
    seed: o.Seed = 0,
    plot: o.Plot = None,
    json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Say what each layer of MODEL would lose and gain here, split into thinner ones."""
    from graphopt.ranks import ranks as measure
    from graphopt.render.progress import progress
    from graphopt.render.ranks import show_ranks
    from graphopt.render.ranks_plot import plotter

    with plotter(plot, model) as draw:
        with progress() as tell:
            found = measure(
                model,
                data=data,
                method=method,
                shapes=o.shapes(shape, keep=True),
                custom_ops=custom_ops or [],
                seed=seed,
                threads=threads,
                progress=tell,
            )
        draw(found)
    _tell(found, json, lambda console: show_ranks(found, console))


@app.command(short_help="List the passes, the rules and what each level runs.")
@shell.boundary
def passes(verbose: o.Verbose = False) -> None:
    """List the rules with their equations, the passes with their options, and the levels."""
    from graphopt.passes.pipelines import LEVELS, PASSES
    from graphopt.passes.rules import all_rules, family_of, plugins
    from graphopt.render.listings import show_passes
    from graphopt.render.rules import show_rules

    rules = [(family_of(rule), rule) for rule in all_rules().values()]

    def draw(console: Console) -> None:
        show_rules(rules, plugins().failures, console)
        show_passes(list(PASSES.values()), LEVELS, console)

    shell.show(draw)


@app.command(short_help="Say why rules fired on a model, or did not.")
@shell.boundary
def explain(
    model: o.ModelFile,
    rule: o.RuleName = None,
    node: o.NodeName = None,
    json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Say where rules fire on MODEL, where they almost do, and what stands against it."""
    from graphopt.explain import explain as explained
    from graphopt.render.rules import show_explanation

    found = explained(model, rule, node)
    _tell(found, json, lambda console: show_explanation(found, console))


def _tell(record: Record, as_json: bool, draw: Callable[[Console], None]) -> None:
    """Print the record, for programs or for people."""
    if as_json:
        shell.print_json(record)
    else:
        shell.show(draw)
