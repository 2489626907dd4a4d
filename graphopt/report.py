"""What a run did, as one versioned schema: the command prints it, `--report` and `--json` save it.

Readers may rely on it: within one `schema_version` fields are only added.
"""

from __future__ import annotations

import platform
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pydantic import Field

from graphopt.codebook_report import CodebookRecord
from graphopt.int8_report import Int8Record
from graphopt.ir import Model, Weight
from graphopt.low_rank_report import LowRankRecord
from graphopt.manager import PassRun
from graphopt.prune_report import PruneRecord
from graphopt.record import Record

if TYPE_CHECKING:
    from graphopt.blame import Fault

SCHEMA_VERSION: Final = 1
Verdict = Literal["proved", "failed", "unproven", "skipped"]


class FileInfo(Record):
    """A model on disk."""

    path: str
    bytes: int = Field(description="model file and external data together")


class GraphStats(Record):
    """Sizes of a graph, bodies of If, Loop and Scan included."""

    nodes: int
    operators: dict[str, int] = Field(description="nodes by operator, most frequent first")
    initializers: int
    parameters: int = Field(description="elements of floating-point initializers and Constants")
    weight_bytes: int = Field(description="bytes of all initializers and Constants, shared once")


class ChangeRecord(Record):
    """One rewrite: the value it stands on and the graph text before and after."""

    rule: str
    root: str
    before: str
    after: str


class PassRecord(Record):
    """One pass of the pipeline; `error` is set where it failed and was undone."""

    text: str
    seconds: float
    changes: list[ChangeRecord]
    error: str = ""
    fired: dict[str, int] = Field(default={}, description="changes by rule")
    rejected: dict[str, int] = Field(
        default={}, description="by rule, nodes that its pattern fits and its requirements do not"
    )


class BlameRecord(Record):
    """A change that made the model compute something else, found and denied."""

    verdict: Literal["blamed", "accumulated"] = Field(
        description="accumulated: no single change is to blame, all of the rule's together are"
    )
    scope: Literal["change", "rule", "pass"] = Field(description="what was denied for it")
    rule: str
    root: str
    pass_text: str = Field(description="the pass that made the change, as in `passes`")
    first_diverging: str = Field(description="the first value that differs; empty where unknown")
    error: float = Field(description="relative to how much that value, or the output, varies")
    reproducer: str = Field(description="folder with before.onnx and the command in pipeline.txt")
    message: str


class FeedRecord(Record):
    """One set of inputs both models ran on."""

    kind: str = Field(description="given, or how the values were drawn")
    shapes: dict[str, list[int]]


class OutputRecord(Record):
    """How one output compares. Errors and noise are relative to how much the output varies."""

    name: str
    type: str
    feeds: int = Field(description="feeds that could prove something about this output")
    signal: float = Field(description="largest deviation of the output from its mean over feeds")
    noise: float = Field(description="largest spread of the original, optimisations off and on")
    error_off: float = Field(description="largest error with onnxruntime's optimisations off")
    error_default: float = Field(description="largest error as users run it")
    used: float = Field(description="share of the allowed error that was used; above 1 fails")
    sqnr_db: float | None = Field(description="signal to error ratio in dB, None where exact")
    verdict: Verdict
    reason: str = ""


class ValidationRecord(Record):
    """Original against candidate."""

    verdict: Verdict
    reason: str = ""
    tolerance: float = Field(default=0.0, description="of the narrowest float type computed in")
    feeds: list[FeedRecord] = Field(default=[])
    outputs: list[OutputRecord] = Field(default=[])
    notes: list[str] = Field(default=[])
    seconds: float = 0.0

    @property
    def noise(self) -> float:
        """The noise floor: the original's largest spread on any output."""
        return max((output.noise for output in self.outputs), default=0.0)

    @property
    def error(self) -> float:
        """The candidate's largest error on any output, either way of running."""
        return max((max(o.error_off, o.error_default) for o in self.outputs), default=0.0)


class Host(Record):
    """Where the run took place."""

    cpu: str
    features: list[str]
    system: str
    python: str
    versions: dict[str, str]


class BenchEntry(Record):
    """One model. Ratios are time of the first model divided by this one's: above 1 is faster."""

    path: str
    ms: float = Field(description="median milliseconds per run, with quartiles")
    ms_low: float
    ms_high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    load_seconds: float = Field(description="in a fresh process, the file in the page cache")
    first_run_seconds: float
    peak_bytes: int = Field(description="resident memory of load and first run, above the start's")


class BenchRecord(Record):
    """What `graphopt bench` measured."""

    schema_version: int = SCHEMA_VERSION
    host: Host
    shapes: dict[str, list[int]] = Field(description="of the feed")
    threads: int = Field(description="0: onnxruntime's default, all cores")
    confidence: float
    blocks: int = Field(description="fresh sessions of every model")
    runs: int = Field(description="timed runs of every model")
    seconds: float
    models: list[BenchEntry]


class Report(Record):
    """One run of `optimize`."""

    schema_version: int = SCHEMA_VERSION
    graphopt: str
    host: Host
    source: FileInfo
    target: FileInfo | None = Field(description="None where nothing was written")
    level: int
    pipeline: str
    opsets: dict[str, int] = Field(description="of the result, by domain")
    opsets_before: dict[str, int] = Field(default={}, description="of the source")
    before: GraphStats
    after: GraphStats
    passes: list[PassRecord]
    validation: ValidationRecord
    blame: list[BlameRecord] = Field(default=[], description="what was denied to prove the result")
    fingerprint: str = Field(default="", description="of the result: equal ones, the same graph")
    warnings: list[str]
    low_rank: LowRankRecord | None = Field(
        default=None, description="if asked for; `validation` is then of the step before it"
    )
    prune: PruneRecord | None = Field(default=None, description="likewise; done after low rank")
    int8: Int8Record | None = Field(default=None, description="likewise; done after both")
    codebook: CodebookRecord | None = Field(default=None, description="likewise; done last")
    bench: BenchRecord | None = Field(default=None, description="original against result, if asked")
    seconds: float


def stats(model: Model) -> GraphStats:
    """Count nodes and weights; reads no weight."""
    operators: Counter[str] = Counter()
    weights: list[Weight] = [v.weight for g in model.graphs() for v in g.initializers if v.weight]
    initializers = len(weights)
    for node in model.nodes():
        operators[f"{node.domain}::{node.op}" if node.domain else node.op] += 1
        for attribute in node.proto.attribute if node.op == "Constant" else ():
            if attribute.HasField("t"):
                weights.append(Weight(attribute.t, model.store))
            elif attribute.HasField("sparse_tensor"):
                weights.append(Weight(attribute.sparse_tensor, model.store))
    return GraphStats(
        nodes=sum(operators.values()),
        operators=dict(operators.most_common()),
        initializers=initializers,
        parameters=sum(weight.size for weight in weights if weight.is_float),
        weight_bytes=sum(weight.nbytes for weight in weights),
    )


def pass_record(run: PassRun) -> PassRecord:
    """A pass run in the report's terms."""
    changes = [
        ChangeRecord(rule=c.rule, root=c.root, before=c.before, after=c.after) for c in run.changes
    ]
    return PassRecord(
        text=run.text,
        seconds=run.seconds,
        changes=changes,
        error=run.error,
        fired=dict(run.fired),
        rejected=dict(run.rejected),
    )


def blame_record(fault: Fault) -> BlameRecord:
    """A fault in the report's terms."""
    return BlameRecord(
        verdict=fault.kind,
        scope=fault.scope,
        rule=fault.rule,
        root=fault.root,
        pass_text=fault.step,
        first_diverging=fault.diverging,
        error=fault.error,
        reproducer=fault.reproducer,
        message=fault.message,
    )


def file_info(path: Path, files: list[Path] | None = None) -> FileInfo:
    """Size of a model with the files beside it that it refers to."""
    return FileInfo(path=str(path), bytes=sum(f.stat().st_size for f in files or [path]))


def model_bytes(model: Path) -> int:
    """Size of a model that was written, with the file of its weights beside it, if there is one."""
    beside = model.with_name(model.name + ".data")
    return file_info(model, [model, beside] if beside.exists() else [model]).bytes


def host() -> Host:
    """This machine: CPU with the features that decide about int8, versions that decide the rest."""
    import archspec.cpu
    from archspec.cpu.detect import detected_info

    # The name is that of a microarchitecture all of whose features are there; there may be more.
    name, found = archspec.cpu.host().name, detected_info().features
    interesting = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
    packages = ("onnx", "onnxruntime", "numpy")
    return Host(
        cpu=name,
        features=[feature for feature in interesting if feature in found],
        system=platform.platform(),
        python=platform.python_version(),
        versions={name: metadata.version(name) for name in packages},
    )


def version() -> str:
    """graphopt's own version."""
    return metadata.version("graphopt")
