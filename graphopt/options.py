"""The options of the command: how they are spelt, explained and read. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from graphopt.errors import UsageError

# What most commands take.
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
ModelFile = Annotated[Path, typer.Argument(metavar="MODEL")]

# What `optimize` takes.
Source = Annotated[Path, typer.Argument(metavar="IN", help="The model.")]
Output = Annotated[Path, typer.Argument(metavar="OUT", help="Where the result goes.")]
Level = Annotated[int, typer.Option(help="0 copy, 1 clean up, 2 fuse, 3 measure.")]
Passes = Annotated[
    str | None, typer.Option(metavar="TEXT", help="These passes instead: 'name, name{a=b}'.")
]
Target = Annotated[
    Literal["portable", "ort-cpu"], typer.Option(help="Where the result has to run.")
]
FixedShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME:1,3,-1,-1",
        help="Fix sizes of an input, -1 keeps one as it is; repeatable.",
    ),
]
Opset = Annotated[int | None, typer.Option(min=1, help="Version of the standard operators to use.")]
Validate = Annotated[bool, typer.Option(help="Prove that it computes the same.")]
Unproven = Annotated[bool, typer.Option("--unproven", help="Write also what could not be proved.")]
KeepOverridable = Annotated[
    bool, typer.Option("--keep-overridable", help="Keep all inputs with a default feedable.")
]
ExternalData = Annotated[
    Literal["auto", "always", "never"], typer.Option(help="Weights in a file of their own.")
]
Sparsity = Annotated[
    str | None,
    typer.Option(metavar="SHARE", help="prune: this share of the weights to zero, or 'auto'."),
]
Nm = Annotated[
    str | None, typer.Option("--nm", metavar="N:M", help="prune: keep n of every m weights.")
]
Block = Annotated[
    str | None, typer.Option(metavar="RxC", help="prune: zeros in blocks of outputs x inputs.")
]
Threshold = Annotated[
    float | None, typer.Option(help="prune: weights below it, in magnitude, to zero.")
]
Channels = Annotated[
    str | None,
    typer.Option(metavar="SHARE", help="prune: channels worth this share of MACs, or 'auto'."),
]
Importance = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="prune: obs, wanda, lamp, magnitude; channels: obs, activation, l1, l2, apoz.",
    ),
]
Recover = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="prune: fit what is left: lsq, moments or none."),
]
LowRank = Annotated[
    str | None,
    typer.Option(metavar="SHARE", help="split layers until this share of MACs is left, or 'auto'."),
]
LowRankMethod = Annotated[
    Literal["auto", "svd", "channel", "spatial", "tucker", "cp"] | None,
    typer.Option(help="low rank: what layers are split into."),
]
RankMethod = Annotated[
    Literal["auto", "svd", "channel", "spatial", "tucker", "cp"],
    typer.Option(help="What layers may be split into."),
]
Plot = Annotated[
    Path | None, typer.Option(metavar="F.svg", help="Draw errors and spectra as well.")
]
Codebook = Annotated[
    Literal["auto", "8", "4"] | None,
    typer.Option(help="Weights as tables and indices of so many bits: a smaller file."),
]
Int8 = Annotated[
    Literal["auto", "static", "dynamic", "weights"] | None,
    typer.Option(help="Compute on int8 where that is faster here and loses little."),
]
MaxDrop = Annotated[
    float, typer.Option(help="lossy: what may be lost of the metric, or of agreement.")
]
Metric = Annotated[
    str | None,
    typer.Option(metavar="FILE:FUNCTION", help="lossy: scores a model; else it has to agree."),
]
MinSqnr = Annotated[
    float | None, typer.Option(metavar="DB", help="lossy: judge by signal to noise instead.")
]
Decisions = Annotated[
    Path | None, typer.Option(metavar="FILE", help="lossy: write down what was decided.")
]
Replay = Annotated[
    Path | None, typer.Option(metavar="FILE", help="lossy: do what was decided, measure nothing.")
]
Force = Annotated[bool, typer.Option("--force", help="lossy: write it even if it is not worth it.")]
ModelThreads = Annotated[
    int, typer.Option("--threads", min=0, help="lossy: that the model will have; 0: all cores.")
]
Bench = Annotated[bool, typer.Option("--bench", help="Time the original against the result.")]
VerifyEach = Annotated[
    bool, typer.Option("--verify-each", help="Verify the graph after every pass.")
]
LogPasses = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Show every pass, the log and tracebacks."),
]

# What the others take.
Original = Annotated[Path, typer.Argument(metavar="A", help="The original model.")]
Compared = Annotated[Path, typer.Argument(metavar="B", help="The model to compare.")]
TimedModels = Annotated[list[Path], typer.Argument(metavar="MODEL")]
Threads = Annotated[int, typer.Option(min=0, help="0: all cores.")]
Seconds = Annotated[float, typer.Option(min=0.1, help="How long to time.")]
RuleName = Annotated[str | None, typer.Option(metavar="NAME", help="This rule only, in detail.")]
NodeName = Annotated[
    str | None, typer.Option(metavar="NAME", help="This node only, by name or output.")
]


def shapes(texts: Sequence[str] | None, *, keep: bool = False) -> dict[str, list[int]]:
    """NAME:1,3,224,224 or NAME:1x3x224x224; a name may hold colons. With `keep`, sizes may be -1.

    Raises UsageError for what is no shape, and for a name given twice.
    """
    found: dict[str, list[int]] = {}
    for text in texts or ():
        name, colon, stated = text.rpartition(":")
        sizes = [part.strip() for part in stated.replace("x", ",").split(",")] if stated else []
        if not colon or not all(size.isdecimal() or (keep and size == "-1") for size in sizes):
            example = "1,3,-1,-1, sizes of 1 and more, or -1 to keep one" if keep else "1,3,224,224"
            raise UsageError(f"--shape {text!r}: write NAME:{example}")
        if name in found:
            raise UsageError(f"--shape {text!r}: {name!r} is given twice")
        found[name] = [int(size) for size in sizes]
    return found
