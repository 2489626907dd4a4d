"""Attributes of drawn patterns: near-misses, other spellings, and free ones changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper

from graphopt.match import input_slot, python_value
from graphopt.operators import ATTRIBUTE_INPUTS, AXES_OF_OUTPUT
from graphopt.rules import Rule
from tests.rule_cases import Draft, Unbuildable, make_attribute, schema_of, stored

WORDS: Final[dict[str, tuple[str, ...]]] = {
    "approximate": ("none", "tanh"),
    "auto_pad": ("NOTSET", "SAME_LOWER", "SAME_UPPER", "VALID"),
    "coordinate_transformation_mode": ("align_corners", "asymmetric", "half_pixel"),
    "mode": ("constant", "edge", "linear", "nearest", "reflect", "DCR", "CRD"),
    "nearest_mode": ("ceil", "floor", "round_prefer_floor"),
    "reduction": ("add", "mul", "none"),
}
_AXES: Final = ("axis", "axes")
_KIND: Final = onnx.AttributeProto
_COUNTS: Final = ("batch_dims", "blocksize", "group", "num_groups")  # other integers are flags
MOST: Final = 4  # values tried of one attribute

Context = tuple[str, Draft, bool | None]


def contexts(rule: Rule, draft: Draft, refused: bool | None) -> Iterator[Context]:
    """Each attribute of each operator of the pattern in other values."""
    types = draft.types()
    for literal, value in draft.literals.items():
        for key, changed in _literal(draft, literal, value.value):
            yield key, changed, refused
    for index, node in draft.drawn.items():
        required = rule.nodes[index].attributes
        known = types.get(node.input[0]) if node.input else None
        rank = known.rank if known is not None else None
        for name in _names(node.op_type, draft.choice.opset):
            if name in required and required[name] is None:
                continue
            current = _current(draft, index, name)
            if name in required:
                yield from _default_left_out(draft, index, name, required[name])
            if node.op_type in AXES_OF_OUTPUT and rank is not None and current:
                rank += len(current)
            if rank is not None and current is not None and name in _AXES:
                changed = _changed(draft, index, name, _respelled(current, rank))
                if changed is not None:
                    yield f"{name} of {index} counted from the other end", changed, True
            for value in _others(draft, index, name, current, rank):
                changed = _settled(_changed(draft, index, name, value), index)
                if changed is not None:
                    what = f"{name} of {index} is {value}"
                    yield what, changed, refused if name in required else None


def _settled(draft: Draft | None, index: int) -> Draft | None:
    """The draft if ONNX allows it, or else with the least further change that makes it allowed."""
    if draft is None or is_valid(draft):
        return draft
    square = draft.copy()
    for name, array in draft.inputs.items():
        if array.ndim > 1 and array.dtype.kind == "f":
            shape = (array.shape[-1],) * array.ndim
            square.inputs[name] = np.random.default_rng(3).normal(size=shape).astype(array.dtype)
    complete = draft.copy()
    node = complete.drawn[index]
    outputs = len(schema_of(node.op_type, draft.choice.opset).outputs)
    node.output.extend(f"{node.output[0]}_more{i}" for i in range(len(node.output), outputs))
    return next((other for other in (square, complete) if is_valid(other)), None)


def is_valid(draft: Draft) -> bool:
    """True for a model that ONNX allows, as far as its checker can tell."""
    proto = draft.proto(typed=False)
    try:
        onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
        check(draft.proto())
        types = draft.types()
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, Unbuildable):
        return False
    return not (
        _counts_back(draft)
        and not all(root in types and types[root].shape is not None for root in draft.roots)
    )


def _counts_back(draft: Draft) -> bool:
    """Negative axes in an opset in which most operators had none, though runtimes took them."""
    if draft.choice.opset >= 11:
        return False
    stated = [a for node in draft.drawn.values() for a in node.attribute if a.name in _AXES]
    return any(axis < 0 for a in stated for axis in np.atleast_1d(python_value(a)))


def check(proto: onnx.ModelProto) -> None:
    """ONNX's checker, but for its demand that inputs and outputs state a rank."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for info in (*copy.graph.input, *copy.graph.output):
        info.type.tensor_type.shape.SetInParent()
    onnx.checker.check_model(copy)


def _literal(draft: Draft, name: str, value: float) -> Iterator[tuple[str, Draft]]:
    array = draft.constants[name]
    near = [value * 1.01 if value else 0.01, -value if value else -0.01]
    if array.dtype.kind != "f":
        near = [value + 1, value - 1] if array.dtype.kind == "i" else [not value]
    for number in near:
        changed = draft.copy()
        changed.constants[name] = np.asarray(number, array.dtype)
        yield f"{name} is {number:.4g} instead of {value:.4g}", changed


def _names(op: str, opset: int) -> list[str]:
    names = list(schema_of(op, opset).attributes)
    became = [name for other, name in ATTRIBUTE_INPUTS if other == op]
    return names + [n for n in became if n not in names and input_slot(op, n, opset) is not None]


def _current(draft: Draft, index: int, name: str) -> Any:
    """The value that the draft states, or the operator's default."""
    for constant, place in draft.stated.items():
        if place == (index, name):
            return draft.constants[constant].tolist()
    node = draft.drawn[index]
    for attribute in node.attribute:
        if attribute.name == name:
            return python_value(attribute)
    schema = schema_of(node.op_type, draft.choice.opset)
    default = schema.attributes[name].default_value if name in schema.attributes else None
    return python_value(default) if default is not None and default.type else None


def _changed(draft: Draft, index: int, name: str, value: Any) -> Draft | None:
    changed = draft.copy()
    node = changed.drawn[index]
    opset = draft.choice.opset
    slot = input_slot(node.op_type, name, opset)
    for constant, place in draft.stated.items():
        if place == (index, name):
            kind = changed.constants[constant].dtype
            changed.constants[constant] = np.asarray(value, kind)
            return changed
    if slot is not None:
        if slot < len(node.input) and node.input[slot]:
            return None  # a parameter of the rule
        node.input.extend([""] * (slot + 1 - len(node.input)))
        constant = f"{node.op_type.lower()}{index}_{name}"
        node.input[slot] = constant
        changed.constants[constant] = stored(np.asarray(value), draft.choice.storage)
        changed.stated[constant] = index, name
        return changed
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.append(make_attribute(schema_of(node.op_type, opset), name, value))
    return changed


def _default_left_out(draft: Draft, index: int, name: str, wanted: Any) -> Iterator[Context]:
    """Stating a default and leaving it out are the same."""
    node = draft.drawn[index]
    schema = schema_of(node.op_type, draft.choice.opset)
    if name not in schema.attributes:
        return
    default = schema.attributes[name].default_value
    if default.type and np.array_equal(python_value(default), wanted):
        changed = draft.copy()
        kept = [a for a in changed.drawn[index].attribute if a.name != name]
        del changed.drawn[index].attribute[:]
        changed.drawn[index].attribute.extend(kept)
        yield f"{name} of {index} is left out", changed, True


def _respelled(axes: Any, rank: int) -> Any:
    if isinstance(axes, list):
        return [_respelled(axis, rank) for axis in axes]
    return axes - rank if axes >= 0 else axes + rank


def _others(draft: Draft, index: int, name: str, current: Any, rank: int | None) -> list[Any]:
    """A few other values that the attribute may have."""
    node = draft.drawn[index]
    schema = schema_of(node.op_type, draft.choice.opset)
    kind: object = schema.attributes[name].type if name in schema.attributes else None
    number = int(kind) if kind is not None else 0  # type: ignore[call-overload]
    if name in _AXES and rank is not None:
        return _other_axes(current, rank, many=name == "axes")
    if name == "perm" and rank is not None:
        orders = [list(order) for order in itertools.permutations(range(rank))]
        return [o for o in orders if o != (current or orders[-1])][: MOST + 2]
    if number == _KIND.STRING:
        return [word for word in WORDS.get(name, ()) if word != current]
    if name == "to":
        kinds = ("FLOAT", "INT64", "INT32", "DOUBLE", "BOOL")
        return [k for kind in kinds if (k := helper.TensorProto.DataType.Value(kind)) != current]
    if number == _KIND.INT or isinstance(current, int):
        return [v for v in (0, 1, *[2] * (name in _COUNTS)) if v != current]
    if number == _KIND.FLOAT or name in ("value", "min", "max", "ratio"):
        base = float(current) if current else 0.0
        return [v for v in (base * 1.01, 0.5, base + 1.0) if v != base]
    return _other_lists(name, current, rank)


def _other_axes(current: Any, rank: int, *, many: bool) -> list[Any]:
    if not many:
        same = None if current is None else current % rank
        return [axis for axis in range(rank) if axis != same]
    same = None if current is None else sorted(axis % rank for axis in current)
    options = [list(o) for n in (1, 2) for o in itertools.combinations(range(rank), n)]
    return [option for option in options if option != same][: MOST + 2]


def _other_lists(name: str, current: Any, rank: int | None) -> list[Any]:
    if not isinstance(current, list | tuple) or not current:
        if rank is None or rank < 3:
            return []
        n = rank - 2
        fresh: dict[str, Sequence[Any]] = {
            "strides": ([2, *[1] * (n - 1)], [*[1] * (n - 1), 2]),
            "dilations": ([2, *[1] * (n - 1)], [*[1] * (n - 1), 2]),
            "pads": ([1, *[0] * (2 * n - 1)], [0] * (2 * n - 1) + [1], list(range(2 * n))),
        }
        return list(fresh.get(name, ()))
    near = []
    for at in range(len(current)):
        for step in (1, -1):
            other = list(current)
            if abs(other[at]) < 1 << 31:  # a limit may stand for the end
                other[at] += step
                near.append(other)
    if list(current)[::-1] != list(current):
        near.append(list(current)[::-1])
    return near[: 5 * MOST]
