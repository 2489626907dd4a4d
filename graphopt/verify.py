"""What every model must fulfil, whatever passes did to it: checked in full, one problem a line.

The editor checks what it touches. This checks everything, both ends of every edge, so that a pass
which broke the graph is found before onnxruntime meets the result, and is found by its name.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, cast

import onnx

from graphopt.errors import ModelError
from graphopt.importer import in_order
from graphopt.ir import Graph, Model, Node, Value
from graphopt.operators import LEGACY

_MOST_PROBLEMS: Final = 100  # of one model; the first few say it all
_OPTION: Final = onnx.defs.OpSchema.FormalParameterOption


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs by name with their declared types, serialised, in order."""

    inputs: tuple[tuple[str, bytes, bool], ...]  # True: it has a default
    outputs: tuple[tuple[str, bytes], ...]

    @classmethod
    def of(cls, model: Model) -> Interface:
        """The interface that callers of the model rely on."""
        declared = {info.name: _type_bytes(info) for info in model.graph.proto.input}
        inputs = [
            (v.name, declared.get(v.name, b""), v.weight is not None) for v in model.graph.inputs
        ]
        return cls(
            tuple(inputs),
            tuple((info.name, _type_bytes(info)) for info in model.proto.graph.output),
        )

    def problems(self, model: Model, narrowed: Collection[str] = ()) -> Iterator[str]:
        """How the model's interface differs; inputs with a default may be gone.

        The `narrowed` inputs may have become more specific, and outputs of another shape for it.
        """
        found = Interface.of(model)
        left = {name for name, _, _ in found.inputs}
        expected = [(n, t) for n, t, has_default in self.inputs if not has_default or n in left]
        sides = (
            ("inputs", expected, [(name, stated) for name, stated, _ in found.inputs]),
            ("outputs", list(self.outputs), list(found.outputs)),
        )
        for what, before, after in sides:
            if [name for name, _ in before] != [name for name, _ in after]:
                listed = [", ".join(name for name, _ in side) for side in (before, after)]
                yield f"the {what} of the model changed: {listed[0]} became {listed[1]}"
                continue
            for (name, old), (_, new) in zip(before, after, strict=True):
                if old == new or (what == "inputs" and name in narrowed and _is_narrower(new, old)):
                    continue
                if not (what == "outputs" and narrowed and _element(new) == _element(old)):
                    yield f"the declared type of {name!r}, one of the {what}, changed"
        stated = [value.name for value in model.graph.outputs]
        if stated != [name for name, _ in found.outputs]:
            yield f"the graph computes {', '.join(stated)}, which are not the model's outputs"


def problems(
    model: Model, interface: Interface | None = None, narrowed: Collection[str] = ()
) -> list[str]:
    """Everything that is wrong with the model, [] where it is sound; linear in nodes and edges.

    Checked are: one producer for every value and the same edges from both ends; every name
    visible where it is read, and computed, fed or constant; an order without cycles; no output of
    a body that belongs to a graph around it; operators that exist at the model's opset, with as
    many inputs and outputs as they take and attributes that they know; data as long as a
    constant's type and shape need; and, against `interface`, what callers rely on, but for the
    shapes that inputs were `narrowed` to on purpose.
    """
    checker = _Checker(model)
    found = []
    for problem in checker.run():
        found.append(problem)
        if len(found) >= _MOST_PROBLEMS:
            return found
    if interface is not None:
        found += interface.problems(model, narrowed)
    return found


class _Checker:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.opsets = model.opsets
        self.functions = {(domain, op) for domain, op, _ in model.functions}
        self.readers: dict[Value, dict[Node, int]] = {}

    def run(self) -> Iterator[str]:
        graphs = list(self.model.graphs())
        for graph in graphs:
            yield from self.names(graph)
            for node in graph.nodes:
                if node.graph is not graph:
                    yield f"{_where(graph)} holds {node.label} of another graph"
                yield from self.edges(node)
                yield from self.operator(node)
            yield from self.outputs(graph)
        for graph in graphs:
            yield from self.consumers(graph)
            yield from self.order(graph)

    # -- values --------------------------------------------------------------------------------

    def names(self, graph: Graph) -> Iterator[str]:
        for name, value in graph.values.items():
            if value.name != name or value.graph is not graph:
                yield f"{name!r} is listed in {_where(graph)}, but is {value.name!r} of another"
            if value.producer is not None:
                if value.weight is not None or value in graph.input_set:
                    yield f"{name!r} is computed by {value.producer.label} and given as well"
                if value.producer not in graph.nodes or value not in value.producer.outputs:
                    yield f"{name!r} says {value.producer.label} computes it, which does not"
            if value.weight is not None:
                yield from self.weight(value)
            outer = _outer(graph)
            if outer is not None and _lookup(outer, name) is not None:
                yield f"{name!r} in {_where(graph)} hides a value of that name around it"
        for value in graph.inputs:
            if graph.values.get(value.name) is not value:
                yield f"the input {value.name!r} is no value of {_where(graph)}"
        if set(graph.inputs) != graph.input_set or len(graph.input_set) != len(graph.inputs):
            yield f"the inputs of {_where(graph)} are counted wrongly"

    def weight(self, value: Value) -> Iterator[str]:
        weight = value.weight
        if weight is None or weight.is_sparse or weight.data_type == onnx.TensorProto.STRING:
            return
        if weight.tensor.name != value.name:
            yield f"the initializer {value.name!r} is stored as {weight.tensor.name!r}"
        try:
            stored, needed = self.model.store.data_bytes(weight.tensor), weight.nbytes
        except ModelError as error:
            yield f"initializer {value.name!r}: {error}"
            return
        if stored is not None and stored != needed:
            yield f"initializer {value.name!r} has {stored:,} bytes and needs {needed:,}"

    def edges(self, node: Node) -> Iterator[str]:
        graph = node.graph
        for value in node.outputs:
            if value is None:
                continue
            if value.producer is not node:
                other = value.producer.label if value.producer else "nobody"
                yield f"{value.name!r} is computed by {node.label}, and by {other} as it says"
            if graph.values.get(value.name) is not value:
                yield f"{value.name!r}, which {node.label} computes, is not in {_where(graph)}"
        made = [value for value in node.outputs if value is not None]
        if len(set(made)) != len(made):
            yield f"{node.label} computes one value twice"
        for value in node.inputs:
            if value is None:
                continue
            counted = self.readers.setdefault(value, {})
            counted[node] = counted.get(node, 0) + 1
            if _lookup(graph, value.name) is not value:
                yield f"{node.label} reads {value.name!r}, which is not visible there"
            elif _is_dangling(value):
                yield f"{node.label} reads {value.name!r}, which nothing computes"

    def outputs(self, graph: Graph) -> Iterator[str]:
        for value in graph.outputs:
            if graph.values.get(value.name) is value:
                if _is_dangling(value):
                    yield f"{_where(graph)} has the output {value.name!r}, which nothing computes"
            elif _lookup(graph, value.name) is value:
                yield f"{_where(graph)} has the output {value.name!r} of a graph around it"
            else:
                yield f"{_where(graph)} has the output {value.name!r}, which it does not hold"
        if Counter(graph.outputs) != graph.output_counts:
            yield f"the outputs of {_where(graph)} are counted wrongly"

    def consumers(self, graph: Graph) -> Iterator[str]:
        """Readers as the values list them are those that the nodes are."""
        for value in graph.values.values():
            if value.consumers != self.readers.pop(value, {}):
                listed = ", ".join(sorted(node.label for node in value.consumers)) or "nobody"
                yield f"{value.name!r} lists readers that are not those it has: {listed}"

    def order(self, graph: Graph) -> Iterator[str]:
        try:
            in_order(sorted(graph.nodes, key=lambda node: node.place), _where(graph))
        except ModelError as error:
            yield str(error)

    # -- operators -----------------------------------------------------------------------------

    def operator(self, node: Node) -> Iterator[str]:
        domain, op = node.domain, node.op
        if op != node.proto.op_type:
            yield f"{node.label}: it is stored as {node.proto.op_type!r}"
        if (domain, op) in self.functions:
            return
        version = self.opsets.get(domain)
        if version is None:
            yield f"{node.label}: the model does not import the domain {domain or 'ai.onnx'!r}"
            return
        facts = _facts(op, version, domain)
        if facts is None:
            if domain in _defined_domains() and op not in LEGACY:
                yield f"{node.label}: {domain or 'ai.onnx'} {version} has no operator {op!r}"
            return
        for what, found, (least, most) in (
            ("inputs", _trimmed(node.inputs), facts.inputs),
            ("outputs", _trimmed(node.outputs), facts.outputs),
        ):
            if not least <= found <= most:
                yield f"{node.label} has {found} {what}; it takes {least} to {most}"
        for slot in facts.required:
            if slot < len(node.inputs) and node.inputs[slot] is None:
                yield f"{node.label} lacks its input {slot}"
        yield from _attribute_problems(node, facts)


@dataclass(frozen=True)
class _Facts:
    """What ONNX defines of one operator version; attribute types as AttributeProto numbers."""

    inputs: tuple[int, int]
    outputs: tuple[int, int]
    required: tuple[int, ...]
    attributes: dict[str, int] = field(hash=False)
    required_attributes: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def _facts(op: str, version: int, domain: str) -> _Facts | None:
    try:
        schema = onnx.defs.get_schema(op, version, domain)
    except onnx.defs.SchemaError:
        return None
    if schema.deprecated:
        return None
    single = [slot for slot, entry in enumerate(schema.inputs) if entry.option == _OPTION.Single]
    return _Facts(
        (schema.min_input, schema.max_input),
        (schema.min_output, schema.max_output),
        tuple(single),
        {name: _number(entry) for name, entry in schema.attributes.items()},
        tuple(name for name, entry in schema.attributes.items() if entry.required),
    )


def _number(attribute: onnx.defs.OpSchema.Attribute) -> int:
    return int(cast(Any, attribute.type))


@functools.cache
def _defined_domains() -> frozenset[str]:
    return frozenset(schema.domain for schema in onnx.defs.get_all_schemas())


def _attribute_problems(node: Node, facts: _Facts) -> Iterator[str]:
    seen = set()
    for attribute in node.proto.attribute:
        name = attribute.name
        if name in seen:
            yield f"{node.label} states its attribute {name!r} twice"
        seen.add(name)
        expected = facts.attributes.get(name)
        if expected is None:
            yield f"{node.label} has no attribute {name!r} in this version"
        elif attribute.type not in (expected, onnx.AttributeProto.UNDEFINED):
            kinds = onnx.AttributeProto.AttributeType
            stated, wanted = kinds.Name(attribute.type), kinds.Name(expected)
            yield f"{node.label}: its attribute {name!r} is {stated}, not {wanted}"
    for name in facts.required_attributes:
        if name not in seen:
            yield f"{node.label} lacks its attribute {name!r}"


def _trimmed(values: list[Value | None]) -> int:
    """How many there are, those left out at the end not counted."""
    count = len(values)
    while count and values[count - 1] is None:
        count -= 1
    return count


def _is_dangling(value: Value) -> bool:
    return value.producer is None and value.weight is None and not value.is_input


def _outer(graph: Graph) -> Graph | None:
    return graph.owner.graph if graph.owner is not None else None


def _lookup(graph: Graph, name: str) -> Value | None:
    """What the name means in the graph."""
    at: Graph | None = graph
    while at is not None:
        if (value := at.values.get(name)) is not None:
            return value
        at = _outer(at)
    return None


def _where(graph: Graph) -> str:
    return f"a body of {graph.owner.label}" if graph.owner is not None else "the graph"


def _is_narrower(new: bytes, old: bytes) -> bool:
    """True where the type takes nothing that the old one did not take."""
    a, b = (onnx.TypeProto.FromString(kind).tensor_type for kind in (new, old))
    if not a.elem_type or a.elem_type != b.elem_type:
        return False
    if not b.HasField("shape"):
        return True
    return len(a.shape.dim) == len(b.shape.dim) and all(
        dim == other or (dim.dim_value > 0 and other.dim_value <= 0)
        for dim, other in zip(a.shape.dim, b.shape.dim, strict=True)
    )


def _element(kind: bytes) -> int:
    """The element type of a tensor, 0 for what is none."""
    return onnx.TypeProto.FromString(kind).tensor_type.elem_type


def _type_bytes(info: onnx.ValueInfoProto) -> bytes:
    return bytes(info.type.SerializeToString(deterministic=True))
