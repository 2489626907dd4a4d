"""From the hollow model to the IR: names resolved, nodes in order, every broken graph named."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import onnx

from graphopt.errors import ModelError
from graphopt.ir import Graph, Model, Node, Value, Weight
from graphopt.storage import Store, read, tensor_bytes
from graphopt.wire import RAW_DATA

_CONSTANT_INPUTS_BELOW_IR: Final = 4  # before, every initializer had to be listed as an input too


def import_model(source: Path | onnx.ModelProto, base: Path | None = None) -> Model:
    """Read and resolve a model. Raises ModelError for a broken file or graph."""
    proto, store = read(source, base)
    label = str(source) if isinstance(source, Path) else "model"
    importer = _Importer(store, label)
    graph = importer.graph(proto.graph, None)
    graph.inputs_are_frozen = 0 < proto.ir_version < _CONSTANT_INPUTS_BELOW_IR
    importer.pin_training(proto, graph)
    return Model(proto, store, graph, label)


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
        sort(graph, self.label)
        return graph

    def declare(self, graph: Graph) -> None:
        proto = graph.proto
        for info in itertools.chain(proto.value_info, proto.input, proto.output):
            graph.value_info[info.name] = info
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
            graph.nodes[node] = None
            for name in node_proto.output:
                node.outputs.append(self.produced(graph, node, name) if name else None)

    def initializer(self, graph: Graph, weight: Weight) -> None:
        name = weight.tensor.name
        value = graph.values.get(name)
        if value is None:
            value = graph.values[name] = Value(name, graph)
        elif value.weight is not None:
            raise self.fail(f"two initializers are called {name!r}")
        value.weight = weight
        tensor = weight.tensor
        index = self.store.reference(tensor)
        if any(size < 0 for size in weight.shape):
            raise self.fail(f"initializer {name!r} has a negative size: {list(weight.shape)}")
        if index is None or self.store[index].field != RAW_DATA:
            return
        expected, found = tensor_bytes(tensor.data_type, tensor.dims), self.store[index].length
        if expected != found:
            raise self.fail(
                f"initializer {name!r} of shape {list(tensor.dims)} needs {expected:,} bytes "
                f"and has {found:,}"
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
            if protos:
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

    def pin_training(self, proto: onnx.ModelProto, graph: Graph) -> None:
        """Training information names values of the main graph: they have to stay."""
        for info in proto.training_info:
            names = {entry.value for entry in info.initialization_binding}
            names |= {entry.key for entry in info.initialization_binding}
            names |= {entry.key for entry in info.update_binding}
            for node in itertools.chain(info.algorithm.node, info.initialization.node):
                names.update(node.input)
            graph.pinned.update(graph.values[name] for name in names if name in graph.values)


def sort(graph: Graph, label: str) -> None:
    """Order the nodes so that each follows what it reads; a sorted graph keeps its order.

    Raises ModelError for a cycle. Linear in nodes and edges.
    """
    done: set[Node] = set()
    if all(_ready(node, done) for node in graph.nodes):
        return
    order: list[Node] = []
    state: dict[Node, bool] = {}  # False: its inputs are being placed, True: placed
    for root in graph.nodes:
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
    graph.nodes = dict.fromkeys(order)
    for position, node in enumerate(order):
        node.position = position
    graph._touch()


def dependencies(node: Node) -> Iterable[Node]:
    """Nodes of the same graph that compute what the node, or a body of it, reads."""
    for value in itertools.chain(node.inputs, *map(_captured, node.graphs())):
        if value is not None and value.graph is node.graph and value.producer is not None:
            yield value.producer


def _captured(body: Graph) -> Iterator[Value | None]:
    for node in body.nodes:
        yield from node.inputs
        for inner in node.graphs():
            yield from _captured(inner)
    yield from body.outputs


def _ready(node: Node, done: set[Node]) -> bool:
    """True where everything the node depends on is done; then it is done as well."""
    if all(other in done for other in dependencies(node)):
        done.add(node)
        return True
    return False
