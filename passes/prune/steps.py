"""Pruning as passes, for pipelines of one's own: nothing is judged or timed here.

`graphopt.optimize` does both, and chooses channels by measured time and harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from graphopt.edit import Editor
from graphopt.errors import UsageError
from graphopt.ir import Model
from graphopt.passes.copies import Copy, shapes_of

if TYPE_CHECKING:  # scipy takes half a second: it is for those who prune
    from graphopt.passes.fitting import Recovery
    from graphopt.passes.prune.importance import UnitImportance
    from graphopt.passes.prune.weights import Importance


@dataclass(frozen=True)
class PruneWeights:
    """Set single weights to zero: a share of all, n of every m ("2:4"), or those below a threshold.

    With `data` (as on the command line) the rest is fitted again. Lossy: it cannot be proved.
    """

    name: ClassVar[str] = "prune-weights"

    sparsity: float = 0.0
    nm: str = ""
    block: str = ""
    threshold: float = 0.0
    importance: Importance = "lamp"
    recover: Recovery = "lsq"
    data: str = ""

    def run(self, model: Model, edit: Editor) -> None:
        """Prune the main graph's weights."""
        if not (self.sparsity or self.nm or self.threshold):
            return
        from graphopt.passes.fitting import Settings
        from graphopt.passes.prune.weights import Pattern, Sparsity, prune_weights

        stated = self.nm or self.block
        pattern = Pattern.of(stated) if stated else Pattern()
        share = self.sparsity if not (self.nm or self.threshold) else None
        how = Sparsity(share, self.threshold or None, pattern, self.importance)
        with Copy(model, self.data) as copy:
            prune_weights(copy.model(), edit, how, copy.feeds, Settings(self.recover))


@dataclass(frozen=True)
class PruneChannels:
    """Take out channels, heads and hidden units that are worth a share of the MACs.

    Those that matter least for what they cost go first. With `data` (as on the command line) what
    reads them is fitted again, and MACs are counted at the shapes of its first feed; without, sizes
    that are open count as nothing. Lossy: it cannot be proved.
    """

    name: ClassVar[str] = "prune-channels"

    share: float = 0.0
    importance: UnitImportance = "l2"
    recover: Recovery = "lsq"
    data: str = ""

    def run(self, model: Model, edit: Editor) -> None:
        """Prune the main graph's channels. Raises UsageError for a share that is none."""
        if not 0 <= self.share < 1:
            raise UsageError(f"share {self.share}: it is 0 or more, and below 1")
        if not self.share:
            return
        from graphopt.passes.fitting import Settings, grams
        from graphopt.passes.prune.channels import Choice, choose, prune_channels, steps
        from graphopt.passes.prune.costs import Work
        from graphopt.passes.prune.groups import groups_of
        from graphopt.passes.prune.importance import observed, ranking, readers_of, unit_scores
        from graphopt.passes.work import sizes_wanted

        groups = groups_of(edit)
        with Copy(model, self.data) as copy:
            seen = copy.sweep({*observed(groups, self.importance), *sizes_wanted(model)})
            shapes = {} if seen is None else shapes_of(seen)
            known = {}
            roots = readers_of(edit, groups, self.importance)
            if roots and copy.feeds is not None:
                known = grams(copy.model(), roots, copy.feeds, Settings())
            choices = []
            for group in groups:
                scores = unit_scores(edit, group, self.importance, seen, known)
                order = ranking(scores)
                lost = scores[list(order)].cumsum() / max(float(scores.sum()), math.ulp(0.0))
                harm = _harm(lost)
                choices.append(Choice(group, steps(group), harm, order))
            cut = choose(choices, Work(edit, groups, shapes), self.share)
            prune_channels(copy.model(), edit, cut, copy.feeds, Settings(self.recover))


def _harm(lost: Any) -> Callable[[int], float]:
    """The share of a group's importance that its first units have."""
    return lambda count: float(lost[count - 1]) if count else 0.0
