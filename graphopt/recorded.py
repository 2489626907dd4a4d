"""Decisions of int8: from what was found to the file, and from the file to the same bytes again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from graphopt import report
from graphopt.compress import Outcome
from graphopt.decisions import Decisions, RegionDecision, TensorQuantization
from graphopt.edit import Editor
from graphopt.errors import UsageError
from graphopt.int8_regions import AS_IT_RUNS, BY_ROW, BY_WEIGHTS, NARROW, Choice
from graphopt.ir import Model, Node
from graphopt.kernels.affine import Affine
from graphopt.passes.quantize.emission import Options
from graphopt.passes.quantize.recipe import DYNAMIC, HALF, STATIC, TABLE, WEIGHTS, Recipe
from graphopt.passes.quantize.units import Unit
from graphopt.regions import Region, StaticType
from graphopt.search import Trial
from graphopt.signature import signature
from graphopt.targets import has_vnni

ORIGINAL: Final = "original"
TARGET: Final = "ort-cpu"
_WEIGHTS: Final = "weights."  # before the names of the options of how weights are quantized
_CHOICES: Final = frozenset({STATIC, DYNAMIC, *WEIGHTS.values(), TABLE, HALF})
_FULL_BITS: Final = 8

Setting = str | int | float | bool | None


def blank_decisions(
    source_sha256: str, fingerprint: str, options: Mapping[str, Setting]
) -> Decisions:
    """Decisions about nothing yet: of the lossless model with this fingerprint, as asked for."""
    host = report.host()
    return Decisions(
        graphopt=report.version(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source_sha256=source_sha256,
        lossless_fingerprint=fingerprint,
        host=host,
        versions=host.versions,
        target=TARGET,
        features=host.features,
        options=dict(options),
        regions=[],
    )


def with_regions(decisions: Decisions, outcome: Outcome, trial: Trial[Recipe]) -> Decisions:
    """All that the bytes of int8 depend on, and why it was chosen, put to the decisions."""
    recipe = trial.recipe
    weights = {_WEIGHTS + name: value for name, value in _settings(recipe.weights).items()}
    more: dict[str, Any] = {
        "options": {**decisions.options, **weights},
        "candidate": trial.name,
        "found": trial.verdict.text,
        "regions": list(_regions(outcome, trial)),
        "tensors": {name: _stated(affine) for name, affine in recipe.tensors.items()},
        "biases": {
            root: [float(number) for number in np.asarray(values).reshape(-1)]
            for root, values in recipe.corrections.items()
        },
    }
    return decisions.model_copy(update=more)


def has_regions(decisions: Decisions) -> bool:
    """True where int8 was decided on, if only to leave all in floats."""
    others = (decisions.pruning, decisions.low_rank, decisions.codebook)
    is_alone = all(other is None for other in others)
    return is_alone or any(name.startswith(_WEIGHTS) for name in decisions.options)


def recipe_of(decisions: Decisions, path: Path) -> Recipe:
    """What the decisions say is to be done. Raises UsageError for what no recipe can be."""
    if decisions.target != TARGET:
        raise _damage(path, f"made for the target {decisions.target!r}")
    options = {r.root: r.option for r in decisions.regions if r.option != ORIGINAL}
    if unknown := sorted({*options.values()} - _CHOICES):
        raise _damage(path, f"there is no option {unknown[0]!r}")
    stated = {
        name.removeprefix(_WEIGHTS): value
        for name, value in decisions.options.items()
        if name.startswith(_WEIGHTS)
    }
    if sorted(stated) != sorted(_settings(Options())):
        raise _damage(path, f"weights are stated by {', '.join(sorted(stated)) or 'nothing'}")
    settings: dict[str, Any] = dict(stated)
    corrections = {root: np.asarray(v, np.float32) for root, v in decisions.biases.items()}
    tensors = {name: _affine(path, name, t) for name, t in decisions.tensors.items()}
    return Recipe(options, tensors, corrections, Options(**settings))


def applied_or_refused(apply: Callable[[Path], Model], base: Path, path: Path | None) -> Model:
    """The model that a recipe makes. Raises UsageError where that of a file does not fit."""
    try:
        return apply(base)
    except (LookupError, TypeError, ValueError) as error:  # its numbers come from the file
        if path is None:
            raise
        said = f"{error} is missing" if type(error) is KeyError else str(error)
        raise _damage(path, " ".join(said.split())) from error


def check_lossless(decisions: Decisions, fingerprint: str, path: Path) -> None:
    """Raise UsageError where the passes did not give the model that the choices are for."""
    if fingerprint == decisions.lossless_fingerprint:
        return
    asked = {"level", "passes", "shapes", "opset", "keep_overridable"}
    with_ = ", ".join(
        f"{name} {value}"
        for name, value in sorted(decisions.options.items())
        if name in asked and value not in (None, False, "")
    )
    raise UsageError(
        f"decisions {path}: the passes give another model here than what they were made for, by "
        f"graphopt {decisions.graphopt} with {with_ or 'its defaults'}"
    )


def replay_notes(decisions: Decisions, path: Path) -> tuple[list[str], list[str]]:
    """Warnings, and notes, about the differences between that machine and this one."""
    warnings, notes = [], []
    bits = decisions.options.get(f"{_WEIGHTS}bits")
    if bits == _FULL_BITS and not has_vnni():
        warnings.append(
            f"decisions {path}: made for a CPU that multiplies 8-bit weights exactly "
            f"({decisions.host.cpu}); this one may saturate, so the result can be worse here"
        )
    if bits not in (None, _FULL_BITS) and has_vnni():
        notes.append(f"made for a CPU without VNNI: weights have {bits} bits, 8 would do here")
    here = report.host().versions
    for name, version in sorted(decisions.versions.items()):
        if here.get(name) != version:
            notes.append(f"made with {name} {version}, here it is {here.get(name, 'missing')}")
    return warnings, notes


# -- regions ---------------------------------------------------------------------------------------


def _regions(outcome: Outcome, trial: Trial[Recipe]) -> Iterator[RegionDecision]:
    """Every unit, and what else was chosen; units in order of computation."""
    candidates, recipe, choice = outcome.candidates, trial.recipe, Choice(outcome, trial)
    known = _known(candidates.model)
    left = set(choice.left())
    static = recipe.taking(STATIC)
    for unit in candidates.units:
        if unit.root in static or unit in left:
            yield _unit(outcome, choice, unit, known, is_static=unit.root in static)
    others = [(DYNAMIC, candidates.products, AS_IT_RUNS), (TABLE, candidates.tables, BY_ROW)]
    others += [(option, candidates.weighted, BY_WEIGHTS) for option in WEIGHTS.values()]
    for option, found, why in others:
        for root in sorted(recipe.taking(option)):
            yield _node(root, found[root], option, why, known)
    for name in sorted(recipe.taking(HALF)):
        yield RegionDecision(root=name, nodes=[], signature="", option=HALF, reason=NARROW)


def _unit(
    outcome: Outcome,
    choice: Choice,
    unit: Unit,
    known: Mapping[str, StaticType],
    *,
    is_static: bool,
) -> RegionDecision:
    before, after = outcome.candidates.milliseconds(unit.root)
    return RegionDecision(
        root=unit.root,
        nodes=[_first(node) for node in unit.nodes],
        signature=signature(Region(unit.root, unit.nodes), known),
        option=STATIC if is_static else ORIGINAL,
        reason=choice.why(unit),
        ms_before=before,
        ms_after=after,
        sqnr_db=choice.sqnr_db([unit.root]) if is_static else None,
    )


def _node(
    root: str, node: Node, option: str, why: str, known: Mapping[str, StaticType]
) -> RegionDecision:
    return RegionDecision(
        root=root,
        nodes=[_first(node)],
        signature=signature(Region(root, (node,)), known),
        option=option,
        reason=why,
    )


def _first(node: Node) -> str:
    return next(value.name for value in node.outputs if value is not None)


def _known(model: Model) -> dict[str, StaticType]:
    """Types of the main graph's values whose shapes are known without running the model."""
    types = Editor(model).types
    found = {}
    for value in model.graph.values.values():
        kind = types[value]
        if kind is None or kind.shape is None or kind.data_type == onnx.TensorProto.UNDEFINED:
            continue
        shape = tuple(size for size in kind.shape if isinstance(size, int))
        if len(shape) == len(kind.shape):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.data_type)
            found[value.name] = StaticType(dtype, shape)
    return found


# -- numbers ---------------------------------------------------------------------------------------


def rounded(recipe: Recipe) -> Recipe:
    """The recipe as the file holds it, where numbers have 32 bits: it gives the same bytes."""
    corrections = {root: np.asarray(v, np.float32) for root, v in recipe.corrections.items()}
    return dataclasses.replace(recipe, corrections=corrections)


def _stated(affine: Affine) -> TensorQuantization:
    return TensorQuantization(
        scale=affine.scale.tolist(),
        zero_point=affine.zero_point.tolist(),
        dtype=affine.dtype.name,
        axis=affine.axis,
    )


def _affine(path: Path, name: str, stated: TensorQuantization) -> Affine:
    try:
        zero = np.asarray(stated.zero_point)
        affine = Affine(np.asarray(stated.scale, np.float32), zero, np.dtype(stated.dtype))
        if affine.dtype != np.uint8 or (affine.zero_point != zero).any():
            raise ValueError(f"{stated.zero_point} is no zero point of {stated.dtype}")
    except (TypeError, ValueError, OverflowError) as error:
        raise _damage(path, f"{name!r}: {error}") from error
    return affine


def _settings(weights: Options) -> dict[str, Setting]:
    return dict(dataclasses.asdict(weights))


def _damage(path: Path, what: str) -> UsageError:
    return UsageError(f"decisions {path}: cannot be replayed: {what}")
