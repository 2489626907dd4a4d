"""Concrete graphs from the pattern and the samples of a rule.

A `Draft` is the pattern drawn once: one alternative, one operand order, one opset, optional inputs
there or not. `tests.rule_choices` says which of them are drawn, `tests.rule_contexts` puts them
into hostile surroundings, `tests.rule_runs` runs many of them at once.
"""

from __future__ import annotations

import copy
import functools
import itertools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from graphopt.match import default_of, input_slot
from graphopt.operators import FORWARD_AXES
from graphopt.proofs import TensorType
from graphopt.rules import Const, Either, Literal, Output, Rule, Sample, Variable, Vars
from graphopt.shapes import from_proto

OPEN_SIZES: Final = (2, 3, 5, 7)
STORAGES: Final = {
    "float32": np.float32,
    "float16": np.float16,
    "float64": np.float64,
    "int64": np.int64,
}

Array = NDArray[Any]
Options = Mapping[int, int]  # id of an Either -> which option


class Unbuildable(Exception):
    """The operators of this opset do not have what the pattern or the sample states."""


@dataclass(frozen=True)
class Choice:
    """One way to draw the pattern."""

    opset: int
    options: Options = field(hash=False)
    root: int = 0
    sample: int = 0
    swapped: frozenset[int] = frozenset()  # commutative nodes with their operands exchanged
    left_out: frozenset[str] = frozenset()  # optional parameters
    storage: str = "float32"

    def __str__(self) -> str:
        parts = [f"opset {self.opset}", f"sample {self.sample}"]
        if self.options or self.root:
            parts.append("way " + "".join(map(str, (self.root, *self.options.values()))))
        parts += [f"swapped {sorted(self.swapped)}"] * bool(self.swapped)
        parts += [f"without {', '.join(sorted(self.left_out))}"] * bool(self.left_out)
        parts += [self.storage] * (self.storage != "float32")
        return ", ".join(parts)


@dataclass
class Draft:
    """A small graph around one drawn pattern. Names are free of prefixes until it is merged."""

    choice: Choice
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    drawn: dict[int, onnx.NodeProto] = field(default_factory=dict)  # of the pattern, by index
    constants: dict[str, Array] = field(default_factory=dict)
    inputs: dict[str, Array] = field(default_factory=dict)  # with what they are fed
    shapes: dict[str, tuple[int | str, ...] | None] = field(default_factory=dict)  # if not its own
    overridable: set[str] = field(default_factory=set)
    outputs: list[str] = field(default_factory=list)
    roots: list[str] = field(default_factory=list)
    literals: dict[str, Literal] = field(default_factory=dict)
    stated: dict[str, tuple[int, str]] = field(default_factory=dict)  # input -> node, attribute
    reader: str = "Identity"  # an operator that the rule does not know

    def copy(self) -> Draft:
        return copy.deepcopy(self, {id(used): used for used in self.literals.values()})

    @property
    def interior(self) -> list[str]:
        """Values inside the pattern: everything that it computes but its root."""
        return [
            name
            for node in self.drawn.values()
            for name in node.output
            if name and name not in self.roots
        ]

    def types(self) -> dict[str, TensorType]:
        """What inference says of every value."""
        found = onnx.shape_inference.infer_shapes(self.proto(typed=False), data_prop=True)
        infos = (*found.graph.value_info, *found.graph.input)
        known = {info.name: from_proto(info.type) for info in infos}
        for name, array in self.constants.items():
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            known[name] = TensorType(kind, array.shape)
        return {name: kind for name, kind in known.items() if kind is not None}

    def graph(self, prefix: str = "", *, typed: bool = True) -> onnx.GraphProto:
        """The graph, every name with the prefix. Outputs state their element type only."""
        outputs = []
        if typed:
            types = self.types()
            if missing := set(self.outputs) - set(types):
                raise Unbuildable(f"nothing is inferred of {', '.join(sorted(missing))}")
            outputs = [
                helper.make_tensor_value_info(name, types[name].data_type, None)
                for name in self.outputs
            ]
        declared = [
            helper.make_tensor_value_info(
                name,
                helper.np_dtype_to_tensor_dtype(array.dtype),
                self.declared(name, array),
            )
            for name, array in itertools.chain(
                self.inputs.items(), ((n, self.constants[n]) for n in sorted(self.overridable))
            )
        ]
        weights = [numpy_helper.from_array(a, name) for name, a in self.constants.items()]
        made = helper.make_graph(self.nodes, "g", declared, outputs, weights)
        _add_prefix(made, prefix)
        return made

    def declared(self, name: str, array: Array) -> tuple[int | str, ...] | None:
        """The shape that an input states: as the sample does, as long as that fits what is fed."""
        stated = self.shapes.get(name, array.shape)
        if stated is None:
            return None
        fits = len(stated) == array.ndim and all(
            isinstance(size, str) or size == fed
            for size, fed in zip(stated, array.shape, strict=True)
        )
        return stated if fits else array.shape

    def proto(self, *, typed: bool = True) -> onnx.ModelProto:
        """A model of this draft alone."""
        imports = [helper.make_opsetid("", self.choice.opset)]
        made = helper.make_model(self.graph(typed=typed), opset_imports=imports)
        made.ir_version = 10
        return made

    def fresh(self, base: str) -> str:
        """A name that nothing has."""
        used = {name for node in self.nodes for name in (*node.output, *node.input)}
        used |= set(self.inputs) | set(self.constants)
        return next(n for i in itertools.count() if (n := f"{base}_{i}" if i else base) not in used)

    def read(self, name: str, base: str = "read") -> str:
        """Let one more node read the value, and its result be an output."""
        made = self.fresh(base)
        self.nodes.append(helper.make_node(self.reader, [name], [made]))
        self.outputs.append(made)
        return made


def draw(rule: Rule, choice: Choice, sample: Sample | None = None) -> Draft:
    """Draw the pattern. Raises Unbuildable."""
    return _Drawing(rule, choice, sample or rule.samples[choice.sample]).draft


class _Drawing:
    def __init__(self, rule: Rule, choice: Choice, sample: Sample) -> None:
        self.rule = rule
        self.choice = choice
        self.sample = sample
        self.draft = Draft(choice, reader=_reader(rule))
        self.names: dict[str, list[str]] = {}
        self.sizes: dict[str, int] = {}
        root = rule.roots[choice.root]
        self.draft.roots = self.node(root.index)
        self.wrap_inputs()
        for number, name in enumerate(self.draft.roots):
            self.draft.read(name, f"y{number}")

    def wrap_inputs(self) -> None:
        """A node between each input and the pattern, so that every value has a producer."""
        for name in list(self.draft.inputs):
            array = self.draft.inputs.pop(name)
            self.draft.inputs[f"{name}_fed"] = unread(self.draft.reader, array)
            wrapper = helper.make_node(self.draft.reader, [f"{name}_fed"], [name])
            self.draft.nodes.insert(0, wrapper)

    def node(self, index: int) -> list[str]:
        pattern = self.rule.nodes[index]
        if index in self.draft.drawn:
            return list(self.draft.drawn[index].output)
        schema = schema_of(pattern.op, self.choice.opset)
        inputs: list[str] = []
        for operand in pattern.operands:
            optional = len(inputs) < len(schema.inputs) and _is_optional(schema, len(inputs))
            inputs += self.operand(operand, schema, len(inputs), optional)
        if index in self.choice.swapped:
            inputs.reverse()
        proto = onnx.NodeProto(op_type=pattern.op)
        for name, value in self.attributes(index).items():
            self.attribute(proto, inputs, index, name, value)
        while inputs and not inputs[-1]:
            inputs.pop()
        if len(inputs) > schema.max_input or len(inputs) < schema.min_input:
            raise Unbuildable(f"{pattern.op} with {len(inputs)} inputs")
        count = pattern.outputs or int(self.stated(index, "outputs", 2))
        outputs = [f"{pattern.op.lower()}{index}" + f"_{i}" * bool(i) for i in range(count)]
        proto.input.extend(inputs)
        proto.output.extend(outputs)
        self.draft.drawn[index] = proto
        self.draft.nodes.append(proto)
        return outputs

    def attributes(self, index: int) -> dict[str, Any]:
        """Those of the sample, by operator and by local name, then those of the pattern."""
        pattern = self.rule.nodes[index]
        found: dict[str, Any] = {}
        for wanted in (pattern.op, None):
            for key, value in self.sample.items():
                label, dot, name = key.partition(".")
                named = label == pattern.op if wanted else label != pattern.op
                if dot and named and pattern in self.rule.labels[label] and name != "outputs":
                    found[name] = value
        return {**pattern.attributes, **found}

    def stated(self, index: int, name: str, default: Any) -> Any:
        for label, nodes in self.rule.labels.items():
            if self.rule.nodes[index] in nodes and f"{label}.{name}" in self.sample:
                return self.sample[f"{label}.{name}"]
        return default

    def attribute(
        self, proto: onnx.NodeProto, inputs: list[str], index: int, name: str, value: Any
    ) -> None:
        """State an attribute in the way of this opset."""
        if value is None:
            return
        if self.choice.opset < FORWARD_AXES.get(proto.op_type, 0) and np.any(np.asarray(value) < 0):
            raise Unbuildable(f"{proto.op_type} counts its axes forward")
        slot = input_slot(proto.op_type, name, self.choice.opset)
        if slot is None:
            schema = schema_of(proto.op_type, self.choice.opset)
            if name in schema.attributes:
                proto.attribute.append(make_attribute(schema, name, value))
            elif not np.array_equal(default_of(proto.op_type, name, self.choice.opset), value):
                raise Unbuildable(f"{proto.op_type} has no attribute {name}")
            return
        inputs += [""] * (slot + 1 - len(inputs))
        inputs[slot] = self.constant(f"{proto.op_type.lower()}{index}_{name}", np.asarray(value))
        self.draft.stated[inputs[slot]] = index, name

    def constant(self, name: str, array: Array) -> str:
        self.draft.constants[name] = stored(array, self.choice.storage)
        return name

    def operand(
        self, operand: object, schema: onnx.defs.OpSchema, slot: int, optional: bool
    ) -> list[str]:
        if isinstance(operand, Either):
            return self.operand(
                operand.options[self.choice.options[id(operand)]], schema, slot, optional
            )
        if isinstance(operand, Output):
            return [self.node(operand.node.index)[operand.slot]]
        if isinstance(operand, Literal):
            return [self.literal(operand, schema, slot)]
        assert isinstance(operand, Variable)
        if operand.name in self.choice.left_out:
            if not optional:
                raise Unbuildable(f"{schema.name} needs its input {slot}")
            return [""]
        if operand.name not in self.names:
            self.names[operand.name] = self.variable(operand)
        return self.names[operand.name]

    def literal(self, literal: Literal, schema: onnx.defs.OpSchema, slot: int) -> str:
        name = f"literal{len(self.draft.literals)}"
        formal = schema.inputs[min(slot, len(schema.inputs) - 1)]
        kinds = (self.choice.storage, "int64", "bool")
        allowed = {"float32": "tensor(float)", "float64": "tensor(double)"}
        taken = [k for k in kinds if allowed.get(k, f"tensor({k})") in formal.types]
        if not taken:
            raise Unbuildable(f"{schema.name} takes no {self.choice.storage}")
        kind = taken[0]
        integers = [self.sample.get(v.name) for v in self.rule.variables.values()]
        if kind == self.choice.storage and all(_is_integer(v) for v in integers):
            kind = "int64"
        self.draft.literals[name] = literal
        if kind == "int64" and literal.value != int(literal.value):
            raise Unbuildable(f"{literal.value} is no integer")
        self.draft.constants[name] = np.asarray(literal.value, kind)
        return name

    def variable(self, variable: Variable) -> list[str]:
        given = self.sample[variable.name]
        if variable.kind is Vars:
            parts = {f"{variable.name}{i}": part for i, part in enumerate(given)}
        else:
            parts = {variable.name: given}
        for name, part in parts.items():
            if isinstance(part, tuple):
                self.draft.shapes[f"{name}_fed"] = part
                part = tuple(map(self.size, part))
            array = stored(drawn(part, name, variable.kind is Const), self.choice.storage)
            place = self.draft.constants if variable.kind is Const else self.draft.inputs
            place[name] = array
        return list(parts)

    def size(self, stated: int | str) -> int:
        """A number for a size that the sample leaves open: another one for each name."""
        if isinstance(stated, int):
            return stated
        return self.sizes.setdefault(stated, OPEN_SIZES[len(self.sizes)])


def drawn(given: Any, name: str, is_constant: bool) -> Array:
    """What a sample gives for a parameter, as an array."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if callable(given):
        return np.asarray(given(rng))
    if isinstance(given, tuple):
        # inputs reach over what piecewise operators tell apart
        return rng.normal(size=given) * (1.0 if is_constant else 3.0)
    return np.asarray(given)


def stored(array: Array, storage: str) -> Array:
    """Floats in the storage type, as whole numbers where that is an integer type."""
    if storage == "int64" and array.dtype.kind == "f":
        array = np.round(array)
    return np.ascontiguousarray(
        array.astype(STORAGES[storage] if array.dtype.kind == "f" else array.dtype)
    ).reshape(array.shape)


def make_attribute(schema: onnx.defs.OpSchema, name: str, value: Any) -> onnx.AttributeProto:
    """An attribute of the type that the operator gives it."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim):
        value = value.tolist()
    kind = int(schema.attributes[name].type)  # type: ignore[call-overload]
    if kind == onnx.AttributeProto.FLOAT:
        value = float(value)
    elif kind == onnx.AttributeProto.TENSOR and isinstance(value, np.ndarray):
        value = numpy_helper.from_array(value)
    return helper.make_attribute(name, value, attr_type=kind)


@functools.cache
def schema_of(op: str, opset: int) -> onnx.defs.OpSchema:
    """The operator's definition. Raises Unbuildable where it is not there yet, or no longer."""
    try:
        found = onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        raise Unbuildable(f"there is no {op} in opset {opset}") from None
    if found.deprecated:
        raise Unbuildable(f"{op} is gone by opset {opset}")
    return found


def _add_prefix(graph: onnx.GraphProto, prefix: str) -> None:
    """Rename everything, names that a body reads from outside included."""
    for named in (*graph.input, *graph.output, *graph.initializer):
        named.name = prefix + named.name
    for node in graph.node:
        node.input[:] = [name and prefix + name for name in node.input]
        node.output[:] = [name and prefix + name for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _add_prefix(attribute.g, prefix)


def _is_optional(schema: onnx.defs.OpSchema, slot: int) -> bool:
    return schema.inputs[slot].option == onnx.defs.OpSchema.FormalParameterOption.Optional


def _is_integer(given: Any) -> bool:
    return (
        not callable(given) and not isinstance(given, tuple) and np.asarray(given).dtype.kind == "i"
    )


def _reader(rule: Rule) -> str:
    return "Neg" if any(node.op == "Identity" for node in rule.nodes) else "Identity"


def unread(reader: str, array: Array) -> Array:
    """What the reader makes into the array."""
    return -array if reader == "Neg" else array
