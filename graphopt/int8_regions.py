"""Regions of a choice of int8, for the report and the decisions file: what was chosen, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from graphopt.compress import Outcome
from graphopt.constants import CONSTANT
from graphopt.int8_report import Precision, RegionRecord
from graphopt.ir import Node
from graphopt.passes.quantize.recipe import DYNAMIC, HALF, STATIC, TABLE, WEIGHTS, Recipe
from graphopt.passes.quantize.units import Unit
from graphopt.regions import boundary, connected
from graphopt.search import Trial
from graphopt.targets import CLAMPS

CHEAPER: Final = "cheaper on integers"
ENCLOSED: Final = "as part of the whole"
AS_IT_RUNS: Final = "its activations are quantized as it runs"
BY_WEIGHTS: Final = "its weights are stored in fewer bits"
BY_ROW: Final = "rows have a scale each"
NARROW: Final = "its weights lose nothing worth mentioning"
DEARER: Final = "cheaper in floats"
NOISY: Final = "too noisy"
NOT_STATIC: Final = "what is kept has nothing static"
UNFUSED: Final = "does not fuse to an integer kernel"
UNSEEN: Final = "not calibrated"
UNLIKE: Final = "its operands have no scale in common"
NO_KERNEL: Final = "no integer kernel"


_PRODUCTS: Final[Mapping[str, tuple[Precision, str]]] = {
    DYNAMIC: ("dynamic int8", AS_IT_RUNS),
    WEIGHTS[8]: ("int8 weights", BY_WEIGHTS),
    WEIGHTS[4]: ("int4 weights", BY_WEIGHTS),
}


class Choice:
    """One candidate's choice for every unit and product of a model."""

    def __init__(self, outcome: Outcome, trial: Trial[Recipe]) -> None:
        self._outcome = outcome
        self._recipe = trial.recipe
        self._given_up = _given_up(outcome.trials, trial)
        self._candidates = candidates = outcome.candidates
        self._units = {unit.node: unit for unit in candidates.units}
        self._usable: frozenset[str] = frozenset()
        if outcome.feeds and candidates.can_be_static:
            self._usable = candidates.everything().taking(STATIC)
        dynamic = self._recipe.taking(DYNAMIC).union(*map(self._recipe.taking, WEIGHTS.values()))
        self._dynamic = {root: n for root, n in candidates.products.items() if root in dynamic}

    def records(self) -> list[RegionRecord]:
        """All regions: static ones, dynamic products, what is stored in fewer bits, floats."""
        return [*self._static(), *self._products(), *self._stored(), *self._floats()]

    def why(self, unit: Unit) -> str:
        """Why a unit is static, or is not."""
        if self._recipe.options.get(unit.root) == STATIC:
            before, after = self._candidates.milliseconds(unit.root)
            pays = before is not None and after is not None and after < before
            return CHEAPER if pays else ENCLOSED
        if unit.root not in self._usable:
            seen = bool(self._usable) and unit.kind == "concatenation"
            return UNLIKE if seen else UNSEEN
        if not self._recipe.taking(STATIC):
            return NOT_STATIC
        return self._given_up.get(unit.root, DEARER)

    def left(self) -> list[Unit]:
        """Units that stay in floats, in order of computation."""
        taken = {*self._dynamic.values()}
        static = self._recipe.taking(STATIC)
        units = self._candidates.units
        return [u for u in units if u.root not in static and u.node not in taken]

    def _static(self) -> list[RegionRecord]:
        units = self._candidates.chosen(self._recipe)
        owner = {node: unit for unit in units for node in unit.nodes}
        found = []
        for nodes in connected(owner):
            inside = list(dict.fromkeys(owner[node] for node in nodes))
            before, after = self._milliseconds(inside)
            pays = before is not None and after is not None and after < before
            outputs = [value.name for value in boundary(nodes)[1]]
            found.append(
                RegionRecord(
                    root=outputs[-1],
                    operators=operators(nodes),
                    precision="int8",
                    why=CHEAPER if pays else ENCLOSED,
                    nodes=len(nodes),
                    ms_before=before,
                    ms_after=after,
                    sqnr_db=self.sqnr_db(outputs),
                )
            )
        return found

    def _products(self) -> list[RegionRecord]:
        found = []
        for root, node in self._dynamic.items():
            unit, nodes = self._units.get(node), self._product(node)
            found.append(
                RegionRecord(
                    root=root,
                    operators=operators(nodes),
                    precision=_PRODUCTS[self._recipe.options[root]][0],
                    why=_PRODUCTS[self._recipe.options[root]][1],
                    nodes=len(nodes),
                    ms_before=self._milliseconds([unit])[0] if unit else None,
                    sqnr_db=self.sqnr_db([root]),
                )
            )
        return found

    def _product(self, node: Node) -> list[Node]:
        """A product with its bias; a clamp behind it stays in floats."""
        unit = self._units.get(node)
        return [n for n in unit.nodes if n.op not in CLAMPS] if unit is not None else [node]

    def _stored(self) -> list[RegionRecord]:
        tables = [
            RegionRecord(
                root=root, operators=f"1 {node.op}", precision="int8 table", why=BY_ROW, nodes=1
            )
            for root, node in self._candidates.tables.items()
            if self._recipe.options.get(root) == TABLE
        ]
        halves = [
            RegionRecord(root=name, operators="1 weight", precision="float16", why=NARROW, nodes=0)
            for name in self._candidates.halves
            if self._recipe.options.get(name) == HALF
        ]
        return tables + halves

    def _floats(self) -> list[RegionRecord]:
        by_reason: dict[str, list[Unit]] = {}
        for unit in self.left():
            by_reason.setdefault(self.why(unit), []).append(unit)
        found = []
        for why, units in by_reason.items():
            nodes = [node for unit in units for node in unit.nodes]
            found.append(_in_floats(nodes, why, self._milliseconds(units)[0]))
        dynamic = self._dynamic.values()
        units = [unit for unit in self._candidates.units if unit.node not in dynamic]
        known = {node for unit in units for node in unit.nodes}
        known |= {n for node in dynamic for n in self._product(node)} | {*self._tables()}
        others = [n for n in self._candidates.model.nodes() if n not in known and _computes(n)]
        return [*found, _in_floats(others, NO_KERNEL, None)] if others else found

    def _tables(self) -> list[Node]:
        taken = self._recipe.taking(TABLE)
        return [node for root, node in self._candidates.tables.items() if root in taken]

    def _milliseconds(self, units: Iterable[Unit]) -> tuple[float | None, float | None]:
        """The sums of what units cost in floats and on integers."""
        pairs = [self._candidates.milliseconds(unit.root) for unit in units]
        before = [a for a, _ in pairs if a is not None]
        after = [b for _, b in pairs if b is not None]
        whole = len(before) == len(after) == len(pairs)
        return (sum(before), sum(after)) if whole else (None, None)

    def sqnr_db(self, names: Iterable[str]) -> float | None:
        """The lowest of the values, as it was followed through the model."""
        noise = self._outcome.noise
        found = [noise.sqnr_db(name) for name in names] if noise is not None else []
        return min((db for db in found if db is not None), default=None)


def operators(nodes: Iterable[Node]) -> str:
    """Operators by number, as in '12 Conv, 9 Mul'."""
    counted = Counter(node.op for node in nodes)
    return ", ".join(f"{n} {op}" for op, n in sorted(counted.items(), key=lambda i: (-i[1], i[0])))


def _in_floats(nodes: Sequence[Node], why: str, ms: float | None) -> RegionRecord:
    return RegionRecord(
        root="",
        operators=operators(nodes),
        precision="float",
        why=why,
        nodes=len(nodes),
        ms_before=ms,
    )


def _computes(node: Node) -> bool:
    return node.op != CONSTANT or bool(node.domain)


def _given_up(trials: Collection[Trial[Recipe]], trial: Trial[Recipe]) -> Mapping[str, str]:
    """What was static in candidates that a candidate came of, and is not any more; why.

    A candidate that came of another is called after it: `a, less 2, and dynamic`.
    """
    found: dict[str, str] = {}
    static, name = trial.recipe.taking(STATIC), trial.name
    while before := _came_of(trials, name):
        lost = before.recipe.taking(STATIC) - static
        why = UNFUSED if "fuse" in name.removeprefix(before.name) else NOISY
        found = dict.fromkeys(lost, why) | found
        static, name = static | lost, before.name
    return found


def _came_of(trials: Collection[Trial[Recipe]], name: str) -> Trial[Recipe] | None:
    """The candidate with the longest name that this one begins with."""
    found = [trial for trial in trials if name.startswith(f"{trial.name}, ")]
    return max(found, key=lambda trial: len(trial.name), default=None)
