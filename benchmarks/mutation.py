"""Do the generated tests bite? Each rule is broken in many small ways; its own cases must notice.

    python benchmarks/mutation.py [--rules NAME ...] [--per-rule 20] [--seed 0] [--jobs 2]

A mutant changes one thing in the source of a rule, or of a function of `passes` that it calls, or
switches one check of the engine off for it. It is killed where it cannot be defined, raises, loops,
or fails any of the cases that are generated from the original rule. Survivors are printed. Those
that `mutation_equivalents.toml` lists, each with its reason, compute the same and do not count.
Exit code 1 below the bar.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import tomllib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import graphopt.passes.rules  # noqa: F401 - registers the rules
from benchmarks.mutants import Mutant, mutants
from graphopt.rules import RULES, RuleError
from tests.rule_contexts import cases
from tests.rule_runs import Batch, batches, check, check_at_once

BAR = 0.96
SURVIVED = "survived"
FAILS_ITSELF = "the rule fails its own tests, which kill whatever is made of it"
SECONDS = 20  # a mutant that takes longer loops
EQUIVALENTS = Path(__file__).with_name("mutation_equivalents.toml")


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant: how it was killed, or SURVIVED."""

    rule: str
    mutant: str
    operator: str
    end: str


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rules", nargs="*", default=[])
    arguments.add_argument("--per-rule", type=int, default=20)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--jobs", type=int, default=2)
    given = arguments.parse_args()
    started = time.perf_counter()
    names = given.rules or sorted(RULES)
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(run_rule, name, given.per_rule, given.seed) for name in names]
        outcomes = [outcome for task in tasks for outcome in shown(task.result())]
    sys.exit(summary(outcomes, time.perf_counter() - started))


def run_rule(name: str, per_rule: int, seed: int) -> list[Outcome]:
    """All mutants of one rule."""
    rule = RULES[name]
    prepared, _ = batches(cases(rule))
    prepared.sort(key=lambda batch: -len(batch.cases))
    if any(check(rule, batch) for batch in prepared):
        return [Outcome(name, FAILS_ITSELF, "none", SURVIVED)]
    return [
        Outcome(name, mutant.text, mutant.operator, fate(mutant, prepared))
        for mutant in mutants(rule, per_rule, seed)
    ]


def fate(mutant: Mutant, prepared: list[Batch]) -> str:
    """How the cases kill the mutant; SURVIVED where none does."""

    def late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with mutant.made() as rule:
            for batch in prepared:
                if failures := check_at_once(rule, batch):
                    return f"{failures[0].case}: {failures[0].problem}"
    except RuleError as error:
        return f"RuleError: {error}"
    except TimeoutError:
        return f"takes over {SECONDS} s"
    except Exception as error:  # whatever a broken rule raises shows that it is broken
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return SURVIVED


def shown(outcomes: list[Outcome]) -> list[Outcome]:
    """Print one rule's line, pass its outcomes on."""
    if outcomes:
        killed = sum(outcome.end != SURVIVED for outcome in outcomes)
        print(f"{outcomes[0].rule:32} {killed:3} of {len(outcomes):3} killed", flush=True)
    return outcomes


def summary(outcomes: list[Outcome], seconds: float) -> int:
    """Print survivors and rates; the exit code."""
    listed = {
        (entry["rule"], entry["mutant"])
        for entry in tomllib.loads(EQUIVALENTS.read_text())["equivalent"]
    }
    alive = [outcome for outcome in outcomes if outcome.end == SURVIVED]
    equal = [outcome for outcome in alive if (outcome.rule, outcome.mutant) in listed]
    survivors = [outcome for outcome in alive if outcome not in equal]
    for one in survivors:
        print(f"survived  {one.rule}\n          {one.mutant}")
    for rule, mutant in sorted(listed - {(one.rule, one.mutant) for one in outcomes}):
        print(f"listed as equivalent but not made (in this run): {rule}: {mutant}")
    for operator, count in sorted(Counter(one.operator for one in outcomes).items()):
        left = sum(one.operator == operator for one in survivors)
        print(f"{operator:24} {count:5} made {left:4} survived")
    counted = len(outcomes) - len(equal)
    rate = 1 - len(survivors) / max(counted, 1)
    print(f"{len(outcomes)} mutants of {len({one.rule for one in outcomes})} rules, ", end="")
    print(f"{len(equal)} equivalent, {len(survivors)} survived: {rate:.1%} killed, {seconds:.0f} s")
    return 0 if rate >= BAR else 1


if __name__ == "__main__":
    main()
