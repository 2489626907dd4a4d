"""Which drafts of a rule are drawn: alternatives, operand orders, opsets, optional inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import onnx

from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.operators import COMMUTATIVE
from graphopt.rewrite import apply_rules
from graphopt.rules import Either, Output, Rule, Variable
from tests.rule_cases import Choice, Options, Unbuildable, draw

OLDEST: Final = 7  # onnxruntime runs no older operators
NEWEST: Final = 21
MOST_WAYS: Final = 32
MOST_ORDERS: Final = 32
MANY_WAYS: Final = 8  # from here on, pairs within each alternative would be too many


def elements(rule: Rule, root: int, options: Options) -> tuple[list[int], list[Either], list[str]]:
    """What a way through the pattern meets: nodes by index, choices, parameters."""
    nodes: dict[int, None] = {}
    eithers: dict[int, Either] = {}
    names: dict[str, None] = {}

    def visit(operand: object) -> None:
        if isinstance(operand, Either):
            eithers[id(operand)] = operand
            if id(operand) in options:
                visit(operand.options[options[id(operand)]])
        elif isinstance(operand, Variable):
            names[operand.name] = None
        elif isinstance(operand, Output) and operand.node.index not in nodes:
            nodes[operand.node.index] = None
            for part in operand.node.operands:
                visit(part)

    visit(Output(rule.roots[root], 0))
    return list(nodes), list(eithers.values()), list(names)


def ways(rule: Rule) -> list[tuple[int, Options]]:
    """Every alternative: the root and an option for each choice on the way. At most MOST_WAYS."""
    found: list[tuple[int, Options]] = []
    for root in range(len(rule.roots)):
        pending: list[dict[int, int]] = [{}]
        while pending:
            options = pending.pop(0)
            open_ones = [e for e in elements(rule, root, options)[1] if id(e) not in options]
            if not open_ones:
                found.append((root, options))
                continue
            first = open_ones[0]
            pending += [{**options, id(first): i} for i in range(len(first.options))]
    step = max(1, -(-len(found) // MOST_WAYS))
    return found[::step]


def opsets(rule: Rule) -> list[int]:
    """The versions at which an operator of the pattern or of the replacement changes."""
    newest = min(rule.max_opset or 99, max(NEWEST, rule.min_opset + 1))
    oldest = max(OLDEST, rule.min_opset)
    ops = {node.op for node in rule.nodes} | _emitted(rule, newest)
    changes = {
        schema.since_version
        for schema in onnx.defs.get_all_schemas_with_history()
        if schema.domain == "" and schema.name in ops
    }
    return sorted({oldest, newest} | {v for v in changes if oldest <= v <= newest})


def _emitted(rule: Rule, opset: int) -> set[str]:
    found: set[str] = set()
    for root, options in ways(rule):
        try:
            model = Model.load(draw(rule, Choice(opset, options, root)).proto())
        except Unbuildable:
            continue
        apply_rules([rule], Editor(model))
        found |= {node.op for node in model.nodes() if node.rule}
    return found


def choices(rule: Rule) -> Iterator[Choice]:
    """Every alternative in all operand orders, and all pairs of what else varies."""
    versions = opsets(rule)
    every = ways(rule)
    for number, (root, options) in enumerate(every):
        swaps, optional = _freedoms(rule, root, options)
        start = Choice(versions[-1], options, root)
        orders = list(itertools.product((False, True), repeat=len(swaps)))
        for turn, order in enumerate(orders[: MOST_ORDERS // (1 + len(every) // MANY_WAYS)]):
            swapped = frozenset(itertools.compress(swaps, order))
            opset = versions[-1 - (turn + number) % len(versions)]
            yield replace(start, swapped=swapped, opset=opset)
        if len(every) < MANY_WAYS:
            yield from _paired(rule, start, versions, swaps, optional)
    if len(every) >= MANY_WAYS:
        yield from _sampled(rule, versions, every)


def _paired(
    rule: Rule, start: Choice, versions: list[int], swaps: list[int], optional: list[str]
) -> Iterator[Choice]:
    factors: list[Sequence[Any]] = [versions, range(len(rule.samples))]
    factors += [(False, True)] * (len(swaps) + len(optional))
    for opset, sample, *flags in pairwise(factors):
        yield replace(
            start,
            opset=opset,
            sample=sample,
            swapped=frozenset(itertools.compress(swaps, flags)),
            left_out=frozenset(itertools.compress(optional, flags[len(swaps) :])),
        )


def _sampled(rule: Rule, versions: list[int], every: list[tuple[int, Options]]) -> Iterator[Choice]:
    """Pairs of an alternative with an opset and a sample; operand orders by chance."""
    rng = np.random.default_rng(0)
    for way, opset, sample in pairwise([range(len(every)), versions, range(len(rule.samples))]):
        root, options = every[way]
        swaps, optional = _freedoms(rule, root, options)
        yield Choice(
            opset,
            options,
            root,
            sample,
            frozenset(n for n in swaps if rng.integers(2)),
            frozenset(n for n in optional if rng.integers(2)),
        )


def _freedoms(rule: Rule, root: int, options: Options) -> tuple[list[int], list[str]]:
    """The operators whose operands can change places, and the parameters that can be left out."""
    nodes, _, names = elements(rule, root, options)
    swaps = [n for n in nodes if rule.nodes[n].op in COMMUTATIVE and _differ(rule, n)]
    return swaps, [n for n in names if rule.variables[n].default is not None]


def _differ(rule: Rule, index: int) -> bool:
    operands = rule.nodes[index].operands
    return len(operands) == 2 and operands[0] is not operands[1]


def pairwise(factors: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Rows in which every two levels of two factors meet; few, not fewest. Same in every run."""
    if len(factors) == 1:
        return [(level,) for level in factors[0]]
    rng = np.random.default_rng(0)
    open_pairs = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(factors)), 2)
        for a in range(len(factors[i]))
        for b in range(len(factors[j]))
    }
    rows = []
    while open_pairs:
        i, a, j, b = min(open_pairs)
        best: tuple[int, list[int]] = (-1, [])
        for _ in range(20):
            row = [int(rng.integers(len(levels))) for levels in factors]
            row[i], row[j] = a, b
            gain = sum(pair in open_pairs for pair in _pairs(row))
            best = max(best, (gain, row))
        open_pairs -= set(_pairs(best[1]))
        rows.append(tuple(levels[at] for levels, at in zip(factors, best[1], strict=True)))
    return rows


def _pairs(row: Sequence[int]) -> list[tuple[int, int, int, int]]:
    return [(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)]
