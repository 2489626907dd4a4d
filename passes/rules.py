"""The passes that fire rules, a family each, until none fits any more; and where rules come from.

Other packages register rules by an entry point of the group `graphopt.rules`: a module, which
registers as it is imported, or a callable without arguments that registers when called.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from importlib import metadata
from typing import ClassVar, Final

from graphopt.edit import Editor
from graphopt.errors import UsageError
from graphopt.ir import Model
from graphopt.passes.canonicalize import (
    arithmetic,
    batches,
    logic,
    movement,
    no_ops,
    parts,
    repeats,
    types,
    views,
)
from graphopt.passes.fusion import (
    activation,
    affine,
    around,
    attention,
    convolution,
    matrix,
    normalization,
    rms,
    tokens,
    transposed,
)
from graphopt.rewrite import apply_rules
from graphopt.rules import RULES, Rule

_log = logging.getLogger(__name__)

# Importing a module registers its rules; they are tried in this order.
FAMILIES: Final = {
    "canonicalize": (no_ops, types, repeats, arithmetic, logic, movement, views, batches, parts),
    "fusion": (
        normalization,
        rms,
        attention,
        tokens,
        activation,
        convolution,
        transposed,
        matrix,
        around,
        affine,
    ),
}
ENTRY_POINTS: Final = "graphopt.rules"


@dataclass(frozen=True)
class Canonicalize:
    """Fire the rules that make a graph plain. `rules` is `all`, or names joined by `+`."""

    name: ClassVar[str] = "canonicalize"
    rules: str = "all"

    def run(self, model: Model, edit: Editor) -> None:
        apply_rules(chosen(self.rules, "canonicalize"), edit)


@dataclass(frozen=True)
class Fuse:
    """Fire the rules that make fewer operators of several. `rules` is `all`, or names and `+`.

    Rules of other packages are among them.
    """

    name: ClassVar[str] = "fuse"
    rules: str = "all"

    def run(self, model: Model, edit: Editor) -> None:
        apply_rules(chosen(self.rules, "fusion"), edit)


@dataclass(frozen=True)
class Plugins:
    """What entry points gave: names of rules, and a line for each package that failed to load."""

    rules: frozenset[str]
    failures: tuple[str, ...]


def all_rules() -> dict[str, Rule]:
    """Every rule by name, those of other packages last."""
    plugins()
    return RULES


def chosen(text: str, family: str) -> list[Rule]:
    """The rules that the text names. Raises UsageError for one that does not exist."""
    rules = all_rules()
    if text == "all":
        return [rule for rule in rules.values() if family_of(rule) == family]
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name not in rules:
            raise UsageError(f"passes: there is no rule {name!r}; 'graphopt passes' lists them")
    return [rules[name] for name in names]


def family_of(rule: Rule) -> str:
    """The family that a rule runs with: one of another package runs with the fusions."""
    return "fusion" if rule.name in plugins().rules else rule.family


@functools.cache
def plugins() -> Plugins:
    """Let other packages register their rules, once. One that fails is left out, with a warning."""
    given: set[str] = set()
    failures = []
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        before = set(RULES)
        try:
            found = entry.load()
            if callable(found):
                found()
        except Exception as error:  # another package's fault must not cost the user the command
            for name in set(RULES) - before:
                del RULES[name]
            origin = entry.dist.name if entry.dist is not None else entry.value
            reason = " ".join(str(error).split()) or type(error).__name__
            failures.append(f"rules of {origin} ({entry.value}) are left out: {reason}")
            _log.warning("%s", failures[-1])
        given |= set(RULES) - before
    return Plugins(frozenset(given), tuple(failures))
