"""The screens of `optimize` and `validate`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphopt.render import text
from graphopt.render.codebook import show_codebook
from graphopt.render.int8 import show_int8
from graphopt.render.listings import speed_line
from graphopt.render.low_rank import show_low_rank
from graphopt.render.prune import show_prune
from graphopt.report import Report, ValidationRecord
from graphopt.step_report import StepRecord

R = TypeVar("R", bound=StepRecord)
_ROWS = 8  # of every list: the whole account is in the report
_CONSTANT = "Constant"
_STYLES = {"proved": "bold green", "failed": "bold red", "unproven": "bold yellow"}


def show_report(report: Report, console: Console, *, every_pass: bool = False) -> None:
    """One screen: sizes, what fired, where the time went, the proof, what was written.

    With `every_pass`, below it what each run of each pass did.
    """
    goal = Path(report.target.path).name if report.target else "nothing written"
    title = Text(f"{text.clean(Path(report.source.path).name)} -> {text.clean(goal)}", style="bold")
    console.print(title.append(f"   {_settings(report)}", style="dim"), soft_wrap=True)
    console.print(text.indented(_sizes(report)))
    console.print()
    is_lossy = _is_lossy(report)
    if not is_lossy or every_pass:  # else what was lost has the screen
        tables = [table for table in (_removed(report), _rules(report)) if table]
        text.show_beside(tables, console)
    if every_pass and report.passes:
        text.show_beside([_passes(report)], console)
    _show_steps(report, console, every_candidate=every_pass)
    lines = proof_lines(report.validation)
    if is_lossy:  # what was proved is the step before it
        lines[0] = ("lossless", lines[0][1])
    lines += _warnings(report)
    if report.bench is not None:
        lines.append(("speed", Text(speed_line(report.bench))))
    console.print(text.facts(lines))
    if report.target is not None:
        line = Text("written     ", style="dim")
        line.append(text.clean(report.target.path), style="not dim")
        size = text.size(report.target.bytes)
        line.append(f"  {size} in {text.duration(report.seconds)}", style="not dim")
        console.print(line, soft_wrap=True)  # a path stays whole, to be copied


def show_refusal(report: Report, console: Console) -> None:
    """What the comparison found, and what was tried to mend it."""
    _show_steps(report, console)
    if not _is_lossy(report):
        show_validation(report.validation, console)
    if report.warnings:
        console.print(text.facts(_warnings(report)))


def _is_lossy(report: Report) -> bool:
    steps = (report.prune, report.low_rank, report.int8, report.codebook)
    return any(step is not None for step in steps)


def _show_steps(report: Report, console: Console, *, every_candidate: bool = False) -> None:
    """What became of each lossy step, in order."""
    low_rank, prune = report.low_rank, report.prune
    later = [step for step in (report.int8, report.codebook) if step is not None and step.kept]
    # The size of the file is that of all steps: it is told once, by the last of them.
    if low_rank is not None:
        is_last = not later and not (prune is not None and prune.kept)
        shown = low_rank if is_last or not low_rank.kept else _without_size(low_rank)
        show_low_rank(shown, console, every_candidate=every_candidate)
    if prune is not None:
        shown_prune = _without_size(prune) if later and prune.kept else prune
        show_prune(shown_prune, console, every_candidate=every_candidate)
    if report.int8 is not None:
        show_int8(report.int8, console, every_candidate=every_candidate)
    if report.codebook is not None:
        show_codebook(report.codebook, console, every_candidate=every_candidate)


def _without_size(record: R) -> R:
    return record.model_copy(update={"bytes": None})


def _warnings(report: Report) -> list[tuple[str, Text | str]]:
    return [("warning", Text(text.clean(w), style="yellow")) for w in report.warnings]


def _settings(report: Report) -> str:
    """The level, and the opset where it became another."""
    old, new = report.opsets_before.get("", 0), report.opsets.get("", 0)
    return f"level {report.level}" + (f", opset {old} -> {new}" if old and old != new else "")


def _sizes(report: Report) -> Table:
    before, after = report.before, report.after
    rows: list[tuple[str, int, int, Callable[[float], str]]] = [
        ("nodes", before.nodes, after.nodes, "{:,}".format)
    ]
    if _CONSTANT in before.operators:  # they take no time: the rest says more
        rest = [stats.nodes - stats.operators.get(_CONSTANT, 0) for stats in (before, after)]
        rows.append(("that compute", rest[0], rest[1], "{:,}".format))
    if report.int8 is None and report.codebook is None:  # integers are not counted among them
        rows.append(("parameters", before.parameters, after.parameters, text.count))
    rows.append(("weights", before.weight_bytes, after.weight_bytes, text.size))
    if report.target is not None:
        rows.append(("file", report.source.bytes, report.target.bytes, text.size))
    table = text.table("", "before", "after", "change")
    for name, old, new, unit in rows:
        delta = text.change(old, new)
        style = "green" if new < old else "red" if new > old else "dim"
        table.add_row(name, unit(old), unit(new), Text(delta, style=style))
    return table


def _removed(report: Report) -> Table | None:
    """Operators that there are fewer of, those that lost most first."""
    before, after = report.before.operators, report.after.operators
    lost = Counter({name: n - after.get(name, 0) for name, n in before.items()})
    top = [(name, n) for name, n in lost.most_common() if n > 0]
    if not top:
        return None
    table = text.table("operator", "before", "after", "removed")
    for name, n in top[:_ROWS]:
        table.add_row(text.clean(name), str(before[name]), str(after.get(name, 0)), str(n))
    return _and_more(table, len(top))


def _rules(report: Report) -> Table | None:
    fired = Counter(change.rule for step in report.passes for change in step.changes)
    if not fired:
        return None
    table = text.table("rule", "fired")
    for rule, times in fired.most_common(_ROWS):
        table.add_row(rule, f"{times} x")
    return _and_more(table, len(fired))


def _passes(report: Report) -> Table:
    """Every run of every pass, in order: where the time went, and what came of it."""
    table = text.table("pass", "seconds", "changes")
    for step in report.passes:
        name = Text(text.clean(step.text), style="red" if step.error else "")
        changes = "undone" if step.error else f"{len(step.changes):,}" if step.changes else ""
        table.add_row(name, f"{step.seconds:.3f}", changes)
    total = sum(step.seconds for step in report.passes)
    table.add_row(Text("all", style="dim"), f"{total:.3f}", "")
    return table


def _and_more(table: Table, rows: int) -> Table:
    if rows > _ROWS:
        table.add_row(Text(f"and {rows - _ROWS} more", style="dim"))
    return table


def proof_lines(proof: ValidationRecord) -> list[tuple[str, Text | str]]:
    """The proof: its verdict, the error against the noise floor, and what it stands on."""
    line = Text(proof.verdict, style=_STYLES.get(proof.verdict, "bold"))
    if proof.reason:
        line.append(f": {text.clean(proof.reason)}", style="not bold default")
    lines: list[tuple[str, Text | str]] = [("validation", line)]
    if proof.outputs:
        used = max(output.used for output in proof.outputs)
        lines.append(
            (
                "error",
                f"{text.error(proof.error)} against a noise floor of {text.error(proof.noise)}: "
                f"{_used(used)} {'of ' if used < 1 else ''}what is allowed",
            )
        )
    if proof.feeds:
        proving = sorted(output.feeds for output in proof.outputs) or [0]
        span = "-".join(str(n) for n in dict.fromkeys((proving[0], proving[-1])))
        stated = f"{len(proof.feeds)}, {span} of them proving; {text.duration(proof.seconds)}"
        lines.append(("feeds", stated))
    return lines + [("note", text.clean(note)) for note in proof.notes]


def show_validation(proof: ValidationRecord, console: Console) -> None:
    """A table with a row per output, then the verdict."""
    if proof.outputs:
        console.print(_outputs(proof))
        console.print()
    reasons = [(text.clean(o.name), text.clean(o.reason)) for o in proof.outputs if o.reason]
    lines: list[tuple[str, Text | str]] = [("output", f"{n}: {why}") for n, why in reasons]
    console.print(text.facts([*lines, *proof_lines(proof)]))


def _outputs(proof: ValidationRecord) -> Table:
    table = text.table(
        "output", "signal", "noise", "error off", "default", "SQNR", "used", "verdict"
    )
    for output in proof.outputs:
        sqnr = "exact" if output.sqnr_db is None else f"{output.sqnr_db:.0f} dB"
        table.add_row(
            text.clean(output.name),
            f"{output.signal:.2g}",
            text.error(output.noise),
            text.error(output.error_off),
            text.error(output.error_default),
            sqnr,
            _used(output.used),
            Text(output.verdict, style=_STYLES.get(output.verdict, "")),
        )
    return table


def _used(share: float) -> str:
    """The share of the allowed error: 12 %, or 2000 x where it is far beyond."""
    return f"{100 * share:.2g} %" if share < 1 else f"{share:,.1f} x"
