"""The screens about rules: those of `passes` and of `explain`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from graphopt.render import text

if TYPE_CHECKING:
    from graphopt.explain import Explanation, RuleRecord
    from graphopt.rules import Rule

_ROWS = 5  # of every list of a rule; --json has all of them


def show_rules(
    rules: Sequence[tuple[str, Rule]], failures: Sequence[str], console: Console
) -> None:
    """Every rule with its equation and the opsets it is for, by the pass that fires it."""
    for family in dict.fromkeys(family for family, _ in rules):
        table = text.table(f"rules of {family}", "equation", "opset", left=2)
        for _, rule in (entry for entry in rules if entry[0] == family):
            newest = f"-{rule.max_opset}" if rule.max_opset is not None else "+"
            table.add_row(Text(rule.name, style="bold"), rule.equation, f"{rule.min_opset}{newest}")
        console.print(table)
        console.print()
    _show_warnings(failures, console)


def show_explanation(found: Explanation, console: Console) -> None:
    """One rule or one node in detail; of all rules, what they did and why they did not."""
    title = Text(text.clean(Path(found.path).name), style="bold")
    console.print(title.append(f"   opset {found.opset}, level {found.level}", style="dim"))
    if found.node:
        console.print(text.facts([("node", text.clean(found.node))]))
    if found.gone:
        console.print(text.facts([("gone", text.clean(found.gone))]))
    console.print()
    if len(found.rules) == 1:
        _show_rule(found.rules[0], console)
    elif found.node:
        _show_node(found.rules, console)
    else:
        _show_all(found.rules, console)
    _show_warnings(found.warnings, console)


def _show_rule(rule: RuleRecord, console: Console) -> None:
    console.print(Text(rule.name, style="bold"))
    rows: list[tuple[str, Text | str]] = [("rule", rule.equation)]
    if not rule.applies:
        rows.append(("opset", Text(f"the rule is for opset {rule.opsets}", style="yellow")))
    fired = [text.clean(firing.root) for firing in rule.fired]
    rows += _list("fired", [f"at {root}" for root in fired])
    rows += _list(
        "rejected", [f"{text.clean(r.node)}: {text.clean(r.reason)}" for r in rule.rejected]
    )
    rows += _list("almost", _misses(rule))
    if rule.applies and len(rows) == 1:
        rows.append(("fired", "nowhere: no node is of the kind that the pattern ends with"))
    console.print(text.facts(rows))


def _misses(rule: RuleRecord) -> list[str]:
    lines = []
    for miss in rule.misses:
        fits = " <- ".join(miss.fits)
        fits = f" (fits: {fits})" if len(miss.fits) > 1 else ""
        line = f"{miss.node}: expected {miss.wanted}, found {miss.found}{fits}"
        lines.append(text.clean(line))
    return lines


def _list(label: str, lines: Sequence[str]) -> list[tuple[str, Text | str]]:
    rows: list[tuple[str, Text | str]] = [
        (f"{label} ({len(lines)})" if not number and len(lines) > 1 else label * (not number), line)
        for number, line in enumerate(lines[:_ROWS])
    ]
    if len(lines) > _ROWS:
        rows.append(("", Text(f"and {len(lines) - _ROWS} more", style="dim")))
    return rows


def _show_node(rules: Sequence[RuleRecord], console: Console) -> None:
    rows: list[tuple[str, Text | str]] = []
    for rule in sorted(rules, key=_closeness, reverse=True):
        said = [Text("fired", style="green")] if rule.fired else []
        said += [Text(text.clean(r.reason), style="yellow") for r in rule.rejected]
        said += [Text(text.clean(f"expected {m.wanted}, found {m.found}")) for m in rule.misses]
        rows += [(rule.name, line) for line in said]
    console.print(text.facts(rows or [("rules", "no rule ends with such a node")]))


def _closeness(rule: RuleRecord) -> tuple[int, int, int]:
    """How much a rule has to say: it fired, it fitted, it fitted in part."""
    deepest = max((len(miss.fits) for miss in rule.misses), default=0)
    return len(rule.fired), len(rule.rejected), deepest


def _show_all(rules: Sequence[RuleRecord], console: Console) -> None:
    fired = sorted((r for r in rules if r.fired), key=lambda r: -len(r.fired))
    if fired:
        table = text.table("fired", "equation", "times", left=2)
        for rule in fired:
            table.add_row(Text(rule.name, style="bold"), rule.equation, f"{len(rule.fired):,}")
        console.print(table)
        console.print()
    reasons = Counter((r.name, rejection.reason) for r in rules for rejection in r.rejected)
    if reasons:
        table = text.table("fitted, but", "why not", "nodes", left=2)
        for (name, reason), count in reasons.most_common(2 * _ROWS):
            table.add_row(Text(name, style="bold"), text.clean(reason), f"{count:,}")
        console.print(table)
        console.print()
    silent = [r.name for r in rules if r.applies and not r.fired and not r.rejected]
    other = [r.name for r in rules if not r.applies]
    rows: list[tuple[str, Text | str]] = []
    for label, names in (("fit nowhere", silent), ("other opsets", other)):
        if names:
            rows.append((label, Text(", ".join(names), style="dim")))
    console.print(text.facts(rows))


def _show_warnings(warnings: Sequence[str], console: Console) -> None:
    if warnings:
        lines: list[tuple[str, Text | str]] = [
            ("warning", Text(text.clean(line), style="yellow")) for line in warnings
        ]
        console.print(text.facts(lines))
