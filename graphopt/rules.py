"""The rule language: one generator function is one rewrite, and its `yield` is the arrow.

    @rule("fuse-conv-batchnorm", min_opset=9, sample={...})
    def fuse_conv_batchnorm(op: Ops, x: Var, w: Const, ..., b: Const = absent(0.0)) -> Rewrite:
        '''BatchNormalization(Conv(x, w, b)) => Conv(x, w*k, (b - mean)*k + beta)'''
        conv = op.Conv(x, w, b)
        bn = op.BatchNormalization(conv, gamma, beta, mean, var, training_mode=0)
        yield bn  # before => after
        ...
        return op.Conv(x, weights, bias, **conv.attrs)

The half above the `yield` runs once, when the rule is defined, and draws the pattern; it must not
branch or read values. On a match it runs again with the same names bound to what was matched, and
the half below computes the replacement. Versions of operators, optional inputs, operand orders,
uses elsewhere and types are the engine's business (`graphopt.match`, `graphopt.rewrite`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from graphopt.language import (
    Absent,
    Call,
    Const,
    Ops,
    Rejected,
    RuleError,
    Var,
    Vars,
    absent,
    require,
)
from graphopt.pattern import (
    Either,
    Literal,
    Operand,
    Output,
    Outputs,
    PatternNode,
    PatternOps,
    Variable,
    check_alternatives,
    labels_of,
    levels,
    needs,
    roots_of,
)

__all__ = [
    "RULES",
    "Absent",
    "Call",
    "Const",
    "Either",
    "Literal",
    "Operand",
    "Ops",
    "Output",
    "Outputs",
    "PatternNode",
    "Rejected",
    "Rewrite",
    "Rule",
    "RuleError",
    "RuleFunction",
    "Sample",
    "Var",
    "Variable",
    "Vars",
    "absent",
    "compile_rule",
    "levels",
    "needs",
    "require",
    "rule",
]

Rewrite = Generator[Any, None, Any]
RuleFunction = Callable[..., Rewrite]
Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """A compiled rule. `root` is the node whose outputs the rewrite replaces."""

    name: str
    function: RuleFunction
    min_opset: int
    max_opset: int | None
    variables: Mapping[str, Variable]
    nodes: tuple[PatternNode, ...]
    roots: tuple[PatternNode, ...]
    labels: Mapping[str, tuple[PatternNode, ...]] = field(repr=False, default_factory=dict)
    samples: tuple[Sample, ...] = field(repr=False, default=())
    refuses: tuple[Sample, ...] = field(repr=False, default=())

    @property
    def equation(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def family(self) -> str:
        """The folder of passes that the rule lives in: `canonicalize`, `fusion`, or a plugin's."""
        return self.function.__module__.rpartition(".")[0].rpartition(".")[2]

    def applies_to(self, opset: int) -> bool:
        """True for the versions of the standard operators that the rule is written for."""
        return self.min_opset <= opset <= (self.max_opset or opset)


RULES: Final[dict[str, Rule]] = {}


def rule(
    name: str,
    *,
    min_opset: int = 1,
    max_opset: int | None = None,
    sample: Sample | Sequence[Sample],
    refuses: Sequence[Sample] = (),
) -> Callable[[RuleFunction], Rule]:
    """Register a generator function as a rule.

    The tests of a rule are generated from its pattern and from `sample`, a mapping of

    - a parameter to what it stands for: a shape (a tuple; floats drawn by seed; a name for a size
      that the model leaves open), a value (array, list or number; a float takes the storage type
      under test, an int is int64) or a function of a numpy Generator that draws one; for Vars a
      list of these, one an input;
    - `name.attribute` to an attribute of an operator of the pattern, wherever its opset states
      it (attribute or input). `name` is the local variable that the first half gives what the
      operator computes; of operators without one, the operator. None leaves the attribute out;
      `outputs` is how many outputs it has, where the pattern takes any number.

    Of several samples the first is complete and each further one states what differs from it.
    The rule must fire on all of them, in every alternative, operand order and opset; and on none
    of `refuses`, near-misses that state what differs from the first sample.
    Raises RuleError where rule or samples are written wrongly.
    """

    def register(function: RuleFunction) -> Rule:
        if name in RULES:
            raise RuleError(f"rule {name!r} is defined twice")
        samples = (sample,) if isinstance(sample, Mapping) else tuple(sample)
        if not samples:
            raise RuleError(f"rule {name!r}: without a sample nothing tests it")
        compiled = compile_rule(name, function, min_opset, max_opset, samples, refuses)
        RULES[name] = compiled
        return compiled

    return register


def compile_rule(
    name: str,
    function: RuleFunction,
    min_opset: int = 1,
    max_opset: int | None = None,
    samples: Sequence[Sample] = (),
    refuses: Sequence[Sample] = (),
) -> Rule:
    """Draw the pattern of a rule. Raises RuleError where it is written wrongly."""
    if not inspect.isgeneratorfunction(function):
        raise RuleError(f"rule {name!r}: the function has no yield")
    if not (inspect.getdoc(function) or "").partition("\n")[0].partition("=>")[2]:
        raise RuleError(f"rule {name!r}: the docstring starts with its equation, before => after")
    variables = _variables(name, function)
    drawn = PatternOps()
    half = function(drawn, **variables)
    try:
        root = next(half)
    except StopIteration:
        raise RuleError(f"rule {name!r}: the first half ends without its yield") from None
    except RuleError as error:
        raise RuleError(f"rule {name!r}: {error}") from None
    roots = roots_of(name, root)
    check_alternatives(name, roots, variables)
    labels = labels_of(inspect.getgeneratorlocals(half), drawn.nodes)
    half.close()
    complete = [{**samples[0], **sample} for sample in samples]
    missed = [{**samples[0], **sample} for sample in refuses] if samples else []
    for sample in (*complete, *missed):
        _check_sample(name, sample, variables, labels)
    return Rule(
        name,
        function,
        min_opset,
        max_opset,
        variables,
        tuple(drawn.nodes),
        roots,
        labels,
        tuple(complete),
        tuple(missed),
    )


def _variables(name: str, function: RuleFunction) -> dict[str, Variable]:
    kinds = {"Var": Var, "Const": Const, "Vars": Vars}
    variables = {}
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        stated = getattr(parameter.annotation, "__name__", parameter.annotation)
        if stated not in kinds:
            raise RuleError(f"rule {name!r}: {parameter.name} is Var, Const or Vars")
        default = parameter.default
        if default is not inspect.Parameter.empty and not isinstance(default, Absent):
            raise RuleError(f"rule {name!r}: the default of {parameter.name} can only be absent()")
        optional = default if isinstance(default, Absent) else None
        variables[parameter.name] = Variable(parameter.name, kinds[stated], optional)
    return variables


def _check_sample(
    name: str,
    sample: Sample,
    variables: Mapping[str, Variable],
    labels: Mapping[str, Sequence[PatternNode]],
) -> None:
    """A value for every parameter, attributes for operators that there are, and nothing else."""
    missing = set(variables) - set(sample)
    if missing:
        raise RuleError(f"rule {name!r}: the sample lacks {', '.join(sorted(missing))}")
    for key in set(sample) - set(variables):
        label, dot, attribute = key.partition(".")
        if not dot or not attribute:
            raise RuleError(f"rule {name!r}: the sample's {key!r} is no parameter")
        if label not in labels:
            raise RuleError(
                f"rule {name!r}: the sample's {key!r}: the pattern calls no operator {label!r}"
            )
