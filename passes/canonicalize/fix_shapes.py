"""Inputs of sizes that are open, fixed to those that the model will meet."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final
from urllib.parse import quote, unquote

import onnx

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.errors import UsageError
from graphopt.importer import build
from graphopt.ir import Model, Value
from graphopt.shapes import Types

OPEN: Final = -1  # a size that stays as it is
_SIZES: Final = re.compile(r"(?:-?\d+(?:x-?\d+)*)?")
_PLAIN: Final = "/:.[]()@!$&*+|~^#'\"?"  # what a name may hold besides letters, digits, _ and -


@dataclass(frozen=True)
class FixShapes:
    """Open sizes of inputs => those in `shapes`, as `image:1x3x224x224;mask:1x-1` (-1: stays open).

    Whatever a name holds of `,;{}%` or blanks is written as in a URL. The declared types of other
    values follow where they would no longer be true.
    """

    name: ClassVar[str] = "fix-shapes"
    shapes: str = ""

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]]) -> FixShapes:
        """The pass for these shapes by input."""
        parts = (f"{quote(name, _PLAIN)}:{'x'.join(map(str, s))}" for name, s in shapes.items())
        return cls(";".join(parts))

    @property
    def by_input(self) -> dict[str, tuple[int, ...]]:
        """The shapes by input. Raises UsageError for text that is none."""
        found: dict[str, tuple[int, ...]] = {}
        for part in filter(None, (part.strip() for part in self.shapes.split(";"))):
            name, colon, sizes = part.rpartition(":")
            if not colon or not _SIZES.fullmatch(sizes):
                raise UsageError(f"passes: {self.name}: cannot read {part!r}; write name:1x3x-1")
            found[unquote(name)] = tuple(int(size) for size in sizes.split("x") if size)
        return found

    def run(self, model: Model, edit: Editor) -> None:
        frozen = model.graph.inputs_are_frozen
        inputs = {v.name: v for v in model.graph.inputs if not (frozen and v.weight)}
        fixed: dict[str, onnx.TypeProto] = {}
        for name, sizes in self.by_input.items():
            if name not in inputs:
                known = ", ".join(map(repr, inputs)) or "none"
                raise UsageError(f"shape of {name!r}: there is no such input; there are {known}")
            kind = _narrowed(inputs[name], sizes)
            if kind != inputs[name].declared_type and edit.allows(self.name, name):
                fixed[name] = kind
        if not fixed:
            return
        before = {name: _text(name, inputs[name].declared_type) for name in fixed}
        edit.adopt(_declared(model, fixed))
        edit.narrow(fixed)
        for name, kind in fixed.items():
            edit.record(self.name, name, before[name], _text(name, kind))


def _narrowed(value: Value, sizes: Sequence[int]) -> onnx.TypeProto:
    """The declared type with these sizes. Raises UsageError where it says otherwise."""
    declared, what = value.declared_type, f"shape of {value.name!r}"
    stated = "x".join(map(str, sizes)) or "a scalar"
    if declared is None or not declared.tensor_type.elem_type:
        raise UsageError(f"{what}: the input is no tensor")
    if wrong := [size for size in sizes if size < 1 and size != OPEN]:
        raise UsageError(f"{what}: {stated} has the size {wrong[0]}; sizes are positive, -1 keeps")
    kind = onnx.TypeProto()
    kind.CopyFrom(declared)
    shape = kind.tensor_type.shape
    if not kind.tensor_type.HasField("shape"):
        shape.dim.extend(onnx.TensorShapeProto.Dimension() for _ in sizes)
        kind.tensor_type.shape.SetInParent()  # also of rank 0
    if len(shape.dim) != len(sizes):
        raise UsageError(
            f"{what}: {stated} has {len(sizes)} sizes, the input {_text('', declared)}"
        )
    held = value.weight.shape if value.weight is not None else ()  # that of its default
    for axis, (dim, size) in enumerate(zip(shape.dim, sizes, strict=True)):
        if size == OPEN:
            continue
        for found in (dim.dim_value, *held[axis : axis + 1]):
            if found > 0 and found != size:
                raise UsageError(f"{what}: axis {axis} is {found} in the model, not {size}")
        dim.dim_value = size
    return kind


def _declared(model: Model, fixed: Mapping[str, onnx.TypeProto]) -> Model:
    """The model with these types of inputs, and what it says of other values made true again."""
    proto = onnx.ModelProto()
    proto.CopyFrom(exporter.to_hollow(model))
    for info in proto.graph.input:
        if info.name in fixed:
            info.type.CopyFrom(fixed[info.name])
    made = build(proto, model.store, model.label)
    types = Types(made)
    for graph in made.graphs():
        for info in (*graph.proto.output, *graph.proto.value_info):
            value = graph.values.get(info.name)
            known = types[value] if value is not None else None
            if known is not None and known.shape is not None:
                _correct(info.type, known.shape)
    return made


def _correct(kind: onnx.TypeProto, shape: Sequence[int | str | None]) -> None:
    """State the sizes that are proven; the others stay as declared, where the rank is right."""
    tensor = kind.tensor_type
    if not tensor.HasField("shape"):
        return
    if len(tensor.shape.dim) != len(shape):
        tensor.shape.ClearField("dim")
        tensor.shape.dim.extend(onnx.TensorShapeProto.Dimension() for _ in shape)
    for dim, size in zip(tensor.shape.dim, shape, strict=True):
        if isinstance(size, int) and dim.dim_value != size:
            dim.dim_value = size


def _text(name: str, kind: onnx.TypeProto | None) -> str:
    """name: float32[N,3], for messages and the account."""
    if kind is None:
        return name
    element = onnx.TensorProto.DataType.Name(kind.tensor_type.elem_type).lower()
    dims: Iterable[str] = (
        str(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?")
        for dim in kind.tensor_type.shape.dim
    )
    shape = f"[{','.join(dims)}]" if kind.tensor_type.HasField("shape") else ""
    return f"{name}: {element}{shape}" if name else f"is {element}{shape}"
