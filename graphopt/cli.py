"""The `graphopt` command. At module level it imports nothing heavy: `--help` has to be quick."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graphopt import shell
from graphopt.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.report import BenchRecord, Record

app = typer.Typer(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # drawing boxes around --help would double its time
)

Data = Annotated[
    str | None,
    typer.Option(metavar="SPEC", help="Feeds: .npz, folder of .npz files, or module:function."),
]
CustomOps = Annotated[
    list[Path] | None,
    typer.Option(metavar="LIB", help="Library of operators onnxruntime lacks; repeatable."),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all proposed feeds.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="NAME:1,3,224,224", help="Shape of an input; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
ReportFile = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Write the report as JSON.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the log and tracebacks.")]


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
    source: Annotated[Path, typer.Argument(metavar="IN", help="The model.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Where the result goes.")],
    level: Annotated[int, typer.Option(help="0 copy, 1 clean up, 2 fuse, 3 measure.")] = 2,
    passes: Annotated[
        str | None, typer.Option(metavar="TEXT", help="These passes instead: 'name, name{a=b}'.")
    ] = None,
    target: Annotated[
        Literal["portable", "ort-cpu"], typer.Option(help="Where the result has to run.")
    ] = "portable",
    data: Data = None,
    validate: Annotated[bool, typer.Option(help="Prove that it computes the same.")] = True,
    unproven: Annotated[
        bool, typer.Option("--unproven", help="Write also what could not be proved.")
    ] = False,
    keep_overridable: Annotated[
        bool, typer.Option("--keep-overridable", help="Keep all inputs with a default feedable.")
    ] = False,
    external_data: Annotated[
        Literal["auto", "always", "never"], typer.Option(help="Weights in a file of their own.")
    ] = "auto",
    custom_ops: CustomOps = None,
    seed: Seed = 0,
    json: Json = False,
    report: ReportFile = None,
    bench: Annotated[
        bool, typer.Option("--bench", help="Time the original against the result.")
    ] = False,
    verify_each: Annotated[
        bool, typer.Option("--verify-each", help="Verify the graph after every pass.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Optimise the model IN, prove the result and write it to OUT."""
    from graphopt import api
    from graphopt.render.progress import progress
    from graphopt.render.results import show_refusal, show_report

    with _report_writer(report, source, output) as save:
        try:
            with progress() as tell:
                result = api.optimize(
                    source,
                    output,
                    level=level,
                    passes=passes,
                    target=target,
                    validate=validate,
                    unproven=unproven,
                    data=data,
                    custom_ops=custom_ops or (),
                    keep_overridable=keep_overridable,
                    external=external_data,
                    seed=seed,
                    verify_each=verify_each or None,  # not asked for: as the environment says
                    progress=tell,
                )
        except RefusedError as refusal:
            if refusal.report is not None:
                save(refusal.report)
                refused = refusal.report
                if not json:
                    _show(lambda console: show_refusal(refused, console))
            raise
        record = result.report
        save(record)
        if bench:
            found = _bench([source, output], data=data, seed=seed, custom_ops=custom_ops or [])
            record = record.model_copy(update={"bench": found})
            save(record)
    if json:
        _print_json(record)
    else:
        _show(lambda console: show_report(record, console))


def _bench(
    models: list[Path],
    *,
    data: str | None,
    seed: int,
    custom_ops: list[Path],
    shapes: dict[str, list[int]] | None = None,
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
    original: Annotated[Path, typer.Argument(metavar="A", help="The original model.")],
    candidate: Annotated[Path, typer.Argument(metavar="B", help="The model to compare.")],
    data: Data = None,
    custom_ops: CustomOps = None,
    seed: Seed = 0,
    json: Json = False,
    report: ReportFile = None,
    verbose: Verbose = False,
) -> None:
    """Compare model B with its original A. Exit code 0 if it is proved to compute the same."""
    from graphopt.render.progress import progress
    from graphopt.render.results import show_validation
    from graphopt.validate import validate_files

    with _report_writer(report, original, candidate) as save:
        with progress() as tell:
            proof = validate_files(
                original,
                candidate,
                data=data,
                custom_ops=custom_ops or [],
                seed=seed,
                progress=tell,
            )
        save(proof)
    if json:
        _print_json(proof)
    else:
        _show(lambda console: show_validation(proof, console))
    raise typer.Exit(0 if proof.verdict == "proved" else 1)


@app.command(short_help="Show what a model is made of, and its MACs.")
@shell.boundary
def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL")],
    shape: Shapes = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what a model is made of, its MACs, and what about it cannot be proved."""
    from graphopt import inspection
    from graphopt.render.listings import show_inspection

    found = inspection.inspect(model, _shapes(shape))
    if json:
        _print_json(found)
    else:
        _show(lambda console: show_inspection(found, console))


@app.command(short_help="Time models against the first of them.")
@shell.boundary
def bench(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL")],
    shape: Shapes = None,
    data: Data = None,
    threads: Annotated[int, typer.Option(min=0, help="0: all cores.")] = 0,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to time.")] = 20.0,
    custom_ops: CustomOps = None,
    seed: Seed = 0,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Time models against the first of them, interleaved, with load time and memory."""
    from graphopt.ir import Model
    from graphopt.render.listings import show_bench

    for path in models:
        Model.load(path)  # a file that is no model is said so before anything is timed
    found = _bench(
        models,
        data=data,
        seed=seed,
        custom_ops=custom_ops or [],
        shapes=_shapes(shape),
        threads=threads,
        seconds=seconds,
    )
    if json:
        _print_json(found)
    else:
        _show(lambda console: show_bench(found, console))


@app.command(short_help="List the passes, the rules and what each level runs.")
@shell.boundary
def passes(verbose: Verbose = False) -> None:
    """List the rules with their equations, the passes with their options, and the levels."""
    from graphopt.passes.pipelines import LEVELS, PASSES
    from graphopt.passes.rules import all_rules, family_of, plugins
    from graphopt.render.listings import show_passes
    from graphopt.render.rules import show_rules

    rules = [(family_of(rule), rule) for rule in all_rules().values()]

    def draw(console: Console) -> None:
        show_rules(rules, plugins().failures, console)
        show_passes(list(PASSES.values()), LEVELS, console)

    _show(draw)


@app.command(short_help="Say why rules fired on a model, or did not.")
@shell.boundary
def explain(
    model: Annotated[Path, typer.Argument(metavar="MODEL")],
    rule: Annotated[
        str | None, typer.Option(metavar="NAME", help="This rule only, in detail.")
    ] = None,
    node: Annotated[
        str | None, typer.Option(metavar="NAME", help="This node only, by name or output.")
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say where rules fire on MODEL, where they almost do, and what stands against it."""
    from graphopt.explain import explain as explained
    from graphopt.render.rules import show_explanation

    found = explained(model, rule, node)
    if json:
        _print_json(found)
    else:
        _show(lambda console: show_explanation(found, console))


def _shapes(texts: list[str] | None) -> dict[str, list[int]]:
    """NAME:1,3,224,224 or NAME:1x3x224x224; a name may hold colons."""
    shapes: dict[str, list[int]] = {}
    for text in texts or ():
        name, colon, sizes = text.rpartition(":")
        parts = sizes.replace("x", ",").split(",") if sizes else []
        if not colon or not all(part.strip().isdecimal() for part in parts):
            raise UsageError(f"--shape {text!r}: write NAME:1,3,224,224")
        shapes[name] = [int(part) for part in parts]
    return shapes


@contextlib.contextmanager
def _report_writer(path: Path | None, *models: Path) -> Iterator[Callable[[Record], Any]]:
    """A function that writes a record to `path` as JSON; that it can be written is checked now."""
    if path is None:
        yield lambda record: None
        return
    from graphopt.output import Target, output_errors

    if any(path.resolve() == model.resolve() for model in models):
        raise UsageError(f"--report {path}: that is a model of this command")
    with Target(path) as place:

        def save(record: Record) -> None:
            with output_errors(path):
                place.staged.write_text(record.model_dump_json(indent=2) + "\n", "utf-8")
            place.commit([place.staged])

        yield save


def _print_json(record: Record) -> None:
    with shell.printing():
        typer.echo(record.model_dump_json(indent=2))


def _show(draw: Callable[[Console], None]) -> None:
    from graphopt.render.text import stdout

    with shell.printing():
        draw(stdout())
