"""From the hollow model to the IR: names resolved, nodes in order, every broken graph named."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import onnx

from graphopt import collector
from graphopt.errors import ModelError
from graphopt.ir import Graph, Model, Node, Value, Weight
from graphopt.operators import is_known
from graphopt.sources import shown
from graphopt.storage import Store, read, tensor_bytes

_CONSTANT_INPUTS_BELOW_IR: Final = 4  # before, every initializer had to be listed as an input too


def import_model(source: Path | onnx.ModelProto, base: Path | None = None) -> Model:
    """Read and resolve a model. Raises ModelError for a broken file or graph."""
    proto, store = read(source, base)
    return build(proto, store, shown(source) if isinstance(source, Path) else "model")


def build(proto: onnx.ModelProto, store: Store, label: str) -> Model:
    """Resolve a hollow model whose weights are in `store`. Raises ModelError for a broken graph."""
    importer = _Importer(store, label)
    for entry in proto.opset_import:
        importer.check_text(entry.domain)
    for function in proto.functions:
        importer.check_text(function.domain, function.name, function.overload)
    with collector.paused():
        graph = importer.graph(proto.graph, None)
    graph.inputs_are_frozen = 0 < proto.ir_version < _CONSTANT_INPUTS_BELOW_IR
    importer.pin_training(proto, graph)
    model = Model(proto, store, graph, label)
    importer.check_operators(model)
    return model


def import_body(proto: onnx.GraphProto, store: Store, label: str) -> Graph:
    """Resolve a graph that stands alone and is about to become part of another.

    Raises ModelError where it reads what it does not compute.
    """
    return _Importer(store, label).graph(proto, None)


class _Importer:
    def __init__(self, store: Store, label: str) -> None:
        self.store = store
        self.label = label

    def fail(self, reason: str) -> ModelError:
        return ModelError(f"{self.label}: {reason}")

    def graph(self, proto: onnx.GraphProto, owner: Node | None) -> Graph:
        """Declare every name of the graph first, then connect: files may be unsorted."""
        graph = Graph(proto, owner)
        self.declare(graph)
        for node in graph.nodes:
            self.connect(node)
        graph.outputs = [self.output(graph, info.name) for info in proto.output]
        for value in graph.outputs:
            graph.output_counts[value] = graph.output_counts.get(value, 0) + 1
        for annotation in proto.quantization_annotation:
            names = [entry.value for entry in annotation.quant_parameter_tensor_names]
            graph.pinned.update(graph.values[name] for name in names if name in graph.values)
        order = in_order(list(graph.nodes), self.label)
        if order != list(graph.nodes):
            graph.nodes = dict.fromkeys(order)
            for position, node in enumerate(order):
                node.position = position
            graph._touch()
        return graph

    def declare(self, graph: Graph) -> None:
        proto = graph.proto
        for info in itertools.chain(proto.value_info, proto.input, proto.output):
            graph.value_info[info.name] = info
        for info in itertools.chain(proto.input, proto.output):
            self.check_text(info.name)
        for info in proto.input:
            if info.name in graph.values:
                raise self.fail(f"two graph inputs are called {info.name!r}")
            graph.values[info.name] = Value(info.name, graph)
        graph.inputs = list(graph.values.values())
        graph.input_set = set(graph.inputs)
        for dense in proto.initializer:
            self.initializer(graph, Weight(dense, self.store))
        for sparse in proto.sparse_initializer:
            self.initializer(graph, Weight(sparse, self.store))
        for position, node_proto in enumerate(proto.node):
            node = Node(node_proto, graph, position)
            names = (node_proto.op_type, node_proto.domain, node_proto.overload, node_proto.name)
            self.check_text(*names, *node_proto.input, *node_proto.output)
            graph.nodes[node] = None
            for name in node_proto.output:
                node.outputs.append(self.produced(graph, node, name) if name else None)

    def check_text(self, *names: object) -> None:
        """Names are text: protobuf hands out bytes for what is no UTF-8."""
        if bytes in map(type, names):
            found = next(name for name in names if isinstance(name, bytes))
            raise self.fail(f"the name {found!r} is no UTF-8")

    def initializer(self, graph: Graph, weight: Weight) -> None:
        name = weight.tensor.name
        self.check_text(name)
        value = graph.values.get(name)
        if value is None:
            value = graph.values[name] = Value(name, graph)
        elif value.weight is not None:
            raise self.fail(f"two initializers are called {name!r}")
        else:  # also an input: its place among the initializers is this one
            del graph.values[name]
            graph.values[name] = value
            value.position = next(graph.positions)
        value.weight = weight
        self.check_weight(weight, f"initializer {name!r}")

    def check_weight(self, weight: Weight, what: str) -> None:
        """A known type and as much data as the shape needs, as far as that shows without decoding.

        A dense tensor may have no data at all: weightless models are read, though never run.
        """
        if any(size < 0 for size in weight.shape):
            raise self.fail(f"{what} has a negative size: {list(weight.shape)}")
        if isinstance(weight.proto, onnx.SparseTensorProto):
            self.check_data(weight.proto.indices, what)
        self.check_data(weight.tensor, what)

    def check_data(self, tensor: onnx.TensorProto, what: str) -> None:
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        if external and self.store.reference(tensor) is None:
            raise self.fail(f"{what} does not say in which file its data is")
        found: int | None
        if tensor.data_type == onnx.TensorProto.STRING:
            unit, found, expected = "strings", len(tensor.string_data), math.prod(tensor.dims)
        else:
            try:
                unit, found = "bytes", self.store.data_bytes(tensor)
                expected = tensor_bytes(tensor.data_type, tensor.dims)
            except ModelError as error:
                raise self.fail(f"{what}: {error}") from None
        if found is not None and expected != found:
            raise self.fail(
                f"{what} of shape {list(tensor.dims)} needs {expected:,} {unit} and has {found:,}"
            )

    def produced(self, graph: Graph, node: Node, name: str) -> Value:
        value = graph.values.get(name)
        if value is not None:
            other = value.producer.label if value.producer else "an input or initializer"
            raise self.fail(f"{name!r} is computed twice: by {other} and by {node.label}")
        value = graph.values[name] = Value(name, graph)
        value.producer = node
        return value

    def connect(self, node: Node) -> None:
        for name in node.proto.input:
            value = self.lookup(node, name) if name else None
            node.inputs.append(value)
            if value is not None:
                value.consumers[node] = value.consumers.get(node, 0) + 1
        for attribute in node.proto.attribute:
            protos = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
            if attribute.HasField("t"):
                weight = Weight(attribute.t, self.store)
                self.check_weight(weight, f"{node.label}: its {attribute.name}")
            if protos:
                if attribute.name in node.bodies:
                    raise self.fail(f"{node.label} has two attributes {attribute.name!r}")
                node.bodies[attribute.name] = [self.graph(proto, node) for proto in protos]

    def lookup(self, node: Node, name: str) -> Value:
        graph: Graph | None = node.graph
        while graph is not None:
            if (value := graph.values.get(name)) is not None:
                return value
            graph = graph.owner.graph if graph.owner is not None else None
        raise self.fail(f"{node.label} reads {name!r}, which nothing computes")

    def output(self, graph: Graph, name: str) -> Value:
        value = graph.values.get(name)
        if value is not None:
            return value
        outer = graph.owner.graph if graph.owner is not None else None
        while outer is not None:
            if name in outer.values:  # onnxruntime rejects it, but it is the file's business
                value = outer.values[name]
                outer.pinned.add(value)
                return value
            outer = outer.owner.graph if outer.owner is not None else None
        where = f"a body of {graph.owner.label}" if graph.owner else "the graph"
        raise self.fail(f"{where} has the output {name!r}, which nothing computes")

    def check_operators(self, model: Model) -> None:
        """Refuse operators of the standard domain that nobody defines."""
        known = {name for domain, name, _ in model.functions if domain == ""}
        for node in model.nodes():
            if node.domain == "" and node.op not in known:
                if is_known(node.op):
                    known.add(node.op)
                    continue
                raise self.fail(
                    f"{node.label}: ai.onnx has no operator {node.op!r} (onnx {onnx.__version__})"
                )

    def pin_training(self, proto: onnx.ModelProto, graph: Graph) -> None:
        """Training information names values of the main graph: they have to stay."""
        for info in proto.training_info:
            names = {entry.value for entry in info.initialization_binding}
            names |= {entry.key for entry in info.initialization_binding}
            names |= {entry.key for entry in info.update_binding}
            names |= _names_read(info.algorithm) | _names_read(info.initialization)
            graph.pinned.update(graph.values[name] for name in names if name in graph.values)


def _names_read(graph: onnx.GraphProto) -> set[str]:
    names: set[str] = set()
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                names |= _names_read(body)
    return names


def in_order(nodes: list[Node], label: str) -> list[Node]:
    """The nodes of a graph so that each follows what it reads; sorted ones keep their order.

    Raises ModelError for a cycle. Linear in nodes and edges.
    """
    done: set[Node] = set()
    if all(_ready(node, done) for node in nodes):
        return nodes
    order: list[Node] = []
    state: dict[Node, bool] = {}  # False: its inputs are being placed, True: placed
    for root in nodes:
        stack: list[tuple[Node, Iterator[Node]]] = []
        if root not in state:
            state[root] = False
            stack.append((root, iter(dependencies(root))))
        while stack:
            node, remaining = stack[-1]
            following = next((n for n in remaining if state.get(n) is not True), None)
            if following is None:
                stack.pop()
                state[node] = True
                order.append(node)
            elif following in state:
                raise ModelError(f"{label}: the graph has a cycle through {following.label}")
            else:
                state[following] = False
                stack.append((following, iter(dependencies(following))))
    return order


def dependencies(node: Node) -> list[Node]:
    """Nodes of the same graph that compute what the node, or a body of it, reads."""
    read: Iterable[Value | None] = node.inputs
    if node.bodies:
        read = itertools.chain(node.inputs, *map(_captured, node.graphs()))
    graph = node.graph
    return [
        value.producer
        for value in read
        if value is not None and value.producer is not None and value.graph is graph
    ]


def _captured(body: Graph) -> Iterator[Value | None]:
    for node in body.nodes:
        yield from node.inputs
        for inner in node.graphs():
            yield from _captured(inner)
    yield from body.outputs


def _ready(node: Node, done: set[Node]) -> bool:
    """True where everything the node depends on is done; then it is done as well."""
    if done.issuperset(dependencies(node)):
        done.add(node)
        return True
    return False
