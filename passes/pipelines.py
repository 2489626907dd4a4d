"""THE list: what each level runs, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Final

from graphopt.errors import UsageError
from graphopt.ir import Model
from graphopt.manager import Pass, parse_pipeline
from graphopt.passes.canonicalize.convert_opset import ConvertOpset
from graphopt.passes.canonicalize.drop_zero_states import DropZeroStates
from graphopt.passes.canonicalize.fix_shapes import FixShapes
from graphopt.passes.canonicalize.fold_constants import FoldConstants
from graphopt.passes.canonicalize.fold_lookups import FoldLookups
from graphopt.passes.canonicalize.freeze_parameters import FreezeParameters
from graphopt.passes.canonicalize.hoist_invariants import HoistInvariants
from graphopt.passes.canonicalize.inline_functions import InlineFunctions
from graphopt.passes.canonicalize.inline_if import InlineIf
from graphopt.passes.canonicalize.lift_constants import LiftConstants
from graphopt.passes.canonicalize.merge_concats import MergeConcats
from graphopt.passes.canonicalize.merge_duplicates import MergeDuplicates
from graphopt.passes.canonicalize.move_transposes import MoveTransposes
from graphopt.passes.canonicalize.refute_branches import RefuteBranches
from graphopt.passes.canonicalize.remove_dead import RemoveDead
from graphopt.passes.canonicalize.simplify_shapes import SimplifyShapes
from graphopt.passes.canonicalize.strip_traces import StripTraces
from graphopt.passes.fusion.merge_projections import MergeProjections
from graphopt.passes.lowrank.embeddings import SplitEmbeddings
from graphopt.passes.lowrank.steps import SplitLayers
from graphopt.passes.plugins.graphsurgeon import Graphsurgeon
from graphopt.passes.prune.sparse import Densify, Sparsify, has_sparse
from graphopt.passes.prune.steps import PruneChannels, PruneWeights
from graphopt.passes.rules import Canonicalize, Fuse

PASSES: Final[dict[str, type[Pass]]] = {
    kind.name: kind
    for kind in (
        FixShapes,
        ConvertOpset,
        InlineFunctions,
        FreezeParameters,
        LiftConstants,
        InlineIf,
        RefuteBranches,
        HoistInvariants,
        Canonicalize,
        FoldConstants,
        FoldLookups,
        MoveTransposes,
        Fuse,
        MergeProjections,
        MergeDuplicates,
        MergeConcats,
        SimplifyShapes,
        DropZeroStates,
        RemoveDead,
        StripTraces,
        Graphsurgeon,
        PruneWeights,
        PruneChannels,
        SplitLayers,
        SplitEmbeddings,
        Sparsify,
        Densify,
    )
}

# Readers that are dead, and values computed twice, keep rules from firing: they go before. What
# one pass finds, another goes on from; a pass that finds nothing is not run again until one does.
_ROUND: Final = (
    "fold-constants, inline-if, lift-constants, hoist-invariants, remove-dead, merge-duplicates, "
    "refute-branches, canonicalize, simplify-shapes, merge-concats, drop-zero-states, "
    "move-transposes, fold-lookups"
)
_ROUNDS: Final = ", ".join([_ROUND] * 3)
_PLAIN: Final = f"inline-functions, freeze-parameters, lift-constants, {_ROUNDS}"
_CLEANUP: Final = f"{_PLAIN}, fold-constants, merge-duplicates, remove-dead, strip-traces"
_FUSE: Final = (
    f"{_PLAIN}, fuse, {_ROUND}, merge-projections, fuse, move-transposes, "
    "fold-constants, merge-duplicates, remove-dead, strip-traces"
)
LEVELS: Final[dict[int, str]] = {0: "", 1: _CLEANUP, 2: _FUSE, 3: _FUSE}


def pipeline(
    level: int,
    passes: str | None,
    *,
    keep_overridable: bool = False,
    shapes: Mapping[str, Sequence[int]] | None = None,
    opset: int | None = None,
) -> list[Pass]:
    """The passes of a level, or those that the text names instead. Raises UsageError.

    Fixing `shapes` of inputs and converting to an `opset` comes first, so that the rest sees both.
    """
    first: list[Pass] = [FixShapes.of(shapes)] if shapes else []
    if opset is not None:
        first.append(ConvertOpset(opset))
    if passes is not None:
        return [*first, *parse_pipeline(passes, PASSES)]
    if level not in LEVELS:
        raise UsageError(f"level {level}: there are levels 0 to {max(LEVELS)}")
    chosen = parse_pipeline(LEVELS[level], PASSES)
    if keep_overridable:
        chosen = [step for step in chosen if not isinstance(step, FreezeParameters)]
    return [*first, *chosen]


def around_sparse(model: Model, steps: Sequence[Pass], *, dense: bool) -> list[Pass]:
    """The passes of a level as they suit the weights of a model that came in sparse.

    What folding and fusing made dense of them becomes sparse again at the end, so that the file
    does not grow. Where they have to be `dense`, as for int8, they are from the start.
    """
    if not has_sparse(model):
        return list(steps)
    return [Densify(), *steps] if dense else [*steps, Sparsify()]


def requested(steps: Sequence[Pass]) -> list[Pass]:
    """The passes at the start that do what a user asked for by name, not what is found to help."""
    return list(takewhile(lambda step: isinstance(step, FixShapes | ConvertOpset), steps))


def fixed_shapes(steps: Sequence[Pass]) -> dict[str, tuple[int, ...]]:
    """Shapes by input that the passes fix; -1 where they leave a size open. Raises UsageError."""
    found: dict[str, tuple[int, ...]] = {}
    for step in steps:
        if isinstance(step, FixShapes):
            found |= step.by_input
    return found
