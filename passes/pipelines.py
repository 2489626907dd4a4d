"""THE list: what each level runs, in order."""

from __future__ import annotations

from typing import Final

from graphopt.errors import UsageError
from graphopt.manager import Pass, parse_pipeline
from graphopt.passes.canonicalize.freeze_parameters import FreezeParameters
from graphopt.passes.canonicalize.remove_dead import RemoveDead
from graphopt.passes.canonicalize.remove_identity import RemoveIdentity
from graphopt.passes.plugins.graphsurgeon import Graphsurgeon

PASSES: Final[dict[str, type[Pass]]] = {
    kind.name: kind for kind in (FreezeParameters, RemoveIdentity, RemoveDead, Graphsurgeon)
}

_CLEANUP: Final = "freeze-parameters, remove-identity, remove-dead"
LEVELS: Final[dict[int, str]] = {0: "", 1: _CLEANUP, 2: _CLEANUP, 3: _CLEANUP}


def pipeline(level: int, passes: str | None, *, keep_overridable: bool = False) -> list[Pass]:
    """The passes of a level, or those that the text names instead. Raises UsageError."""
    if passes is not None:
        return parse_pipeline(passes, PASSES)
    if level not in LEVELS:
        raise UsageError(f"level {level}: there are levels 0 to {max(LEVELS)}")
    chosen = parse_pipeline(LEVELS[level], PASSES)
    if keep_overridable:
        chosen = [step for step in chosen if not isinstance(step, FreezeParameters)]
    return chosen
