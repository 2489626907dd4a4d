"""The graph that everything works on: typed, hashable handles over the hollow model.

A `Value` is one name with one meaning for its whole life; a `Node` computes values; a `Graph` is
the main graph or the body of an If, Loop or Scan; a `Model` is the main graph with everything
ONNX keeps around it. Handles compare and hash by identity. What a pass does not touch is written
back from the very protos it came from, so a round trip loses nothing, known or unknown.

Only `graphopt.edit` changes a graph: the underscored methods keep both ends of every edge.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.errors import ModelError
from graphopt.storage import Store, tensor_bytes

STANDARD_DOMAINS: Final = frozenset({"", "ai.onnx"})
Shape = tuple[int | str | None, ...]
_FLOATS: Final = frozenset(
    number
    for name, number in onnx.TensorProto.DataType.items()
    if "FLOAT" in name or name == "DOUBLE"
)


_KEPT_BELOW: Final = 1024  # bytes of a decoded constant: rules ask for the same ones again
SERIALS: Final = itertools.count()


class Weight:
    """A constant tensor, dense or sparse, whose data stays where it is until `values` is asked."""

    __slots__ = ("_decoded", "_nbytes", "data_type", "proto", "shape", "store")

    def __init__(self, proto: onnx.TensorProto | onnx.SparseTensorProto, store: Store) -> None:
        self.proto = proto
        self.store = store
        self.shape: tuple[int, ...] = tuple(proto.dims)
        self.data_type: int = self.tensor.data_type  # a TensorProto.DataType
        self._nbytes = -1  # not yet known
        self._decoded: NDArray[np.generic] | None = None  # kept where it is small

    @property
    def tensor(self) -> onnx.TensorProto:
        """The tensor that carries name and type: of a sparse one, its non-zero values."""
        return self.proto.values if isinstance(self.proto, onnx.SparseTensorProto) else self.proto

    def named(self, name: str) -> Weight:
        """The same under this name; the data stays where it is."""
        if self.tensor.name == name:
            return self
        found = Weight(copy.deepcopy(self.proto), self.store)
        found.tensor.name = name
        return found

    @property
    def is_sparse(self) -> bool:
        return isinstance(self.proto, onnx.SparseTensorProto)

    @property
    def is_float(self) -> bool:
        """True for every floating-point type, bfloat16 and the 8 and 4 bit ones included."""
        return self.data_type in _FLOATS

    @property
    def size(self) -> int:
        """Number of elements, zeros of a sparse tensor included."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in the file; strings count their characters."""
        if self._nbytes < 0:
            self._nbytes = self._count_bytes()
        return self._nbytes

    def _count_bytes(self) -> int:
        if isinstance(self.proto, onnx.SparseTensorProto):
            values, indices = self.proto.values, self.proto.indices
            return tensor_bytes(values.data_type, values.dims) + self.store.stored_bytes(indices)
        if self.data_type == onnx.TensorProto.STRING:
            return sum(len(text) for text in self.proto.string_data)
        return tensor_bytes(self.data_type, self.proto.dims)

    @property
    def values(self) -> NDArray[np.generic]:
        """The dense array, read-only where it is a view of the file.

        Raises ModelError where the data does not fit type and shape.
        """
        if self._decoded is None:
            array = self._decode()
            if array.nbytes > _KEPT_BELOW:
                return array
            array.flags.writeable = False
            self._decoded = array
        return self._decoded

    def _decode(self) -> NDArray[np.generic]:
        if not isinstance(self.proto, onnx.SparseTensorProto):
            return self.store.array(self.proto)
        try:
            values, indices = map(self.store.array, (self.proto.values, self.proto.indices))
            dense = np.zeros(self.shape, values.dtype)
            dense.reshape(-1)[_linear(values, indices, self.shape)] = values
        except (ValueError, MemoryError) as error:
            name = self.tensor.name
            raise ModelError(f"sparse tensor {name!r} cannot be decoded: {error}") from None
        return dense


def _linear(
    values: NDArray[np.generic], indices: NDArray[np.generic], shape: Sequence[int]
) -> NDArray[np.int64]:
    """Where the values [n] stand in the flat tensor, from indices [n], or [n, rank] by axis.

    They have to ascend, as ONNX requires: then none is there twice. Raises ValueError.
    """
    if indices.dtype.kind not in "iu":
        raise ValueError(f"its indices are {indices.dtype}")
    if values.ndim != 1 or indices.shape not in (values.shape, (*values.shape, len(shape))):
        raise ValueError(
            f"values {list(values.shape)} and indices {list(indices.shape)} do not belong together"
        )
    found = indices.astype(np.int64)
    sizes = np.asarray(shape if found.ndim == 2 else math.prod(shape), np.int64)
    if np.any(found < 0) or np.any(found >= sizes):
        raise ValueError(f"an index lies outside of {list(shape)}")
    if found.ndim == 2:
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        found = found @ np.asarray(strides, np.int64)
    if np.any(found[1:] <= found[:-1]):
        raise ValueError("its indices do not ascend")
    return found


class Value:
    """One name in one graph. `producer` is None for inputs, initializers and names of a caller."""

    __slots__ = ("consumers", "graph", "name", "position", "producer", "weight")

    def __init__(self, name: str, graph: Graph) -> None:
        self.name = name
        self.graph = graph
        self.position = next(graph.positions)  # orders the initializers of the graph
        self.producer: Node | None = None
        self.weight: Weight | None = None
        self.consumers: dict[Node, int] = {}  # node, also one in a body -> number of its inputs

    @property
    def is_output(self) -> bool:
        return self in self.graph.output_counts

    @property
    def is_input(self) -> bool:
        return self in self.graph.input_set

    @property
    def constant(self) -> Weight | None:
        """The weight, where no caller can replace it: None for an input with a default."""
        if self.weight is None:
            return None
        overridable = self in self.graph.input_set and not self.graph.inputs_are_frozen
        return None if overridable else self.weight

    @property
    def declared_type(self) -> onnx.TypeProto | None:
        """The type that the file states, which may be wrong: good for a proposal, never a proof."""
        info = self.graph.value_info.get(self.name)
        return info.type if info is not None and info.HasField("type") else None

    def __repr__(self) -> str:
        return f"Value({self.name!r})"


class Node:
    """An operator call. `inputs` and `outputs` hold None where an optional one is left out."""

    __slots__ = (
        "bodies",
        "domain",
        "graph",
        "inputs",
        "op",
        "outputs",
        "position",
        "proto",
        "rewired",
        "rule",
        "serial",
    )

    def __init__(self, proto: onnx.NodeProto, graph: Graph, position: float) -> None:
        self.proto = proto
        self.op: str = proto.op_type
        stated = proto.domain
        self.domain: str = "" if stated in STANDARD_DOMAINS else stated  # however it is spelt
        self.graph = graph
        self.position = position  # where the node stands in the file
        self.serial = next(SERIALS)  # orders nodes at one position
        self.inputs: list[Value | None] = []
        self.outputs: list[Value | None] = []
        self.bodies: dict[str, list[Graph]] = {}  # attribute name -> its graphs
        self.rule = ""  # the rule that made it, "" for a node of the file
        self.rewired = False  # inputs or outputs differ from those in the proto

    @property
    def place(self) -> tuple[float, int]:
        """Sorts the nodes of a graph: those that took the place of another stand as they came."""
        return self.position, self.serial

    @property
    def overload(self) -> str:
        """Which of several functions of one name it calls."""
        return self.proto.overload

    @property
    def name(self) -> str:
        return self.proto.name

    @property
    def label(self) -> str:
        """How messages call the node: its name, or what it computes."""
        stated = next((name for name in self.proto.output if name), "")
        first = next((value.name for value in self.outputs if value is not None), stated)
        name = self.name if self.name.isprintable() else repr(self.name)
        return f"{self.op} {name or repr(first)}"

    def attribute(self, name: str) -> onnx.AttributeProto | None:
        """The attribute as the node states it, None where it leaves it to the default."""
        return next((a for a in self.proto.attribute if a.name == name), None)

    def graphs(self) -> Iterator[Graph]:
        """Its bodies, in the order of its attributes."""
        for graphs in self.bodies.values():
            yield from graphs

    def text(self) -> str:
        """The node in ONNX's text syntax, bodies and attributes of many values cut short."""
        outputs = ", ".join(value.name if value else "" for value in self.outputs)
        inputs = ", ".join(value.name if value else "" for value in self.inputs)
        attributes = [_attribute_text(a) for a in self.proto.attribute]
        stated = f" <{', '.join(attributes)}>" if attributes else ""
        domain = f"{self.domain}." if self.domain else ""
        return f"{outputs} = {domain}{self.op}{stated} ({inputs})"

    def __repr__(self) -> str:
        return f"Node({self.text()})"


class Graph:
    """The main graph, or a body that may read the values of the graphs around it."""

    def __init__(self, proto: onnx.GraphProto, owner: Node | None) -> None:
        self.proto = proto
        self.owner = owner
        self.positions = itertools.count()
        self.nodes: dict[Node, None] = {}  # in file order
        self.values: dict[str, Value] = {}  # every name declared here
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.input_set: set[Value] = set()
        self.output_counts: dict[Value, int] = {}
        self.value_info: dict[str, onnx.ValueInfoProto] = {}
        self.redeclared: set[str] = set()  # names whose value_info is not the file's any more
        self.pinned: set[Value] = set()  # read by annotations or training information
        self.inputs_are_frozen = False  # IR < 4: initializers had to be listed as inputs
        self.edited = False

    @property
    def initializers(self) -> Iterator[Value]:
        """Values with a weight, in file order."""
        return (value for value in self.values.values() if value.weight is not None)

    def walk(self) -> Iterator[Graph]:
        """This graph and every body in it, outer before inner."""
        yield self
        for node in self.nodes:
            if node.bodies:
                for body in node.graphs():
                    yield from body.walk()

    # -- the primitives of graphopt.edit: each keeps both ends of an edge ------------------------

    def _touch(self) -> None:
        graph: Graph | None = self
        while graph is not None and not graph.edited:
            graph.edited = True
            graph = graph.owner.graph if graph.owner is not None else None

    def _set_input(self, node: Node, slot: int, value: Value | None) -> None:
        old = node.inputs[slot]
        if old is not None:
            _count_down(old.consumers, node)
        if value is not None:
            value.consumers[node] = value.consumers.get(node, 0) + 1
        node.inputs[slot] = value
        node.rewired = True
        node.graph._touch()

    def _set_output(self, node: Node, slot: int, value: Value | None) -> None:
        old = node.outputs[slot]
        if old is not None:
            old.producer = None
        if value is not None:
            value.producer = node
        node.outputs[slot] = value
        node.rewired = True
        node.graph._touch()

    def _remove_node(self, node: Node) -> None:
        del self.nodes[node]
        for reader in _with_bodies(node):
            for value in reader.inputs:
                if value is not None:
                    _count_down(value.consumers, reader)
        for value in node.outputs:
            if value is not None:
                value.producer = None
        self._touch()

    def _restore_node(self, node: Node) -> None:
        self.nodes[node] = None
        for reader in _with_bodies(node):
            for value in reader.inputs:
                if value is not None:
                    value.consumers[reader] = value.consumers.get(reader, 0) + 1
        for value in node.outputs:
            if value is not None:
                value.producer = node
        self._touch()

    def _remove_value(self, value: Value) -> None:
        del self.values[value.name]
        self._touch()

    def _restore_value(self, value: Value) -> None:
        self.values[value.name] = value
        self._touch()

    def _restore_order(self) -> None:
        """Back into file order, after nodes and values came back."""
        self.nodes = dict.fromkeys(sorted(self.nodes, key=lambda node: node.place))
        ordered = sorted(self.values.values(), key=lambda value: value.position)
        self.values = {value.name: value for value in ordered}

    def _set_inputs(self, values: list[Value]) -> None:
        self.inputs = values
        self.input_set = set(values)
        self._touch()


class Model:
    """A model: the main graph and what ONNX keeps around it."""

    def __init__(self, proto: onnx.ModelProto, store: Store, graph: Graph, label: str) -> None:
        self.proto = proto  # hollow; its graph is what the file held, not what passes made of it
        self.store = store
        self.graph = graph
        self.label = label  # what messages call it: a path, or "model"

    @classmethod
    def load(cls, source: Path | onnx.ModelProto, base: Path | None = None) -> Model:
        """Read a file or a ModelProto (left untouched). Raises ModelError."""
        from graphopt.importer import import_model

        return import_model(source, base)

    @property
    def opsets(self) -> dict[str, int]:
        """Version of every operator set that the model imports; "" is the standard one."""
        found: dict[str, int] = {}
        for entry in self.proto.opset_import:
            found["" if entry.domain in STANDARD_DOMAINS else entry.domain] = entry.version
        return found

    @property
    def functions(self) -> dict[tuple[str, str, str], onnx.FunctionProto]:
        """Functions that the model defines, by domain ("" for the standard one), name, overload."""
        return {
            ("" if f.domain in STANDARD_DOMAINS else f.domain, f.name, f.overload): f
            for f in self.proto.functions
        }

    def graphs(self) -> Iterator[Graph]:
        """The main graph and every body."""
        return self.graph.walk()

    def nodes(self) -> Iterator[Node]:
        """Every node, bodies included, functions not."""
        for graph in self.graphs():
            yield from graph.nodes


def _with_bodies(node: Node) -> Iterator[Node]:
    """The node and every node in its bodies: all that stop reading when it goes."""
    yield node
    if node.bodies:
        for body in node.graphs():
            for inner in body.walk():
                yield from inner.nodes


def _count_down(counts: dict[Node, int], node: Node) -> None:
    counts[node] -= 1
    if counts[node] == 0:
        del counts[node]


def _attribute_text(attribute: onnx.AttributeProto) -> str:
    kind = onnx.AttributeProto
    if attribute.type in (kind.GRAPH, kind.GRAPHS):
        return f"{attribute.name} = {{...}}"
    if attribute.type in (kind.TENSOR, kind.SPARSE_TENSOR):
        tensor = attribute.t if attribute.type == kind.TENSOR else attribute.sparse_tensor.values
        name = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        return f"{attribute.name} = {name}[{','.join(map(str, tensor.dims))}]"
    text = str(onnx.helper.printable_attribute(attribute))
    return text if len(text) <= 120 else f"{text[:117]}..."
