"""Low rank as a pass, for pipelines of one's own: nothing is judged or timed here.

`graphopt.optimize` does both, and splits only what is measured to be faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graphopt.edit import Editor
from graphopt.errors import UsageError
from graphopt.ir import Model
from graphopt.passes.copies import Copy

if TYPE_CHECKING:  # scipy takes half a second: it is for those who split
    from numpy.typing import NDArray

    from graphopt.passes.fitting import Settings
    from graphopt.passes.lowrank.forms import Method
    from graphopt.passes.lowrank.options import Option
    from graphopt.passes.lowrank.table import Ranks
    from graphopt.runtime import Feed

    Array = NDArray[Any]


@dataclass(frozen=True)
class SplitLayers:
    """Split convolutions and products into smaller ones, of low rank.

    Say how far, in one of three ways. `keep` is the share of the main graph's MACs that is left:
    layers that lose least for what they save go first, and as many MACs go as can where that is not
    enough. With `energy` each layer gets the least rank that keeps this share of the mean square of
    what it gives (of its variance, where it has a bias), with `evbmf` the rank of what stands out
    of noise in its weights (empirical variational Bayes); where nothing does, it stays.

    `method` is svd (products), channel, spatial, tucker, cp (convolutions), or auto: all but cp. A
    split that saves no MACs is not made. With `data` (as on the command line) errors are of what
    layers read there, and all layers are fitted again. MACs are counted at the shapes of its first
    feed; without, of one that is proposed. Lossy: it cannot be proved.
    """

    name: ClassVar[str] = "split-layers"

    keep: float = 0.0
    method: Method | Literal["auto"] = "auto"
    energy: float = 0.0
    evbmf: bool = False
    data: str = ""

    def run(self, model: Model, edit: Editor) -> None:
        """Split the main graph's layers, none without options. Raises UsageError for bad ones."""
        self._check()
        if not (self.keep or self.energy or self.evbmf):
            return
        from graphopt.passes.fitting import Settings
        from graphopt.passes.lowrank.factor import factor
        from graphopt.passes.lowrank.split import RULE
        from graphopt.passes.recipe import Stage
        from graphopt.passes.work import sizes_wanted

        settings = Settings()
        with Copy(model, self.data) as copy:
            dense = copy.model()
            if not (wanted := sizes_wanted(dense)):
                return
            ranks = self._ranks(dense, copy.sizes(wanted), copy.feeds, settings)
            chosen = self._chosen(ranks, lambda root: edit.allows(RULE, root))
            if all(option.method is None for option in chosen.values()):
                return
            fitted = Editor(copy.model())
            found = factor(
                dense, fitted, ranks.groups, chosen, copy.feeds, settings, known=ranks.moments
            )
            Stage.between(dense, fitted, splits=found.splits).apply(edit)

    def _ranks(
        self,
        dense: Model,
        shapes: Mapping[str, tuple[int, ...]],
        feeds: Callable[[], Iterator[Feed]] | None,
        settings: Settings,
    ) -> Ranks:
        """What can be chosen; where each layer is looked at by itself, one option of each."""
        from graphopt.passes.lowrank.least import by_energy, by_noise
        from graphopt.passes.lowrank.options import AUTOMATIC, pooled, splittable
        from graphopt.passes.lowrank.table import Ranks, each_group, tabulate

        methods = AUTOMATIC if self.method == "auto" else (self.method,)
        if self.keep:
            return tabulate(dense, shapes, methods, feeds, settings)
        groups = tuple(splittable(Editor(dense), shapes))
        options: dict[str, list[Option]] = {}
        kept: dict[str, Array] = {}
        for group, moments in each_group(dense, groups, feeds, settings, None):
            gram = pooled(group, moments)
            if self.evbmf:
                options[group.root] = [by_noise(group, methods, gram)]
            else:
                options[group.root] = [by_energy(group, methods, gram, self.energy)]
            if len(group.layers) > 1 or not group.first.is_free:
                kept |= moments
        return Ranks(groups, options, 0, kept, {})

    def _chosen(self, ranks: Ranks, allows: Callable[[str], bool]) -> dict[str, Option]:
        """One option of each layer, the dense one where it must not be split."""
        options = {
            g.root: ranks.options[g.root] if allows(g.root) else [g.dense] for g in ranks.groups
        }
        if self.keep:
            return ranks.allocated(self.keep, options)
        return {root: found for root, (found,) in options.items()}

    def _check(self) -> None:
        """Raise UsageError for options that say too much, or nonsense."""
        from graphopt.passes.lowrank.forms import METHODS

        if self.method not in ("auto", *METHODS):
            raise UsageError(f"method {self.method!r}: there are auto, {', '.join(METHODS)}")
        if bool(self.keep) + bool(self.energy) + self.evbmf > 1:
            raise UsageError("split-layers: say how far in one way: keep, energy or evbmf")
        for option, share in (("keep", self.keep), ("energy", self.energy)):
            if not 0 <= share < 1:
                raise UsageError(f"{option} {share}: it is above 0 and below 1")
        if self.evbmf and self.method == "cp":
            raise UsageError("evbmf: it gives ranks of matrices, and cp has none")
