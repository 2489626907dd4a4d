"""The screens of `inspect`, `bench`, `densify` and `passes`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphopt.render import text

if TYPE_CHECKING:
    from graphopt.inspection import Inspection, PortRecord
    from graphopt.manager import Pass
    from graphopt.report import BenchRecord, Report

_ROWS = 12  # of operators; --json lists all
_PORTS = 8


def show_inspection(found: Inspection, console: Console) -> None:
    """The whole model on about one screen."""
    console.print(Text(text.clean(found.file.path), style="bold"), soft_wrap=True)
    console.print()
    console.print(text.facts(_summary(found)))
    console.print()
    text.show_beside([_operators(found), _weights(found)], console)
    if not found.doubts:
        console.print(text.facts([("provable", "nothing known speaks against it")]))
    else:
        lines: list[tuple[str, Text | str]] = [
            ("cannot be proved", Text(f"{text.clean(d.subject)}: {text.clean(d.reason)}", "yellow"))
            for d in found.doubts
        ]
        console.print(text.facts(lines))


def show_densified(report: Report, console: Console) -> None:
    """What `densify` did, on a line; below it the verdict, where that is not the usual one."""
    made = sum(step.fired.get("densify-weight", 0) for step in report.passes)
    before, after = (text.size(stats.weight_bytes) for stats in (report.before, report.after))
    done = f"{text.plural(made, 'sparse tensor')} made dense, weights {before} -> {after}"
    line = Text(done if made else "no sparse tensors: nothing to do")
    if report.target is not None:
        files = " -> ".join(text.size(file.bytes) for file in (report.source, report.target))
        line.append(f"; {text.clean(report.target.path)}, file {files}")
    line.append(f"; {report.validation.verdict}")
    console.print(line, soft_wrap=True)  # a path stays whole, to be copied
    if report.validation.verdict != "proved" and report.validation.reason:
        console.print(Text(text.clean(report.validation.reason), style="dim"), soft_wrap=True)


def _summary(found: Inspection) -> list[tuple[str, Text | str]]:
    external = text.plural(len(found.external_files), "external file")
    opsets = ", ".join(f"{domain or 'ai.onnx'} {v}" for domain, v in found.opsets.items())
    rows: list[tuple[str, Text | str]] = [
        (
            "file",
            text.size(found.file.bytes) + (f" with {external}" if found.external_files else ""),
        ),
        ("format", f"IR {found.ir_version}, opset {text.clean(opsets)}"),
        ("producer", text.clean(found.producer) or "unknown"),
        ("nodes", f"{found.stats.nodes:,}"),
        ("parameters", text.count(found.stats.parameters)),
        ("MACs", _macs(found)),
    ]
    for label, ports in (
        ("input", found.inputs),
        ("overridable", found.overridable),
        ("output", found.outputs),
    ):
        rows += [(label, port_text(port)) for port in ports[:_PORTS]]
        if len(ports) > _PORTS:
            rows.append(("", Text(f"and {len(ports) - _PORTS} more", style="dim")))
    for label, names in (
        ("free dims", found.free_dims),
        ("functions", found.functions),
        ("foreign domains", found.foreign_domains),
        ("external data", found.external_files),
    ):
        if names:
            shown = ", ".join(text.clean(name) for name in names[:_PORTS])
            more = f" and {len(names) - _PORTS} more" if len(names) > _PORTS else ""
            rows.append((label, shown + more))
    if found.sparse_initializers:
        rows.append(("sparse", text.plural(found.sparse_initializers, "sparse initializer")))
    return rows


def _macs(found: Inspection) -> str:
    """12.3 G at image:1x3x224x224 (assumed), and what of it is not known."""
    macs = found.macs
    shown = [f"{text.clean(n)}:{'x'.join(map(str, s)) or 'scalar'}" for n, s in macs.shapes.items()]
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    line = f"{text.count(macs.total)} at {', '.join(shown[:3])}{more}" if shown else ""
    line = line or text.count(macs.total)
    if macs.assumed:
        line += " (free dims assumed; --shape sets them)"
    if macs.unknown:
        line += f"; MACs of {macs.unknown} of {macs.nodes} nodes unknown"
    if macs.once_per_loop:
        line += "; loops counted for one iteration"
    return line


def port_text(port: PortRecord) -> str:
    """An input or output: image: float32[batch, 3, 224, 224]."""
    dims = "" if port.shape is None else f"[{', '.join(str(d or '?') for d in port.shape)}]"
    if port.is_tensor and port.shape is None:
        dims = " of unknown rank"
    return text.clean(f"{port.name}: {port.type}{dims}")


def _operators(found: Inspection) -> Table:
    table = text.table("operator", "nodes", "share", "MACs", "of all")
    total = max(found.macs.total, 1)
    # those that do the work are worth a row even where they are few
    ranked = sorted(found.operators, key=lambda o: (-max(o.share, o.macs / total), o.operator))
    chosen = ranked[:_ROWS]
    for operator in (o for o in found.operators if o in chosen):
        macs = text.count(operator.macs) if operator.macs else ""
        part = text.share(operator.macs / total) if operator.macs else ""
        name = text.clean(operator.operator)
        table.add_row(name, f"{operator.nodes:,}", text.share(operator.share), macs, part)
    rest = len(found.operators) - len(chosen)
    if rest:
        nodes = found.stats.nodes - sum(o.nodes for o in chosen)
        table.add_row(Text(f"{rest} others", style="dim"), f"{nodes:,}")
    return table


def _weights(found: Inspection) -> Table:
    table = text.table("weights", "tensors", "elements", "bytes")
    for weight in found.weights:
        elements, size = text.count(weight.elements), text.size(weight.bytes)
        table.add_row(weight.type, f"{weight.tensors:,}", elements, size)
    return table


def show_bench(found: BenchRecord, console: Console) -> None:
    """A row per file, then how it was measured."""
    table = text.table("file", "median", "speed", f"{found.confidence:.0%} interval", "load")
    for title in ("first run", "peak"):
        table.add_column(title, justify="right", no_wrap=True)
    distinct = len({Path(entry.path).name for entry in found.models}) == len(found.models)
    for entry in found.models:
        style = "green" if entry.ratio_low > 1 else "red" if entry.ratio_high < 1 else ""
        first = entry is found.models[0]
        table.add_row(
            text.clean(Path(entry.path).name if distinct else entry.path),
            text.milliseconds(entry.ms),
            "1" if first else Text(f"{entry.ratio:.3f}x", style=style),
            "" if first else f"{entry.ratio_low:.3f}-{entry.ratio_high:.3f}",
            text.duration(entry.load_seconds),
            text.duration(entry.first_run_seconds),
            text.size(entry.peak_bytes),
        )
    console.print(table)
    console.print()
    shapes = ", ".join(f"{text.clean(n)}:{'x'.join(map(str, s))}" for n, s in found.shapes.items())
    threads = f"{found.threads} threads" if found.threads else "all cores"
    runs = (
        f"{text.plural(found.runs, 'run')} of each in {text.plural(found.blocks, 'fresh session')}"
    )
    lines: list[tuple[str, Text | str]] = [
        ("feed", shapes or "none"),
        ("measured", f"{runs}, interleaved; {threads}; {text.duration(found.seconds)}"),
    ]
    if len(found.models) > 1:
        lines.append(("speed", "time of the first file divided by this one's: above 1 is faster"))
    console.print(text.facts(lines))


def speed_line(record: BenchRecord) -> str:
    """How the last of the timed models compares with the first, on one line."""
    old, new = record.models[0], record.models[-1]
    if new.ratio_low > 1:
        stated = f"{new.ratio:.3f}x faster"
    elif new.ratio_high < 1:
        stated = f"{1 / new.ratio:.3f}x slower"
    else:
        stated = "no measurable difference"
    return (
        f"{stated}: {text.milliseconds(old.ms)} -> {text.milliseconds(new.ms)}, ratio "
        f"{new.ratio:.3f} ({new.ratio_low:.3f}-{new.ratio_high:.3f} at {record.confidence:.0%})"
    )


def show_passes(passes: Sequence[type[Pass]], levels: dict[int, str], console: Console) -> None:
    """Every pass with what it does and its options, then what each level runs."""
    table = text.table("pass", "what it does", "options", left=3)
    for kind in passes:
        summary = (inspect.getdoc(kind) or "").partition("\n")[0]
        options = ", ".join(map(_option, dataclasses.fields(cast(Any, kind))))
        table.add_row(Text(kind.name, style="bold"), summary, options or "-")
    console.print(table)
    console.print()
    console.print(text.facts([(f"level {n}", steps or "-") for n, steps in levels.items()]))


def _option(field: dataclasses.Field[Any]) -> str:
    """The option with its default, as it is written in a pipeline."""
    if field.default is dataclasses.MISSING:
        return field.name
    default = str(field.default)
    return f"{field.name}={default.lower() if isinstance(field.default, bool) else default}"
