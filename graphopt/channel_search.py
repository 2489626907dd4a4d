"""Which channels to take out of one model: measured milliseconds for measured harm.

Harm is that of each group alone; what groups do together is for the judge of whole candidates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from graphopt import exporter
from graphopt.attribution import NodeCosts
from graphopt.edit import Editor
from graphopt.errors import RuntimeFailure
from graphopt.ir import Model, Node
from graphopt.operators import MACS
from graphopt.passes.fitting import Fitted, Settings, fit, grams
from graphopt.passes.prune import importance as units_by
from graphopt.passes.prune.channels import (
    Choice,
    Cut,
    Harm,
    choose,
    column_masks,
    power_law,
    steps,
)
from graphopt.passes.prune.costs import Work
from graphopt.passes.prune.groups import Group, groups_of
from graphopt.passes.prune.importance import UnitImportance, ranking, unit_scores
from graphopt.passes.recipe import Stage, StagedRecipe
from graphopt.passes.work import sizes_wanted
from graphopt.runtime import Feed
from graphopt.selection import Selection, Tell
from graphopt.statistics import Statistics, sweep

Feeds = Callable[[], Iterator[Feed]]
_LEVELS: Final = (0.25, 0.5)  # of a group's units, at which harm is measured
_FEEDS: Final = 8  # that readers are fitted on for it, and that it is measured on


@dataclass(frozen=True)
class GroupCut:
    """A group with what was measured of it, and how many of its units go."""

    text: str
    root: str
    units: int
    gone: int
    harm: float | None


class ChannelSearch:
    """Cuts of the lossless model. `feeds` are those that layers are fitted on, None without data.

    `costs` are the profile of the model, `folder` is for files. All is measured once, at the start.
    """

    def __init__(
        self,
        lossless: Path,
        by: UnitImportance,
        selection: Selection[StagedRecipe],
        feeds: Feeds | None,
        settings: Settings,
        costs: NodeCosts,
        folder: Path,
        tell: Tell,
    ) -> None:
        self._lossless = lossless
        self._selection = selection
        self._feeds = feeds
        self._settings = settings
        self._folder = folder
        self._tell = tell
        self._edit = Editor(Model.load(lossless))
        self.groups = groups_of(self._edit)
        self._work = Work(self._edit, self.groups, self._shapes())
        self._ms = node_times(self._edit, costs)
        self._choices = self._measured(by)

    def cut(self, share: float) -> Cut:
        """What goes for a share of the MACs; empty where nothing can."""
        return choose(self._choices, self._work, share, self._ms)

    def macs_gone(self, cut: Cut) -> float:
        """The share of all MACs that a cut takes with it."""
        gone = {root: len(units) for root, units in cut.items()}
        return 1 - self._work.macs(gone) / max(1, self._work.total)

    def account(self, cut: Cut) -> list[GroupCut]:
        """Every group that there was a choice about."""
        found = []
        for choice in self._choices:
            group, gone = choice.group, len(cut.get(choice.group.root, ()))
            harm = choice.harm(gone) if gone else None
            found.append(GroupCut(group.text(gone), group.root, group.units, gone, harm))
        return found

    def fitted(self, cut: Cut, progress: Callable[[float], None]) -> tuple[Stage, Fitted]:
        """What layers have to learn before the cut, and the account of them."""
        return self._fitted(cut, self._feeds, None, progress)

    def _fitted(
        self,
        cut: Cut,
        feeds: Feeds | None,
        only: set[str] | None,
        progress: Callable[[float], None] | None = None,
    ) -> tuple[Stage, Fitted]:
        if feeds is None:
            return Stage(cut=cut), Fitted()
        dense, edit = Model.load(self._lossless), Editor(Model.load(self._lossless))
        masks = column_masks(self._edit, self.groups, cut)
        found = fit(dense, edit, masks, feeds, self._settings, only=only, progress=progress)
        return Stage.between(dense, edit, cut), found

    # -- what is measured --------------------------------------------------------------------------

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what products read, on the feed that models are timed on."""
        wanted = sizes_wanted(self._edit.model)
        seen = self._swept(wanted, [self._selection.proposed()])
        return {v: seen.shape(v).first for v in seen.values if seen.has_shape(v)}

    def _measured(self, by: UnitImportance) -> list[Choice]:
        """What can be chosen: of each group the order in which its units go, and their harm."""
        seen, known = self._observed(by), self._grams(by)
        found = []
        for number, group in enumerate(self.groups):
            self._tell("measuring what channels tell", number / len(self.groups))
            if counts := steps(group):
                order = ranking(unit_scores(self._edit, group, by, seen, known))
                found.append(Choice(group, counts, self._harm(group, order), order))
        return found

    def _observed(self, by: UnitImportance) -> Statistics | None:
        """What calibration sees of what the groups' readers read; None where that is nothing."""
        wanted = units_by.observed(self.groups, by)
        if not wanted or self._feeds is None:
            return None
        return self._swept(wanted, self._feeds())

    def _swept(self, wanted: Any, feeds: Any) -> Statistics:
        return sweep(
            self._lossless,
            feeds,
            wanted,
            threads=self._settings.threads,
            custom_ops=self._settings.custom_ops,
            progress=lambda done: self._tell(f"calibrating, {done} feeds", None),
        )

    def _grams(self, by: UnitImportance) -> dict[str, Any]:
        """Gram matrices of what the groups' readers read, where their choice needs them."""
        roots = units_by.readers_of(self._edit, self.groups, by)
        if not roots or self._feeds is None:
            return {}

        def tell(done: float) -> None:
            self._tell("seeing what channels tell", done)

        return grams(Model.load(self._lossless), roots, self._feeds, self._settings, tell)

    def _harm(self, group: Group, order: Sequence[int]) -> Harm:
        """The noise of the outputs by how many units of a group go, from two measurements."""
        measured = []
        for level in _LEVELS:
            count = min(max(1, round(level * group.units)), group.units - 1)
            cut = {group.root: tuple(sorted(order[:count]))}
            measured.append((count / group.units, self._noise(cut)))
        if measured[0][0] == measured[1][0]:
            measured[0] = (measured[0][0] / 2, measured[0][1] / 4)
        law = power_law(*measured)
        return lambda count: law(count / group.units)

    def _noise(self, cut: Cut) -> float:
        """Of the outputs with this cut alone, its readers fitted on a few feeds."""
        feeds = self._feeds
        few = None if feeds is None else (lambda: itertools.islice(feeds(), _FEEDS))
        readers = set(column_masks(self._edit, self.groups, cut))
        stage, _ = self._fitted(cut, few, readers)
        target = self._folder / "alone.onnx"
        exporter.save(StagedRecipe((stage,)).dense(self._lossless), target)
        try:
            return self._selection.judge.noise(target, _FEEDS)
        except RuntimeFailure:
            return math.inf  # a runtime that refuses it: never chosen


def node_times(edit: Editor, costs: NodeCosts) -> Mapping[Node, float]:
    """Milliseconds by node: of what runs as one, the product has all."""
    values, found = edit.model.graph.values, dict[Node, float]()
    for root, ms in costs.values.items():
        names = [*costs.computed[root], root]
        nodes = [values[name].producer for name in names if name in values]
        known = [node for node in nodes if node is not None]
        owner = next((n for n in known if (n.domain, n.op) in MACS), known[-1] if known else None)
        if owner is not None:
            found[owner] = found.get(owner, 0.0) + ms
    return found
