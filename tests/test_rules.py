"""Every rule on graphs generated from its own pattern and samples; no rule is named here."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import graphopt.passes.rules
from graphopt.rules import RULES, Either, Rule
from tests.rule_choices import elements, ways
from tests.rule_contexts import Case, cases
from tests.rule_runs import Batch, batches, check

assert graphopt.passes.rules.FAMILIES  # importing them registers their rules


@dataclass(frozen=True)
class Prepared:
    """A rule with its cases, and which of these onnxruntime runs."""

    rule: Rule
    cases: list[Case]
    batches: list[Batch]
    refused: list[tuple[Case, str]]


@pytest.fixture(scope="module", params=sorted(RULES))
def prepared(request: pytest.FixtureRequest) -> Prepared:
    rule = RULES[request.param]
    made = cases(rule)
    return Prepared(rule, made, *batches(made))


def test_does_what_it_should_wherever_it_is_put(prepared: Prepared) -> None:
    failures = [failure for batch in prepared.batches for failure in check(prepared.rule, batch)]
    assert not failures, "\n".join(f"{one.case}: {one.problem}" for one in failures)


def test_cases_reach_every_part_of_the_pattern(prepared: Prepared) -> None:
    """Each sample, alternative and operator is in a case that has to fire, and that runs."""
    rule = prepared.rule
    drafts = [case.draft for batch in prepared.batches for case in batch.cases if case.fires]
    choices = [draft.choice for draft in drafts]
    assert {choice.sample for choice in choices} == set(range(len(rule.samples)))
    assert {choice.root for choice in choices} == set(range(len(rule.roots)))
    wanted = {(id(e), i) for e in _eithers(rule) for i in range(len(e.options))}
    assert {pair for choice in choices for pair in choice.options.items()} == wanted
    assert {i for draft in drafts for i in draft.drawn} == {node.index for node in rule.nodes}


def test_refusals_run(prepared: Prepared) -> None:
    """A near-miss that no opset runs would prove nothing."""
    run = {case.label.rpartition(": ")[2] for batch in prepared.batches for case in batch.cases}
    missing = {f"refuses {number}" for number in range(len(prepared.rule.refuses))} - run
    assert not missing, "\n".join(f"{case.label}: {why}" for case, why in prepared.refused)


def _eithers(rule: Rule) -> list[Either]:
    found = [e for root, options in ways(rule) for e in elements(rule, root, options)[1]]
    return list({id(either): either for either in found}.values())
